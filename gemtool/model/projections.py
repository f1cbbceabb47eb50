"""What queries, keys and values of an attention layer are made from: rows, mixed, projected, normed,
rotated.

Axes: B batch, T new positions, D model, H query heads, N key/value heads, K head dimension.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gemtool.model.config import LayerKind, ModelConfig
from gemtool.model.layers import norm, plain_rms_norm, round_to, unit_norm
from gemtool.model.mesh import constrain
from gemtool.model.params import Tree
from gemtool.model.rope import rotary

Sources = tuple[jax.Array, jax.Array, jax.Array]
"""Rows [B, T, D] that queries, keys and values are made from."""


def sources_of(
    p: Tree, kind: LayerKind, rows: jax.Array, segments: jax.Array | None = None
) -> Sources:
    """What queries, keys and values of the last T of `rows` are made from, [B, T, D] each.

    `rows` [B, conv_tail + T, D] begin with the rows that convolution and shift look back to;
    `segments` int32 [B, conv_tail + T] keep them from looking into another document.
    """
    steps = rows.shape[1] - kind.conv_tail
    mixed = _convolve(p["conv"], rows, segments) if kind.qk_conv > 1 else rows
    for_q, for_k, for_v = mixed[:, kind.key_shift :], mixed[:, :steps], rows[:, kind.conv_tail :]
    if kind.key_shift and segments is not None:
        same = segments[:, -steps - 1 : -1] == segments[:, -steps:]
        for_k = jnp.where(same[:, :, None], for_k, 0.0)
    if segments is None:
        for_q, for_k, for_v = (_cut(x) for x in (for_q, for_k, for_v))
    return for_q, for_k, for_v


def _cut(x: jax.Array) -> jax.Array:
    """New rows [B, T, D] that every device has, cut again for what treats each by itself."""
    return constrain(constrain(x, None, None, None), None, "length", None)


def queries_of(p: Tree, config: ModelConfig, kind: LayerKind, sources: Sources) -> jax.Array:
    """Queries [B, T, H, K] of their sources, unrotated."""
    q = jnp.einsum("btd,dhk->bthk", sources[0], p["q"])
    if kind.qkv_bias:
        q = q + p["q_bias"][None, None]
    q = _normed(p, config, kind, q, "q_norm")
    if kind.qk_norm == "unit":
        q = q * jnp.exp(p["log_temperature"]).astype(q.dtype)[None, None, :, None]
    return q


def keys_and_values_of(
    p: Tree, config: ModelConfig, kind: LayerKind, sources: Sources
) -> tuple[jax.Array, jax.Array]:
    """Keys and values [B, T, N, K] of their sources, unrotated. Values, and keys that are cached
    unrotated, come rounded for the cache."""
    k = jnp.einsum("btd,dnk->btnk", sources[1], p["k"])
    v = jnp.einsum("btd,dnk->btnk", sources[2], p["v"])
    if kind.qkv_bias:
        k, v = k + p["k_bias"][None, None], v + p["v_bias"][None, None]
    k = _normed(p, config, kind, k, "k_norm")
    if kind.bounded:
        k = round_to(k, config.kv_dtype)
    return k, round_to(v, config.kv_dtype)


def _normed(p: Tree, config: ModelConfig, kind: LayerKind, x: jax.Array, scale: str) -> jax.Array:
    """Queries or keys [B, T, H, K] as `qk_norm` says."""
    match kind.qk_norm:
        case "unit":
            return unit_norm(x)
        case "rms":
            return norm(config, x, p[scale])
        case "rms_joint":
            return _joint_norm(config, x, p[scale])
        case "rms_plain":
            return plain_rms_norm(x, config.norm_eps)
        case _:
            return x


def _joint_norm(config: ModelConfig, x: jax.Array, scale: jax.Array) -> jax.Array:
    """RMSNorm over all heads of a position as one vector: [B, T, H, K] and [H, K] -> [B, T, H, K]."""
    return norm(config, x.reshape(*x.shape[:2], -1), scale.reshape(-1)).reshape(x.shape)


def rotated(kind: LayerKind, x: jax.Array, positions: jax.Array) -> jax.Array:
    """Queries or keys [B, T, H, K] rotated by positions int32 [B or 1, T], where the kind is."""
    if not kind.rope_theta:
        return x
    return rotary(x, positions, kind.rope_theta, kind.rope_scaling)


def sharpened(kind: LayerKind, q: jax.Array, positions: jax.Array) -> jax.Array:
    """Queries [B, T, H, K] multiplied by what `length_scale` says of positions int32 [B or 1, T]."""
    if not kind.length_scale:
        return q
    steps = ((positions + 1) // kind.length_floor).astype(jnp.float32)
    factor = 1 + kind.length_scale * jnp.log1p(steps)
    return q * factor.astype(q.dtype)[:, :, None, None]


def _convolve(taps: jax.Array, rows: jax.Array, segments: jax.Array | None) -> jax.Array:
    """Depthwise causal convolution, [B, C-1+M, D] -> [B, M, D]; taps [C, D], the first for now."""
    width = taps.shape[0]
    count = rows.shape[1] - width + 1
    total = jnp.zeros_like(rows[:, :count])
    for j in range(width):
        back = slice(width - 1 - j, width - 1 - j + count)
        term = rows[:, back] * taps[j][None, None, :]
        if segments is not None and j > 0:
            same = segments[:, back] == segments[:, width - 1 :]
            term = jnp.where(same[:, :, None], term, 0.0)
        total = total + term
    return total
