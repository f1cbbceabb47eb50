"""A model that begins as a trained one: with more pieces in its vocabulary, or with more parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np

from gemtool.data.vocab import Vocab
from gemtool.errors import GemtoolError
from gemtool.model.config import ModelConfig
from gemtool.model.params import Tree, flatten, init_params, param_specs, unflatten


def extend_params(params: Tree, config: ModelConfig, old: Vocab, new: Vocab) -> Tree:
    """Parameters of a model of `config` with a row more for each id that `new` appends to `old`.

    The row of a new piece is the mean of the rows of the old pieces that spelled its text, so that
    the model begins with what it knew of it.
    """
    spelled = [old.encode(new.piece_bytes(i)) for i in range(old.size, new.size)]

    def rows(table: Any) -> np.ndarray:
        table = np.asarray(table)
        added = np.stack([table[ids].mean(axis=0, dtype=np.float64) for ids in spelled])
        return np.concatenate([table, added.astype(table.dtype)])

    specs = flatten(param_specs(config))
    grown = {
        path: rows(value) if specs[path].axes[0] == "vocab" else value
        for path, value in flatten(params).items()
    }
    return unflatten(grown)


def require_parts_of(path: str, old: ModelConfig, new: ModelConfig) -> None:
    """Refuses a model `new` that lacks a parameter of that of a checkpoint at `path`, the size of the
    vocabulary aside.

    Raises:
        GemtoolError: naming the first parameter that is missing or of another shape.
    """
    old = replace(old, vocab_size=new.vocab_size)
    there = flatten(param_specs(new))
    for name, spec in flatten(param_specs(old)).items():
        if name not in there:
            raise GemtoolError(f"{path}: its parameter {name} is not in the model {new.name}")
        if there[name].shape != spec.shape:
            shapes = f"{list(spec.shape)}, in the model {new.name} {list(there[name].shape)}"
            raise GemtoolError(f"{path}: its parameter {name} is {shapes}")


def add_params(params: Tree, config: ModelConfig, seed: int) -> Tree:
    """Parameters of a model of `config` that has all of these; the others, an encoder or an index
    perhaps, are fresh."""
    return unflatten(flatten(init_params(config, jax.random.key(seed))) | flatten(params))
