"""The index of an indexed attention layer: what summarises blocks of keys, and who chooses among them.

Of the rows that the layer's queries and keys are made from, x^q_t and x^k_i (see attention.py), a
network with a shared hidden layer makes

    u_t = unit(W_q silu(W_h x^q_t))                          the vector of a query
    e_i = W_k silu(W_h x^k_i),  g_i = W_g silu(W_h x^k_i)    of a key, and its logit a landmark
    l_jm = unit(sum_i softmax_i(g_im) e_i)                   landmark m of block j, i over its keys
    s_tj = max_m <u_t, l_jm>                                 the score of a block

It is learned by distillation: `objective` compares s with the share of the layer's dense attention
that falls into each block, among the blocks of the sequence and of all others of the batch. Nothing
flows back into the layer itself.

Axes: B sequences, T positions, D model, I index dimension, M landmarks, J blocks, P positions a block.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from gemtool.model.kinds import IndexConfig, LayerKind
from gemtool.model.layers import unit_norm
from gemtool.model.params import Tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IndexCache:
    """What an index keeps of the past, float32 but for `touched`.

    `landmarks`  [B, M, I, J], those of whole blocks; what lies behind them means nothing. None where
                 the layer shares another's keys.
    `pending`    [B, P, I + M], vectors and logits of the keys of the block that is not whole yet; or
                 None.
    `queries`    [B, sticky - 1, I], vectors of the last queries, newest last.
    `touched`    bool [F], the pages (pages.py) in which some query attended to something; None where
                 nothing lies in pages.
    """

    landmarks: jax.Array | None
    pending: jax.Array | None
    queries: jax.Array
    touched: jax.Array | None = None


def block_capacity(index: IndexConfig, capacity: int) -> int:
    """Blocks that landmarks have room for where positions have `capacity`: a step writes those of the
    positions that it is padded with too."""
    return capacity // index.block + 2


def position_capacity(index: IndexConfig, blocks: int) -> int:
    """Positions that there is room for where landmarks have so much: what `block_capacity` was told."""
    return (blocks - 2) * index.block


def query_vectors(p: Tree, x: jax.Array) -> jax.Array:
    """Vectors float32 [..., I] of queries, of the index's parameters and rows [..., D]."""
    return unit_norm(_hidden(p, x) @ p["q"])


def key_vectors(p: Tree, x: jax.Array) -> jax.Array:
    """Vectors and logits float32 [..., I + M] of keys, of rows [..., D]."""
    return _hidden(p, x) @ jnp.concatenate([p["k"], p["gate"]], axis=1)


def _hidden(p: Tree, x: jax.Array) -> jax.Array:
    return jax.nn.silu(x.astype(jnp.float32) @ p["hidden"])


def summarise(index: IndexConfig, keys: jax.Array) -> jax.Array:
    """Landmarks float32 [B, M, I, J] of blocks of `key_vectors` [B, J, P, I + M]."""
    vectors, logits = keys[..., : index.dim], keys[..., index.dim :]
    shares = jax.nn.softmax(logits, axis=2)
    means = unit_norm(jnp.einsum("bjpi,bjpm->bmji", vectors, shares))
    return means.transpose(0, 1, 3, 2)


