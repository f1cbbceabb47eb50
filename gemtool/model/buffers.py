"""Keys and values of a full-attention layer, on one device or dealt over a mesh.

On one device a buffer is [B, S, N, K], a row a position. On a mesh it is [B, J, R, N, K]: the same
rows in the same order, in J rounds of R, and R is cut over the devices that share the positions: runs
of `RUN` positions are dealt round them like cards. Therefore

* contexts of any length are spread evenly, to a run, whatever the capacity;
* to grow takes more rounds on every device, and moves nothing;
* what a device holds is in order, and the rows before any position are the first so many of it: the
  past is attended to without a mask.

The devices are those of the context axis; where the tensor axis does not divide the key heads, those of
both, each with all key heads of its positions.

Axes: B sequences, S positions, T new ones, H query heads, N key/value heads, K head dimension.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec

from gemtool.kernels.attention import flash_attention, merge_attention, partial_attention
from gemtool.kernels.blocks import block_attention, partial_block_attention
from gemtool.kernels.dispatch import target_platform
from gemtool.kernels.dtypes import accumulator
from gemtool.kernels.turns import counted_turns
from gemtool.model.mesh import (
    RULES,
    constrain,
    current_mesh,
    cut_axes,
    device_count,
    partition,
)
from gemtool.model.pages import Pages, attend_with_pages

RUN = 4096
"""Positions that are dealt to a device at a time; as many as a block of a context file has."""

Axes = tuple[str | None, ...]


def buffer_axes(kv_heads: int, mesh: Any | None) -> Axes:
    """Logical axes of a buffer."""
    if mesh is None:
        return (None,) * 4
    if kv_heads % mesh.shape["tensor"] == 0:
        return (None, None, "cache", "kv_heads", None)
    return (None, None, "cache_all_heads", None, None)


def buffer_shape(
    batch_size: int, capacity: int, kv_heads: int, head_dim: int, mesh: Any | None
) -> tuple[int, ...]:
    """The shape of a buffer of at least `capacity` positions."""
    if mesh is None:
        return (batch_size, capacity, kv_heads, head_dim)
    positions = buffer_axes(kv_heads, mesh)[2] or ""
    per_round = RUN * device_count(RULES[positions], mesh)
    return (batch_size, -(-capacity // per_round), per_round, kv_heads, head_dim)


def buffer_capacity(buffer: jax.Array) -> int:
    """How many positions it has room for."""
    return math.prod(buffer.shape[1:-2])


def grow(buffer: jax.Array, capacity: int) -> jax.Array:
    """A buffer with room for at least `capacity` positions that begins with the rows of this one."""
    per_round = math.prod(buffer.shape[2:-2])
    more = max(-(-capacity // per_round) - buffer.shape[1], 0)
    grown = jnp.pad(buffer, [(0, more if axis == 1 else 0) for axis in range(buffer.ndim)])
    return constrain(grown, *buffer_axes(buffer.shape[-2], current_mesh()))


def write_rows(buffer: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
    """The buffer with `rows` [B, T, N, K] at positions `start` int32 [] and after.

    `start + T` must be within the capacity. In place where the buffer is donated: each device writes
    those of its own positions.
    """
    mesh = current_mesh()
    if mesh is None:
        return jax.lax.dynamic_update_slice_in_dim(buffer, rows, start, axis=1)
    spec = _spec(buffer, mesh)
    steps = rows.shape[1]

    def local(buffer: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
        share = _Share.of(buffer, spec, mesh)
        size = min(steps, share.run)

        def write(index: jax.Array, held: jax.Array) -> jax.Array:
            begins = share.begins(index)
            first = jnp.clip(start - begins, 0, share.run - size)
            source = begins + first + jnp.arange(size, dtype=jnp.int32) - start
            mine = (source >= 0) & (source < steps)
            new = jnp.take(rows, jnp.where(mine, source, 0), axis=1)
            at = index * share.run + first
            old = jax.lax.dynamic_slice_in_dim(held, at, size, axis=1)
            new = jnp.where(mine[None, :, None, None], new, old)
            return jax.lax.dynamic_update_slice_in_dim(held, new, at, axis=1)

        # A loop, over what is often no run at all, is what every compiler does in place.
        runs = share.runs(start, steps)
        touched = (steps + share.run - 2) // share.run + 1
        with counted_turns(-(-touched // share.devices)):
            held = jax.lax.fori_loop(*runs, write, share.rows(buffer))
        return _reshaped(held, buffer.shape)

    return jax.shard_map(
        local,
        in_specs=(spec, PartitionSpec(None, None, *spec[3:]), PartitionSpec()),
        out_specs=spec,
        check_vma=False,
    )(buffer, rows, start)


def read_rows(buffer: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """`size` rows from position `start` int32 [] on, within the capacity: [B, size, N, K]."""
    mesh = current_mesh()
    if mesh is None:
        return jax.lax.dynamic_slice_in_dim(buffer, start, size, axis=1)
    spec = _spec(buffer, mesh)

    def local(buffer: jax.Array, start: jax.Array) -> jax.Array:
        share = _Share.of(buffer, spec, mesh)
        here, place = share.places(start + jnp.arange(size, dtype=jnp.int32))
        found = jnp.take(share.rows(buffer), jnp.where(here, place, 0), axis=1)
        return jax.lax.psum(jnp.where(here[None, :, None, None], found, 0), share.axes)

    return jax.shard_map(
        local,
        in_specs=(spec, PartitionSpec()),
        out_specs=PartitionSpec(None, None, *spec[3:]),
        check_vma=False,
    )(buffer, start)


def buffer_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    new: tuple[jax.Array, jax.Array],
    length: jax.Array,
    sink: jax.Array | None,
    **options: Any,
) -> jax.Array:
    """Attention of T new positions to all before them and to themselves, causal.

    On a mesh each device attends to the positions that it holds of the past, all of which every query
    sees, and what they find is merged by its log-sum-exps; the new ones, few, each device has anyway.

    Args:
        q: [B, T, H, K].
        k: buffer of keys, the new ones included.
        v: of values.
        new: keys and values [B, T, N, K] of the new positions.
        length: int32 [], positions before them.
        sink: [H] or None.
        options: those of `partial_attention`.

    Returns:
        [B, T, H, K].
    """
    mesh = current_mesh()
    if mesh is None:
        stop = length + q.shape[1]
        return flash_attention(q, k, v, q_start=length, kv_length=stop, sink=sink, **options)
    spec = _spec(k, mesh)
    heads = partition(("heads",), q.shape[2:3], mesh) if spec[3] else PartitionSpec(None)
    queries, rows = PartitionSpec(None, None, *heads, None), PartitionSpec(None, None, *spec[3:])

    def local(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        new: tuple[jax.Array, jax.Array],
        length: jax.Array,
        sink: jax.Array | None,
    ) -> jax.Array:
        share = _Share.of(k, spec, mesh)
        past = partial_attention(
            q,
            share.rows(k),
            share.rows(v),
            causal=False,
            kv_length=share.count(length),
            **options,
        )
        parts = [_merged(*past, share.axes), _wide(partial_attention(q, *new, **options))]
        return merge_attention(parts, sink)[0].astype(q.dtype)

    return jax.shard_map(
        local,
        in_specs=(queries, spec, spec, rows, PartitionSpec(), heads),
        out_specs=queries,
        check_vma=False,
    )(q, k, v, new, length, sink)


def buffer_block_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    blocks: jax.Array,
    block: int,
    length: jax.Array,
    sink: jax.Array | None,
    pages: Pages | None = None,
    **options: Any,
) -> jax.Array:
    """Attention of T new positions to some blocks of all positions, causal.

    On a mesh each device attends to those of the blocks that it holds, and what they find is merged.
    There, no positions lie in pages.

    Args:
        q: [B, T, H, K].
        k: buffer of keys, the new ones included.
        v: of values.
        blocks: int32 [B, T, C], numbers of blocks, -1 for none.
        block: positions of a block.
        length: int32 [], positions before the new ones.
        sink: [H] or None.
        pages: what lies before the first row of the buffers, if anything does.
        options: those of `partial_block_attention`.

    Returns:
        [B, T, H, K].
    """
    mesh = current_mesh()
    options = {**options, "block": block}
    if pages is not None:
        return attend_with_pages(q, k, v, pages, blocks=blocks, length=length, sink=sink, **options)
    if mesh is None:
        return block_attention(q, k, v, blocks, q_start=length, sink=sink, **options)
    spec = _spec(k, mesh)
    heads = partition(("heads",), q.shape[2:3], mesh) if spec[3] else PartitionSpec(None)
    queries = PartitionSpec(None, None, *heads, None)

    def local(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        blocks: jax.Array,
        length: jax.Array,
        sink: jax.Array | None,
    ) -> jax.Array:
        share = _Share.of(k, spec, mesh)
        starts = blocks * block
        here, place = share.places(starts)
        held = jnp.where(here & (blocks >= 0), place // block, -1)
        own = share.rows(k), share.rows(v)
        part = partial_block_attention(q, *own, held, starts=starts, q_start=length, **options)
        merged = _merged(*part, share.axes)
        return merge_attention([merged], sink)[0].astype(q.dtype)

    return jax.shard_map(
        local,
        in_specs=(queries, spec, spec, PartitionSpec(), PartitionSpec(), heads),
        out_specs=queries,
        check_vma=False,
    )(q, k, v, blocks, length, sink)


def _merged(out: jax.Array, lse: jax.Array, axes: tuple[str, ...]) -> tuple[jax.Array, jax.Array]:
    """`merge_attention` of what each device of some axes of the mesh found."""
    out, lse = _wide((out, lse))
    top = jax.lax.pmax(lse, axes)
    share = jnp.exp(lse - top)
    total = jax.lax.psum(share, axes)
    out = jax.lax.psum(out * share[..., None], axes) / total[..., None]
    return out, top + jnp.log(total)


def _wide(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """What `partial_attention` found, in the type that it is merged in."""
    out, lse = part
    dtype = accumulator(out.dtype)
    return out.astype(dtype), lse.astype(dtype)


@dataclasses.dataclass(frozen=True)
class _Share:
    """What the device that runs this holds of a buffer; within `shard_map`."""

    axes: tuple[str, ...]
    """Of the mesh, over which positions are dealt."""
    devices: int
    run: int
    here: jax.Array
    """int32 []: which of the devices this is."""

    @classmethod
    def of(cls, local: jax.Array, spec: PartitionSpec, mesh: Any) -> _Share:
        axes = cut_axes(spec[2])
        return cls(axes, device_count(axes, mesh), local.shape[2], jax.lax.axis_index(axes))

    @property
    def round(self) -> int:
        return self.devices * self.run

    def rows(self, local: jax.Array) -> jax.Array:
        """This device's part of a buffer, in order of position: [B, J, run, N, K] -> [B, S, N, K]."""
        return _reshaped(local, (local.shape[0], -1, *local.shape[3:]))

    def count(self, position: jax.Array) -> jax.Array:
        """How many rows before a position it holds: its first so many."""
        rounds, rest = position // self.round, position % self.round
        return rounds * self.run + jnp.clip(rest - self.here * self.run, 0, self.run)

    def begins(self, index: jax.Array) -> jax.Array:
        """The first position of its run `index`."""
        return (index * self.devices + self.here) * self.run

    def runs(self, start: jax.Array, steps: int) -> tuple[jax.Array, jax.Array]:
        """Which of its runs have some of `steps` positions from `start` on: the first, and behind the
        last."""
        first, stop = start // self.run, -(-(start + steps) // self.run)
        first, stop = ((x - self.here + self.devices - 1) // self.devices for x in (first, stop))
        return first, stop

    def places(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Whether it holds positions int32 [n], bool [n], and in which of its rows."""
        rounds, rest = positions // self.round, positions % self.round
        here = rest // self.run == self.here
        return here, rounds * self.run + rest % self.run


def _reshaped(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`x` in another shape, where it lies."""
    x = x.reshape(shape)
    if target_platform() != "cpu":
        return x
    # There XLA may reorder axes of size 1, and copies the array for it.
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _spec(buffer: jax.Array, mesh: Any) -> PartitionSpec:
    return partition(buffer_axes(buffer.shape[-2], mesh), buffer.shape, mesh)
