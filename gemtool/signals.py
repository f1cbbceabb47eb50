"""What SIGINT, SIGTERM and SIGHUP do: remove what is unfinished, say so, end the process. The same for
SIGBUS, of a mapped file that was cut.

The handlers raise nothing: an exception out of a handler is lost wherever Python or a library
discards exceptions (destructors, callbacks of the garbage collector, imports), and the work would
go on. What must not stay behind is registered while it is there (`removed_on_signal`).
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from gemtool import log
from gemtool.errors import CorruptInput

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that ask a process to end; its exit code is then 128 + their number."""

_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}

_removals: list[Callable[[], object]] = []
_bus_error: list[Any] = []
"""What handles one: kept, as only the system refers to it."""


def install() -> None:
    """Takes over the signals, except those that whoever started us wants ignored (nohup, `&`)."""
    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


@contextlib.contextmanager
def removed_on_signal(removal: Callable[[], object]) -> Iterator[None]:
    """Calls `removal` if a signal ends the process inside the block.

    It is called between any two operations of the main thread, so it must be short, and fit every
    state in which the block may be.
    """
    _removals.append(removal)
    try:
        yield
    finally:
        _removals.remove(removal)


@contextlib.contextmanager
def deferred(message: str) -> Iterator[list[int]]:
    """Lets the block choose the moment to stop: the number of a signal is put into the list.

    `message` says what happens until then. A second signal ends the process at once.
    """
    stop: list[int] = []

    def request(number: int, frame: FrameType | None) -> None:
        if stop:
            os._exit(128 + number)
        stop.append(number)
        log.last_words(f"{word(number)}, {message} (again to skip that)")

    before = {n: signal.getsignal(n) for n in STOPPING}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def word(number: int) -> str:
    """What happened to a process that got a signal: `interrupted`, `terminated`, `hung up`."""
    return _WORDS[signal.Signals(number)]


def explain_bus_errors(explain: Callable[[], str | None]) -> None:
    """Ends the process with what `explain` says, as of a corrupt input, where memory that is a mapped
    file cannot be read any more; if it says None, with the signal. Only the first call counts.

    Whatever looks at the memory cannot go on, and Python's own handlers are called when it has: so this
    one is the system's, called in the thread that looked.
    """
    if _bus_error:
        return
    import ctypes

    system = ctypes.CDLL(None).signal
    system.restype, system.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)

    def end(number: int) -> None:
        message = None
        with contextlib.suppress(Exception):
            message = explain()
        if message is None:
            system(number, before)
            os.kill(os.getpid(), number)
        else:
            _end(message, CorruptInput.exit_code, "error")

    try:
        handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(end)
    except (MemoryError, OSError):  # where no memory may be executable
        return
    _bus_error.append(handler)
    before = system(signal.SIGBUS, ctypes.cast(handler, ctypes.c_void_p))


def _stop(number: int, frame: FrameType | None) -> None:
    for each in STOPPING:
        signal.signal(each, lambda number, frame: os._exit(128 + number))
    _end(word(number), 128 + number)


def _end(message: str, code: int, level: str = "info") -> NoReturn:
    log.last_words(message, level)
    for removal in reversed(_removals):
        with contextlib.suppress(Exception):
            removal()
    os._exit(code)
