"""What an interrupted prefill left, and how to go on: the whole contexts of a partial file, and the one
that was begun, up to its last state but the one at the end."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemtool.errors import CorruptInput, GemtoolError
from gemtool.infer.contexts import Base
from gemtool.infer.engine import Engine
from gemtool.infer.mapped import can_map
from gemtool.infer.prefill import Begun, Tally
from gemtool.infer.spill import gone
from gemtool.stream.checked import Counts
from gemtool.stream.context import BLOCK, ContextReader, Part, open_contexts, require_match
from gemtool.stream.lineage import inherited_parts
from gemtool.stream.spans import Span


@dataclass(frozen=True)
class Left:
    """What a partial file holds."""

    whole: tuple[Mapping[str, Any], ...] = ()
    """Footers of the contexts that are finished."""
    begun: Begun | None = None
    end: int = 0
    """Bytes that are of use."""


def read_left(engine: Engine, path: Path) -> Left:
    """What there is in the partial file of a prefill.

    Raises:
        GemtoolError: another model made it, or the parent of a context is missing or another.
    """
    if path.stat().st_size == 0:
        return Left()
    whole: list[Mapping[str, Any]] = []
    end = 0
    with open_contexts(str(path), grows=True) as contexts:
        while True:
            try:
                reader = next(contexts, None)
            except CorruptInput:  # cut in a header
                reader = None
            if reader is None:
                return Left(tuple(whole), None, end)
            require_match(reader.header, engine.header(reader.header.doc), reader.name)
            begun = _read(engine, reader, end)
            if begun is not None:
                return Left(tuple(whole), begun[0], begun[1] or end)
            whole.append({**reader.footer, "parent": reader.header.to_dict()["parent"]})
            end = reader.position


def _read(engine: Engine, reader: ContextReader, begin: int) -> tuple[Begun | None, int] | None:
    """None: the context, from byte `begin` on, is whole. Else what was begun, to the byte behind its
    last state; (None, 0): nothing that could be gone on with."""
    blocks: list[Part] = []
    own: list[np.ndarray] = []
    lazy = can_map(engine.config, engine.mesh)
    for part in _verified(inherited_parts(reader, lazy)):
        blocks.append(part)
    found = last = _Point({}, 0, 0, Counts(), 0, 0)
    try:
        for part in _verified(reader.parts(lazy)):
            if part.part == "block":
                found = last  # A state that nothing follows may be the one at the end.
                blocks.append(part)
                own.append(part.arrays["tokens"])
            elif part.part == "state":
                here = reader.position, reader.counts, len(blocks), len(own)
                last = _Point(part.arrays, part.stop, *here)
        return None
    except CorruptInput:
        pass  # where it was interrupted
    if not found.end:
        return None, 0
    # As it was, so that what comes is the same to the bit.
    start = reader.header.start
    mapped = (gone(found.length) if reader.header.parent is None else start) // BLOCK
    sequence = engine.restore(found.length, blocks[: found.blocks], found.state, None, mapped)
    tokens = np.concatenate(own[: found.own])
    return Begun(sequence, reader.header, tokens, found.counts, begin), found.end


def _verified(parts: Iterable[Part]) -> Iterator[Part]:
    """Each with all that it holds: what cannot be gone on with shows here, not later."""
    for part in parts:
        for path in part.arrays:
            part.verify(path)
        yield part


@dataclass(frozen=True)
class _Point:
    """A state of a context, and what stands before it."""

    state: Mapping[str, np.ndarray]
    length: int
    end: int
    """Bytes of the file, it included."""
    counts: Counts
    blocks: int
    own: int
    """Blocks that are not a parent's."""


def skip_whole(
    footer: Mapping[str, Any], doc: str, spans: Iterable[Span], base: Base | None
) -> None:
    """Reads a document whose context is finished, with this footer; `base` is what it continues.

    Raises:
        GemtoolError: the context is of another document.
    """
    tally = Tally({} if base is None else base.footer)
    digest = hashlib.sha256()
    if base is not None:
        digest.update(np.ascontiguousarray(base.tail, "<i4").tobytes())
    for span in tally.through(spans):
        digest.update(np.ascontiguousarray(span.tokens, "<i4").tobytes())
    found = {
        "doc": doc,
        "kinds": tally.kinds,
        "tokens_sha256": digest.hexdigest(),
        "media_sha256": tally.media(),
        "parent": None if base is None or base.parent is None else asdict(base.parent),
    }
    for name, value in found.items():
        if footer[name] != value:
            raise GemtoolError(
                f"--resume: a context that is there is of another document than {doc!r} (its {name} "
                "differs); go on with the input that it was begun with, or leave out --resume"
            )
