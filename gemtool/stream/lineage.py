"""Contexts that continue others: a file holds what is new, and names its parent.

The blocks of a context are those of its parent before `start`, the first token of the parent's last
block that was not full, and then its own, which begin with that block again. Everything else, the last
state and scores, is its own. A parent may continue another.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from gemtool.errors import CorruptInput, GemtoolError
from gemtool.stream.context import (
    ContextReader,
    ContextWriter,
    Parent,
    Part,
    open_contexts,
    require_match,
)

Place = tuple[str, int]
"""A file and which of its contexts."""


def whole_parts(reader: ContextReader, lazy: bool = False) -> Iterator[Part]:
    """The parts of a context as if it were one file: its ancestors' blocks, then all of its own.

    What is given is only known to be right at the end: use none of it before. `lazy` as in
    `ContextReader.parts`.

    Raises:
        CorruptInput: one of the files is damaged, or they continue one another in a circle.
        GemtoolError: a parent is missing or is not what was continued.
    """
    yield from inherited_parts(reader, lazy)
    yield from reader.parts(lazy)


def inherited_parts(
    reader: ContextReader, lazy: bool = False, seen: frozenset[Place] = frozenset()
) -> Iterator[Part]:
    """The blocks of its ancestors alone, none of which is in `seen`; raises as `whole_parts`, of them
    only."""
    header, parent = reader.header, reader.header.parent
    if parent is not None:
        path = reader.folder / parent.path
        place = str(path.resolve()), parent.index
        if place in seen:
            raise CorruptInput(f"{reader.name}: continues {path}, which continues it")
        if not path.exists():
            raise GemtoolError(
                f"{reader.name}: continues {path}, which is not there; put it back, or make one file "
                "of both where it is (gemtool prefill --flatten)"
            )
        with open_contexts(str(path)) as contexts:
            found = _nth(contexts, parent.index)
            if found is None:
                raise _changed(reader, path, "it holds fewer contexts")
            require_match(found.header, header, found.name)
            end = 0
            theirs = inherited_parts(found, lazy, seen | {place}), found.parts(lazy)
            for part in itertools.chain(*theirs):
                if part.part == "block" and part.start < header.start:
                    end = part.stop
                    yield part
            if found.id != parent.id:
                raise _changed(reader, path, f"its id is {found.id[:16]}, not {parent.id[:16]}")
            if end != header.start:
                raise CorruptInput(
                    f"{reader.name}: begins at token {header.start:,}, its parent {path} has "
                    f"whole blocks to {end:,}"
                )


def _nth(contexts: Iterator[ContextReader], index: int) -> ContextReader | None:
    for reader in contexts:
        if reader.index == index:
            return reader
    return None


def _changed(reader: ContextReader, path: Path, how: str) -> GemtoolError:
    return GemtoolError(
        f"{reader.name}: continues another {path} than this one: {how}; bring back the one that it was "
        "made from, or prefill again"
    )


def as_parent(reader: ContextReader, path: str, output: str | None) -> Parent:
    """How a context that was read whole, of a file, is named in a file `output` that continues it; None
    is a pipe, whose reader is taken to be in this folder."""
    folder = Path() if output in (None, "-") else Path(str(output)).parent
    relative = os.path.relpath(Path(path).resolve(), folder.resolve())
    return Parent(reader.id, relative, reader.index)


def flatten(
    reader: ContextReader, sink: BinaryIO, pg: tuple[Mapping[str, Any], ...]
) -> dict[str, Any]:
    """Writes a context and its ancestors as one that needs no other; returns the footer. Its answers
    are the same, its id is not.

    Raises: as `whole_parts`.
    """
    header = reader.header
    writer = ContextWriter(sink, replace(header, parent=None, start=0, pg=pg))
    for part in whole_parts(reader):
        if part.part == "block":
            arrays = dict(part.arrays)
            writer.block(arrays.pop("tokens"), arrays)
        elif part.part == "state":
            writer.state(part.arrays)
        else:
            writer.end(part.arrays["logits"])
    return writer.close(reader.footer["kinds"], reader.footer["media_sha256"])
