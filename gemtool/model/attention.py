"""One attention layer, in two forms that agree: whole packed sequences, and steps with a cache.

For the normed hidden rows x of one document, and for each query head with its key/value head,

    h_t  = sum_j conv_j * x_{t-j}                  depthwise causal convolution (`qk_conv` taps)
    q_t  = W_q h_t       k_t = W_k h_{t - key_shift}       v_t = W_v x_t       each plus its bias
    q, k = norm(q), norm(k), rotated by their position where the kind has `rope_theta`
    s_ti = cap(temperature * <q_t, k_i>)           for the i <= t within the window or chunk of t
    y_t  = W_o sum_i softmax_i(s_t., sink) v_i + bias

With `key_shift` = 1 and W_q = W_k, the query after "...ABC" matches the key of whatever token
followed an earlier "...ABC" and returns that token's value: recall in a single layer.

An indexed layer is trained so. In a step its queries see the positions of some blocks only: their own,
a few before it, and those that an index chooses (index.py). Where that is all blocks, it is the same.

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
from gemtool.model import index
from gemtool.model.batch import Batch
from gemtool.model.buffers import (
    buffer_attention,
    buffer_block_attention,
    buffer_capacity,
    write_rows,
)
from gemtool.model.config import LayerKind, ModelConfig
from gemtool.model.kinds import IndexConfig
from gemtool.model.layers import norm, plain_rms_norm, round_to, unit_norm
from gemtool.model.mesh import constrain
from gemtool.model.parallel import Others, cached_attention, chosen_blocks, packed_attention
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
    `index`       of an indexed layer, else None.
    """

    k: jax.Array
    v: jax.Array
    tail: jax.Array
    index: index.IndexCache | None = None


Sources = tuple[jax.Array, jax.Array, jax.Array]
"""Rows [B, T, D] that queries, keys and values are made from."""

Extended = tuple[jax.Array, jax.Array, jax.Array, dict[str, Any], LayerCache]
"""Queries, the keys and values that they attend to, which of those they see (options of the kernel),
and the new cache."""


