"""`tokenize` spread over a Ray cluster: the plain command run for a few inputs at a time.

A task runs the command for a group of inputs and streams its output back; the spans of all groups,
in the order of the inputs, are those of one run. Ray runs a task again whose process or machine
was lost. Every machine needs gemtool, and the inputs under the same paths.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from gemtool import log
from gemtool.errors import CorruptInput, GemtoolError, UsageError
from gemtool.stream.checked import Source
from gemtool.stream.spans import Span, read_spans

_CHUNK = 8 << 20
"""Bytes of a stream that travel together."""

_CHUNKS_WAITING = 4
"""Of each task, before it waits for them to be taken."""

_GROUP_FILES = 64
_GROUP_BYTES = 64 << 20
"""Inputs of a task: starting one costs as much as some pictures."""

_RETRIES = 3
_LEFT_OUT = re.compile(r"(\d+) inputs or documents could not be read")
_ERRORS = {2: UsageError, 3: CorruptInput}


class Cluster:
    """A connection to a Ray cluster (RAY_ADDRESS), or to one on this machine alone.

    Args:
        options: of `tokenize`, without inputs and output.
        threads: what `options` gives each task to use.

    Attributes:
        problems: inputs left out so far, with `--keep-going`.
    """

    def __init__(self, options: Sequence[str], threads: int) -> None:
        self._options = list(options)
        self._threads = threads
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
        self._ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()

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
        slots = int(self._ray.cluster_resources().get("CPU", 1)) // self._threads
        waiting, folder = groups(files), str(Path.cwd())
        running = deque(
            task.remote(self._options, group, folder) for group in islice(waiting, slots + 1)
        )
        while running:
            yield from self._spans_of(running.popleft())
            for group in islice(waiting, 1):
                running.append(task.remote(self._options, group, folder))

    def _spans_of(self, results: Any) -> Iterator[Span]:
        chunks = _Chunks(self._items(results))
        try:
            yield from read_spans(Source(chunks), "a task's output")  # type: ignore[arg-type]
        except CorruptInput:
            if chunks.drain() == 0:
                raise
        self._finish(chunks)

    def _items(self, results: Any) -> Iterator[Any]:
        try:
            for reference in results:
                yield self._ray.get(reference)
        except self._ray.exceptions.RayError as problem:
            what = " ".join(str(problem).split())[:300]
            raise GemtoolError(f"the Ray cluster could not finish a task: {what}") from None

    def _finish(self, chunks: _Chunks) -> None:
        """Passes on what a task said, and how it ended."""
        code = chunks.drain()
        errors = []
        for record in chunks.messages:
            if record["level"] == "error":
                errors.append(record["message"])
            else:
                getattr(log, record["level"])(record["message"])
        if code:
            message = errors[-1] if errors else f"a task ended with status {code}"
            if left_out := _LEFT_OUT.match(message):
                self.problems += int(left_out[1])
            else:
                raise _ERRORS.get(code, GemtoolError)(message)


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


class _Lost(Exception):
    """The command was killed; another attempt may do better."""


def _tokenize(options: list[str], files: list[str], folder: str) -> Iterator[Any]:
    """The task: chunks of a span stream, then the exit code and messages of the command."""
    command = [sys.executable, "-m", "gemtool", "tokenize", "--no-pg", "--log-json", *options]
    names = "".join(f"{name}\0" for name in files).encode("utf-8", "surrogateescape")
    with tempfile.TemporaryFile() as listed, tempfile.TemporaryFile() as said:
        listed.write(names)
        listed.seek(0)
        tool = subprocess.Popen(
            [*command, "--files-from", "-"],
            cwd=folder,
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


def _messages(said: bytes) -> Iterator[dict[str, str]]:
    for line in said.decode("utf-8", "replace").splitlines():
        try:
            record = json.loads(line)
            level, message = str(record["level"]), str(record["message"])
        except (ValueError, TypeError, KeyError):
            continue  # from a library
        if level in ("debug", "info", "warning", "error"):
            yield {"level": level, "message": message}


class _Chunks:
    """The output of a task as a file, and what came after it."""

    def __init__(self, items: Iterator[Any]) -> None:
        self._items = items
        self._chunk = memoryview(b"")
        self._code: int | None = None
        self.messages: list[dict[str, str]] = []

    def read(self, size: int) -> bytes:
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

    def readline(self) -> bytes:
        raise CorruptInput("a task's output is no Arrow stream")

    def drain(self) -> int:
        """Goes to the end; the exit code."""
        while self.read(_CHUNK):
            pass
        assert self._code is not None
        return self._code
