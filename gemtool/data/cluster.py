"""`tokenize` spread over a Ray cluster: the plain command run for a few inputs at a time.

A task runs the command for a group of inputs and streams its output back; the spans of all groups,
in the order of the inputs, are those of one run. Ray runs a task again whose process or machine
was lost. Every machine needs this version of gemtool, and the inputs under the same paths.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from gemtool import __version__, log
from gemtool.data.documents import LEFT_OUT
from gemtool.errors import CorruptInput, GemtoolError, UsageError
from gemtool.signals import STOPPING
from gemtool.stream.checked import Source
from gemtool.stream.spans import Header, Span, read_spans

_CHUNK = 8 << 20
"""Bytes of a stream that travel together."""

_CHUNKS_WAITING = 4
"""Of each task, before it waits for them to be taken."""

_GROUP_FILES = 64
_GROUP_BYTES = 64 << 20
"""Inputs of a task, at most, if they are several: starting one costs as much as some pictures."""

_RETRIES = 3
_ERRORS = {2: UsageError, 3: CorruptInput}

# `-P`, not `-m`: no module is looked for in the current folder, which is anyone's.
_START = (
    "from gemtool.data.worker import die_with_parent; die_with_parent(); "
    "from gemtool.__main__ import main; main()"
)

# However the tool ends, its end of the pipe closes then. What Ray started works in its folder, and
# would notice only after a minute.
_CLEANER = """
import glob, os, shutil, sys, time
sys.stdin.read()
folder = sys.argv[1]
while os.path.exists(folder):
    for cwd in glob.glob("/proc/[0-9]*/cwd"):
        try:
            if os.readlink(cwd) == folder:
                os.kill(int(cwd.split("/")[2]), 9)
        except OSError:
            pass
    shutil.rmtree(folder, ignore_errors=True)
    time.sleep(1)
"""


class Cluster:
    """A connection to the Ray cluster of RAY_ADDRESS, or without that to one made here.

    One made here has this machine alone, talks over the loopback interface, and ends with the
    tool, its files too, however the tool ends.

    Args:
        options: of `tokenize`, without inputs and output.
        threads: what `options` gives each task to use.
        header: of the stream to be; tasks whose vocabulary or settings differ are refused.

    Attributes:
        problems: inputs left out so far, with `--keep-going`.

    Raises:
        UsageError: Ray is not installed, or no machine of the cluster has so many processors.
        GemtoolError: there is no cluster at that address.
    """

    def __init__(self, options: Sequence[str], threads: int, header: Header) -> None:
        self._options = list(options)
        self._threads = threads
        self._header = header
        self._stack = contextlib.ExitStack()
        self.problems = 0
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError:
            raise UsageError(
                "--engine ray needs the package ray: pip install 'gemtool[ray]'"
            ) from None
        self._ray = ray

    def __enter__(self) -> Cluster:
        with contextlib.ExitStack() as stack:
            self._connect(stack)
            largest = max(
                (node["Resources"].get("CPU", 0) for node in self._ray.nodes() if node["Alive"]),
                default=0,
            )
            if largest < self._threads:
                raise UsageError(
                    f"--threads {self._threads}: no machine of the Ray cluster has so many "
                    f"processors (the largest has {largest:.0f})"
                )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _connect(self, stack: contextlib.ExitStack) -> None:
        address = os.environ.get("RAY_ADDRESS", "")
        if address.startswith("ray://"):
            raise UsageError(
                f"RAY_ADDRESS {address}: a Ray Client cannot stream results; run this on a machine "
                "of the cluster, with RAY_ADDRESS=auto"
            )
        options: dict[str, Any] = {"address": address}
        folder = stack.enter_context(_temporary_folder())
        if not address:
            options = {
                "address": "local",
                "include_dashboard": False,
                "_node_ip_address": "127.0.0.1",
                "_temp_dir": folder,
            }
        stack.callback(self._ray.shutdown)
        # Workers of Ray look for modules in the folder in which it starts: not in anyone's.
        with _handlers_kept(), contextlib.chdir(folder):
            try:
                self._ray.init(log_to_driver=False, logging_level=logging.CRITICAL, **options)
            except Exception as problem:  # connection, value and runtime errors, by its layers
                what = f"no Ray cluster at RAY_ADDRESS {address}" if address else "Ray"
                raise GemtoolError(f"{what}: {_one_line(problem)}") from None

    def spans(self, files: Iterable[str]) -> Iterator[Span]:
        """The spans of all files, in order.

        Raises:
            GemtoolError: what the command said, or the cluster lost a task too often.
        """
        task = self._ray.remote(_tokenize).options(
            num_cpus=self._threads,
            max_retries=_RETRIES,
            retry_exceptions=[_Lost],
            num_returns="streaming",
            _generator_backpressure_num_objects=_CHUNKS_WAITING,
        )
        folder = str(Path.cwd())
        started = (task.remote(self._options, group, folder) for group in groups(files))
        running = deque(islice(started, self._tasks()))
        while running:
            yield from self._spans_of(running.popleft())
            running.extend(islice(started, self._tasks() - len(running)))

    def _tasks(self) -> int:
        """How many to have under way: one waits while the others fill the cluster."""
        return 1 + int(self._ray.cluster_resources().get("CPU", 1)) // self._threads

    def _spans_of(self, results: Any) -> Iterator[Span]:
        output = _Output(self._items(results))
        source = Source(output)  # type: ignore[arg-type]
        try:
            reader = read_spans(source, "a task's output")
            self._require_same(reader.header)
            yield from reader
        except CorruptInput:
            if output.drain() == 0:  # else the command failed, and says why
                raise
        self._finish(output)

    def _require_same(self, header: Header) -> None:
        version = header.pg[-1].get("version") if header.pg else None
        for what, theirs, ours in (
            ("gemtool", version, __version__),
            ("the vocabulary", header.vocab, self._header.vocab),
            ("the media settings", header.settings, self._header.settings),
        ):
            if theirs != ours:
                raise GemtoolError(
                    f"a machine of the Ray cluster has {what} {theirs}, this one {ours}: results "
                    "would differ; make them the same everywhere"
                )

    def _items(self, results: Any) -> Iterator[Any]:
        try:
            for reference in results:
                yield self._ray.get(reference)
        except self._ray.exceptions.RayError as problem:
            raise GemtoolError(
                f"the Ray cluster could not finish a task: {_one_line(problem)}"
            ) from None

    def _finish(self, output: _Output) -> None:
        """Passes on what a task said, and how it ended."""
        code = output.drain()
        messages, outcome = list(output.messages), f"a task ended with status {code}"
        if code and messages and messages[-1][0] == "error":
            outcome = messages.pop()[1]
        for level, text in messages:
            (log.error if level == "error" else log.warning)(text)
        if code:
            if found := LEFT_OUT.match(outcome):
                self.problems += int(found[1])
            else:
                raise _ERRORS.get(code, GemtoolError)(outcome)


def groups(files: Iterable[str]) -> Iterator[list[str]]:
    """Files in order, those for one task together."""
    group: list[str] = []
    size = 0
    for path in files:
        try:
            length = Path(path).stat().st_size
        except OSError:
            length = 0
        if group and (len(group) == _GROUP_FILES or size + length > _GROUP_BYTES):
            yield group
            group, size = [], 0
        group.append(path)
        size += length
    if group:
        yield group


@contextlib.contextmanager
def _temporary_folder() -> Iterator[str]:
    """A folder that goes when the block or the process ends, by whatever signal."""
    # Short: Ray puts sockets into folders of it, whose paths have 107 bytes at most.
    folder = str(Path(tempfile.mkdtemp(prefix="gt-")).resolve())
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _CLEANER, folder],
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is not for it
    ) as cleaner:
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            assert cleaner.stdin is not None
            cleaner.stdin.close()


@contextlib.contextmanager
def _handlers_kept() -> Iterator[None]:
    """Keeps our handlers of signals, which Ray replaces."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _one_line(problem: Exception) -> str:
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return " ".join([*lines[:1], *lines[1:][-1:]])[:400]  # a traceback lies between


