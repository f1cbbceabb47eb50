"""Keys and values of the first positions of a sequence where they lie, in pages that are only read.

On a CPU, memory may be a mapped file: then blocks come from the disk when they are attended to, and a
context of any length takes no memory of its own. What comes after the pages is in a buffer as always,
whose first row is that of the first position behind them.

The queries of a step name nearly the same blocks. So each block that some of them name is fetched once,
some at a time, in a loop with a *dynamic* bound, and what is found in each lot is merged.

Axes: B sequences, T new positions, C blocks named, H query heads, N key/value heads, K head dimension.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemtool.kernels.attention import merge_attention
from gemtool.kernels.attention.reference import NOTHING
from gemtool.kernels.blocks import partial_block_attention
from gemtool.kernels.dispatch import accumulator
from gemtool.model.config import ModelConfig

PAGE = 4096
"""Positions of a page: those of a block of a context file."""
UNIT = 8
"""Bytes of a row of memory; pages begin at rows. As Arrow aligns what it writes."""
LOT = 4 << 20
"""Bytes of keys that are fetched at a time, at most."""
_NO_BLOCK = np.int32(np.iinfo(np.int32).max)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pages:
    """Of one layer.

    `memory`  [R, UNIT bytes] in the config's `kv_dtype`: what pages are in, of several layers.
    `table`   int32 [2, F]: the rows of memory where keys and values [PAGE, N, K] of each page begin.
    `length`  int32 []: positions that are in pages, whole ones.
    """

    memory: jax.Array
    table: jax.Array
    length: jax.Array


def paged_layers(config: ModelConfig) -> frozenset[int]:
    """The layers whose keys and values may lie in pages: those to which all that attend do it through
    an index, by blocks of whole rows of memory."""
    kinds = list(enumerate(config.layer_kinds))
    size = jnp.dtype(config.kv_dtype).itemsize
    others = {
        config.source(at)
        for at, kind in kinds
        if kind.index is None or kind.index.block * kind.kv_heads * kind.head_dim * size % UNIT
    }
    return frozenset(at for at, kind in kinds if kind.grows and at not in others)


def pages_of(blocks: jax.Array, block: int, pages: Pages) -> jax.Array:
    """The pages in which some of the blocks int32 [...] are: bool [F]."""
    per_page = PAGE // block
    there = (blocks >= 0) & (blocks < pages.length // block)
    count = pages.table.shape[1]
    which = jnp.where(there, blocks // per_page, count)
    return jnp.zeros(count, jnp.bool).at[which].set(True, mode="drop")


def paged_block_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: Pages,
    *,
    blocks: jax.Array,
    block: int,
    length: jax.Array,
    sink: jax.Array | None,
    **options: Any,
) -> jax.Array:
    """Attention of T new positions to some blocks of all positions, causal.

    Args:
        q: [B, T, H, K].
        k: keys [B, S, N, K] of the positions behind the pages, the new ones included.
        v: values of them.
        pages: those before, of every sequence.
        blocks: int32 [B, T, C], numbers of blocks, -1 for none.
        block: positions of a block.
        length: int32 [], positions before the new ones.
        sink: [H] or None.
        options: those of `partial_block_attention`.

    Returns:
        [B, T, H, K].
    """
    options = {**options, "block": block}
    first = pages.length // block
    own = jnp.where(blocks >= first, blocks - first, -1)
    behind = partial_block_attention(q, k, v, own, starts=blocks * block, q_start=length, **options)
    with jax.named_scope("pages"):
        before = _attend(q, jnp.where(blocks < first, blocks, -1), pages, k.shape[2], options)
    wide = behind[0].astype(before[0].dtype), behind[1]
    return merge_attention([wide, before], sink)[0].astype(q.dtype)


def _attend(
    q: jax.Array, blocks: jax.Array, pages: Pages, kv_heads: int, options: dict[str, Any]
) -> tuple[jax.Array, jax.Array]:
    """`partial_block_attention` to blocks that are in pages, all of them before every query."""
    shape, block = q.shape, options["block"]
    heads, dim = shape[2:]
    # Who asks does not matter: one sequence of all queries.
    q, blocks = q.reshape(1, -1, heads, dim), blocks.reshape(1, -1, blocks.shape[2])
    exist = pages.table.shape[1] * (PAGE // block)
    lot = max(LOT // (block * kv_heads * dim * pages.memory.dtype.itemsize), 1)
    lot = min(lot, blocks.size, exist)
    numbers, count, place = _distinct(blocks, min(blocks.size, exist), lot)

    def visit(i: jax.Array, seen: Any) -> Any:
        wanted = jax.lax.dynamic_slice_in_dim(numbers, i * lot, lot)
        k, v = (_fetched(pages, which, wanted, block, kv_heads, dim) for which in (0, 1))
        here = jnp.where(place // lot == i, place % lot, -1)
        # As if every query were behind the last key.
        starts = jnp.zeros_like(here)
        out, lse = partial_block_attention(q, k, v, here, starts=starts, q_start=block, **options)
        return merge_attention([seen, (out.astype(dtype), lse)])

    dtype = accumulator(q.dtype)
    nothing = jnp.zeros(q.shape, dtype), jnp.full(q.shape[:3], NOTHING, dtype)
    lots = (count + lot - 1) // lot
    out, lse = jax.lax.fori_loop(jnp.int32(0), lots, visit, nothing)
    return out.reshape(shape), lse.reshape(shape[:3])


def _distinct(blocks: jax.Array, most: int, lot: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The blocks that lists int32 [1, T, C] name, each once, ascending: their numbers int32 [`most` up
    to whole lots], the last repeated; how many there are; and the place of each entry of the lists
    among them, int32 [1, T, C], negative where it names none."""
    flat = blocks.reshape(-1)
    entry = jnp.arange(flat.size, dtype=jnp.int32)
    key, entry = jax.lax.sort((jnp.where(flat < 0, _NO_BLOCK, flat), entry), num_keys=1)
    is_new = jnp.pad(key[1:] != key[:-1], (1, 0), constant_values=True) & (key < _NO_BLOCK)
    rank = jnp.cumsum(is_new, dtype=jnp.int32) - 1
    room = -(-most // lot) * lot
    # Where no block is, one is read that is read anyway.
    numbers = jnp.full(room, jnp.maximum(flat.max(), 0), jnp.int32)
    numbers = numbers.at[jnp.where(key < _NO_BLOCK, rank, room)].set(key, mode="drop")
    place = jnp.zeros_like(flat).at[entry].set(jnp.where(key < _NO_BLOCK, rank, -lot))
    return numbers, rank[-1] + 1, place.reshape(blocks.shape)


def _fetched(
    pages: Pages, which: int, numbers: jax.Array, block: int, kv_heads: int, dim: int
) -> jax.Array:
    """Keys (0) or values (1) of blocks, one after the other: [1, len(numbers) * block, N, K]."""
    width = pages.memory.shape[1]
    rows, per_page = block * kv_heads * dim // width, PAGE // block
    at = pages.table[which, numbers // per_page] + numbers % per_page * rows
    found = jax.lax.gather(
        pages.memory,
        at[:, None],
        jax.lax.GatherDimensionNumbers(
            offset_dims=(1, 2), collapsed_slice_dims=(), start_index_map=(0,)
        ),
        slice_sizes=(rows, width),
        mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )
    return found.reshape(1, len(numbers) * block, kv_heads, dim)
