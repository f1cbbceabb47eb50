"""Contexts of files -> sequences of a model, to be asked or continued."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemtool.errors import CorruptInput, GemtoolError, UsageError
from gemtool.infer.engine import Engine, Sequence
from gemtool.stream.context import BLOCK, ContextReader, Parent, open_contexts, require_match
from gemtool.stream.files import is_stdin
from gemtool.stream.lineage import as_parent, whole_parts


@dataclass(frozen=True)
class Loaded:
    """A context that is back in a model."""

    sequence: Sequence
    tail: np.ndarray
    """int32 [n]: the tokens of its last block, if that is not full."""
    footer: Mapping[str, Any]


@dataclass(frozen=True)
class Base(Loaded):
    """A context that is to be continued."""

    parent: Parent
    """How files that continue it name it."""


def open_base(engine: Engine, path: str, output: str | None) -> Base:
    """The one context of a file, to be continued in a file `output` (None or "-": standard output).

    Raises:
        UsageError: the file is standard input, which cannot be named, or `output` would replace it.
        GemtoolError: it holds several contexts, or as `load_context`.
    """
    if is_stdin(path):
        raise UsageError(
            "--append: standard input has no name by which to refer to it; name a file"
        )
    if (
        output not in (None, "-")
        and Path(str(output)).exists()
        and Path(str(output)).samefile(path)
    ):
        raise UsageError(f"{output}: is what --append continues; write to another file")
    with open_contexts(path) as contexts:
        reader = next(contexts)
        loaded = load_context(engine, reader)
        if next(contexts, None) is not None:
            raise GemtoolError(f"{path}: holds several contexts; --append continues a file of one")
    parent = as_parent(reader, path, output)
    return Base(loaded.sequence, loaded.tail, loaded.footer, parent)


def load_context(engine: Engine, reader: ContextReader) -> Loaded:
    """Puts a context back into a model, with those that it continues.

    Raises:
        GemtoolError: another model, vocabulary or layout made it; its parent is missing or another.
        CorruptInput: it is damaged or truncated.
    """
    require_match(reader.header, engine.header(reader.header.doc), reader.name)
    blocks: list[Mapping[str, np.ndarray]] = []
    state: Mapping[str, np.ndarray] = {}
    logits = np.empty(0, np.float32)
    length = 0
    for part in whole_parts(reader):
        if part.part == "block":
            blocks.append(part.arrays)
        elif part.part == "state":
            state, length = part.arrays, part.stop
        elif part.part == "end":
            logits = part.arrays["logits"]
    if length != reader.footer["length"]:
        raise CorruptInput(f"{reader.name}: the last state is of token {length:,}, not of the last")
    tail = blocks[-1]["tokens"] if length % BLOCK else np.empty(0, np.int32)
    try:
        return Loaded(engine.restore(length, blocks, state, logits), tail, reader.footer)
    except (KeyError, ValueError) as problem:
        raise CorruptInput(f"{reader.name}: the context is not whole ({problem})") from None