class _Lost(Exception):
    """The command was killed; another attempt may do better."""


def _tokenize(options: list[str], files: list[str], folder: str) -> Iterator[Any]:
    """The task: chunks of a span stream, then the exit code and messages of the command.

    They are the same each time, so that an attempt goes on where the one before it was lost.
    """
    command = [sys.executable, "-P", "-c", _START, "tokenize", "--log-json", *options]
    # What a variable says, `options` say too.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GEMTOOL_")}
    with tempfile.TemporaryFile() as listed, tempfile.TemporaryFile() as said:
        listed.write(b"".join(os.fsencode(name) + b"\0" for name in files))
        listed.seek(0)
        tool = subprocess.Popen(
            [*command, "--files-from", "-"],
            cwd=folder,
            env=kept,
            stdin=listed,
            stdout=subprocess.PIPE,
            stderr=said,
        )
        try:
            assert tool.stdout is not None
            with tool.stdout:
                while chunk := tool.stdout.read(_CHUNK):
                    yield chunk
            code = tool.wait()
        finally:
            tool.kill()  # if this task is given up
            tool.wait()
        said.seek(0)
        messages = list(_messages(said.read()))
    if code < 0:
        raise _Lost(f"signal {-code}")
    yield {"code": code, "messages": messages}


def _messages(said: bytes) -> Iterator[tuple[str, str]]:
    """Level and text of the warnings and errors that the command logged."""
    for line in said.decode("utf-8", "replace").splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):  # a library's, not ours
            record = json.loads(line)
            if record["level"] in ("warning", "error"):
                yield record["level"], str(record["message"])


class _Output:
    """The output of a task as a file, and what came after it."""

    def __init__(self, items: Iterator[Any]) -> None:
        self._items = items
        self._chunk = memoryview(b"")
        self._code: int | None = None
        self.messages: list[tuple[str, str]] = []

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, at least one before the end."""
        while not self._chunk and self._code is None:
            item = next(self._items, None)
            if item is None:
                raise GemtoolError("the Ray cluster lost the end of a task's output")
            if isinstance(item, bytes):
                self._chunk = memoryview(item)
            else:
                self._code, self.messages = item["code"], item["messages"]
        part, self._chunk = self._chunk[:size], self._chunk[size:]
        return bytes(part)

    def drain(self) -> int:
        """Goes to the end; the exit code."""
        while self.read(_CHUNK):
            pass
        assert self._code is not None
        return self._code
