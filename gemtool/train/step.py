"""One training step as a pure function: (state, batch) -> (state, metrics)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gemtool.model.batch import Batch
from gemtool.model.config import ModelConfig
from gemtool.model.execution import FLOAT32, Execution
from gemtool.model.moe import update_biases
from gemtool.model.params import Tree, abstract_params, flatten, init_params, unflatten
from gemtool.model.stacking import STACK, repeats, stack_layers, unstack_layers
from gemtool.model.transformer import forward, index_loss, index_quality
from gemtool.train.objectives import next_token_loss
from gemtool.train.parts import INDEX, TRUNK, merge, split

Metrics = dict[str, jax.Array]

STATE_BYTES = 16
"""Of training, a parameter: itself, its gradient and two moments, float32."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes."""

    params: Tree
    optimizer: Any
    """optax state of the part that is trained: moments and step count."""
    step: Any
    """int32 [], steps done."""


def init_state(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    seed: int,
    params: Tree | None = None,
    stacked: bool = False,
    part: str = TRUNK,
) -> TrainState:
    """A state at step 0, of fresh parameters or a copy of those given, and `optimizer` for a part of
    them, `stacked` ones if so."""
    if params is None:
        params = init_params(config, jax.random.key(seed))
    else:
        params = jax.tree.map(jnp.array, params)
    if stacked:
        params = _restacked(config, params, stacked)
    state = TrainState(params, None, jnp.zeros((), jnp.int32))
    return with_fresh_moments(state, optimizer, part)


def with_fresh_moments(
    state: TrainState,
    optimizer: optax.GradientTransformation,
    part: str,
    shardings: TrainState | None = None,
) -> TrainState:
    """A state whose next step is the first of `optimizer`, for a part of the parameters; moments are
    placed by `shardings`, if there is a mesh."""
    places = None if shardings is None else shardings.optimizer
    trained, _ = split(state.params, part)
    moments = jax.jit(optimizer.init, out_shardings=places)(trained)
    return TrainState(state.params, moments, state.step)


def abstract_state(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    stacked: bool = False,
    part: str = TRUNK,
) -> TrainState:
    """Shapes and dtypes of a state."""
    params = abstract_params(config, stacked)
    trained, _ = split(params, part)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    return TrainState(params, jax.eval_shape(optimizer.init, trained), step)


def restacked(config: ModelConfig, state: TrainState, stacked: bool) -> TrainState:
    """A state whose parameters and moments are stacked, or apart, whatever they were."""
    trees = jax.tree.map(
        lambda x: _restacked(config, x, stacked) if isinstance(x, dict) else x,
        state.optimizer,
        is_leaf=lambda x: isinstance(x, dict),
    )
    return TrainState(_restacked(config, state.params, stacked), trees, state.step)


def _restacked(config: ModelConfig, tree: Tree, stacked: bool) -> Tree:
    layers = tree["layers"]
    if (STACK in layers) == stacked or (found := repeats(config)) is None:
        return tree
    # Of the moments of a part, layers that have none of it are absent before and behind.
    if stacked:
        layers = {str(i): {} for i in range(len(config.layers))} | layers
        tree = stack_layers(config, {**tree, "layers": layers}, lambda *same: jnp.stack(same))
    else:
        turn = {str(j): {} for j in range(found.period)} | layers[STACK]
        whole = {**tree, "layers": {**layers, STACK: turn}}
        tree = unstack_layers(config, whole, lambda x, index: x[index])
    return unflatten(flatten(tree))


def stack(batches: Sequence[Batch]) -> Batch:
    """Micro-batches (numpy) as one Batch with a leading axis, [M, B, T].

    Where they differ in room for media groups, absent groups fill up the smaller ones.
    """

    def join(*arrays: np.ndarray) -> np.ndarray:
        longest = max(array.shape[0] for array in arrays)
        missing = [longest - array.shape[0] for array in arrays]
        # A group of zero `rows` is absent.
        return np.stack(
            [
                np.pad(array, [(0, count)] + [(0, 0)] * (array.ndim - 1)) if count else array
                for array, count in zip(arrays, missing, strict=True)
            ]
        )

    return jax.tree.map(join, *batches)


