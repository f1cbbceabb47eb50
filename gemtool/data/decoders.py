"""Decoding of images, sound and video in processes of their own, a few files ahead if wanted.

What a file does to its worker (a crash, a hang, more memory than it may have) becomes one error
that names the file; the next file gets a new worker.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from gemtool import errors, log
from gemtool.data.avfile import SCALE_DOWN
from gemtool.data.pieces import Piece
from gemtool.data.settings import MediaSettings
from gemtool.data.wire import LARGEST_READ, Channel, WireError, read_piece
from gemtool.data.worker import MEMORY
from gemtool.errors import CorruptInput, GemtoolError

PATIENCE = 20.0
"""Seconds without a piece, and without input that was not read before, after which it hangs."""

_STARTUP = 120.0
_AHEAD = 16 << 20
"""Bytes of pieces decoded ahead of their use, for each worker."""

_START = "import sys; sys.path[:] = sys.argv[1:]; from gemtool.data.worker import main; main()"
_ENVIRONMENT = {
    # Threads of linear algebra, which is not needed, would take of its memory.
    "OPENBLAS_NUM_THREADS": "1",
    # glibc is not to return memory that the next frame will want.
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
    "MALLOC_MMAP_THRESHOLD_": str(4 << 20),
}
_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True)
class Job:
    """A file to decode.

    Attributes:
        kind: `image`, `audio` or `video`.
        name: for `meta` and messages.
        settings: the token budgets.
        opened: entered when its turn comes; gives the file, and whether the worker may read it
            itself from its beginning, a regular file, or the tool reads it as the worker asks.
        waits: do not begin before the pieces are asked for: standard input.
    """

    kind: str
    name: str
    settings: MediaSettings
    opened: AbstractContextManager[tuple[BinaryIO, bool]]
    waits: bool = False


@dataclass(frozen=True, slots=True)
class _Note:
    """A message of the worker."""

    level: str
    text: str


class _Lost(Exception):
    """The worker cannot go on with this file."""


class _Hung(_Lost):
    """It got nowhere for too long."""


class Decoders:
    """Decodes files in up to `count` worker processes (no more than there are processors).

    Files are decoded from when they are handed over, in that order, to 16 MiB a worker ahead of
    their use. Pieces, errors and messages are the same, in the same order, for any number.
    """

    def __init__(self, count: int = 1) -> None:
        self.count = min(count, _processors())
        self._jobs: queue.SimpleQueue[_Ahead | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._changed = threading.Condition()
        self._buffered = 0
        self._closed = False

    def __enter__(self) -> Decoders:
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for _thread in self._threads:
            self._jobs.put(None)

    def pieces(self, job: Job) -> Iterator[Piece]:
        """The pieces of a file, to be taken before those of the next one."""
        if job.waits:
            return self._here(job)
        ahead = _Ahead(job)
        self._jobs.put(ahead)
        if len(self._threads) < self.count:
            thread = threading.Thread(target=self._work, daemon=True)
            self._threads.append(thread)
            thread.start()
        return self._results(ahead)

    def _here(self, job: Job) -> Iterator[Piece]:
        # Not in a thread, which could not be interrupted while it waits for standard input.
        with closing(_Slot()) as slot, job.opened as (file, regular):
            for item in slot.decode(job, file, regular):
                yield from _told(item)

    def _work(self) -> None:
        """A thread with a worker. The worker dies with it, so it lives as long as the pool."""
        with closing(_Slot()) as slot:
            while (ahead := self._jobs.get()) is not None and not self._closed:
                try:
                    with ahead.job.opened as (file, regular):
                        for item in slot.decode(ahead.job, file, regular):
                            if not self._put(ahead, item):
                                break
                except BaseException as problem:
                    ahead.problem = problem
                with self._changed:
                    ahead.done = True
                    self._changed.notify_all()

    def _put(self, ahead: _Ahead, item: Piece | _Note) -> bool:
        """Keeps an item until it is wanted; False if it never will be."""
        size = _size(item)
        with self._changed:
            while not (self._closed or ahead.dropped):
                urgent = ahead.wanted and not ahead.items
                if urgent or self._buffered + size <= _AHEAD * self.count:
                    self._buffered += size
                    ahead.items.append(item)
                    self._changed.notify_all()
                    return True
                self._changed.wait()
        return False

    def _results(self, ahead: _Ahead) -> Iterator[Piece]:
        """Waits for pieces; logs the worker's messages where they belong among them."""
        try:
            with self._changed:
                ahead.wanted = True
                self._changed.notify_all()
            while True:
                with self._changed:
                    while not (ahead.items or ahead.done):
                        self._changed.wait()
                    if not ahead.items:
                        break
                    item = ahead.items.popleft()
                    self._buffered -= _size(item)
                    self._changed.notify_all()
                yield from _told(item)
            if ahead.problem is not None:
                raise ahead.problem
        finally:
            with self._changed:
                ahead.dropped = True
                self._buffered -= sum(map(_size, ahead.items))
                ahead.items.clear()
                self._changed.notify_all()


@dataclass(slots=True)
class _Ahead:
    """A job and what has been decoded of it."""

    job: Job
    items: deque[Piece | _Note] = field(default_factory=deque)
    problem: BaseException | None = None
    done: bool = False
    wanted: bool = False
    dropped: bool = False


def _size(item: Piece | _Note) -> int:
    payload = getattr(item, "payload", None)
    return 1000 + (0 if payload is None else payload.nbytes)


