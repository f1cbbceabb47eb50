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
The first of them may lie in pages that are only read (pages.py).

A step over new rows needs little of the past: `conv_tail` rows of x, and the keys and values within
reach. Windows and chunks cache keys *before* rotation and rotate relative to the step, since float32
angles of absolute positions lose their meaning at millions of tokens.

Axes: B batch, T new positions, S keys, D model, H query heads, N key/value heads, K head dimension.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gemtool.kernels.attention import chunk_segments
from gemtool.model import index
from gemtool.model.batch import Batch
from gemtool.model.buffers import (
    buffer_attention,
    buffer_block_attention,
    read_rows,
    write_rows,
)
from gemtool.model.config import LayerKind, ModelConfig
from gemtool.model.kinds import IndexConfig
from gemtool.model.layers import round_to
from gemtool.model.mesh import constrain
from gemtool.model.pages import Pages, pages_of
from gemtool.model.parallel import Others, cached_attention, chosen_blocks, packed_attention
from gemtool.model.params import Tree
from gemtool.model.projections import (
    Sources,
    keys_and_values_of,
    queries_of,
    rotated,
    sharpened,
    sources_of,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """What one layer keeps of the past.

    `k`, `v`      in the config's `kv_dtype`. Full attention: a buffer (`buffers.py`), whose rows from
                  the cache's length on are free; it has none of positions that lie in pages.
                  Window or chunk: [B, S, N, K], S is `window`, the last row newest.
    `tail`        float32 [B, conv_tail, D], the last normed hidden rows, newest last; zeros before
                  the beginning.
    `index`       of an indexed layer, else None.

    A layer that shares another's keys has None for `k` and `v`.
    """

    k: jax.Array
    v: jax.Array
    tail: jax.Array
    index: index.IndexCache | None = None


class Keys(NamedTuple):
    """What the queries of whole packed sequences attend to, in a layer or in several that share it.

    `k`, `v`    [B, T, N, K], rotated and rounded.
    `vectors`   float32 [B, T, I + M], what an index makes of the keys; None where nobody asks.
    """

    k: jax.Array
    v: jax.Array
    vectors: jax.Array | None


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
    shared: Keys | None = None,
    negatives: int = 0,
    learn_index: bool = False,
) -> tuple[jax.Array, Keys, dict[str, jax.Array]]:
    """Attention over whole packed sequences, never across segments.

    With `negatives`, queries of an unbounded layer without positions also see the keys of so many
    other sequences of the batch, those of parts of their own sequence's documents excepted: what they
    look for is to be told from more than one sequence holds.

    `x` [B, T, D] normed, of the tokens of `batch`; `shared`, the keys of another layer if this one
    attends to them. Returns [B, T, D], the keys that were attended to, and what `index.objective` says
    of an indexed layer if `learn_index`, else {}.
    """
    segments, positions = batch.segments, batch.positions
    before = ((0, 0), (kind.conv_tail, 0))
    rows = jnp.pad(x, (*before, (0, 0)))
    sources = sources_of(p, kind, rows, jnp.pad(segments, before, constant_values=-1))
    learn_index = learn_index and kind.index is not None
    if shared is None:
        k, v = keys_and_values_of(p, config, kind, sources)
        k, vectors = rotated(kind, k, positions), None
        if not kind.bounded:
            k = round_to(k, config.kv_dtype)
        if learn_index:
            vectors = index.key_vectors(p["index"], jax.lax.stop_gradient(sources[1]))
        shared = Keys(k, v, vectors)
    k, v, vectors = shared
    turned = rotated(kind, queries_of(p, config, kind, sources), positions)
    q = sharpened(kind, turned, positions)
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
    if not learn_index:
        return out, shared, {}
    assert kind.index is not None
    assert vectors is not None
    documents = segments if batch.documents is None else batch.documents
    far = sharpened(kind, turned, jnp.full((1, 1), kind.index.horizon, jnp.int32))
    return (
        out,
        shared,
        index.objective(
            p["index"],
            kind,
            sources[0],
            vectors,
            (far, k),
            p.get("sink"),
            segments,
            documents,
            batch.weights,
        ),
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
    source: LayerCache | None = None,
    pages: Pages | None = None,
) -> tuple[jax.Array, LayerCache]:
    """Attention of T new positions over the cache and themselves.

    `x` [B, T, D] normed; `length` int32 [], positions already cached; `valid` int32 [], how many
    of the T are real; `source`, where the layer shares another's keys, the cache of that one with the
    new positions added; `pages`, of an indexed layer, the keys and values of the first positions, which
    its buffer then lacks. Returns [B, T, D], of which rows from `valid` on mean nothing, and the cache
    with the real rows added.
    """
    extend: Callable[..., Extended] = _extend_bounded
    if source is not None:
        extend = partial(_extend_shared, source, pages)
    elif not kind.bounded:
        extend = partial(_extend_full, pages)
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
    pages: Pages | None = None,
) -> LayerCache:
    """The cache that `attend_cached` returns, without attending."""
    extend = _extend_bounded if kind.bounded else partial(_extend_full, pages)
    extended = extend(p, config, kind, x, cache, length, valid)[-1]
    if extended.index is None or cache.index is None:
        return extended
    # Nobody attends, so no page is touched, and the compiler drops the choice of blocks.
    own = dataclasses.replace(extended.index, touched=cache.index.touched)
    return dataclasses.replace(extended, index=own)


