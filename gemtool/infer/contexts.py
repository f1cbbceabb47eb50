"""Contexts of files -> sequences of a model, to be asked or continued."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemtool.errors import CorruptInput, GemtoolError, UsageError
from gemtool.infer.engine import Engine
from gemtool.infer.sequence import Sequence
from gemtool.stream.context import (
    BLOCK,
    ContextReader,
    Parent,
    Part,
    open_contexts,
    require_match,
)
from gemtool.stream.files import display_name, is_stdin
from gemtool.stream.lineage import as_parent, whole_parts


@dataclass(frozen=True)
class Loaded:
    """A context that is back in a model."""

    doc: str
    sequence: Sequence
    tokens: np.ndarray
    """int32 [n]: all of them."""
    footer: Mapping[str, Any]

    @property
    def tail(self) -> np.ndarray:
        """int32 [n]: the tokens of its last block, if that is not full."""
        return self.tokens[len(self.tokens) // BLOCK * BLOCK :]


@dataclass(frozen=True)
class Base(Loaded):
    """A context that is to be continued."""

    parent: Parent | None
    """How files that continue it name it. None: they hold all of it themselves."""


def open_base(engine: Engine, path: str, output: str | None) -> Base:
    """The one context of a file, to be continued in a file `output` (None or "-": standard output); of
    standard input, which has no name to refer to, with no parent.

    Raises:
        UsageError: `output` would replace the file.
        GemtoolError: it holds several contexts, or as `load_context`.
    """
    named = not is_stdin(path)
    if named and output not in (None, "-"):
        target = Path(str(output))
        if target.exists() and target.samefile(path):
            raise UsageError(f"{output}: is the context that is continued; write to another file")
    with open_contexts(path) as contexts:
        reader = next(contexts)
        loaded = load_context(engine, reader)
        if next(contexts, None) is not None:
            name = display_name(path)
            raise GemtoolError(f"{name}: holds several contexts; only one can be continued")
    parent = as_parent(reader, path, output) if named else None
    return Base(loaded.doc, loaded.sequence, loaded.tokens, loaded.footer, parent)


def load_context(engine: Engine, reader: ContextReader) -> Loaded:
    """Puts a context back into a model, with those that it continues.

    On a CPU, layers with an index attend to whole blocks of files where they lie, on a disk: these are
    neither read nor verified before (`gemtool.infer.mapped`). On a mesh or an accelerator, of a pipe,
    and for other layers, keys and values are loaded.

    Raises:
        GemtoolError: another model, vocabulary or layout made it; its parent is missing or another.
        CorruptInput: it is damaged or truncated.
    """
    require_match(reader.header, engine.header(reader.header.doc), reader.name)
    blocks: list[Part] = []
    state = end = Part("none", 0, 0, {})
    for part in whole_parts(reader, lazy=True):
        if part.part == "block":
            blocks.append(part)
        elif part.part == "state":
            state = part
        elif part.part == "end":
            end = part
    length = state.stop
    if length != reader.footer["length"]:
        raise CorruptInput(f"{reader.name}: the last state is of token {length:,}, not of the last")
    try:
        sequence = engine.restore(length, blocks, state.arrays, end.arrays["logits"])
        sequence.tokens = tokens = np.concatenate([block.arrays["tokens"] for block in blocks])
        for part in (*blocks, state, end):
            if part.origin is not None and not part.origin.source.is_as_opened():
                for path in part.arrays:  # what was copied is what is there now
                    part.verify(path, again=True)
        return Loaded(reader.header.doc, sequence, tokens, reader.footer)
    except (KeyError, ValueError) as problem:
        raise CorruptInput(f"{reader.name}: the context is not whole ({problem})") from None
