"""Attention and encoders on a mesh: what each device computes, and what it sends to which.

Without a current mesh (`jax.set_mesh`) these are the kernels themselves. On one, each function runs
per device (`jax.shard_map`):

* window attention fetches the keys and values that its first queries look back to from the devices
  before it (a halo);
* full attention passes keys and values round the ring of the context axis, merging what it attends
  to piece by piece (ring attention, arXiv 2310.01889); its backward pass goes round once more, with
  the gradients of keys and values travelling along, so that no device ever holds all of them;
* media encoders: each device encodes its share of the groups.

Attention to a cache's window is here too, and the choice among the blocks that it keeps of a sequence;
attention to these is in buffers.py. Experts are in expert_parallel.py, tables with a row a token in
vocab_parallel.py.

Axes: B sequences, T positions, H query heads, N key/value heads, K head dimension, D model; within a
device they are that device's share.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from gemtool.kernels.attention import flash_attention, merge_attention, partial_attention
from gemtool.kernels.blocks import choose_blocks
from gemtool.kernels.rows import row_dots
from gemtool.model.mesh import AXES, current_mesh, partition


def on_rows(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """`function(x)` [..., A] -> [..., B] that treats each row by itself, on a mesh [B, T, A].

    For what XLA would gather all rows for, as it does for `top_k`.
    """
    mesh = current_mesh()
    if mesh is None:
        return function(x)
    rows = partition(("batch", "length", None), x.shape, mesh)
    return jax.shard_map(function, in_specs=rows, out_specs=rows, check_vma=False)(x)


def on_groups(
    function: Callable[[Any, jax.Array, jax.Array], jax.Array],
    params: Any,
    values: jax.Array,
    rows: jax.Array,
) -> jax.Array:
    """`function(params, values, rows)` [N, P, D] that treats each media group by itself: `values`
    [N, P, F], `rows` int32 [N].

    On a mesh every device computes its share of the groups, with all of the parameters, and gets
    what the others computed. Groups are dealt out like cards: those that exist come first.
    """
    mesh = current_mesh()
    if mesh is None:
        return function(params, values, rows)
    count = rows.shape[0]

    def deal(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, -count % mesh.size), *[(0, 0)] * (x.ndim - 1)))
        return x.reshape(-1, mesh.size, *x.shape[1:])

    def local(params: Any, values: jax.Array, rows: jax.Array) -> jax.Array:
        return function(params, values[:, 0], rows[:, 0])[:, None]

    dealt, everywhere = PartitionSpec(None, AXES), PartitionSpec()
    soft = jax.shard_map(
        local, in_specs=(everywhere, dealt, dealt), out_specs=dealt, check_vma=False
    )(params, deal(values), deal(rows))
    soft = jax.lax.with_sharding_constraint(soft, everywhere)
    return soft.reshape(-1, *soft.shape[2:])[:count]


class Others(NamedTuple):
    """Keys and values [B, S, N, K] of other sequences, which queries attend to that are not 0 in
    `queries` int32 [B, T], where they are not 0 in `keys` int32 [B, S]; both are 0 or 1."""

    k: Any
    v: Any
    queries: Any
    keys: Any


def packed_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    *,
    sink: jax.Array | None,
    window: int | None,
    others: Others | None = None,
    **options: Any,
) -> jax.Array:
    """Causal attention within the segments of packed sequences, and to `others`.

    `q` [B, T, H, K], `k` and `v` [B, T, N, K], `segments` int32 [B, T] (0 is padding), `sink` [H] or
    None; `options` are those of `partial_attention`. Returns [B, T, H, K].

    Raises:
        NotImplementedError: others, where the context axis of the mesh cuts sequences.
    """
    mesh = current_mesh()
    if mesh is None:
        return _one_device(q, k, v, segments, sink, window, others, options)
    queries = partition(("batch", "length", "heads", None), q.shape, mesh)
    keys = partition(("batch", "length", "kv_heads", None), k.shape, mesh)
    groups = q.shape[2] // k.shape[2]
    if others is not None and mesh.shape["context"] > 1:
        raise NotImplementedError("negatives on a mesh whose context axis cuts sequences")
    positions = PartitionSpec(*queries[:2])
    of_others = None if others is None else Others(keys, keys, positions, positions)
    specs = (queries, keys, keys, positions, PartitionSpec(queries[2]), of_others)

    def local(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        segments: jax.Array,
        sink: jax.Array | None,
        others: Others | None,
    ) -> jax.Array:
        if keys[2] is None:
            k, v = (_own_heads(x, q.shape[2], groups) for x in (k, v))
            if others is not None:
                heads = [_own_heads(x, q.shape[2], groups) for x in (others.k, others.v)]
                others = Others(heads[0], heads[1], others.queries, others.keys)
        if mesh.shape["context"] == 1:
            return _one_device(q, k, v, segments, sink, window, others, options)
        if window is not None:
            return _halo(mesh.shape["context"], q, k, v, segments, sink, window, options)
        fixed = (mesh.shape["context"], tuple(sorted(options.items())))
        return _ring(fixed, q, k, v, segments, sink)

    return jax.shard_map(local, in_specs=specs, out_specs=queries, check_vma=False)(
        q, k, v, segments, sink, others
    )


def _one_device(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    sink: jax.Array | None,
    window: int | None,
    others: Others | None,
    options: dict[str, Any],
) -> jax.Array:
    shared: dict[str, Any] = {
        "q_segments": segments,
        "kv_segments": segments,
        "window": window,
        **options,
    }
    if others is None:
        return flash_attention(q, k, v, sink=sink, **shared)
    seen: dict[str, Any] = {
        "q_segments": others.queries,
        "kv_segments": others.keys,
        "causal": False,
    }
    parts = [
        partial_attention(q, k, v, **shared),
        partial_attention(q, others.k, others.v, **seen, **options),
    ]
    return merge_attention(parts, sink)[0].astype(q.dtype)


def cached_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_start: int,
    q_segments: jax.Array,
    kv_segments: jax.Array,
    sink: jax.Array | None,
    **options: Any,
) -> jax.Array:
    """Attention of new positions to the few that a window or chunk keeps, and to themselves.

    `q` [B, T, H, K], the first at `q_start` of `k` and `v` [B, S, N, K]; segments int32 [B, T] and
    [B, S], `sink` [H] or None; `options` are those of `partial_attention`. Returns [B, T, H, K].
    """
    mesh = current_mesh()
    if mesh is None:
        segments = {"q_segments": q_segments, "kv_segments": kv_segments, "q_start": q_start}
        return flash_attention(q, k, v, sink=sink, **segments, **options)
    queries = partition((None, "length", "heads", None), q.shape, mesh)
    keys = partition((None, None, "kv_heads", None), k.shape, mesh)
    groups = q.shape[2] // k.shape[2]

    def local(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        q_segments: jax.Array,
        kv_segments: jax.Array,
        sink: jax.Array | None,
    ) -> jax.Array:
        if keys[2] is None:
            k, v = (_own_heads(x, q.shape[2], groups) for x in (k, v))
        here = 0 if queries[1] is None else jax.lax.axis_index("context") * q.shape[1]
        return flash_attention(
            q,
            k,
            v,
            q_start=q_start + here,
            q_segments=q_segments,
            kv_segments=kv_segments,
            sink=sink,
            **options,
        )

    positions = PartitionSpec(*queries[:2])
    return jax.shard_map(
        local,
        in_specs=(queries, keys, keys, positions, PartitionSpec(), PartitionSpec(queries[2])),
        out_specs=queries,
        check_vma=False,
    )(q, k, v, q_segments, kv_segments, sink)


def chosen_blocks(
    u: jax.Array,
    landmarks: jax.Array,
    *,
    candidates: jax.Array,
    width: jax.Array,
    most: int,
    sticky: int,
) -> jax.Array:
    """`choose_blocks` of new positions, on a mesh each device for those that it has of them.

    Every device has all of `u` [B, sticky - 1 + T, I] and `landmarks` [B, M, I, J]. Returns int32
    [B, T, most].
    """
    mesh = current_mesh()
    steps = candidates.shape[0]

    def local(
        u: jax.Array, landmarks: jax.Array, candidates: jax.Array, width: jax.Array
    ) -> jax.Array:
        own = candidates.shape[0]
        if own < steps:
            first = jax.lax.axis_index("context") * own
            u = jax.lax.dynamic_slice_in_dim(u, first, own + sticky - 1, axis=1)
        return choose_blocks(
            u, landmarks, candidates=candidates, width=width, most=most, sticky=sticky
        )

    if mesh is None:
        return local(u, landmarks, candidates, width)
    everywhere = PartitionSpec()
    where = partition((None, "length", None), (u.shape[0], steps, most), mesh)
    rows = PartitionSpec(where[1])
    return jax.shard_map(
        local, in_specs=(everywhere, everywhere, rows, rows), out_specs=where, check_vma=False
    )(u, landmarks, candidates, width)


def _own_heads(x: jax.Array, heads: int, groups: int) -> jax.Array:
    """Of all key heads [B, T, N, K], those of this device's query heads, one each or one for all."""
    first = jax.lax.axis_index("tensor") * heads
    if groups % heads == 0:
        return jax.lax.dynamic_slice_in_dim(x, first // groups, 1, axis=2)
    return jnp.take(x, (first + jnp.arange(heads, dtype=jnp.int32)) // groups, axis=2)


def _shift(x: Any, size: int, by: int = 1) -> Any:
    """What the device `by` places before holds; of the last ones, where there is none before."""
    return jax.lax.ppermute(x, "context", [(i, (i + by) % size) for i in range(size)])


def _halo(
    size: int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    sink: jax.Array | None,
    window: int,
    options: dict[str, Any],
) -> jax.Array:
    """Window attention with the `window - 1` positions before this device's."""
    here, own = jax.lax.axis_index("context"), q.shape[1]
    reach = min(window - 1, (size - 1) * own)
    rows = [(k, v, segments)]
    for by in range(1, -(-reach // own) + 1):
        needed = min(own, reach - (by - 1) * own)
        before = _shift(tuple(x[:, own - needed :] for x in (k, v, segments)), size, by)
        rows.insert(0, (*before[:2], jnp.where(here >= by, before[2], 0)))
    k, v, kv_segments = (jnp.concatenate(parts, axis=1) for parts in zip(*rows, strict=True))
    return flash_attention(
        q,
        k,
        v,
        q_start=reach,
        window=window,
        q_segments=segments,
        kv_segments=kv_segments,
        sink=sink,
        **options,
    )


Fixed = tuple[int, tuple[tuple[str, Any], ...]]
"""Devices of the ring, and options of the kernel."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(
    fixed: Fixed,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    sink: jax.Array | None,
) -> jax.Array:
    return _ring_forward(fixed, q, k, v, segments, sink)[0]


def _ring_forward(
    fixed: Fixed,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    sink: jax.Array | None,
) -> tuple[jax.Array, Any]:
    size, _ = fixed
    out, lse = _own(fixed, segments, q, k, v)
    seen = out.astype(lse.dtype), lse  # rounded once, after the last merge

    def visit(by: jax.Array, carry: Any) -> Any:
        seen, (k, v, theirs) = carry
        k, v, theirs = _shift((k, v, theirs), size)
        part = _visit(fixed, segments, _earlier(theirs, by), q, k, v)
        return merge_attention([seen, part]), (k, v, theirs)

    seen, _ = jax.lax.fori_loop(1, size, visit, (seen, (k, v, segments)))
    out, lse = merge_attention([seen], sink)
    out = out.astype(q.dtype)
    return out, (q, k, v, segments, sink, out, lse)


def _ring_backward(fixed: Fixed, saved: Any, d_out: jax.Array) -> tuple[Any, ...]:
    size, _ = fixed
    q, k, v, segments, sink, out, lse = saved
    wide = d_out.astype(lse.dtype)
    along = row_dots(wide, out.astype(lse.dtype))  # [B, T, H]

    def gradients(attend: Any, k: jax.Array, v: jax.Array) -> Any:
        (part, part_lse), back = jax.vjp(attend, q, k, v)
        share = jnp.exp(part_lse - lse)
        d_lse = share * (row_dots(wide, part.astype(lse.dtype)) - along)
        return back(((wide * share[..., None]).astype(part.dtype), d_lse))

    d_q, d_k, d_v = gradients(functools.partial(_own, fixed, segments), k, v)

    def visit(by: jax.Array, carry: Any) -> Any:
        d_q, travelling = carry
        k, v, theirs, d_k, d_v = _shift(travelling, size)
        attend = functools.partial(_visit, fixed, segments, _earlier(theirs, by))
        more_q, more_k, more_v = gradients(attend, k, v)
        return d_q + more_q, (k, v, theirs, d_k + more_k, d_v + more_v)

    d_q, (*_, d_k, d_v) = jax.lax.fori_loop(1, size, visit, (d_q, (k, v, segments, d_k, d_v)))
    d_k, d_v = _shift((d_k, d_v), size)  # home
    d_sink = None
    if sink is not None:
        d_sink = -jnp.sum(jnp.exp(sink[None, None] - lse) * along, axis=(0, 1)).astype(sink.dtype)
    return d_q, d_k, d_v, None, d_sink


_ring.defvjp(_ring_forward, _ring_backward)


def _own(fixed: Fixed, segments: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
    """Attention to this device's own keys: those before each query."""
    return partial_attention(q, k, v, q_segments=segments, kv_segments=segments, **dict(fixed[1]))


def _visit(
    fixed: Fixed,
    segments: jax.Array,
    theirs: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
) -> Any:
    """Attention to keys of another device, all of them before the queries."""
    return partial_attention(
        q, k, v, causal=False, q_segments=segments, kv_segments=theirs, **dict(fixed[1])
    )


def _earlier(segments: jax.Array, by: jax.Array) -> jax.Array:
    """Segments of the device `by` places before, as padding where the ring began anew: later ones."""
    return jnp.where(jax.lax.axis_index("context") >= by, segments, 0)