def attend_packed(
    p: Tree,
    config: ModelConfig,
    kind: LayerKind,
    x: jax.Array,
    batch: Batch,
    *,
    negatives: int = 0,
    learn_index: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Attention over whole packed sequences, never across segments.

    With `negatives`, queries of an unbounded layer without positions also see the keys of so many
    other sequences of the batch, those of parts of their own sequence's documents excepted: what they
    look for is to be told from more than one sequence holds.

    `x` [B, T, D] normed, of the tokens of `batch` -> [B, T, D], and what `index.objective` says of an
    indexed layer if `learn_index`, else {}.
    """
    segments, positions = batch.segments, batch.positions
    before = ((0, 0), (kind.conv_tail, 0))
    rows = jnp.pad(x, (*before, (0, 0)))
    sources = _sources(p, kind, rows, jnp.pad(segments, before, constant_values=-1))
    q, k, v = _project(p, config, kind, sources)
    turned, k = _rotated(kind, q, positions), _rotated(kind, k, positions)
    q = _sharpened(kind, turned, positions)
    if not kind.bounded:
        k = round_to(k, config.kv_dtype)
    visible = segments
    if kind.attention == "chunk":
        visible = chunk_segments(positions, segments, kind.window)
    # A chunk is a window too: how far back keys are wanted.
    window = kind.window if kind.bounded else None
    others = None
    if negatives and not kind.bounded and not kind.rope_theta:
        others = _others(k, v, batch, negatives)
    out = _attend(
        p, kind, (q, k, v), packed_attention, segments=visible, window=window, others=others
    )
    if not (learn_index and kind.index):
        return out, {}
    documents = segments if batch.documents is None else batch.documents
    far = _sharpened(kind, turned, jnp.full((1, 1), kind.index.horizon, jnp.int32))
    return out, index.objective(
        p["index"], kind, sources[:2], (far, k), p.get("sink"), segments, documents
    )


def _others(k: jax.Array, v: jax.Array, batch: Batch, count: int) -> Others:
    """Keys and values of the `count` sequences before each of a batch, and which of them it sees."""
    documents, present = batch.documents, batch.segments > 0
    if documents is None:
        raise ValueError("negatives: the batch does not say which documents it is of")

    def rolled(x: jax.Array) -> jax.Array:
        return jnp.concatenate([jnp.roll(x, by, axis=0) for by in range(1, count + 1)], axis=1)

    theirs = rolled(documents)  # [B, count * T]
    own = (theirs[:, :, None] == documents[:, None, :]).any(axis=2)
    visible = (rolled(present) & ~own).astype(jnp.int32)
    return Others(rolled(k), rolled(v), present.astype(jnp.int32), visible)


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
    extend = _extend_bounded if kind.bounded else _extend_full
    kernels: dict[str, Callable[..., jax.Array]] = {
        "full": buffer_attention,
        "indexed": buffer_block_attention,
    }
    kernel = kernels.get(kind.attention, cached_attention)
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
    """New keys and values into the free rows of the buffer; queries see all rows before them, or of
    those the blocks that an index chooses.

    Rows beyond `valid` are written too (a fixed shape costs nothing) and overwritten by the next
    step; causality hides them until then.
    """
    rows = _after(cache.tail.astype(x.dtype), x)
    sources = _sources(p, kind, rows)
    q, k, v = _project(p, config, kind, sources)
    positions = (length + jnp.arange(x.shape[1], dtype=jnp.int32))[None, :]
    q, k = _sharpened(kind, _rotated(kind, q, positions), positions), _rotated(kind, k, positions)
    k = round_to(k, config.kv_dtype).astype(cache.k.dtype)
    v = v.astype(cache.v.dtype)
    cache = LayerCache(
        k=write_rows(cache.k, k, length),
        v=write_rows(cache.v, v, length),
        tail=_tail(kind, rows, valid).astype(cache.tail.dtype),
        index=cache.index,
    )
    if kind.index is None:
        return q, cache.k, cache.v, {"new": (k, v), "length": length}, cache
    cache, blocks = _extend_index(p["index"], kind.index, sources, cache, positions[0], valid)
    attended = {"blocks": blocks, "block": kind.index.block, "length": length}
    return q, cache.k, cache.v, attended, cache


def _extend_index(
    p: Tree,
    config: IndexConfig,
    sources: Sources,
    cache: LayerCache,
    positions: jax.Array,
    valid: jax.Array,
) -> tuple[LayerCache, jax.Array]:
    """The cache with the index of new positions int32 [T], and the blocks int32 [B, T, C] that their
    queries attend to."""
    past = cache.index
    assert past is not None
    queries, keys = index.query_vectors(p, sources[0]), index.key_vectors(p, sources[1])
    queries, keys = (constrain(x, None, None, None) for x in (queries, keys))
    now = index.extend(config, past, keys, queries, positions[0], valid)
    chosen = chosen_blocks(
        jnp.concatenate([past.queries, queries], axis=1),
        now.landmarks,
        candidates=index.candidates(config, positions),
        width=index.width(config, positions),
        most=config.most(buffer_capacity(cache.k)),
        sticky=config.sticky,
    )
    local = index.local_blocks(config, positions)
    local = jnp.broadcast_to(local[None], (*chosen.shape[:2], local.shape[1]))
    cache = dataclasses.replace(cache, index=now)
    return cache, jnp.concatenate([local, chosen], axis=2)


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
    q, k, v = _project(p, config, kind, _sources(p, kind, rows))
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


def _sources(
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


def _project(
    p: Tree, config: ModelConfig, kind: LayerKind, sources: Sources
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [B, T, H, K], keys and values [B, T, N, K] of their sources, unrotated.

    Values, and keys that are cached unrotated, come rounded for the cache.
    """
    for_q, for_k, for_v = sources
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
