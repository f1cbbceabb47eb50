"""Mixture of experts by running every expert on every token. O(T E) work and memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gemtool.kernels.dtypes import accumulator
from gemtool.kernels.glu import Glu


def experts_reference(
    x: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array,
    w: dict[str, jax.Array],
    glu: Glu,
) -> jax.Array:
    """See `gemtool.kernels.experts.expert_mlp`; `w` has its matrices and biases by name."""
    dtype = accumulator(x.dtype)
    wide = {name: array.astype(dtype) for name, array in w.items()}

    def project(name: str, rows: str, y: jax.Array) -> jax.Array:
        y = jnp.einsum(f"{rows},eio->eto", y, wide[name])
        bias = wide.get(f"{name}_bias")
        return y if bias is None else y + bias[:, None, :]

    x_ = x.astype(dtype)
    y = project("down", "eti", glu(project("gate", "ti", x_), project("up", "ti", x_)))
    chosen = expert_ids[:, :, None] == jnp.arange(len(w["gate"]), dtype=jnp.int32)[None, None]
    share = jnp.where(chosen, weights.astype(dtype)[:, :, None], 0).sum(axis=1)  # [T, E]
    return jnp.einsum("te,etd->td", share, y).astype(x.dtype)