def extend_keys(
    index: IndexConfig, cache: IndexCache, keys: jax.Array, length: jax.Array, valid: jax.Array
) -> IndexCache:
    """The cache with the keys of T new positions, of which the first `valid` are real.

    `keys` [B, T, I + M] of `key_vectors`; `length` int32 [], positions before them. Landmarks of
    blocks that are not whole are written too, and again later: nobody chooses among them until then.
    """
    assert cache.pending is not None
    assert cache.landmarks is not None
    zero, block = jnp.int32(0), index.block
    new, pending = new_landmarks(index, cache.pending, keys, length % block, valid)
    at = (zero, zero, zero, length // block)
    landmarks = jax.lax.dynamic_update_slice(cache.landmarks, new, at)
    return dataclasses.replace(cache, landmarks=landmarks, pending=pending)


def new_landmarks(
    index: IndexConfig, pending: jax.Array, keys: jax.Array, offset: jax.Array, valid: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Landmarks [B, M, I, J] of the blocks that new keys [B, T, I + M] fall into, the first `offset`
    int32 [] rows of `pending` being those before them; and what is pending behind the first `valid`."""
    batch, steps, width = keys.shape
    block = index.block
    count = (block - 1 + steps + block - 1) // block
    # The last of them may be cut: room for a whole block behind.
    rows = jnp.pad(pending, ((0, 0), (0, count * block), (0, 0)))
    rows = jax.lax.dynamic_update_slice(rows, keys, (jnp.int32(0), offset, jnp.int32(0)))
    blocks = rows[:, : count * block].reshape(batch, count, block, width)
    first = (offset + valid) // block * block
    return summarise(index, blocks), jax.lax.dynamic_slice_in_dim(rows, first, block, axis=1)


def extend_queries(
    index: IndexConfig, cache: IndexCache, queries: jax.Array, valid: jax.Array
) -> tuple[IndexCache, jax.Array]:
    """The cache with T new queries [B, T, I] of `query_vectors`, of which the first `valid` are real;
    and all that their choice depends on, [B, sticky - 1 + T, I]."""
    recent = jnp.concatenate([cache.queries, queries], axis=1)
    last = jax.lax.dynamic_slice_in_dim(recent, valid, index.sticky - 1, axis=1)
    return dataclasses.replace(cache, queries=last), recent


def candidates(index: IndexConfig, positions: jax.Array) -> jax.Array:
    """How many blocks each query may choose among, int32 [T]: those before the local ones."""
    return jnp.maximum(positions // index.block - index.local, 0)


def width(index: IndexConfig, positions: jax.Array) -> jax.Array:
    """How many blocks queries at positions int32 [T] choose, int32 [T]."""
    doublings = 31 - jax.lax.clz(jnp.maximum(positions // index.floor, 1))
    return index.select + index.growth * doublings


def local_blocks(index: IndexConfig, positions: jax.Array) -> jax.Array:
    """The blocks that queries attend to in any case, int32 [T, local + 1]; -1 where there is none."""
    back = jnp.arange(index.local + 1, dtype=jnp.int32)
    return jnp.maximum(positions[:, None] // index.block - back[None, :], -1)


# --- learning -------------------------------------------------------------------------------------

DOUBLINGS = 32
"""Of positions, by which the quality of an index is told apart."""


def objective(
    p: Tree,
    kind: LayerKind,
    x: jax.Array,
    vectors: jax.Array,
    qk: tuple[jax.Array, jax.Array],
    sink: jax.Array | None,
    segments: jax.Array,
    documents: jax.Array,
    weights: jax.Array,
) -> dict[str, jax.Array]:
    """How far a layer's index is from what its attention looks at, over whole packed sequences.

    Blocks are counted from the beginning of a sequence here. A query's block, blocks after it, and
    blocks of several documents are no candidates, nor are blocks of other sequences whose document
    the query's sequence has a part of.

    Args:
        p: the index's parameters.
        kind: the layer's.
        x: what queries are made from, [B, T, D].
        vectors: `key_vectors` [B, T, I + M] of the keys.
        qk: queries [B, T, H, K], as those at `horizon`, and keys [B, T, N, K] as they are multiplied,
            `kind.scale` aside.
        sink: [H] or None.
        segments: int32 [B, T]; 0 is padding.
        documents: int32 [B, T], equal where documents are.
        weights: float32 [B, T], how much each query counts: what its next token weighs as a target.

    Returns:
        float32 [DOUBLINGS] each, sums over the queries from position 2^(d-1) to 2^d, weighted also by
        the share of attention that their candidates get and by how much of that falls into one block
        (the sum of squared shares: a query that looks everywhere has nothing to find): "loss", a
        cross-entropy; "top1", whether the block that gets most has the best score; "topk", whether it
        is among the best, as many as are chosen at its position; "mass", the share that these get of
        what all candidates do; and "weight", the sum of the weights.
    """
    index = kind.index
    assert index is not None
    block, missing = index.block, -segments.shape[1] % index.block

    def padded(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)))

    x, vectors = padded(jax.lax.stop_gradient(x)), padded(vectors)
    q, k = (padded(jax.lax.stop_gradient(x).astype(jnp.float32)) for x in qk)
    segments, documents, weights = padded(segments), padded(documents), padded(weights)
    batch, length = segments.shape
    count = length // block
    landmarks = summarise(index, vectors.reshape(batch, count, block, -1))
    everybody = landmarks.transpose(1, 2, 0, 3).reshape(index.landmarks, index.dim, batch * count)
    temperature = jnp.exp(p["log_temperature"])[None, None]

    blocks = segments.reshape(batch, count, block)
    whole = (blocks == blocks[:, :, :1]).all(axis=2) & (blocks[:, :, 0] > 0)  # [B, J]
    of_block = documents.reshape(batch, count, block)[:, :, 0]
    # Whether a sequence has a part of the document of any block of the batch: [B, B * J].
    shared = (documents[:, :, None] == of_block.reshape(1, 1, -1)).any(axis=1)
    foreign = whole.reshape(1, -1) & ~shared
    keys = jnp.arange(length, dtype=jnp.int32)
    row = jnp.arange(batch, dtype=jnp.int32)
    # Whose block a column of scores is.
    owner = jnp.repeat(row, count)[None, None, :] == row[:, None, None]  # [B, 1, B * J]

    def of_queries(start: jax.Array) -> dict[str, jax.Array]:
        """Sums over the queries [B, Q] of one block of each sequence."""

        def take(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, start, block, axis=1)

        at = start + jnp.arange(block, dtype=jnp.int32)
        segment = take(segments)[:, :, None]
        visible = (segments[:, None, :] == segment) & (segment > 0)
        visible = visible & (keys[None, :] <= at[:, None])[None]
        share = _block_shares(kind, take(q), k, sink, visible, count)  # [B, Q, J]
        own = whole[:, None, :] & (blocks[:, None, :, 0] == segment)
        own = own & (jnp.arange(count, dtype=jnp.int32) < start // block)[None, None, :]
        share = jnp.where(own, share, 0)
        total = share.sum(axis=2)
        share = share / jnp.maximum(total, 1e-9)[:, :, None]
        weight = take(weights) * total * (share * share).sum(axis=2)
        target = jnp.where(owner, jnp.tile(share, (1, 1, batch)), 0)  # [B, Q, B * J]
        allowed = jnp.where(owner, jnp.tile(own, (1, 1, batch)), foreign[:, None, :])
        u = query_vectors(p, take(x))
        scores = jnp.einsum("bqi,mij->mbqj", u, everybody).max(axis=0)
        logs = jax.nn.log_softmax(jnp.where(allowed, scores * temperature, -1e30), axis=2)
        ranked = jnp.where(allowed, scores, -jnp.inf)
        most = min(index.most(length), batch * count)
        best, _ = jax.lax.top_k(ranked, most)
        last = jnp.minimum(width(index, at), most) - 1
        least = jnp.take_along_axis(best, last[None, :, None], axis=2)
        chosen = allowed & (ranked >= least)
        wanted = jnp.argmax(target, axis=2)[:, :, None]
        sums = {
            "loss": -(target * logs).sum(axis=2),
            "top1": jnp.take_along_axis(ranked, wanted, axis=2)[:, :, 0] >= best[:, :, 0],
            "topk": jnp.take_along_axis(chosen, wanted, axis=2)[:, :, 0],
            "mass": jnp.where(chosen, target, 0).sum(axis=2),
            "weight": jnp.ones_like(weight),
        }
        return {name: (weight * x.astype(weight.dtype)).sum() for name, x in sums.items()}

    starts = jnp.arange(0, length, block, dtype=jnp.int32)
    each = jax.lax.map(jax.checkpoint(of_queries), starts)
    doublings = 32 - jax.lax.clz(starts)
    return jax.tree.map(lambda x: jnp.zeros(DOUBLINGS, x.dtype).at[doublings].add(x), each)


def _block_shares(
    kind: LayerKind,
    q: jax.Array,
    k: jax.Array,
    sink: jax.Array | None,
    visible: jax.Array,
    count: int,
) -> jax.Array:
    """The share of attention that falls into each block, the mean of all heads: [B, Q, J].

    Queries [B, Q, H, K], keys [B, T, N, K], `visible` bool [B, Q, T].
    """
    groups = kind.heads // kind.kv_heads
    grouped = q.reshape(*q.shape[:2], kind.kv_heads, groups, kind.head_dim)
    scores = jnp.einsum("bqngk,btnk->bngqt", grouped, k) * kind.scale
    if kind.soft_cap:
        scores = kind.soft_cap * jnp.tanh(scores / kind.soft_cap)
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    rest = jnp.full(kind.heads, -1e30, scores.dtype) if sink is None else sink.astype(scores.dtype)
    rest = jax.lax.stop_gradient(rest).reshape(1, kind.kv_heads, groups, 1, 1)
    rest = jnp.broadcast_to(rest, (*scores.shape[:4], 1))
    shares = jax.nn.softmax(jnp.concatenate([scores, rest], axis=4), axis=4)[..., :-1]
    return shares.reshape(*scores.shape[:4], count, -1).sum(axis=5).mean(axis=(1, 2))
