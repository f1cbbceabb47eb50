"""Tables with a row a token on a mesh: looking rows up, and scoring against all of them.

The embedding and the unembedding are the largest arrays that every token needs, so no device gathers
one. The fsdp and expert axes cut their columns, as those of other parameters; the devices of these axes
have different sequences, and send each other what is smaller than the table:

* to look up, token ids: each device reads its columns of the rows for all, and columns become rows of
  one device by all-to-all;
* to score, hidden states, a few at a time: columns of the table become rows by all-to-all (the tensor
  axis cuts rows anyway), and each device scores everybody's positions against its part.

So the gradient of a table is as small as the device's part of it.

Axes: B sequences, T positions, D model, V vocabulary; within a device they are that device's share.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from gemtool.kernels.dtypes import accumulator
from gemtool.model.mesh import AXES, current_mesh, cut_axes, device_count, partition


def embedding_rows(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """The rows of `table` [V, D] of `tokens` int32, on a mesh [B, T]: -> [..., D].

    Each device looks up in its own rows and columns of the table, so that the gradient of the table is
    summed, and nobody gathers that of the activations.
    """
    mesh = current_mesh()
    if mesh is None:
        return _rows_of(table.shape, table, tokens)
    spec = partition(("vocab", "embed"), table.shape, mesh)
    places = partition(("batch", "length"), tokens.shape, mesh)
    cut = _column_axes(spec, mesh)

    def local(table: jax.Array, tokens: jax.Array) -> jax.Array:
        if cut and places[0] is not None:
            tokens = jax.lax.all_gather(tokens, cut, tiled=True)
        here = jax.lax.axis_index("tensor")
        index = tokens - here * (0 if spec[0] is None else len(table))
        mine = (index >= 0) & (index < len(table))
        if spec[0] is None:
            mine = jnp.broadcast_to(here == 0, tokens.shape)
        found = _rows_of(table.shape, table, jnp.where(mine, index, 0))
        found = jnp.where(mine[..., None], found, 0)
        if cut and places[0] is not None:
            found = jax.lax.all_to_all(found, cut, split_axis=0, concat_axis=2, tiled=True)
        elif cut:
            found = jax.lax.all_gather(found, cut, axis=2, tiled=True)
        return found[None]

    parts = jax.shard_map(
        local,
        in_specs=(spec, places),
        out_specs=PartitionSpec("tensor", *places, None),
        check_vma=False,
    )(table, tokens)
    return jnp.sum(parts, axis=0)


def _column_axes(spec: PartitionSpec, mesh: Any) -> tuple[str, ...]:
    """The axes, of more than one device, that cut the columns of a table."""
    return tuple(axis for axis in cut_axes(spec[1]) if mesh.shape[axis] > 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows_of(shape: tuple[int, int], table: jax.Array, tokens: jax.Array) -> jax.Array:
    """`table[tokens]`. A frequent token's gradients are many: they are added in float32, whatever the
    table is rounded to."""
    return jnp.take(table, tokens, axis=0)


def _rows_of_forward(
    shape: tuple[int, int], table: jax.Array, tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _rows_of(shape, table, tokens), tokens


def _rows_of_backward(
    shape: tuple[int, int], tokens: jax.Array, d_rows: jax.Array
) -> tuple[jax.Array, None]:
    wide = d_rows.astype(accumulator(d_rows.dtype))
    return jnp.zeros(shape, wide.dtype).at[tokens].add(wide).astype(d_rows.dtype), None


_rows_of.defvjp(_rows_of_forward, _rows_of_backward)


@dataclasses.dataclass(frozen=True)
class Spread:
    """How rows of a table are spread over devices that run a function."""

    alike: tuple[str, ...] = ()
    """Axes of the mesh whose devices have different rows, and the same positions."""
    apart: tuple[str, ...] = ()
    """Whose devices have different rows, of those, and different positions."""

    @property
    def axes(self) -> tuple[str, ...]:
        """All of them, in the order of the rows."""
        return self.alike + self.apart

    def gather(self, x: jax.Array) -> jax.Array:
        """The positions of all, [C, ...] -> [C * devices, ...]."""
        return jax.lax.all_gather(x, self.apart, tiled=True) if self.apart else x


def sum_over_positions(
    function: Callable[..., jax.Array], table: jax.Array, *arrays: jax.Array
) -> jax.Array:
    """A sum over positions that takes a table with a row a token: each device adds up its share.

    `function(table, *arrays, spread)` gets this device's rows of `table` [V, D], its positions of
    `arrays` [B, T, ...], and the `Spread` of the rows. It returns float32 []: what all return is added.
    """
    mesh = current_mesh()
    if mesh is None:
        return function(table, *arrays, Spread())
    spec = partition(("vocab", "embed"), table.shape, mesh)
    places = partition(("batch", "length"), arrays[0].shape[:2], mesh)
    alike = () if spec[0] is None or mesh.shape["tensor"] == 1 else ("tensor",)
    cut = _column_axes(spec, mesh) if places[0] is not None else ()
    # Columns become rows where there are enough of these; else they are gathered.
    pieces = device_count((*alike, *cut), mesh)
    spread = Spread(alike, cut if table.shape[0] % pieces == 0 else ())

    def local(table: jax.Array, *arrays: jax.Array) -> jax.Array:
        if spread.apart:
            table = jax.lax.all_to_all(table, cut, split_axis=0, concat_axis=1, tiled=True)
        return function(table, *arrays, spread)[None] / copies

    # Devices along an axis that cuts neither the table nor the positions all compute the same.
    cuts = {*alike, *jax.tree.leaves(tuple(places))}
    copies = device_count(set(AXES) - cuts, mesh)
    shares = jax.shard_map(
        local,
        in_specs=(spec if spread.apart else PartitionSpec(spec[0], None), *[places] * len(arrays)),
        out_specs=PartitionSpec(AXES),
        check_vma=False,
    )(table, *arrays)
    return jnp.sum(shares)