def _told(item: Piece | _Note) -> Iterator[Piece]:
    """Yields a piece; logs what a worker says."""
    if isinstance(item, Piece):
        yield item
    elif item.level in _LEVELS:
        getattr(log, item.level)(item.text)


class _Slot:
    """Room for one worker: started when there is work, replaced when it is of no more use."""

    def __init__(self) -> None:
        self._worker: _Worker | None = None

    def decode(self, job: Job, file: BinaryIO, regular: bool) -> Iterator[Piece | _Note]:
        """Yields the pieces of a file.

        Raises:
            CorruptInput, GemtoolError: as the front ends do; or the worker did not survive.
        """
        again = True
        while again:
            worker = self._worker or _Worker()
            self._worker = None
            # What an earlier file left behind is not this one's fault.
            again, began = worker.used and regular, False
            try:
                for item in worker.decode(job, file, regular):
                    began = True
                    yield item
                return
            except _Lost as problem:
                if began or not again or isinstance(problem, _Hung):
                    raise CorruptInput(f"{job.name}: {problem}") from None
            finally:
                if worker.usable:
                    self._worker = worker
                else:
                    worker.close()

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None


class _Worker:
    """A worker process and the connection to it."""

    def __init__(self) -> None:
        self.used = False
        self._loaded: set[str] = set()
        self.usable = False
        ours, theirs = socket.socketpair()
        # Not `-m`, which would look for modules in the current folder first: anyone's folder.
        command = [sys.executable, "-P", "-c", _START, *sys.path]
        environment = {**os.environ, **_ENVIRONMENT}
        with theirs:
            self._process = subprocess.Popen(
                command,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
        self._channel = Channel(ours, ahead=True)

    def close(self) -> None:
        self.usable = False
        self._process.kill()
        self._process.wait()
        self._channel.sock.close()

    def decode(self, job: Job, file: BinaryIO, regular: bool) -> Iterator[Piece | _Note]:
        """Yields pieces and messages.

        Raises:
            _Lost: the worker crashed, hung, or ran out of memory.
            GemtoolError: what it says is wrong with the file.
        """
        self.usable, problem = False, None
        self._begin(job, file if regular else None)
        while True:
            header, body = self._receive(job.kind in self._loaded)
            match header.get("type"):
                case "piece":
                    yield self._checked(header, body)
                case "read":
                    self._answer(file, header)
                case "log":
                    yield _Note(str(header.get("level")), str(header.get("message")))
                case "ready":
                    self._loaded.add(job.kind)
                case "error":
                    problem = _problem(header, job)
                case "end":
                    self.used, self.usable = True, header.get("usable") is True
                    if problem is not None:
                        raise problem
                    return
                case "beat":
                    continue
                case _:
                    raise _Lost("its decoder went astray")

    def _begin(self, job: Job, file: BinaryIO | None) -> None:
        header = {"kind": job.kind, "name": job.name, "settings": job.settings.to_dict()}
        descriptor = None
        if file is not None:
            descriptor = file.fileno()
            os.lseek(descriptor, 0, os.SEEK_SET)
        try:
            self._channel.send(header, descriptor=descriptor)
        except OSError:
            raise self._death() from None

    def _receive(self, loaded: bool) -> tuple[dict[str, Any], Any]:
        limit = PATIENCE if loaded else _STARTUP
        if self._channel.sock.gettimeout() != limit:
            self._channel.sock.settimeout(limit)
        try:
            message = self._channel.receive()
        except TimeoutError:
            raise _Hung(f"its decoder got nowhere in {limit:.0f} seconds: given up") from None
        except WireError as problem:
            raise (_Lost(str(problem)) if self._running() else self._death()) from None
        except OSError:
            raise self._death() from None
        if message is None:
            raise self._death()
        return message

    def _answer(self, file: BinaryIO, header: dict[str, Any]) -> None:
        size = header.get("size")
        if not isinstance(size, int) or not 0 < size <= LARGEST_READ:
            raise _Lost("its decoder went astray")
        block = file.read(size)  # which may take as long as it takes
        try:
            self._channel.send({}, block)
        except OSError:
            raise self._death() from None

    def _checked(self, header: dict[str, Any], body: Any) -> Piece:
        try:
            return read_piece(header, body)
        except WireError as problem:
            raise _Lost(str(problem)) from None

    def _running(self) -> bool:
        try:
            self._process.wait(1)
        except subprocess.TimeoutExpired:
            return True
        return False

    def _death(self) -> _Lost:
        if self._running():
            return _Lost("its decoder closed the connection")
        code = self._process.returncode
        if code >= 0:
            return _Lost(f"its decoder ended unexpectedly (status {code})")
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        if name == "SIGKILL":
            return _Lost("its decoder was killed (out of memory?)")
        return _Lost(f"its decoder crashed ({name})")


def _problem(header: dict[str, Any], job: Job) -> Exception:
    kind, message = header.get("error"), str(header.get("message"))
    if kind == "memory":
        hint = f": {SCALE_DOWN}" if job.kind == "video" else ""
        return _Lost(
            f"needs more than the {MEMORY >> 20} MiB of memory that decoding may take; scale it "
            f"down{hint}"
        )
    known = getattr(errors, str(kind), None)
    if isinstance(known, type) and issubclass(known, GemtoolError):
        return known(message)
    return CorruptInput(f"{job.name}: damaged, its decoder stumbled ({message})")


def _processors() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return os.cpu_count() or 1