def _extend_full(
    pages: Pages | None,
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
    sources = sources_of(p, kind, rows)
    k, v = keys_and_values_of(p, config, kind, sources)
    positions = (length + jnp.arange(x.shape[1], dtype=jnp.int32))[None, :]
    k = round_to(rotated(kind, k, positions), config.kv_dtype).astype(cache.k.dtype)
    v = v.astype(cache.v.dtype)
    found = cache.index
    if kind.index is not None and found is not None:
        vectors = constrain(index.key_vectors(p["index"], sources[1]), None, None, None)
        found = index.extend_keys(kind.index, found, vectors, length, valid)
    start = length if pages is None else length - pages.length
    cache = LayerCache(
        write_rows(cache.k, k, start), write_rows(cache.v, v, start), cache.tail, found
    )
    return _attending(p, config, kind, sources, rows, cache, cache, (k, v), pages, length, valid)


def _extend_shared(
    source: LayerCache,
    pages: Pages | None,
    p: Tree,
    config: ModelConfig,
    kind: LayerKind,
    x: jax.Array,
    cache: LayerCache,
    length: jax.Array,
    valid: jax.Array,
) -> Extended:
    """Queries that attend to the keys and values of another layer."""
    rows = _after(cache.tail.astype(x.dtype), x)
    sources = sources_of(p, kind, rows)
    steps = x.shape[1]
    new = None
    if kind.index is None:
        new = read_rows(source.k, length, steps), read_rows(source.v, length, steps)
    return _attending(p, config, kind, sources, rows, cache, source, new, pages, length, valid)


def _attending(
    p: Tree,
    config: ModelConfig,
    kind: LayerKind,
    sources: Sources,
    rows: jax.Array,
    cache: LayerCache,
    source: LayerCache,
    new: tuple[jax.Array, jax.Array] | None,
    pages: Pages | None,
    length: jax.Array,
    valid: jax.Array,
) -> Extended:
    """Queries to the buffers of `source`, which have the new positions, and to the `pages` before
    them; `new`, the keys and values of the new positions. The cache is that of the layer, whose tail
    and index still lack the queries."""
    steps = sources[0].shape[1]
    positions = (length + jnp.arange(steps, dtype=jnp.int32))[None, :]
    q = rotated(kind, queries_of(p, config, kind, sources), positions)
    q = sharpened(kind, q, positions)
    tail = _tail(kind, rows, valid).astype(cache.tail.dtype)
    cache = dataclasses.replace(cache, tail=tail)
    if kind.index is None:
        return q, source.k, source.v, {"new": new, "length": length}, cache
    cache, blocks = _chosen(
        p["index"], kind.index, sources[0], cache, source, pages, positions[0], valid
    )
    attended = {"blocks": blocks, "block": kind.index.block, "length": length, "pages": pages}
    return q, source.k, source.v, attended, cache


def _chosen(
    p: Tree,
    config: IndexConfig,
    x: jax.Array,
    cache: LayerCache,
    source: LayerCache,
    pages: Pages | None,
    positions: jax.Array,
    valid: jax.Array,
) -> tuple[LayerCache, jax.Array]:
    """The cache with the index's queries at positions int32 [T], made from x [B, T, D], and with the
    pages that they touch; and the blocks int32 [B, T, C] of `source` that they attend to."""
    assert cache.index is not None
    assert source.index is not None
    assert source.index.landmarks is not None
    vectors = constrain(index.query_vectors(p, x), None, None, None)
    own, recent = index.extend_queries(config, cache.index, vectors, valid)
    chosen = chosen_blocks(
        recent,
        source.index.landmarks,
        candidates=index.candidates(config, positions),
        width=index.width(config, positions),
        most=config.most(index.position_capacity(config, source.index.landmarks.shape[3])),
        sticky=config.sticky,
    )
    local = index.local_blocks(config, positions)
    local = jnp.broadcast_to(local[None], (*chosen.shape[:2], local.shape[1]))
    blocks = jnp.concatenate([local, chosen], axis=2)
    if pages is not None:
        assert own.touched is not None
        # What nobody looks at need not be read.
        real = jnp.arange(len(positions), dtype=jnp.int32) < valid
        blocks = jnp.where(real[None, :, None], blocks, -1)
        touched = own.touched | pages_of(blocks, config.block, pages)
        own = dataclasses.replace(own, touched=touched)
    return dataclasses.replace(cache, index=own), blocks


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
    the step. Of several continuations, `length` is int32 [B]."""
    steps, window = x.shape[1], kind.window
    rows = _after(cache.tail.astype(x.dtype), x)
    sources = sources_of(p, kind, rows)
    q = queries_of(p, config, kind, sources)
    k, v = keys_and_values_of(p, config, kind, sources)
    k = _after(cache.k, k.astype(cache.k.dtype), "kv_heads", None)
    v = _after(cache.v, v.astype(cache.v.dtype), "kv_heads", None)
    cache = LayerCache(
        k=jax.lax.dynamic_slice_in_dim(k, valid, window, axis=1),
        v=jax.lax.dynamic_slice_in_dim(v, valid, window, axis=1),
        tail=_tail(kind, rows, valid).astype(cache.tail.dtype),
    )
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    relative = jnp.arange(window + steps, dtype=jnp.int32)[None, :]
    q, k = rotated(kind, q, relative[:, window:]), rotated(kind, k, relative)
    # Their positions in the document, plus the window.
    later = relative + length.reshape(-1, 1)
    q = sharpened(kind, q, later[:, window:] - window)
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
    return output(p, kind, out)


def output(p: Tree, kind: LayerKind, out: jax.Array) -> jax.Array:
    """What a layer says of what its heads found: [B, T, H, K] -> [B, T, D]."""
    y = jnp.einsum("bthk,hkd->btd", out, p["o"])
    return y + p["o_bias"][None, None, :] if kind.out_bias else y
