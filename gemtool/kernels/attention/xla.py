"""FlashAttention (arXiv 2205.14135) in plain XLA, in the forms that XLA's CPU compiler runs fast.

One scan goes over all (batch row, query block) pairs; inside it a loop with *dynamic* bounds visits
only the key blocks that the query block can see, keeping a running maximum and sum. Blocks that are
visible throughout are visited by a loop without a mask. The backward pass saves the output and the
log of the softmax's denominator, and recomputes the probabilities of each block; gradients of keys
and values accumulate in place.

Inside a block, rows are the queries of one key head: R = G * (queries in the block), G = H / KV.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gemtool.kernels.attention.reference import NOTHING
from gemtool.kernels.dtypes import accumulator
from gemtool.kernels.rows import row_dots

KEY_BLOCK = 128
DECODE_KEY_BLOCK = 512
"""Of one query in a buffer of more than LONG keys; in a shorter one it would be mostly empty."""
LONG = 4096


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of `partial_attention` that are fixed while tracing."""

    scale: float
    causal: bool
    window: int | None
    soft_cap: float | None


def attention_xla(
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
    options = Options(scale, causal, window, soft_cap)
    start = jnp.asarray(q_start, jnp.int32)
    stop = jnp.minimum(jnp.asarray(kv_length, jnp.int32), k.shape[1])
    with jax.named_scope("flash_attention"):
        return _flash(options, q, k, v, start, stop, q_segments, kv_segments, sink)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(
    options: Options,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_start: jax.Array,
    kv_length: jax.Array,
    q_segments: jax.Array | None,
    kv_segments: jax.Array | None,
    sink: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    return _forward(options, q, k, v, q_start, kv_length, q_segments, kv_segments, sink)


def _flash_fwd(options: Options, *arrays: Any) -> tuple[tuple[jax.Array, jax.Array], Any]:
    out, logsumexp = _forward(options, *arrays)
    return (out, logsumexp), (arrays, out, logsumexp)


def _flash_bwd(
    options: Options, saved: Any, d_results: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array | None, ...]:
    (q, k, v, q_start, kv_length, q_segments, kv_segments, sink), out, logsumexp = saved
    plan = _Plan.of(options, q, k, q_start, kv_length, q_segments, kv_segments)
    d_q, d_k, d_v, d_sink = _backward(plan, q, k, v, sink, out, logsumexp, *d_results)
    return d_q, d_k, d_v, None, None, None, None, d_sink


_flash.defvjp(_flash_fwd, _flash_bwd)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How queries and keys are cut into blocks, and which blocks and pairs see each other."""

    options: Options
    q_start: jax.Array
    kv_length: jax.Array
    q_segments: jax.Array | None  # [B * query blocks, Q], as `rows` orders them
    kv_segments: jax.Array | None  # [B, S]
    segment_range: tuple[jax.Array, jax.Array] | None  # least, greatest of a key block [B, N]
    batch: int
    length: int  # T
    groups: int  # G
    kv_heads: int
    dim: int
    queries: int  # a query block
    query_blocks: int  # a batch row
    capacity: int  # S
    keys: int  # a key block
    heads_first: bool  # whether keys and values are reordered once, not block by block
    dtype: Any

    @classmethod
    def of(
        cls,
        options: Options,
        q: jax.Array,
        k: jax.Array,
        q_start: jax.Array,
        kv_length: jax.Array,
        q_segments: jax.Array | None,
        kv_segments: jax.Array | None,
    ) -> _Plan:
        batch, length, heads, dim = q.shape
        capacity, kv_heads = k.shape[1:3]
        groups = heads // kv_heads
        # Much to see gains from tall matmuls; where it is little, the corners of the causal triangle
        # or of the window, which are computed for nothing, weigh more.
        rows = 256 if min(length, options.window or length) >= 2048 else 128
        # A power of two: blocks of queries then end where blocks of keys do.
        queries = max(1 << (rows // groups - 1).bit_length(), 16)
        queries = min(queries, round_up(length, 8)) if length > 1 else 1
        query_blocks = -(-length // queries)
        tall = length == 1 and capacity > LONG
        keys = min(DECODE_KEY_BLOCK if tall else KEY_BLOCK, capacity)
        segment_range = None
        if q_segments is not None and kv_segments is not None:
            pad = query_blocks * queries - length
            q_segments = jnp.pad(q_segments, ((0, 0), (0, pad))).reshape(-1, queries)
            pad = round_up(capacity, keys) - capacity
            blocks = jnp.pad(kv_segments, ((0, 0), (0, pad))).reshape(batch, -1, keys)
            segment_range = range_of(blocks)
        return cls(
            options=options,
            q_start=q_start,
            kv_length=kv_length,
            q_segments=q_segments,
            kv_segments=kv_segments,
            segment_range=segment_range,
            batch=batch,
            length=length,
            groups=groups,
            kv_heads=kv_heads,
            dim=dim,
            queries=queries,
            query_blocks=query_blocks,
            capacity=capacity,
            keys=keys,
            # Only if every key is likely to be read several times: never copy a large cache.
            heads_first=length > 1 and capacity <= 2 * length,
            dtype=accumulator(q.dtype),
        )

    def rows(self, x: jax.Array) -> jax.Array:
        """[B, T, H, X] -> [B * query blocks, KV, R, X]: one item a step of the scan."""
        pad = self.query_blocks * self.queries - self.length
        x = jnp.pad(x.astype(self.dtype), ((0, 0), (0, pad), (0, 0), (0, 0)))
        x = x.reshape(-1, self.queries, self.kv_heads, self.groups, x.shape[-1])
        return x.transpose(0, 2, 3, 1, 4).reshape(-1, *self.row_shape, x.shape[-1])

    def unrows(self, x: jax.Array) -> jax.Array:
        """The inverse of `rows`."""
        x = x.reshape(-1, self.kv_heads, self.groups, self.queries, x.shape[-1])
        x = x.transpose(0, 3, 1, 2, 4)
        x = x.reshape(self.batch, -1, self.kv_heads * self.groups, x.shape[-1])
        return x[:, : self.length]

    @property
    def row_shape(self) -> tuple[int, int]:
        return self.kv_heads, self.groups * self.queries

    def sink_rows(self, sink: jax.Array) -> jax.Array:
        """[H] -> [KV, R]."""
        sink = sink.astype(self.dtype).reshape(self.kv_heads, self.groups, 1)
        return jnp.broadcast_to(sink, (*sink.shape[:2], self.queries)).reshape(self.row_shape)

    def arrange(self, x: jax.Array) -> jax.Array:
        """Keys or values as `block` reads them."""
        return x.transpose(0, 2, 1, 3).astype(self.dtype) if self.heads_first else x

    def block(self, x: jax.Array, row: jax.Array, j: jax.Array) -> jax.Array:
        """Key block j of a batch row -> [KV, keys, D]."""
        start, origin = self.key_start(j), jnp.int32(0)
        # A bare copy of rows of 64 is compiled as scalar code; a product, with an unknown 1, is not.
        one = lax.optimization_barrier(jnp.ones((), self.dtype))
        if self.heads_first:
            shape = (1, self.kv_heads, self.keys, self.dim)
            return lax.dynamic_slice(x, (row, origin, start, origin), shape)[0] * one
        shape = (1, self.keys, self.kv_heads, self.dim)
        block = lax.dynamic_slice(x, (row, start, origin, origin), shape)[0]
        return block.transpose(1, 0, 2).astype(self.dtype) * one

    def key_start(self, j: jax.Array) -> jax.Array:
        """First key of block j. The last block ends at the capacity, so it may overlap the one
        before it; `mask` hides what it repeats.
        """
        return jnp.minimum(j * self.keys, self.capacity - self.keys)

    def bounds(self, step: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Key blocks of a step of the scan: [first, middle) without a mask, [middle, last) with."""
        options, keys = self.options, self.keys
        row, i = step // self.query_blocks, step % self.query_blocks
        oldest = self.q_start + i * self.queries
        newest = self.q_start + jnp.minimum((i + 1) * self.queries, self.length) - 1
        stop = jnp.minimum(self.kv_length, newest + 1) if options.causal else self.kv_length
        first, last = jnp.int32(0), (stop + keys - 1) // keys
        if options.window is not None:
            first = jnp.maximum(oldest - options.window + 1, 0) // keys
        if self.segment_range is not None and self.q_segments is not None:
            # Overlapping ranges of segment numbers are necessary for a pair to match: this skips
            # other documents of a packed sequence, however segments are arranged.
            least, greatest = (x[row] for x in self.segment_range)
            low, high = range_of(self.q_segments[step])
            meet = (least <= high) & (greatest >= low)
            count = meet.shape[0]
            before = jnp.argmax(meet).astype(jnp.int32)
            after = count - jnp.argmax(meet[::-1]).astype(jnp.int32)
            first = jnp.where(meet.any(), jnp.maximum(first, before), count)
            last = jnp.minimum(last, after)
        if self.always_masked:
            return first, first, last
        seen_by_all = jnp.minimum(self.kv_length, oldest + 1) if options.causal else self.kv_length
        return first, seen_by_all // keys, last

    @property
    def always_masked(self) -> bool:
        return self.options.window is not None or self.segment_range is not None

    def mask(self, step: jax.Array, j: jax.Array) -> jax.Array:
        """Which pairs of a query block and key block j see each other: bool [queries, keys]."""
        options = self.options
        row, i = step // self.query_blocks, step % self.query_blocks
        at = self.q_start + i * self.queries + jnp.arange(self.queries, dtype=jnp.int32)[:, None]
        of = self.key_start(j) + jnp.arange(self.keys, dtype=jnp.int32)[None, :]
        visible = (of >= j * self.keys) & (of < self.kv_length)
        if options.causal:
            visible = visible & (of <= at)
        if options.window is not None:
            visible = visible & (of > at - options.window)
        if self.q_segments is not None and self.kv_segments is not None:
            own = self.q_segments[step][:, None]
            theirs = lax.dynamic_slice(self.kv_segments, (row, self.key_start(j)), (1, self.keys))
            visible = visible & (own == theirs) & (own != 0)
        return jnp.broadcast_to(visible, (self.queries, self.keys))

    def scores(
        self, q: jax.Array, k: jax.Array, step: jax.Array, j: jax.Array, masked: bool
    ) -> tuple[jax.Array, jax.Array | None]:
        """Scores [KV, R, keys] of a block, -inf where hidden, and the slope of the soft cap."""
        scores = jnp.einsum("hrd,hsd->hrs", q, k)
        slope = None
        cap = self.options.soft_cap
        if cap is not None:
            squashed = jnp.tanh(scores / cap)
            scores, slope = cap * squashed, 1 - squashed * squashed
        if masked:
            split = scores.reshape(self.kv_heads, self.groups, self.queries, self.keys)
            split = jnp.where(self.mask(step, j)[None, None], split, -jnp.inf)
            scores = split.reshape(scores.shape)
        return scores, slope

    def over_keys(self, step: jax.Array, body: Callable[..., Any], carry: Any) -> Any:
        """Fold `body(j, carry, masked)` over the key blocks that a step of the scan can see."""
        first, middle, last = self.bounds(step)
        if not self.always_masked:
            carry = lax.fori_loop(first, middle, functools.partial(body, masked=False), carry)
        return lax.fori_loop(middle, last, functools.partial(body, masked=True), carry)


def _forward(
    options: Options,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_start: jax.Array,
    kv_length: jax.Array,
    q_segments: jax.Array | None,
    kv_segments: jax.Array | None,
    sink: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """The output [B, T, H, D], and the log of its sum of exponentials [B, T, H]."""
    plan = _Plan.of(options, q, k, q_start, kv_length, q_segments, kv_segments)
    k, v = plan.arrange(k), plan.arrange(v)

    def query_block(item: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        step, queries = item
        row = step // plan.query_blocks

        def key_block(j: jax.Array, carry: Any, masked: bool) -> Any:
            top, total, acc = carry
            scores, _ = plan.scores(queries, plan.block(k, row, j), step, j, masked)
            new_top = jnp.maximum(top, scores.max(axis=-1))
            masses = jnp.exp(scores - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            total = total * shrink + masses.sum(axis=-1)
            acc = acc * shrink[..., None]
            acc = acc + jnp.einsum("hrs,hsd->hrd", masses, plan.block(v, row, j))
            return new_top, total, acc

        # Hidden scores are -inf, and exp(-inf - NOTHING) is 0 where exp(-inf - -inf) would be NaN.
        carry = (
            jnp.full(plan.row_shape, NOTHING, plan.dtype),
            jnp.zeros(plan.row_shape, plan.dtype),
            jnp.zeros((*plan.row_shape, plan.dim), plan.dtype),
        )
        top, total, acc = plan.over_keys(step, key_block, carry)
        if sink is not None:
            logit = plan.sink_rows(sink)
            new_top = jnp.maximum(top, logit)
            shrink = jnp.exp(top - new_top)
            total = total * shrink + jnp.exp(logit - new_top)
            top, acc = new_top, acc * shrink[..., None]
        total = jnp.where(total == 0, 1, total)  # sees nothing: zeros
        return acc / total[..., None], top + jnp.log(total)

    steps = jnp.arange(plan.batch * plan.query_blocks, dtype=jnp.int32)
    out, logsumexp = lax.map(query_block, (steps, plan.rows(q) * options.scale))
    return plan.unrows(out).astype(q.dtype), plan.unrows(logsumexp[..., None])[..., 0]


def _backward(
    plan: _Plan,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sink: jax.Array | None,
    out: jax.Array,
    logsumexp: jax.Array,
    d_out: jax.Array,
    d_logsumexp: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    scale = plan.options.scale
    q_rows, d_out_rows = plan.rows(q) * scale, plan.rows(d_out)
    # Through the softmax: d_scores = p * (d_p - delta), delta = sum of p * d_p = out . d_out, less
    # what comes through the log of the denominator, whose slope is p.
    delta = row_dots(plan.rows(out), d_out_rows) - plan.rows(d_logsumexp[..., None])[..., 0]
    logsumexp = plan.rows(logsumexp[..., None])[..., 0]
    keys, values = plan.arrange(k), plan.arrange(v)

    def query_block(d_kv: Any, item: Any) -> tuple[Any, jax.Array]:
        step, queries, d_o, lse, dot = item
        row = step // plan.query_blocks

        def key_block(j: jax.Array, carry: Any, masked: bool) -> Any:
            d_q, d_k, d_v = carry
            block_k, block_v = plan.block(keys, row, j), plan.block(values, row, j)
            scores, slope = plan.scores(queries, block_k, step, j, masked)
            p = jnp.exp(scores - lse[..., None])
            d_scores = p * (jnp.einsum("hrd,hsd->hrs", d_o, block_v) - dot[..., None])
            if slope is not None:
                d_scores = d_scores * slope
            d_q = d_q + jnp.einsum("hrs,hsd->hrd", d_scores, block_k)
            at = (row, jnp.int32(0), plan.key_start(j), jnp.int32(0))
            d_v = _add_at(d_v, at, jnp.einsum("hrs,hrd->hsd", p, d_o)[None])
            d_k = _add_at(d_k, at, jnp.einsum("hrs,hrd->hsd", d_scores, queries)[None])
            return d_q, d_k, d_v

        d_q = jnp.zeros((*plan.row_shape, plan.dim), plan.dtype)
        d_q, *d_kv = plan.over_keys(step, key_block, (d_q, *d_kv))
        return tuple(d_kv), d_q

    steps = jnp.arange(plan.batch * plan.query_blocks, dtype=jnp.int32)
    empty = jnp.zeros((plan.batch, plan.kv_heads, plan.capacity, plan.dim), plan.dtype)
    items = (steps, q_rows, d_out_rows, logsumexp, delta)
    (d_k, d_v), d_q = lax.scan(query_block, (empty, empty), items)
    d_sink = None
    if sink is not None:
        # The sink's own value is zero, so its d_p is too. Padded rows have delta = 0.
        share = jnp.exp(plan.sink_rows(sink)[None] - logsumexp)
        by_row = -(share * delta).sum(axis=0).reshape(plan.kv_heads, plan.groups, plan.queries)
        d_sink = by_row.sum(axis=-1).reshape(-1).astype(sink.dtype)
    return (
        (plan.unrows(d_q) * scale).astype(q.dtype),
        d_k.transpose(0, 2, 1, 3).astype(k.dtype),
        d_v.transpose(0, 2, 1, 3).astype(v.dtype),
        d_sink,
    )


def _add_at(buffer: jax.Array, at: tuple[jax.Array, ...], block: jax.Array) -> jax.Array:
    """`buffer[at : at + block.shape] += block`; in place where the buffer is a loop's carry."""
    return lax.dynamic_update_slice(buffer, lax.dynamic_slice(buffer, at, block.shape) + block, at)


def range_of(segments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Least and greatest segment on the last axis, padding (0) aside: an empty range if all is."""
    least = jnp.where(segments == 0, np.iinfo(np.int32).max, segments).min(axis=-1)
    return least, segments.max(axis=-1)


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
