"""Mixture of experts by running every expert on every token. O(T E) work and memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gemtool.kernels.dispatch import accumulator


def experts_reference(
    x: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    w_down: jax.Array,
) -> jax.Array:
    """See `gemtool.kernels.experts.expert_mlp`."""
    dtype = accumulator(x.dtype)
    x_, gate_, up_, down_ = (a.astype(dtype) for a in (x, w_gate, w_up, w_down))
    gate = jnp.einsum("td,edf->etf", x_, gate_)
    up = jnp.einsum("td,edf->etf", x_, up_)
    y = jnp.einsum("etf,efd->etd", jax.nn.silu(gate) * up, down_)
    chosen = expert_ids[:, :, None] == jnp.arange(len(w_gate), dtype=jnp.int32)[None, None]
    share = jnp.where(chosen, weights.astype(dtype)[:, :, None], 0).sum(axis=1)  # [T, E]
    return jnp.einsum("te,etd->td", share, y).astype(x.dtype)
