"""Pairs of a token and an expert that it chose, in order of the expert."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Pairs(NamedTuple):
    """The N = T * K pairs in order of their expert, those without an expert last."""

    pair: jax.Array  # int32 [N]: the i-th pair in this order, counted along expert_ids [T, K]
    place: jax.Array  # int32 [T, K]: where a pair is in this order
    start: jax.Array  # int32 [E]: the first pair of an expert
    rows: jax.Array  # int32 [E]: how many it has

    @property
    def token(self) -> jax.Array:
        """int32 [N]: the token of each."""
        return self.pair // self.place.shape[1]


def sort_pairs(expert_ids: jax.Array, experts: int) -> Pairs:
    """From int32 [T, K], `experts` for "no expert"."""
    count = expert_ids.size
    flat = expert_ids.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    place = jnp.zeros(count, jnp.int32).at[order].set(jnp.arange(count, dtype=jnp.int32))
    edges = jnp.searchsorted(flat[order], jnp.arange(experts + 1, dtype=jnp.int32))
    edges = edges.astype(jnp.int32)
    return Pairs(order, place.reshape(expert_ids.shape), edges[:-1], edges[1:] - edges[:-1])


def combine(
    rows: jax.Array, pairs: Pairs, expert_ids: jax.Array, weights: jax.Array, experts: int
) -> jax.Array:
    """The weighted sum of each token's rows, in order of its choices.

    `rows` [N or more, D], in the order of pairs; `weights` [T, K] -> [T, D] in the type of weights.
    Rows of pairs without an expert are not looked at.
    """
    out = jnp.zeros((len(expert_ids), rows.shape[1]), weights.dtype)
    for choice in range(expert_ids.shape[1]):
        present = expert_ids[:, choice, None] < experts
        row = rows[pairs.place[:, choice]].astype(weights.dtype)
        out = out + jnp.where(present, weights[:, choice, None] * row, 0)
    return out
