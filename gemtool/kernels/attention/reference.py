"""Attention as one reads it in a book: every score, one mask, one softmax. O(T S) memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gemtool.kernels.dtypes import accumulator

NOTHING = -1e30
"""Log of the sum of exponentials of a query that sees no key: finite, so that it can be subtracted."""


def attention_reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float,
    causal: bool,
    window: int | None,
    q_start: int | jax.Array,
    kv_length: int | jax.Array,
    q_segments: jax.Array | None,
    kv_segments: jax.Array | None,
    sink: jax.Array | None,
    soft_cap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """See `gemtool.kernels.attention.partial_attention`."""
    batch, length, heads = q.shape[:3]
    dtype = accumulator(q.dtype)
    repeats = heads // k.shape[2]
    keys = jnp.repeat(k.astype(dtype), repeats, axis=2)
    values = jnp.repeat(v.astype(dtype), repeats, axis=2)
    scores = jnp.einsum("bthd,bshd->bhts", q.astype(dtype), keys) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)

    at = (jnp.asarray(q_start, jnp.int32) + jnp.arange(length, dtype=jnp.int32))[:, None]
    of = jnp.arange(k.shape[1], dtype=jnp.int32)[None, :]
    visible = jnp.broadcast_to(of < jnp.asarray(kv_length, jnp.int32), (length, k.shape[1]))
    if causal:
        visible &= of <= at
    if window is not None:
        visible &= of > at - window
    visible = jnp.broadcast_to(visible[None], (batch, *visible.shape))
    if q_segments is not None and kv_segments is not None:
        own, theirs = q_segments[:, :, None], kv_segments[:, None, :]
        visible &= (own == theirs) & (own != 0)

    visible = visible[:, None]  # [B, 1, T, S]
    hidden = jnp.finfo(dtype).min
    top = jnp.where(visible, scores, hidden).max(axis=-1, keepdims=True)
    if sink is not None:
        logit = sink.astype(dtype)[None, :, None, None]
        top = jnp.maximum(top, logit)
    # A constant shift of the logits changes nothing, so no gradient flows through it. It also has
    # to be inside the `where`: exp of a hidden score could overflow and make the gradient NaN.
    top = jax.lax.stop_gradient(top)
    masses = jnp.exp(jnp.where(visible, scores - top, hidden))
    total = masses.sum(axis=-1, keepdims=True)
    if sink is not None:
        total = total + jnp.exp(logit - top)
    total = jnp.where(total == 0, 1, total)
    out = jnp.einsum("bhts,bshd->bthd", masses / total, values).astype(q.dtype)
    lse = jnp.maximum(top + jnp.log(total), NOTHING)
    return out, lse[..., 0].transpose(0, 2, 1)
