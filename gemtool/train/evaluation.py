"""What a model is worth on shards that it is not trained on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from gemtool.data.shards import ShardFolder
from gemtool.model.config import ModelConfig
from gemtool.model.execution import FLOAT32, Execution
from gemtool.model.params import Tree
from gemtool.train.loader import evaluation_batches
from gemtool.train.parts import INDEX
from gemtool.train.step import make_eval_step, make_index_eval_step

Row = dict[str, Any]


class Evaluation:
    """Evaluation shards, and the compiled programs that go over them.

    Args:
        folder: the shards, of sequences of any length.
        config: the model.
        batch: sequences at a time.
        execution: as in training.
    """

    def __init__(
        self, folder: ShardFolder, config: ModelConfig, batch: int, execution: Execution = FLOAT32
    ) -> None:
        self._folder, self._batch = folder, batch
        self._loss = make_eval_step(config, execution)
        self._quality = make_index_eval_step(config, execution)

    def row(self, params: Tree, part: str) -> Row:
        """The mean loss of the next token, "eval_loss"; and where an index is trained, "eval_index": by
        length, a power of two, the "top1", "topk" and "mass" (`gemtool.model.index.objective`) of the
        queries in the last half of a context so long."""
        loss, weight = (math.fsum(x) for x in zip(*self._each(self._loss, params), strict=True))
        row: Row = {"eval_loss": loss / weight if weight else math.nan}
        if part == INDEX:
            row["eval_index"] = by_length(list(self._each(self._quality, params)))
        return row

    def _each(self, step: Callable[..., Any], params: Tree) -> Any:
        for batch in evaluation_batches(self._folder, self._batch):
            yield step(params, batch)


def by_length(batches: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The means of the sums [DOUBLINGS] of `index_quality` of some batches, by length."""
    total = {
        name: np.sum([np.asarray(x[name], np.float64) for x in batches], axis=0)
        for x in batches[:1]
        for name in x
    }
    weight = total["weight"]
    return {
        str(1 << d): {
            name: round(float(total[name][d] / weight[d]), 5) for name in ("top1", "topk", "mass")
        }
        for d in np.flatnonzero(weight).tolist()
    }
