"""Keys and values of the first positions of a sequence where they lie, in pages that are only read.

On a CPU, memory may be a mapped file: then blocks come from the disk when they are attended to, and a
context of any length takes no memory of its own. What comes after the pages is in a buffer as always,
whose first row is that of the first position behind them.

Axes: B sequences, T new positions, C blocks named, H query heads, N key/value heads, K head dimension.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from gemtool.kernels.attention import merge_attention
from gemtool.kernels.blocks import paged_block_attention, partial_block_attention
from gemtool.model.config import ModelConfig

PAGE = 4096
"""Positions of a page: those of a block of a context file."""
UNIT = 8
"""Bytes of a row of memory; pages begin at rows. As Arrow aligns what it writes."""


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


def attend_with_pages(
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
        options: `scale` and `soft_cap` of `partial_block_attention`.

    Returns:
        [B, T, H, K].
    """
    options = {**options, "block": block}
    first = pages.length // block
    own = jnp.where(blocks >= first, blocks - first, -1)
    behind = partial_block_attention(q, k, v, own, starts=blocks * block, q_start=length, **options)
    before = paged_block_attention(
        q,
        pages.memory,
        pages.table,
        jnp.where(blocks < first, blocks, -1),
        page=PAGE,
        kv_heads=k.shape[2],
        **options,
    )
    return merge_attention([behind, before], sink)[0].astype(q.dtype)
