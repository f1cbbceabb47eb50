"""Prefill in bounded memory: a sequence lets go of keys and values that are written, and goes on with
those in its file.

Layers with an index attend to them where they lie (`gemtool.infer.mapped`). Landmarks stay in memory,
and so does all of layers to which any attends without an index. What continues another context (which
may be continued again, by what comes next) keeps all of its own.
"""

from __future__ import annotations

import itertools
import os
import stat
from typing import BinaryIO

from gemtool.infer.engine import Engine
from gemtool.infer.mapped import can_map, mappable
from gemtool.infer.sequence import Sequence
from gemtool.stream.context import BLOCK, STATE_EVERY, ContextReader, ContextWriter
from gemtool.stream.mapped import MappedSource

LEAST = 3 * STATE_EVERY
"""Positions that are let go together, at least."""
SHARE = 8
"""And one in so many of the context, as all blocks of the file are then gone through (though not their
keys and values)."""


def kept(length: int) -> int:
    """Positions that are in memory at most while a context of `length` is written."""
    return min(length, max(LEAST, length // SHARE) + STATE_EVERY)


def can_spill(engine: Engine, sink: BinaryIO) -> bool:
    """Whether what is written to `sink` can be read there, and attended to."""
    if not can_map(engine.config, engine.mesh) or not sink.readable():
        return False
    return stat.S_ISREG(os.fstat(sink.fileno()).st_mode)


def spill(
    engine: Engine, sequence: Sequence, sink: BinaryIO, begin: int, writer: ContextWriter
) -> None:
    """Lets go of positions, if it is time for it.

    Args:
        engine: the model.
        sequence: no fork, all of whose positions are in whole blocks, written or of a parent.
        sink: the file, for which `can_spill`.
        begin: the byte of it at which the context begins.
        writer: of the context.

    Raises:
        CorruptInput: the file does not hold what was written.
    """
    pages, start = sequence.pages, writer.header.start
    before = len(pages) * BLOCK
    if sequence.length - before < max(LEAST, before // SHARE):
        return
    if before < start:  # some of what it continues is in memory
        return
    sink.flush()
    sink.seek(begin)
    source = MappedSource(sink)
    sink.seek(0, os.SEEK_END)
    found = ContextReader(source, str(getattr(sink, "name", "output"))).parts(lazy=True)
    blocks = (part for part in found if part.part == "block")
    own = itertools.islice(blocks, (sequence.length - start) // BLOCK)
    parts = [*pages[: start // BLOCK], *own]
    if mappable(engine.config, parts) == len(parts):
        sequence.go_on_with(parts)
