"""Attention to several sets of keys becomes attention to all of them."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def merge_attention(
    parts: Sequence[tuple[jax.Array, jax.Array]], sink: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Attention to several sets of keys, from the attention to each.

    Args:
        parts: of `partial_attention`, with the same queries and without a sink.
        sink: floating [H], of all.

    Returns:
        What `partial_attention` gives for all keys together.
    """
    logs = jnp.stack([lse for _, lse in parts])
    everything = logs if sink is None else jnp.concatenate([logs, _like(sink, logs[:1])])
    total = jax.nn.logsumexp(everything, axis=0)
    shares = jnp.exp(logs - total[None])
    out = sum(out * share[..., None] for (out, _), share in zip(parts, shares, strict=True))
    return out.astype(parts[0][0].dtype), total


def _like(sink: jax.Array, logs: jax.Array) -> jax.Array:
    return jnp.broadcast_to(sink.astype(logs.dtype)[None, None, None], logs.shape)
