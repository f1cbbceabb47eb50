"""Attention to chosen blocks of keys, and the choice of blocks by their summaries.

A buffer of keys is cut into blocks of consecutive positions. Each query attends to the few blocks
that its list names, so that its cost does not depend on how long the buffer is. Lists come from
`choose_blocks`, which compares index queries with several summary vectors ("landmarks") of every
block; blocks that are always wanted (a query's own and those just before it) the caller adds.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gemtool.kernels.blocks.reference import (
    block_attention_reference,
    choose_blocks_reference,
    paged_block_attention_reference,
)
from gemtool.kernels.blocks.select import choose_blocks_xla, last_scores
from gemtool.kernels.blocks.xla import block_attention_xla, paged_block_attention_xla
from gemtool.kernels.dispatch import deferred, dispatch

__all__ = [
    "block_attention",
    "choose_blocks",
    "last_scores",
    "paged_block_attention",
    "partial_block_attention",
]

IMPLEMENTATIONS = {
    "pallas_tpu": deferred("gemtool.kernels.blocks.pallas_tpu", "block_attention_pallas_tpu"),
    "xla": block_attention_xla,
    "reference": block_attention_reference,
}

PAGED_IMPLEMENTATIONS = {
    "xla": paged_block_attention_xla,
    "reference": paged_block_attention_reference,
}

CHOICE_IMPLEMENTATIONS = {
    "xla": choose_blocks_xla,
    "reference": choose_blocks_reference,
}


def block_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, blocks: jax.Array, **options: Any
) -> jax.Array:
    """Attend from each query to blocks of keys: the output of `partial_block_attention`."""
    return partial_block_attention(q, k, v, blocks, **options)[0]


def partial_block_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    blocks: jax.Array,
    *,
    block: int,
    q_start: int | jax.Array,
    kv_length: int | jax.Array | None = None,
    starts: jax.Array | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sink: jax.Array | None = None,
    impl: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attend from each query to blocks of keys, so that more keys can be attended to later.

    Block j is the keys `j * block` up to `(j + 1) * block` of the buffer. A query at absolute
    position `p = q_start + t` sees the keys of the blocks that its list names, namely key i of
    block `blocks[b, t, c]` if both of these hold: `starts[b, t, c] + i <= p`; the key's index in
    the buffer is below `kv_length`. A query that sees nothing returns zeros.

    Work is proportional to the blocks that are named and seen, and is shared by neighbours that name
    the same ones; the buffers may be far larger. They are neither copied nor converted as a whole.
    Scores, softmax and sums are float32 (float64 when `q` is float64).

    For inference: there is no gradient, neither of the output nor of the log.

    Args:
        q: [B, T, H, D] floating. A temperature belongs in here, multiplied by the caller.
        k: [B, S, KV, D] of any floating type, S a multiple of `block`. KV divides H; query head h
            uses key head h // (H // KV).
        v: [B, S, KV, D] as k.
        blocks: int32 [B, T, C], in any order, each at most once in a list; -1 is no block.
        block: keys of a block; at least 1.
        q_start: int or int32 [] (may be traced): position of the first query.
        kv_length: int or int32 [] (may be traced): keys from this index on are absent; by default
            none is.
        starts: int32 [B, T, C]: position of the first key of each block named; by default
            `blocks * block`. For buffers that hold a share of the positions.
        scale: multiplies the scores; D ** -0.5 by default.
        soft_cap: scores become `soft_cap * tanh(scores / soft_cap)`.
        sink: floating [H]: a logit that takes part in the softmax and has no value.
        impl: name of the implementation; by default the best of this platform.

    Returns:
        The output [B, T, H, D] in q's dtype, and the log of the sum of exponentials that it was
        divided by [B, T, H] (`merge_attention` needs it; -1e30 where nothing is seen).

    Raises:
        ValueError: shapes or options do not fit together.
    """
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(f"block attention: q, k, v are [B, T|S, heads, D]; got {_shapes(q, k, v)}")
    batch, length, heads, dim = q.shape
    if k.shape[0] != batch or k.shape[3] != dim or heads % k.shape[2]:
        got = _shapes(q, k, v)
        raise ValueError(f"block attention: B, D or heads of q and k do not match: {got}")
    if block < 1 or k.shape[1] % block:
        raise ValueError(f"block attention: {k.shape[1]} keys are no whole blocks of {block}")
    if blocks.ndim != 3 or blocks.shape[:2] != (batch, length):
        raise ValueError(f"block attention: blocks are [B, T, C]; got {_shapes(blocks)}")
    if starts is not None and starts.shape != blocks.shape:
        got = _shapes(blocks, starts)
        raise ValueError(f"block attention: starts are one a block named; got {got}")
    if sink is not None and sink.shape != (heads,):
        raise ValueError(f"block attention: sink is [H] = [{heads}]; got {_shapes(sink)}")
    blocks = jnp.asarray(blocks, jnp.int32)
    starts = blocks * block if starts is None else jnp.asarray(starts, jnp.int32)
    stop = jnp.int32(k.shape[1])
    if kv_length is not None:
        stop = jnp.minimum(jnp.asarray(kv_length, jnp.int32), stop)
    at = jnp.asarray(q_start, jnp.int32) + jnp.arange(length, dtype=jnp.int32)
    # What is seen of a block, in one number: its keys up to this one.
    newest = jnp.minimum(at[None, :, None] - starts, stop - 1 - blocks * block)
    if blocks.shape[2] == 0:
        blocks, newest = (jnp.pad(x, ((0, 0), (0, 0), (0, 1))) - 1 for x in (blocks, newest))
    # A block that is not seen is as good as none: nobody then fetches it.
    seen = (blocks >= 0) & (newest >= 0)
    return dispatch(
        "block attention",
        IMPLEMENTATIONS,
        impl,
        q,
        k,
        v,
        jnp.where(seen, blocks, -1),
        jnp.where(seen, jnp.minimum(newest, block - 1), -1),
        block=block,
        scale=dim**-0.5 if scale is None else float(scale),
        soft_cap=soft_cap,
        sink=sink,
    )


