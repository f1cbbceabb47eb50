"""Many continuations of one context, each a token further at a time.

They write in the buffers of the context that they continue: position p of fork b, from `start` on, has
row `rows[b] + p - start`, and the landmarks of its blocks go with it. What lies before `start` they
share: its keys are read once for all of them, as are weights.

A fork's windows, tails and what its index has pending are rows of the state, [B, ...].

Axes: B forks, D model, H query heads, N key/value heads, K head dimension, J blocks, R rows of a fork.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from gemtool.kernels.attention import merge_attention, partial_attention
from gemtool.kernels.blocks import last_scores, paged_block_attention, partial_block_attention
from gemtool.model import index
from gemtool.model.attention import LayerCache, attend_cached, output
from gemtool.model.config import LayerKind, ModelConfig
from gemtool.model.layers import round_to
from gemtool.model.pages import PAGE, Pages, pages_of
from gemtool.model.params import Tree
from gemtool.model.projections import (
    keys_and_values_of,
    queries_of,
    rotated,
    sharpened,
    sources_of,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Forks:
    """Where the forks of a context lie in its buffers.

    `start`    int32 []: the first position that they do not share, where a block of every index begins.
    `rows`     int32 [B], as if positions: where the own ones of each begin; likewise multiples.
    `room`     how many each has room for.
    `running`  bool [B]: which go on; others write rows that nobody sees. None: all.
    """

    start: jax.Array
    rows: jax.Array
    room: int = dataclasses.field(metadata={"static": True})
    running: jax.Array | None = None

    def places(self, positions: jax.Array) -> jax.Array:
        """Where positions int32 [B] of the forks' own are; of those before and beyond, the first and
        the last of the room."""
        return self.rows + jnp.clip(positions - self.start, 0, self.room - 1)


def attend_forks(
    p: Tree,
    config: ModelConfig,
    kind: LayerKind,
    x: jax.Array,
    cache: LayerCache,
    length: jax.Array,
    forks: Forks,
    source: LayerCache | None = None,
    pages: Pages | None = None,
) -> tuple[jax.Array, LayerCache]:
    """What `attend_cached` does, of one new position of each fork: `x` [B, 1, D], after `length` int32
    [B]. Buffers and landmarks are [1, ...], those of all."""
    one = jnp.int32(1)
    if kind.bounded:
        return attend_cached(p, config, kind, x, cache, length, one)
    positions = length[:, None]
    rows = jnp.concatenate([cache.tail.astype(x.dtype), x], axis=1)
    sources = sources_of(p, kind, rows)
    if source is None:
        cache = _written(p, config, kind, sources, cache, length, forks, pages)
    held = cache if source is None else source
    q = sharpened(kind, rotated(kind, queries_of(p, config, kind, sources), positions), positions)
    tail = rows[:, rows.shape[1] - kind.conv_tail :].astype(cache.tail.dtype)
    cache = dataclasses.replace(cache, tail=tail)
    options: dict[str, Any] = {"scale": kind.scale, "soft_cap": kind.soft_cap or None}
    if kind.index is None:
        parts = _all_keys(q, held, length, forks, options)
    else:
        cache, blocks = _chosen(p["index"], kind, sources[0], cache, held, length, forks, pages)
        parts = _some_blocks(q, held, blocks, kind.index.block, length, forks, pages, options)
    out = merge_attention(parts, p.get("sink"))[0].astype(q.dtype)
    return output(p, kind, out), cache


def _written(
    p: Tree,
    config: ModelConfig,
    kind: LayerKind,
    sources: tuple[jax.Array, jax.Array, jax.Array],
    cache: LayerCache,
    length: jax.Array,
    forks: Forks,
    pages: Pages | None,
) -> LayerCache:
    """The cache with the keys of the new positions, and the landmarks of the blocks they are in."""
    k, v = keys_and_values_of(p, config, kind, sources)
    k = round_to(rotated(kind, k, length[:, None]), config.kv_dtype).astype(cache.k.dtype)
    v = v.astype(cache.v.dtype)
    places = forks.places(length)
    at = places if pages is None else places - pages.length
    held = dataclasses.replace(cache, k=_put(cache.k, k, at, 1), v=_put(cache.v, v, at, 1))
    if cache.index is None:
        return held
    return dataclasses.replace(
        held, index=_summarised(p["index"], kind, sources[1], cache.index, length, places)
    )


def _summarised(
    p: Tree,
    kind: LayerKind,
    x: jax.Array,
    found: index.IndexCache,
    length: jax.Array,
    places: jax.Array,
) -> index.IndexCache:
    """The index's cache with the keys made of rows x [B, 1, D], which are at places int32 [B]."""
    config = kind.index
    assert config is not None
    assert found.landmarks is not None
    assert found.pending is not None

    def own(pending: jax.Array, keys: jax.Array, offset: jax.Array) -> tuple[jax.Array, jax.Array]:
        new, rest = index.new_landmarks(config, pending[None], keys[None], offset, jnp.int32(1))
        return new[0, ..., :1], rest[0]

    new, pending = jax.vmap(own)(found.pending, index.key_vectors(p, x), length % config.block)
    landmarks = _put(found.landmarks, new, places // config.block, 3)
    return dataclasses.replace(found, landmarks=landmarks, pending=pending)


def _put(buffer: jax.Array, rows: jax.Array, places: jax.Array, axis: int) -> jax.Array:
    """The buffer [1, ...] with one row of each fork, [B, ...], at places int32 [B] of an axis: one by
    one, which compilers do in place."""
    for fork in range(rows.shape[0]):
        buffer = jax.lax.dynamic_update_slice_in_dim(
            buffer, rows[fork : fork + 1], places[fork], axis
        )
    return buffer


def _all_keys(
    q: jax.Array, held: LayerCache, length: jax.Array, forks: Forks, options: dict[str, Any]
) -> list[tuple[jax.Array, jax.Array]]:
    """Attention of q [B, 1, H, K] to what is shared, by all as if they were queries of one sequence,
    and to the own positions of each."""
    shared = partial_attention(
        q.swapaxes(0, 1), held.k, held.v, causal=False, kv_length=forks.start, **options
    )

    def own(buffer: jax.Array) -> jax.Array:
        cut = [jax.lax.dynamic_slice_in_dim(buffer, row, forks.room, axis=1) for row in forks.rows]
        return jnp.concatenate(cut)

    count = jnp.minimum(length + 1 - forks.start, forks.room)
    there = jnp.arange(forks.room, dtype=jnp.int32)[None] < count[:, None]
    seen: dict[str, Any] = {
        "q_segments": jnp.ones_like(length)[:, None],
        "kv_segments": there.astype(jnp.int32),
    }
    alone = partial_attention(
        q, own(held.k), own(held.v), causal=False, kv_length=count.max(), **seen, **options
    )
    return [jax.tree.map(lambda x: x.swapaxes(0, 1), shared), alone]


def _chosen(
    p: Tree,
    kind: LayerKind,
    x: jax.Array,
    cache: LayerCache,
    held: LayerCache,
    length: jax.Array,
    forks: Forks,
    pages: Pages | None,
) -> tuple[LayerCache, jax.Array]:
    """The cache with the index's queries, of rows x [B, 1, D], and the pages that they touch; and the
    blocks int32 [B, C] that each attends to, by number among all that the buffers have: local ones and
    the best of those before, shared or its own."""
    config = kind.index
    assert config is not None
    assert cache.index is not None
    assert held.index is not None
    assert held.index.landmarks is not None
    own, recent = index.extend_queries(config, cache.index, index.query_vectors(p, x), jnp.int32(1))
    start, first = forks.start // config.block, (forks.rows // config.block)[:, None]
    count = index.candidates(config, length)[:, None]
    used = (first + jnp.maximum(count - start, 0)).max()
    scores = last_scores(recent, held.index.landmarks, used)  # [B, J], of shared and own ones
    at = jnp.arange(scores.shape[1], dtype=jnp.int32)[None]
    is_shared = at < jnp.minimum(count, start)
    is_own = (at >= first) & (at < first + count - start)
    most = min(config.most(index.position_capacity(config, scores.shape[1])), scores.shape[1])
    _, best = jax.lax.top_k(jnp.where(is_shared | is_own, scores, -jnp.inf), most)
    width = jnp.minimum(index.width(config, length), count[:, 0])
    wanted = jnp.arange(most, dtype=jnp.int32)[None] < width[:, None]
    best = jnp.where(wanted, best.astype(jnp.int32), -1)
    local = index.local_blocks(config, length)
    behind = jnp.where(local >= start, local - start + first, local)
    blocks = jnp.concatenate([behind, best], axis=1)
    if forks.running is not None:
        # What nobody looks at need not be read.
        blocks = jnp.where(forks.running[:, None], blocks, -1)
    if pages is not None:
        assert own.touched is not None
        own = dataclasses.replace(own, touched=own.touched | pages_of(blocks, config.block, pages))
    return dataclasses.replace(cache, index=own), blocks


def _some_blocks(
    q: jax.Array,
    held: LayerCache,
    blocks: jax.Array,
    block: int,
    length: jax.Array,
    forks: Forks,
    pages: Pages | None,
    options: dict[str, Any],
) -> list[tuple[jax.Array, jax.Array]]:
    """Attention of q [B, 1, H, K] to the blocks int32 [B, C] of each, as if all were queries of one
    sequence."""
    options = {**options, "block": block}
    start, first = forks.start // block, (forks.rows // block)[:, None]
    number = jnp.where(blocks >= first, blocks - first + start, blocks)  # in its own document
    # A query sees what begins at or before it: as if each were at its place in the batch.
    later = jnp.arange(len(length), dtype=jnp.int32) - length
    starts = number * block + later[:, None]
    queries, parts, inside = q.swapaxes(0, 1), [], jnp.int32(0)
    if pages is not None:
        inside = pages.length // block
        parts = [
            paged_block_attention(
                queries,
                pages.memory,
                pages.table,
                jnp.where(blocks < inside, blocks, -1)[None],
                page=PAGE,
                kv_heads=held.k.shape[2],
                **options,
            )
        ]
    here = jnp.where(blocks >= inside, blocks - inside, -1)[None]
    parts.append(
        partial_block_attention(
            queries, held.k, held.v, here, starts=starts[None], q_start=0, **options
        )
    )
    return [(out.swapaxes(0, 1), lse.swapaxes(0, 1)) for out, lse in parts]
