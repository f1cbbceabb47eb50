"""One attention layer, in two forms that agree: whole packed sequences, and steps with a cache.

For the normed hidden rows x of one document, and for each query head with its key/value head,

    h_t  = sum_j conv_j * x_{t-j}                  depthwise causal convolution (`qk_conv` taps)
    q_t  = W_q h_t       k_t = W_k h_{t - key_shift}       v_t = W_v x_t       each plus its bias
    q, k = norm(q), norm(k), rotated by their position where the kind has `rope_theta`
    s_ti = cap(temperature * <q_t, k_i>)           for the i <= t within the window or chunk of t
    y_t  = W_o sum_i softmax_i(s_t., sink) v_i + bias

With `key_shift` = 1 and W_q = W_k, the query after "...ABC" matches the key of whatever token
followed an earlier "...ABC" and returns that token's value: recall in a single layer.

A step over new rows needs little of the past: `conv_tail` rows of x, and the keys and values within
reach. Windows and chunks cache keys *before* rotation and rotate relative to the step, since float32
angles of absolute positions lose their meaning at millions of tokens.

Axes: B batch, T new positions, S keys, D model, H query heads, N key/value heads, K head dimension.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gemtool.kernels.attention import chunk_segments
from gemtool.model.buffers import buffer_attention, write_rows
from gemtool.model.config import LayerKind, ModelConfig
from gemtool.model.layers import norm, plain_rms_norm, round_to, unit_norm
from gemtool.model.mesh import constrain
from gemtool.model.parallel import cached_attention, packed_attention
from gemtool.model.params import Tree
from gemtool.model.rope import rotary


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """What one layer keeps of the past.

    `k`, `v`      in the config's `kv_dtype`. Full attention: a buffer (`buffers.py`), whose rows from
                  the cache's length on are free. Window or chunk: [B, S, N, K], S is `window`, the
                  last row newest.
    `tail`        float32 [B, conv_tail, D], the last normed hidden rows, newest last; zeros before
                  the beginning.
    """

    k: jax.Array
    v: jax.Array
    tail: jax.Array


Extended = tuple[jax.Array, jax.Array, jax.Array, dict[str, Any], LayerCache]
"""Queries, the keys and values that they attend to, which of those they see (options of the kernel),
and the new cache."""


def attend_packed(
    p: Tree,
    config: ModelConfig,
    kind: LayerKind,
    x: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
) -> jax.Array:
    """Attention over whole packed sequences, never across segments.

    `x` [B, T, D] normed; `positions`, `segments` int32 [B, T] -> [B, T, D].
    """
    before = ((0, 0), (kind.conv_tail, 0))
    rows = jnp.pad(x, (*before, (0, 0)))
    q, k, v = _project(p, config, kind, rows, jnp.pad(segments, before, constant_values=-1))
    q, k = _sharpened(kind, _rotated(kind, q, positions), positions), _rotated(kind, k, positions)
    if not kind.bounded:
        k = round_to(k, config.kv_dtype)
    visible = segments
    if kind.attention == "chunk":
        visible = chunk_segments(positions, segments, kind.window)
    # A chunk is a window too: how far back keys are wanted.
    window = kind.window if kind.bounded else None
    return _attend(p, kind, (q, k, v), packed_attention, segments=visible, window=window)


def attend_cached(
    p: Tree,
    config: ModelConfig,
    kind: LayerKind,
    x: jax.Array,
    cache: LayerCache,
    length: jax.Array,
    valid: jax.Array,
) -> tuple[jax.Array, LayerCache]:
    """Attention of T new positions over the cache and themselves.

    `x` [B, T, D] normed; `length` int32 [], positions already cached; `valid` int32 [], how many
    of the T are real. Returns [B, T, D], of which rows from `valid` on mean nothing, and the cache
    with the real rows added.
    """
    extend, kernel = (
        (_extend_bounded, cached_attention) if kind.bounded else (_extend_full, buffer_attention)
    )
    q, k, v, attended, cache = extend(p, config, kind, x, cache, length, valid)
    return _attend(p, kind, (q, k, v), kernel, **attended), cache


def write_keys(
    p: Tree,
    config: ModelConfig,
    kind: LayerKind,
    x: jax.Array,
    cache: LayerCache,
    length: jax.Array,
    valid: jax.Array,
) -> LayerCache:
    """The cache that `attend_cached` returns, without attending."""
    extend = _extend_bounded if kind.bounded else _extend_full
    return extend(p, config, kind, x, cache, length, valid)[-1]


def _extend_full(
    p: Tree,
    config: ModelConfig,
    kind: LayerKind,
    x: jax.Array,
    cache: LayerCache,
    length: jax.Array,
    valid: jax.Array,
) -> Extended:
    """New keys and values into the free rows of the buffer; queries see all rows before them.

    Rows beyond `valid` are written too (a fixed shape costs nothing) and overwritten by the next
    step; causality hides them until then.
    """
    rows = _after(cache.tail.astype(x.dtype), x)
    q, k, v = _project(p, config, kind, rows)
    positions = (length + jnp.arange(x.shape[1], dtype=jnp.int32))[None, :]
    q, k = _sharpened(kind, _rotated(kind, q, positions), positions), _rotated(kind, k, positions)
    k = round_to(k, config.kv_dtype).astype(cache.k.dtype)
    v = v.astype(cache.v.dtype)
    cache = LayerCache(
        k=write_rows(cache.k, k, length),
        v=write_rows(cache.v, v, length),
        tail=_tail(kind, rows, valid).astype(cache.tail.dtype),
    )
    return q, cache.k, cache.v, {"new": (k, v), "length": length}, cache


def _extend_bounded(
    p: Tree,
    config: ModelConfig,
    kind: LayerKind,
    x: jax.Array,
    cache: LayerCache,
    length: jax.Array,
    valid: jax.Array,
) -> Extended:
    """Keys and values of the last `window` positions followed by the new ones, rotated relative to
    the step."""
    steps, window = x.shape[1], kind.window
    rows = _after(cache.tail.astype(x.dtype), x)
    q, k, v = _project(p, config, kind, rows)
    k = _after(cache.k, k.astype(cache.k.dtype), "kv_heads", None)
    v = _after(cache.v, v.astype(cache.v.dtype), "kv_heads", None)
    cache = LayerCache(
        k=jax.lax.dynamic_slice_in_dim(k, valid, window, axis=1),
        v=jax.lax.dynamic_slice_in_dim(v, valid, window, axis=1),
        tail=_tail(kind, rows, valid).astype(cache.tail.dtype),
    )
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    relative = jnp.arange(window + steps, dtype=jnp.int32)[None, :]
    q, k = _rotated(kind, q, relative[:, window:]), _rotated(kind, k, relative)
    # Their positions in the document, plus the window.
    later = relative + length
    q = _sharpened(kind, q, later[:, window:] - window)
    # Rows before the beginning do not exist: they get 0. Others, 1 or the number of their chunk.
    segments = later // window
    if kind.attention == "window":
        segments = jnp.minimum(segments, 1)
    segments = jnp.broadcast_to(segments, (x.shape[0], window + steps))
    attended = {
        "window": window,
        "q_start": window,
        "q_segments": segments[:, window:],
        "kv_segments": segments,
    }
    return q, k, v, attended, cache


def _tail(kind: LayerKind, rows: jax.Array, valid: jax.Array) -> jax.Array:
    """The last `conv_tail` real rows of [B, conv_tail + T, D]."""
    return jax.lax.dynamic_slice_in_dim(rows, valid, kind.conv_tail, axis=1)


def _after(past: jax.Array, new: jax.Array, *axes: str | None) -> jax.Array:
    """`past` [B, S, ...] and `new` [B, T, ...] as one.

    On a mesh every device gets all rows, also where the context axis cuts the new ones. `axes` are the
    logical ones after the first two.
    """
    whole = (None, None, *(axes or (None,)))
    return constrain(jnp.concatenate([past, constrain(new, *whole)], axis=1), *whole)


def _cut(x: jax.Array) -> jax.Array:
    """New rows [B, T, D] that every device has, cut again for what treats each by itself."""
    return constrain(constrain(x, None, None, None), None, "length", None)


def _attend(
    p: Tree,
    kind: LayerKind,
    qkv: tuple[jax.Array, jax.Array, jax.Array],
    kernel: Callable[..., jax.Array],
    **visible: Any,
) -> jax.Array:
    """Softmax over what is visible (options of `kernel`), and the output projection.

    Queries [B, T, H, K], keys and values [B, S, N, K] -> [B, T, D].
    """
    out = kernel(
        *qkv, scale=kind.scale, sink=p.get("sink"), soft_cap=kind.soft_cap or None, **visible
    )
    y = jnp.einsum("bthk,hkd->btd", out, p["o"])
    return y + p["o_bias"][None, None, :] if kind.out_bias else y


def _project(
    p: Tree,
    config: ModelConfig,
    kind: LayerKind,
    rows: jax.Array,
    segments: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [B, T, H, K], keys and values [B, T, N, K] of the last T of `rows`, unrotated.

    `rows` [B, conv_tail + T, D] begin with the rows that convolution and shift look back to;
    `segments` int32 [B, conv_tail + T] keep them from looking into another document. Values, and
    keys that are cached unrotated, come rounded for the cache.
    """
    steps = rows.shape[1] - kind.conv_tail
    mixed = _convolve(p["conv"], rows, segments) if kind.qk_conv > 1 else rows
    for_q, for_k, for_v = mixed[:, kind.key_shift :], mixed[:, :steps], rows[:, kind.conv_tail :]
    if kind.key_shift and segments is not None:
        same = segments[:, -steps - 1 : -1] == segments[:, -steps:]
        for_k = jnp.where(same[:, :, None], for_k, 0.0)
    if segments is None:
        for_q, for_k, for_v = (_cut(x) for x in (for_q, for_k, for_v))
    q = jnp.einsum("btd,dhk->bthk", for_q, p["q"])
    k = jnp.einsum("btd,dnk->btnk", for_k, p["k"])
    v = jnp.einsum("btd,dnk->btnk", for_v, p["v"])
    if kind.qkv_bias:
        q, k, v = (x + p[f"{n}_bias"][None, None] for n, x in zip("qkv", (q, k, v), strict=True))
    if kind.qk_norm == "unit":
        q, k = unit_norm(q), unit_norm(k)
        q = q * jnp.exp(p["log_temperature"]).astype(q.dtype)[None, None, :, None]
    elif kind.qk_norm == "rms":
        q, k = norm(config, q, p["q_norm"]), norm(config, k, p["k_norm"])
    elif kind.qk_norm == "rms_joint":
        q, k = _joint_norm(config, q, p["q_norm"]), _joint_norm(config, k, p["k_norm"])
    elif kind.qk_norm == "rms_plain":
        q, k = plain_rms_norm(q, config.norm_eps), plain_rms_norm(k, config.norm_eps)
    if kind.bounded:
        k = round_to(k, config.kv_dtype)
    return q, k, round_to(v, config.kv_dtype)


def _joint_norm(config: ModelConfig, x: jax.Array, scale: jax.Array) -> jax.Array:
    """RMSNorm over all heads of a position as one vector: [B, T, H, K] and [H, K] -> [B, T, H, K]."""
    return norm(config, x.reshape(*x.shape[:2], -1), scale.reshape(-1)).reshape(x.shape)


def _rotated(kind: LayerKind, x: jax.Array, positions: jax.Array) -> jax.Array:
    """Queries or keys [B, T, H, K] rotated by positions int32 [B or 1, T], where the kind is."""
    if not kind.rope_theta:
        return x
    return rotary(x, positions, kind.rope_theta, kind.rope_scaling)


def _sharpened(kind: LayerKind, q: jax.Array, positions: jax.Array) -> jax.Array:
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
