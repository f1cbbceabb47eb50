"""The cache of a model: what every layer keeps of the past.

Two kinds of arrays: *blocks*, rows of the full-attention layers' keys and values, that grow with the
context and are written once; and the *state* (windows, convolution tails, length), a few kilobytes
that each step replaces.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from gemtool.model.attention import LayerCache
from gemtool.model.buffers import Axes, buffer_axes, buffer_shape
from gemtool.model.config import LayerKind, ModelConfig
from gemtool.model.mesh import constrain, current_mesh, partition


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """`length` int32 []: positions seen, by every sequence of the batch; `layers`: one each."""

    length: jax.Array
    layers: tuple[LayerCache, ...]


def abstract_cache(
    config: ModelConfig, batch_size: int, capacity: int, mesh: Mesh | None = None
) -> Cache:
    """Shapes and dtypes of a cache that can take `capacity` positions, on a mesh with shardings.

    Buffers are dealt over the mesh as `buffers.py` says; windows and chunks are cut by key heads where
    the tensor axis divides these; the rest is everywhere.
    """

    def array(shape: Sequence[int], dtype: Any, axes: Axes) -> jax.ShapeDtypeStruct:
        where = None if mesh is None else NamedSharding(mesh, partition(axes, shape, mesh))
        return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=where)

    layers = []
    for kind in config.layer_kinds:
        size = (batch_size, capacity, kind.kv_heads, kind.head_dim)
        shape = (batch_size, kind.window, *size[2:]) if kind.bounded else buffer_shape(*size, mesh)
        rows = array(shape, jnp.dtype(config.kv_dtype), _axes(kind, mesh))
        tail = array((batch_size, kind.conv_tail, config.d_model), jnp.float32, (None,) * 3)
        layers.append(LayerCache(rows, rows, tail))  # type: ignore[arg-type]
    return Cache(array((), jnp.int32, ()), tuple(layers))  # type: ignore[arg-type]


def init_cache(config: ModelConfig, batch_size: int, capacity: int) -> Cache:
    """An empty cache on one device that can take `capacity` positions.

    A step writes all T rows that it is given: `length + T` must never exceed the capacity, padding
    of the last chunk included.
    """
    shapes = abstract_cache(config, batch_size, capacity)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def constrain_cache(config: ModelConfig, cache: Cache) -> Cache:
    """The cache, placed on the current mesh as `abstract_cache` says; unchanged without one."""
    mesh = current_mesh()
    if mesh is None:
        return cache
    layers = []
    for kind, layer in zip(config.layer_kinds, cache.layers, strict=True):
        k, v = (constrain(x, *_axes(kind, mesh)) for x in (layer.k, layer.v))
        layers.append(LayerCache(k, v, constrain(layer.tail, None, None, None)))
    return Cache(constrain(cache.length), tuple(layers))


def _axes(kind: LayerKind, mesh: Any | None) -> Axes:
    """Logical axes of a layer's keys and values."""
    if kind.bounded:
        return (None, None, "kv_heads", None)
    return buffer_axes(kind.kv_heads, mesh)


def full_layers(config: ModelConfig) -> tuple[int, ...]:
    """Indices of the layers whose keys and values grow with the context."""
    kinds = enumerate(config.layer_kinds)
    return tuple(index for index, kind in kinds if not kind.bounded)


def state_arrays(config: ModelConfig, cache: Cache) -> dict[str, np.ndarray]:
    """All but the blocks: `length`, `layers/0/k`, `layers/0/v`, `layers/0/tail`."""
    arrays = {"length": np.asarray(cache.length)}
    for index, (kind, layer) in enumerate(zip(config.layer_kinds, cache.layers, strict=True)):
        if kind.bounded:
            arrays[f"layers/{index}/k"] = np.asarray(layer.k)
            arrays[f"layers/{index}/v"] = np.asarray(layer.v)
        arrays[f"layers/{index}/tail"] = np.asarray(layer.tail)
    return arrays
