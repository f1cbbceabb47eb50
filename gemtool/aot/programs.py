"""The programs of train, prefill and decode, lowered for chips that are not here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from gemtool.aot.topology import Topology
from gemtool.infer.steps import abstract_sequence, kv_step, scored_step
from gemtool.kernels.dispatch import compiling_for
from gemtool.model.batch import Batch
from gemtool.model.config import ModelConfig
from gemtool.model.execution import Execution
from gemtool.model.flops import TRAINING, forward_flops, keys_flops
from gemtool.model.mesh import make_mesh, param_shardings, partition, require_fit
from gemtool.model.params import abstract_params, count_params, in_dtype
from gemtool.train.optimizer import make_optimizer
from gemtool.train.placement import state_shardings
from gemtool.train.step import STATE_BYTES, abstract_state, make_train_step


@dataclass(frozen=True)
class Program:
    """A program for all chips of a slice, lowered and not yet compiled."""

    name: str
    lowered: Any
    tokens: int
    """That one run advances by."""
    needed_flops: float
    """Of one run, over all chips, as the mathematics needs them."""


def training_mesh(config: ModelConfig, topology: Topology) -> dict[str, int]:
    """Sizes of axes that suit training: copies of the model where one fits a chip thrice, else its
    parameters cut over all chips, experts over up to eight of them."""
    chips = len(topology.devices)
    if 3 * STATE_BYTES * count_params(config)[0] < topology.chip.memory:
        return {"data": chips}
    experts = config.moe.experts if config.moe is not None else 1
    expert = math.gcd(experts, chips, 8)
    return {"fsdp": chips // expert, "expert": expert}


def inference_mesh(config: ModelConfig, topology: Topology) -> dict[str, int]:
    """Sizes of axes that suit one sequence: heads and hidden units over up to eight chips, experts
    over the others as far as they go, and the positions of the context over what is left."""
    chips = len(topology.devices)
    tensor = math.gcd(chips, 8, *(kind.heads for kind in config.layer_kinds))
    experts = config.moe.experts if config.moe is not None else 1
    expert = math.gcd(experts, chips // tensor)
    return {"tensor": tensor, "expert": expert, "context": chips // tensor // expert}


def training_program(
    config: ModelConfig,
    topology: Topology,
    sizes: Mapping[str, int],
    execution: Execution,
    *,
    batch: int,
    length: int,
    accumulate: int = 1,
) -> Program:
    """A step on `batch` packed sequences of `length`, without media, in `accumulate` parts.

    Raises:
        UsageError: the mesh does not fit the chips, the model or the batch.
    """
    mesh = make_mesh(sizes, topology.devices)
    part = batch // accumulate
    require_fit(config, mesh, part, length)
    optimizer = make_optimizer(config, execution.stacked)
    places = state_shardings(config, optimizer, mesh, execution.stacked)
    state = jax.tree.map(
        lambda x, where: x.update(sharding=where),
        abstract_state(config, optimizer, execution.stacked),
        places,
    )

    def rows(dtype: Any) -> jax.ShapeDtypeStruct:
        shape = (accumulate, part, length)
        where = NamedSharding(mesh, partition((None, "batch", "length"), shape, mesh))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    ids = rows(jnp.int32)
    batches = Batch(ids, ids, ids, ids, rows(jnp.float32))
    with jax.set_mesh(mesh), compiling_for("tpu"):
        step = make_train_step(config, optimizer, places, execution)
        lowered = step.lower(state, batches, 1e-3)
    needed = TRAINING * batch * forward_flops(config, length, scored=length)
    return Program("train step", lowered, batch * length, needed)


def prefill_program(
    config: ModelConfig,
    topology: Topology,
    sizes: Mapping[str, int],
    dtype: str,
    *,
    length: int,
    chunk: int,
) -> Program:
    """The last whole chunk of a context of `length` positions, whose logits nobody asks for.

    Raises:
        UsageError: the mesh does not fit the chips or the model.
    """
    chunk = min(chunk, length)
    lowered = _step(config, topology, sizes, dtype, length, chunk, scored=False)
    needed = keys_flops(config, chunk, start=length - chunk)
    return Program("prefill chunk", lowered, chunk, needed)


def decode_program(
    config: ModelConfig, topology: Topology, sizes: Mapping[str, int], dtype: str, *, length: int
) -> Program:
    """A token after a context of `length` positions.

    Raises:
        UsageError: the mesh does not fit the chips or the model.
    """
    lowered = _step(config, topology, sizes, dtype, length, 1, scored=True)
    return Program(
        "decode token", lowered, 1, forward_flops(config, 1, start=length, scored=1, chosen=True)
    )


def _step(
    config: ModelConfig,
    topology: Topology,
    sizes: Mapping[str, int],
    dtype: str,
    length: int,
    steps: int,
    scored: bool,
) -> Any:
    """A step of `steps` positions with buffers for `length` and those."""
    mesh = make_mesh(sizes, topology.devices)
    require_fit(config, mesh)
    params = jax.eval_shape(partial(in_dtype, dtype=dtype), abstract_params(config))
    params = jax.tree.map(
        lambda x, where: x.update(sharding=where), params, param_shardings(config, mesh)
    )
    buffers, state = abstract_sequence(config, length + steps, mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())
    tokens = jax.ShapeDtypeStruct((steps,), jnp.int32, sharding=everywhere)
    valid = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    program = scored_step if scored else kv_step
    with jax.set_mesh(mesh), compiling_for("tpu"):
        return program.lower(params, config, tokens, None, valid, buffers, state, {})
