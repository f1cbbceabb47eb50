"""Attention to chosen blocks in plain XLA, in the forms that XLA's CPU compiler runs fast.

Neighbours name nearly the same blocks. So queries are taken in small groups, and a group visits the
union of its lists: a loop with a *dynamic* bound fetches several blocks at a time, converts them,
and scores all rows of the group against them with one matmul a key head; a query does not see what
it did not name. Maximum and sum are kept running, as in FlashAttention (arXiv 2205.14135).

Measured on a core: groups of 16 queries and 512 keys at a time are the fastest. Fetching by a gather
of whole blocks is faster than slices put together.
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

GROUP = 16
KEYS_AT_ONCE = 512
NO_BLOCK = np.int32(np.iinfo(np.int32).max)


def block_attention_xla(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    blocks: jax.Array,
    newest: jax.Array,
    *,
    block: int,
    scale: float,
    soft_cap: float | None,
    sink: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """See `gemtool.kernels.blocks.partial_block_attention`; `newest` int32 [B, T, C] is the last key
    seen of each block named, 0 .. block - 1, and -1 where there is none."""
    kv_heads, dim = k.shape[2:]

    def fetch(buffer: jax.Array, row: jax.Array, numbers: jax.Array) -> jax.Array:
        at = jnp.stack([jnp.full_like(numbers, row), numbers * block], axis=1)
        # Of the buffer as it is: a loop could get a copy of one that is reshaped.
        return lax.gather(
            buffer,
            at,
            lax.GatherDimensionNumbers(
                offset_dims=(1, 2, 3), collapsed_slice_dims=(0,), start_index_map=(0, 1)
            ),
            slice_sizes=(1, block, kv_heads, dim),
            mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
        )

    sources = functools.partial(fetch, k), functools.partial(fetch, v)
    exist = k.shape[1] // block
    with jax.named_scope("block_attention"):
        return _forward(q, sources, kv_heads, exist, blocks, newest, block, scale, soft_cap, sink)


def paged_block_attention_xla(
    q: jax.Array,
    memory: jax.Array,
    table: jax.Array,
    blocks: jax.Array,
    *,
    block: int,
    page: int,
    kv_heads: int,
    scale: float,
    soft_cap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """See `gemtool.kernels.blocks.paged_block_attention`."""
    width, per_page = memory.shape[1], page // block
    rows = block * kv_heads * q.shape[3] // width

    def fetch(places: jax.Array, _: jax.Array, numbers: jax.Array) -> jax.Array:
        at = places[numbers // per_page] + numbers % per_page * rows
        return lax.gather(
            memory,
            at[:, None],
            lax.GatherDimensionNumbers(
                offset_dims=(1, 2), collapsed_slice_dims=(), start_index_map=(0,)
            ),
            slice_sizes=(rows, width),
            mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
        )

    sources = functools.partial(fetch, table[0]), functools.partial(fetch, table[1])
    newest = jnp.where(blocks >= 0, jnp.int32(block - 1), -1)
    exist = table.shape[1] * per_page
    with jax.named_scope("paged_block_attention"):
        return _forward(q, sources, kv_heads, exist, blocks, newest, block, scale, soft_cap, None)


Fetch = Callable[[jax.Array, jax.Array], jax.Array]
"""Batch row int32 [] and numbers int32 [n] -> the n * block * KV * D values of these blocks, as they
follow one another in a buffer, in any shape."""


def _forward(
    q: jax.Array,
    sources: tuple[Fetch, Fetch],
    kv_heads: int,
    exist: int,
    blocks: jax.Array,
    newest: jax.Array,
    block: int,
    scale: float,
    soft_cap: float | None,
    sink: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Keys and values come from `sources`, which have blocks of `kv_heads` up to number `exist`."""
    batch, length, heads, dim = q.shape
    dtype = accumulator(q.dtype)
    per_key = heads // kv_heads
    groups = -(-length // GROUP)  # of a batch row
    queries = -(-length // groups)
    rows = per_key * queries
    at_once = max(KEYS_AT_ONCE // block, 1)
    pad = groups * queries - length

    def grouped(x: jax.Array, fill: int) -> jax.Array:
        """[B, T, ...] -> [B * groups, queries, ...]."""
        widths = ((0, 0), (0, pad), *((0, 0) for _ in x.shape[2:]))
        x = jnp.pad(x, widths, constant_values=fill)
        return x.reshape(batch * groups, queries, *x.shape[2:])

    union = _union(grouped(blocks, -1), grouped(newest, -1), exist, at_once)
    # Rows are the queries of one key head: [B * groups, KV, R, D].
    q_rows = grouped(q.astype(dtype), 0).reshape(-1, queries, kv_heads, per_key, dim) * scale
    q_rows = q_rows.transpose(0, 2, 3, 1, 4).reshape(-1, kv_heads, rows, dim)
    logit = None if sink is None else _sink_rows(sink.astype(dtype), kv_heads, queries)

    def group(item: tuple[jax.Array, jax.Array, _Union]) -> tuple[jax.Array, jax.Array]:
        step, own, named = item
        row = step // groups

        def fetch(source: Fetch, numbers: jax.Array) -> jax.Array:
            """The blocks of those numbers, one after the other: [KV, keys, D]."""
            tile = source(row, numbers).astype(dtype).reshape(-1, kv_heads, dim)
            return tile.reshape(1, -1, dim) if kv_heads == 1 else tile.transpose(1, 0, 2)

        def visit(i: jax.Array, carry: Any) -> Any:
            top, total, acc = carry
            numbers = lax.dynamic_slice_in_dim(named.blocks, i * at_once, at_once)
            last = lax.dynamic_slice_in_dim(named.newest, i * at_once, at_once)
            scores = jnp.einsum("hrd,hsd->hrs", own, fetch(sources[0], numbers))
            if soft_cap is not None:
                scores = soft_cap * jnp.tanh(scores / soft_cap)
            # Made here, so that it is a part of the comparison: from outside the loop, twice the time.
            key = jnp.arange(block, dtype=jnp.int32)[None, None, :]
            visible = key <= last.T[:, :, None]  # [queries, blocks, keys]
            split = scores.reshape(kv_heads, per_key, queries, at_once, block)
            scores = jnp.where(visible[None, None], split, -jnp.inf).reshape(scores.shape)
            new_top = jnp.maximum(top, scores.max(axis=-1))
            masses = jnp.exp(scores - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            total = total * shrink + masses.sum(axis=-1)
            acc = acc * shrink[..., None]
            acc = acc + jnp.einsum("hrs,hsd->hrd", masses, fetch(sources[1], numbers))
            return new_top, total, acc

        # Hidden scores are -inf, and exp(-inf - NOTHING) is 0 where exp(-inf - -inf) would be NaN.
        carry = (
            jnp.full((kv_heads, rows), NOTHING, dtype),
            jnp.zeros((kv_heads, rows), dtype),
            jnp.zeros((kv_heads, rows, dim), dtype),
        )
        visits = (named.count + at_once - 1) // at_once
        top, total, acc = lax.fori_loop(jnp.int32(0), visits, visit, carry)
        if logit is not None:
            new_top = jnp.maximum(top, logit)
            shrink = jnp.exp(top - new_top)
            total = total * shrink + jnp.exp(logit - new_top)
            top, acc = new_top, acc * shrink[..., None]
        total = jnp.where(total == 0, 1, total)  # sees nothing: zeros
        return acc / total[..., None], top + jnp.log(total)

    steps = jnp.arange(batch * groups, dtype=jnp.int32)
    out, lse = lax.map(group, (steps, q_rows, union))

    def ungrouped(x: jax.Array) -> jax.Array:
        """[B * groups, KV, R, X] -> [B, T, H, X]."""
        x = x.reshape(batch, groups, kv_heads, per_key, queries, x.shape[-1])
        x = x.transpose(0, 1, 4, 2, 3, 5).reshape(batch, groups * queries, heads, x.shape[-1])
        return x[:, :length]

    return ungrouped(out).astype(q.dtype), ungrouped(lse[..., None])[..., 0]


def _sink_rows(sink: jax.Array, kv_heads: int, queries: int) -> jax.Array:
    """[H] -> [KV, R]."""
    sink = sink.reshape(kv_heads, -1, 1)
    return jnp.broadcast_to(sink, (*sink.shape[:2], queries)).reshape(kv_heads, -1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Union:
    """The blocks that a group names, each once.

    `blocks` int32 [N, U]; `count` int32 [N], how many there are; `newest` int32 [N, U, queries], the
    last key that a query sees of each, -1 where it did not name it. Places beyond the count repeat a
    block, and nobody sees it there.
    """

    blocks: jax.Array
    count: jax.Array
    newest: jax.Array


def _union(blocks: jax.Array, newest: jax.Array, exist: int, at_once: int) -> _Union:
    """Of lists int32 [N, queries, C] each; U has room for `at_once` places more than are named."""
    groups, queries, choices = blocks.shape
    blocks, newest = blocks.reshape(groups, -1), newest.reshape(groups, -1)
    # What is read where no block is: one that is read anyway.
    repeated = jnp.maximum(blocks.max(axis=1, keepdims=True), 0)
    if queries == 1:  # a decoding step: no block comes twice, no need to sort
        place = jnp.arange(1, choices + 1, dtype=jnp.int32)[None]
        named = jnp.where(blocks < 0, jnp.broadcast_to(repeated, blocks.shape), blocks)
        named = jnp.concatenate([named, jnp.broadcast_to(repeated, (groups, at_once))], axis=1)
        newest = jnp.pad(newest, ((0, 0), (0, at_once)), constant_values=-1)
        return _Union(named, jnp.where(blocks < 0, 0, place).max(axis=1), newest[..., None])

    room = min(queries * choices, exist) + at_once
    entry = jnp.broadcast_to(jnp.arange(blocks.shape[1], dtype=jnp.int32)[None], blocks.shape)
    key = jnp.where(blocks < 0, NO_BLOCK, blocks)
    key, entry = lax.sort((key, entry), dimension=1, num_keys=1)
    is_new = jnp.pad(key[:, 1:] != key[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    is_new &= key < NO_BLOCK
    rank = jnp.cumsum(is_new, axis=1, dtype=jnp.int32) - 1
    place = jnp.where(key < NO_BLOCK, rank, room)  # of no block: out of bounds, dropped
    row = jnp.broadcast_to(jnp.arange(groups, dtype=jnp.int32)[:, None], place.shape)
    named = jnp.broadcast_to(repeated, (groups, room))
    last = jnp.full((groups, room, queries), -1, jnp.int32)
    sorted_newest = jnp.take_along_axis(newest, entry, axis=1)
    return _Union(
        named.at[row, place].set(key, mode="drop"),
        rank[:, -1] + 1,
        last.at[row, place, entry // choices].set(sorted_newest, mode="drop"),
    )
