"""What SIGINT, SIGTERM and SIGHUP do: remove what is unfinished, say so, end the process.

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

from gemtool import log

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that ask a process to end; its exit code is then 128 + their number."""

_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}

_removals: list[Callable[[], object]] = []


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


def _stop(number: int, frame: FrameType | None) -> None:
    for each in STOPPING:
        signal.signal(each, lambda number, frame: os._exit(128 + number))
    log.last_words(word(number))
    for removal in reversed(_removals):
        with contextlib.suppress(Exception):
            removal()
    os._exit(128 + number)
