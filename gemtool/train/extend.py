"""A model for a vocabulary that has more pieces than the one it was trained with."""

from __future__ import annotations

from typing import Any

import numpy as np

from gemtool.data.vocab import Vocab
from gemtool.model.config import ModelConfig
from gemtool.model.params import Tree, flatten, param_specs, unflatten


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
