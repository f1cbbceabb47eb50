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
        What `partial_attention` gives for all keys together, the output in the type of the first.
    """
    logs = jnp.stack([lse for _, lse in parts])
    everything = logs if sink is None else jnp.concatenate([logs, _like(sink, logs[:1])])
    total = jax.nn.logsumexp(everything, axis=0)
    shares = jnp.exp(logs - total[None])
    wide = (out.astype(total.dtype) for out, _ in parts)
    out = sum(out * share[..., None] for out, share in zip(wide, shares, strict=True))
    return out.astype(parts[0][0].dtype), total


def _like(sink: jax.Array, logs: jax.Array) -> jax.Array:
    return jnp.broadcast_to(sink.astype(logs.dtype)[None, None, None], logs.shape)