def paged_block_attention(
    q: jax.Array,
    memory: jax.Array,
    table: jax.Array,
    blocks: jax.Array,
    *,
    block: int,
    page: int,
    kv_heads: int,
    scale: float | None = None,
    soft_cap: float | None = None,
    impl: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attend from each query to all keys of some blocks, which lie in pages anywhere in a memory.

    Page f is the keys `f * page` up to `(f + 1) * page`, [page, KV, D] in C order from row
    `table[0, f]` of the memory on; so are its values, from row `table[1, f]` on. Work is as that of
    `partial_block_attention`; of the memory only the blocks named are read.

    Args:
        q: [B, T, H, D] floating.
        memory: [R, W] of any floating type; rows of W values, of which a block has a whole number.
        table: int32 [2, F].
        blocks: int32 [B, T, C], numbers below `F * page / block`, each at most once in a list; -1 is no
            block.
        block: keys of a block.
        page: keys of a page, a multiple of `block`.
        kv_heads: divides H.
        scale: multiplies the scores; D ** -0.5 by default.
        soft_cap: as in `partial_block_attention`.
        impl: name of the implementation; by default the best of this platform.

    Returns:
        As `partial_block_attention`.

    Raises:
        ValueError: shapes or options do not fit together.
    """
    if q.ndim != 4 or memory.ndim != 2 or table.shape[:1] != (2,) or table.ndim != 2:
        got = _shapes(q, memory, table)
        raise ValueError(f"paged attention: expected [B, T, H, D], [R, W] and [2, F]; got {got}")
    if blocks.ndim != 3 or blocks.shape[:2] != q.shape[:2]:
        raise ValueError(f"paged attention: blocks are [B, T, C]; got {_shapes(blocks)}")
    if block < 1 or page % block or block * kv_heads * q.shape[3] % memory.shape[1]:
        raise ValueError(
            f"paged attention: blocks of {block} keys are no whole rows of {memory.shape[1]} values, "
            f"or pages of {page} no whole blocks"
        )
    return dispatch(
        "paged block attention",
        PAGED_IMPLEMENTATIONS,
        impl,
        q,
        memory,
        table,
        jnp.asarray(blocks, jnp.int32),
        block=block,
        page=page,
        kv_heads=kv_heads,
        scale=q.shape[3] ** -0.5 if scale is None else float(scale),
        soft_cap=soft_cap,
    )


def choose_blocks(
    u: jax.Array,
    landmarks: jax.Array,
    *,
    candidates: jax.Array,
    width: jax.Array,
    most: int,
    sticky: int = 8,
    impl: str | None = None,
) -> jax.Array:
    """The blocks with the best scores of each query, exactly: equal scores, the lower block first.

    The score of block j for query t is the greatest dot product of one of its M landmarks with one
    of the index queries t - sticky + 1 .. t. Looking back keeps a choice for some steps and lets
    neighbours choose nearly the same. `reference.block_scores` has all of them.

    Work is proportional to the candidates, not to NB. There is no gradient.

    Args:
        u: float32 [B, sticky - 1 + T, I]: index queries, first those of the positions before.
        landmarks: floating [B, M, I, NB], finite where there are candidates: so that few queries
            read them as they lie.
        candidates: int32 [T], not descending: query t chooses among blocks `j < candidates[t]`;
            those beyond NB do not exist.
        width: int32 [T]: how many it chooses, at most `most`.
        most: how long a list of blocks is; at least 1.
        sticky: at least 1.
        impl: name of the implementation; by default the best of this platform.

    Returns:
        int32 [B, T, most]: numbers of blocks, the best first, then -1.

    Raises:
        ValueError: shapes or options do not fit together.
    """
    if sticky < 1 or most < 1:
        raise ValueError(f"choice of blocks: sticky={sticky}, most={most}; expected at least 1")
    if u.ndim != 3 or landmarks.ndim != 4 or u.shape[::2] != landmarks.shape[::2]:
        got = _shapes(u, landmarks)
        raise ValueError(f"choice of blocks: expected u [B, T, I], landmarks [B, M, I, NB]; {got}")
    length = u.shape[1] - sticky + 1
    if length < 1 or candidates.shape != (length,) or width.shape != (length,):
        got = _shapes(u, candidates, width)
        raise ValueError(
            f"choice of blocks: u is [B, sticky - 1 + T, I], candidates and width [T]; got {got} "
            f"with sticky={sticky}"
        )
    return dispatch(
        "choice of blocks",
        CHOICE_IMPLEMENTATIONS,
        impl,
        u,
        landmarks,
        candidates=jnp.clip(jnp.asarray(candidates, jnp.int32), 0, landmarks.shape[3]),
        width=jnp.asarray(width, jnp.int32),
        most=most,
        sticky=sticky,
    )


def _shapes(*arrays: jax.Array) -> str:
    return ", ".join(str(list(a.shape)) for a in arrays)