def make_train_step(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    shardings: TrainState | None = None,
    execution: Execution = FLOAT32,
    part: str = TRUNK,
    negatives: int = 0,
) -> Any:
    """The jitted step, (state, batches, rate) -> (state, metrics).

    It takes a state, which it consumes, stacked micro-batches [M, B, T], and the learning rate.
    `shardings` are those of the state on the current mesh, if there is one. The state is stacked where
    `execution` is. `optimizer` is that of the `part` that is trained; the others stay as they are, to
    the bit:

    - "trunk": by the loss of the next token, with `negatives` other rows of a micro-batch for each.
      Gradients of micro-batches are accumulated, so that M changes memory and rounding, not the
      result where there are no negatives.
    - "index": by distillation. Candidates are the blocks of a micro-batch, of whose losses the mean
      is taken.

    Metrics: "loss" (mean over weights), "grad_norm" (before clipping); of a trunk "expert_load"
    (largest ratio of the most chosen expert's load to the mean; absent without experts), of an index
    those of `index_loss`.
    """

    def next_token(
        params: Tree, batch: Batch, weight: jax.Array, count: int
    ) -> tuple[jax.Array, tuple[jax.Array, Tree]]:
        hidden, router = forward(params, config, batch, execution, negatives=negatives)
        loss = next_token_loss(params, config, hidden, batch.targets, batch.weights) / weight
        return loss + router["loss"] / count, (loss, router["load"])

    def distillation(
        params: Tree, batch: Batch, weight: jax.Array, count: int
    ) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
        loss, found = index_loss(params, config, batch, execution)
        return loss / count, (loss / count, found)

    learn = distillation if part == INDEX else next_token

    @partial(
        jax.jit, donate_argnums=0, out_shardings=None if shardings is None else (shardings, None)
    )
    def train_step(state: TrainState, batches: Batch, rate: float) -> tuple[TrainState, Metrics]:
        count = batches.tokens.shape[0]
        # One divisor for all micro-batches: a position weighs the same wherever it lies.
        weight = jnp.maximum(jnp.sum(batches.weights), 1e-8)
        trained, frozen = split(state.params, part)

        def objective(trained: Tree, batch: Batch) -> tuple[jax.Array, tuple[jax.Array, Any]]:
            return learn(merge(trained, frozen), batch, weight, count)

        def gradients(batch: Batch) -> tuple[Tree, jax.Array, Any]:
            grads, (loss, found) = jax.grad(objective, has_aux=True)(trained, batch)
            return grads, loss, found

        first = jax.tree.map(lambda x: x[0], batches)
        if count == 1:
            total = gradients(first)
        else:
            zeros = jax.tree.map(
                lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradients, first)
            )
            total, _ = jax.lax.scan(
                lambda carry, batch: (jax.tree.map(jnp.add, carry, gradients(batch)), None),
                zeros,
                batches,
            )
        grads, loss, found = total
        found = jax.tree.map(lambda value: value / count, found)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, trained)
        trained = jax.tree.map(lambda p, update: p - rate * update, trained, updates)
        params = merge(trained, frozen)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        if part == INDEX:
            metrics |= found
        else:
            params = update_biases(params, config, found)
            if shares := jax.tree.leaves(found):
                ratios = [jnp.max(share) * share.shape[-1] for share in shares]
                metrics["expert_load"] = jnp.max(jnp.stack(ratios))
        return TrainState(params, optimizer_state, state.step + 1), metrics

    return train_step


def make_index_eval_step(
    config: ModelConfig, execution: Execution = FLOAT32
) -> Callable[[Tree, Batch], dict[str, jax.Array]]:
    """A jitted function: `index_quality` of a batch [B, T]."""

    @jax.jit
    def index_eval_step(params: Tree, batch: Batch) -> dict[str, jax.Array]:
        return index_quality(params, config, batch, execution)

    return index_eval_step


def make_eval_step(
    config: ModelConfig, execution: Execution = FLOAT32
) -> Callable[[Tree, Batch], tuple[jax.Array, jax.Array]]:
    """A jitted function: sum of weighted losses of a batch [B, T], and sum of weights."""

    @jax.jit
    def eval_step(params: Tree, batch: Batch) -> tuple[jax.Array, jax.Array]:
        hidden, _ = forward(params, config, batch, execution)
        loss = next_token_loss(params, config, hidden, batch.targets, batch.weights)
        return loss, jnp.sum(batch.weights)

    return eval_step
