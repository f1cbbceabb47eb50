"""Prefill in little memory: a sequence lets go of keys and values that are written, and goes on with
those in its file.

Layers with an index attend to them where they lie (`gemtool.infer.mapped`, files of up to 8 GiB).
Landmarks stay in memory, the last eighth of a long context, and all of layers to which any attends
without an index. What continues another context (which
may be continued again, by what comes next) keeps all of its own.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from gemtool import log
from gemtool.infer.engine import Engine
from gemtool.infer.mapped import can_map, mappable
from gemtool.infer.sequence import Sequence
from gemtool.stream.context import BLOCK, STATE_EVERY, ContextReader
from gemtool.stream.mapped import MappedSource

LEAST = 3 * STATE_EVERY
"""Positions that are let go together, at least."""
SHARE = 8
"""And one in so many of the context, as all blocks of the file are then gone through (though not their
keys and values)."""


def kept(length: int) -> int:
    """Positions that are in memory at most while a context of `length` is written."""
    return min(length, max(LEAST, length // SHARE) + STATE_EVERY)


def gone(length: int) -> int:
    """Positions of a context that were let go when it has `length`."""
    before = 0
    for at in range(STATE_EVERY, length + 1, STATE_EVERY):
        if at - before >= max(LEAST, before // SHARE):
            before = at
    return before


def can_spill(engine: Engine, sink: BinaryIO) -> bool:
    """Whether what is written to `sink` can be read there, and attended to."""
    if not can_map(engine.config, engine.mesh):
        return False
    try:
        with _readable(sink) as file:
            return stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    except (OSError, ValueError):  # no file of the system's, or a pipe
        return False


@contextlib.contextmanager
def _readable(sink: BinaryIO) -> Iterator[BinaryIO]:
    """What is written, to be read: where a shell redirects its output to a file, that is opened again,
    as the one that there is can only be written. Raises OSError where this system does not do that."""
    if sink.readable():
        try:
            yield sink
        finally:
            sink.seek(0, os.SEEK_END)
    else:
        # Elsewhere what is opened there shares its place in the file with the other.
        if sys.platform != "linux" or not stat.S_ISREG(os.fstat(sink.fileno()).st_mode):
            raise OSError(errno.ESPIPE, os.strerror(errno.ESPIPE))
        with Path(f"/dev/fd/{sink.fileno()}").open("rb") as file:
            yield file


def begin_of(sink: BinaryIO) -> int:
    """The byte of a file at which what is written next will be: of one that a shell appends to (>>),
    its end, wherever it is thought to be."""
    sink.flush()
    if fcntl.fcntl(sink.fileno(), fcntl.F_GETFL) & os.O_APPEND:
        return os.fstat(sink.fileno()).st_size
    return sink.tell()


def spill(engine: Engine, sequence: Sequence, sink: BinaryIO, begin: int) -> None:
    """Lets go of positions, if it is time for it.

    Args:
        engine: the model.
        sequence: no fork, all of whose positions are in blocks that are written.
        sink: the file, for which `can_spill`.
        begin: the byte of it at which the context begins.

    Raises:
        CorruptInput: the file does not hold what was written.
    """
    if gone(sequence.length) != sequence.length:
        return
    try:
        sink.flush()
        with _readable(sink) as file:
            file.seek(begin)
            source = MappedSource(file, grows=True)
        source.name = str(getattr(sink, "name", "output"))
        found = ContextReader(source, source.name).parts(lazy=True)
        with contextlib.closing(found):  # type: ignore[type-var]
            blocks = (part for part in found if part.part == "block")
            parts = list(itertools.islice(blocks, sequence.length // BLOCK))
        if mappable(engine.config, parts) == len(parts):
            sequence.go_on_with(parts)
    except OSError as problem:
        log.debug(f"{problem}: what is written stays in memory")
