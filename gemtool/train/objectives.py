"""What training minimises: the cross-entropy of the next token.

Scores over a vocabulary are by far the largest arrays of a step ([B * T, V]), so they never exist
at once: only positions that have a weight are scored, a chunk at a time, and where gradients are
wanted a chunk's are taken while its scores are there. Nothing is computed twice.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from gemtool.model.config import ModelConfig
from gemtool.model.params import Tree
from gemtool.model.transformer import logits

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
        hidden: float32 [B, T, D] of the forward pass.
        targets: int32 [B, T].
        weights: float32 [B, T]; positions of weight 0 cost nothing.
        chunk: static; positions scored at a time.
    """
    name = "embedding" if config.tie_embeddings else "unembedding"
    flat = hidden.reshape(-1, hidden.shape[-1])
    with jax.named_scope("next_token_loss"):
        return _loss(
            config, chunk, {name: params[name]}, flat, targets.reshape(-1), weights.reshape(-1)
        )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss(
    config: ModelConfig,
    chunk: int,
    head: Tree,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
) -> jax.Array:
    rows, count = _weighted_first(weights, chunk)

    def body(i: jax.Array, total: jax.Array) -> jax.Array:
        here = jax.lax.dynamic_slice_in_dim(rows, i * chunk, chunk)
        return total + _chunk_loss(config, head, *_take(here, hidden, targets, weights))

    return jax.lax.fori_loop(0, count, body, jnp.zeros((), jnp.float32))


def _loss_and_gradients(
    config: ModelConfig,
    chunk: int,
    head: Tree,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
) -> tuple[jax.Array, tuple[Tree, jax.Array]]:
    rows, count = _weighted_first(weights, chunk)
    value_and_grad = jax.value_and_grad(_chunk_loss, argnums=(1, 2))

    def body(i: jax.Array, carry: tuple[jax.Array, Tree, jax.Array]) -> tuple:
        total, d_head, d_hidden = carry
        here = jax.lax.dynamic_slice_in_dim(rows, i * chunk, chunk)
        loss, (d_table, d_rows) = value_and_grad(
            config, head, *_take(here, hidden, targets, weights)
        )
        d_head = jax.tree.map(jnp.add, d_head, d_table)
        return total + loss, d_head, d_hidden.at[here].set(d_rows, mode="drop")

    start = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, head), jnp.zeros_like(hidden))
    total, d_head, d_hidden = jax.lax.fori_loop(0, count, body, start)
    return total, (d_head, d_hidden)


def _scale_gradients(
    config: ModelConfig, chunk: int, gradients: tuple[Tree, jax.Array], d_loss: jax.Array
) -> tuple[Tree, jax.Array, None, None]:
    d_head, d_hidden = jax.tree.map(lambda g: g * d_loss, gradients)
    return d_head, d_hidden, None, None


_loss.defvjp(_loss_and_gradients, _scale_gradients)


def _weighted_first(weights: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Row numbers int32 [a multiple of chunk], those that have a weight first, in order, and the
    number of chunks that hold any of them. Row numbers past the end fill the last chunk.
    """
    rows = weights.shape[0]
    order = jnp.argsort(weights == 0, stable=True).astype(jnp.int32)
    order = jnp.pad(order, (0, -rows % chunk), constant_values=rows)
    weighted = jnp.count_nonzero(weights).astype(jnp.int32)
    return order, (weighted + chunk - 1) // chunk


def _take(
    rows: jax.Array, hidden: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows [C] of hidden [N, D], targets [N] and weights [N]; zeros past the end."""
    return tuple(x.at[rows].get(mode="fill", fill_value=0) for x in (hidden, targets, weights))  # type: ignore[return-value]


def _chunk_loss(
    config: ModelConfig, head: Tree, hidden: jax.Array, targets: jax.Array, weights: jax.Array
) -> jax.Array:
    scores = logits(head, config, hidden)
    chosen = jnp.take_along_axis(scores, targets[:, None], axis=-1)[:, 0]
    return jnp.dot(weights, jax.nn.logsumexp(scores, axis=-1) - chosen)
