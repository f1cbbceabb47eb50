"""What training minimises: the cross-entropy of the next token.

Scores over a vocabulary are by far the largest arrays of a step ([B * T, V]), so they never exist
at once: only positions that have a weight are scored, a chunk at a time, and where gradients are
wanted a chunk's are taken while its scores are there. Nothing is computed twice.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from gemtool.kernels.dtypes import accumulator
from gemtool.kernels.turns import counted_turns
from gemtool.model.config import ModelConfig
from gemtool.model.params import Tree
from gemtool.model.transformer import logits
from gemtool.model.vocab_parallel import Spread, sum_over_positions

CHUNK = 512
"""Positions scored at a time: [512, V] is 32 MB at V = 16,384."""


def next_token_loss(
    params: Tree,
    config: ModelConfig,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    chunk: int = CHUNK,
) -> jax.Array:
    """Sum over positions of weight * -log p(target), float32 [].

    Args:
        params: the parameters; only those that score tokens are used.
        config: static.
        hidden: [B, T, D] of the forward pass.
        targets: int32 [B, T].
        weights: float32 [B, T]; positions of weight 0 cost nothing.
        chunk: static; positions scored at a time.
    """
    name = "embedding" if config.tie_embeddings else "unembedding"

    def local(
        table: jax.Array,
        hidden: jax.Array,
        targets: jax.Array,
        weights: jax.Array,
        spread: Spread,
    ) -> jax.Array:
        flat = hidden.reshape(-1, hidden.shape[-1])
        # Devices score one another's positions: of eight or more, eight chunks at a time.
        each = min(chunk, -(-8 * chunk // jax.lax.axis_size(spread.apart)))
        fixed = (config, name, each, spread)
        return _loss(fixed, table, flat, targets.reshape(-1), weights.reshape(-1))

    with jax.named_scope("next_token_loss"):
        table = params[name].astype(hidden.dtype)
        return sum_over_positions(local, table, hidden, targets, weights)


Fixed = tuple[ModelConfig, str, int, Spread]
"""The model, its parameter that scores tokens, positions scored at a time, and how the rows of
that parameter are spread over devices."""


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(
    fixed: Fixed, table: jax.Array, hidden: jax.Array, targets: jax.Array, weights: jax.Array
) -> jax.Array:
    """This device's share of the loss: those of devices with different rows are all alike."""
    chunk = fixed[2]
    rows, count = _weighted_first(fixed, weights)

    def body(i: jax.Array, total: jax.Array) -> jax.Array:
        here = jax.lax.dynamic_slice_in_dim(rows, i * chunk, chunk)
        scores = _scores(fixed, table, hidden.at[here].get(mode="fill", fill_value=0))
        return total + _chunk_loss(fixed, scores, *_take(here, targets, weights))[0]

    with counted_turns(rows.shape[0] // chunk):  # of all positions
        return jax.lax.fori_loop(0, count, body, jnp.zeros((), jnp.float32))


def _loss_and_gradients(
    fixed: Fixed, table: jax.Array, hidden: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    chunk = fixed[2]
    rows, count = _weighted_first(fixed, weights)

    def body(i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple:
        total, d_table, d_hidden = carry
        here = jax.lax.dynamic_slice_in_dim(rows, i * chunk, chunk)
        x = hidden.at[here].get(mode="fill", fill_value=0)
        scores, back = jax.vjp(partial(_scores, fixed), table, x)
        loss, d_scores = _chunk_loss(fixed, scores, *_take(here, targets, weights))
        d_table_here, d_rows = back(d_scores)
        d_table = d_table + d_table_here.astype(d_table.dtype)
        return total + loss, d_table, d_hidden.at[here].set(d_rows, mode="drop")

    # Added in float32, whatever is multiplied.
    d_table = jnp.zeros(table.shape, accumulator(table.dtype))
    start = (jnp.zeros((), jnp.float32), d_table, jnp.zeros_like(hidden))
    with counted_turns(rows.shape[0] // chunk):  # of all positions
        total, d_table, d_hidden = jax.lax.fori_loop(0, count, body, start)
    return total, (d_table.astype(table.dtype), d_hidden)


def _scale_gradients(
    fixed: Fixed, gradients: tuple[jax.Array, jax.Array], d_loss: jax.Array
) -> tuple[jax.Array, jax.Array, None, None]:
    d_table, d_hidden = (g * d_loss.astype(g.dtype) for g in gradients)
    return d_table, d_hidden, None, None


_loss.defvjp(_loss_and_gradients, _scale_gradients)


def _weighted_first(fixed: Fixed, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Row numbers int32 [a multiple of chunk], those that have a weight first, in order, and the
    number of chunks that hold any of them: as many on every device that takes part in scoring them.
    Row numbers past the end fill the last chunk.
    """
    _, _, chunk, spread = fixed
    rows = weights.shape[0]
    order = jnp.argsort(weights == 0, stable=True).astype(jnp.int32)
    order = jnp.pad(order, (0, -rows % chunk), constant_values=rows)
    weighted = jnp.count_nonzero(weights).astype(jnp.int32)
    if spread.apart:
        weighted = jax.lax.pmax(weighted, spread.apart)
    return order, (weighted + chunk - 1) // chunk


def _take(rows: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows [C] of targets [N] and weights [N]; zeros past the end."""
    return tuple(x.at[rows].get(mode="fill", fill_value=0) for x in (targets, weights))  # type: ignore[return-value]


def _scores(fixed: Fixed, table: jax.Array, x: jax.Array) -> jax.Array:
    """float32 [C, V]: scores of the rows of `table` that are here, for positions x [C, D] of all."""
    config, name, _, spread = fixed
    return logits({name: table}, config, spread.gather(x))


def _chunk_loss(
    fixed: Fixed, scores: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The loss of some positions, shared evenly among the devices that have different rows, and its
    derivative by each score. `scores` are of this device's part of the vocabulary."""
    spread = fixed[3]
    axes, targets, weights = spread.axes, spread.gather(targets), spread.gather(weights)
    top = jnp.max(scores, axis=-1)
    if axes:
        top = jax.lax.pmax(top, axes)
        targets = targets - jax.lax.axis_index(axes) * scores.shape[-1]
    masses = jnp.exp(scores - top[:, None])
    is_target = jnp.arange(scores.shape[-1], dtype=jnp.int32)[None, :] == targets[:, None]
    total = jnp.sum(masses, axis=-1)
    chosen = jnp.sum(jnp.where(is_target, scores, 0), axis=-1)
    share = 1.0
    if axes:
        total, chosen = jax.lax.psum((total, chosen), axes)
        share = 1.0 / jax.lax.axis_size(axes)
    loss = jnp.dot(weights, top + jnp.log(total) - chosen) * share
    d_scores = weights[:, None] * (masses / total[:, None] - is_target.astype(jnp.float32))
    return loss, d_scores
