"""Where the arrays of a training run lie on a mesh."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemtool.model.batch import Batch
from gemtool.model.config import ModelConfig
from gemtool.model.mesh import param_shardings, partition
from gemtool.train.parts import TRUNK, split
from gemtool.train.step import TrainState, abstract_state


def state_shardings(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    stacked: bool = False,
    part: str = TRUNK,
) -> TrainState:
    """A `NamedSharding` for every array of a state, `optimizer` that of a part of the parameters:
    moments lie where their parameters do."""
    params, everywhere = (
        param_shardings(config, mesh, stacked),
        NamedSharding(mesh, PartitionSpec()),
    )
    moments = optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        abstract_state(config, optimizer, stacked, part).optimizer,
        split(params, part)[0],
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(params, moments, everywhere)


def place_batches(batches: Batch, mesh: Mesh) -> Batch:
    """Stacked micro-batches [M, B, T] on the devices that compute their rows and positions.

    Media groups, which may belong to any row, go everywhere.
    """

    def put(x: np.ndarray, *axes: str | None) -> jax.Array:
        return jax.device_put(x, NamedSharding(mesh, partition(axes, x.shape, mesh)))

    rows: dict[str, Any] = {
        name: put(getattr(batches, name), None, "batch", "length")
        for name in ("tokens", "segments", "positions", "targets", "weights", "documents")
        if getattr(batches, name) is not None
    }
    media = jax.tree.map(lambda x: put(x, *[None] * x.ndim), batches.media)
    return Batch(**rows, media=media)
