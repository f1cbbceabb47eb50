"""The cache of a model: what every layer keeps of the past.

Two kinds of arrays: *blocks*, rows of the unbounded layers' keys and values and the landmarks of their
index, that grow with the context and are written once; and the *state* (windows, convolution tails,
what an index has not summarised yet, length), a few kilobytes that each step replaces.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from gemtool.model.attention import LayerCache
from gemtool.model.buffers import Axes, buffer_axes, buffer_shape
from gemtool.model.config import LayerKind, ModelConfig
from gemtool.model.forks import Forks
from gemtool.model.index import IndexCache, block_capacity
from gemtool.model.mesh import constrain, current_mesh, partition
from gemtool.model.pages import Pages, paged_layers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """`length` int32 []: positions seen, by every sequence of the batch; `layers`: one each; `pages`:
    by layer, where the first positions of some lie, if not in buffers. Of forks, `length` is int32 [B],
    and buffers and landmarks are those of all (forks.py)."""

    length: jax.Array
    layers: tuple[LayerCache, ...]
    pages: Mapping[int, Pages] = dataclasses.field(default_factory=dict)
    forks: Forks | None = None


def abstract_cache(
    config: ModelConfig,
    batch_size: int,
    capacity: int,
    mesh: Mesh | None = None,
    behind: int | None = None,
) -> Cache:
    """Shapes and dtypes of a cache that can take `capacity` positions, on a mesh with shardings; with
    `behind`, of layers that may be paged only so many keys and values, those behind the pages.

    Buffers are dealt over the mesh as `buffers.py` says; windows and chunks are cut by key heads where
    the tensor axis divides these; the rest is everywhere, landmarks too.
    """

    def array(shape: Sequence[int], dtype: Any, axes: Axes) -> jax.ShapeDtypeStruct:
        where = None if mesh is None else NamedSharding(mesh, partition(axes, shape, mesh))
        return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=where)

    layers, paged = [], frozenset[int]() if behind is None else paged_layers(config)
    for at, kind in enumerate(config.layer_kinds):
        room = behind if behind is not None and at in paged else capacity
        size = (batch_size, room, kind.kv_heads, kind.head_dim)
        shape = (batch_size, kind.window, *size[2:]) if kind.bounded else buffer_shape(*size, mesh)
        rows = None if kind.shares else array(shape, jnp.dtype(config.kv_dtype), _axes(kind, mesh))
        tail = array((batch_size, kind.conv_tail, config.d_model), jnp.float32, (None,) * 3)
        index = None
        if kind.index is not None:
            found = kind.index
            blocks = block_capacity(found, max(capacity, math.prod(shape[1:-2])))
            sizes = {
                "landmarks": (batch_size, found.landmarks, found.dim, blocks),
                "pending": (batch_size, found.block, found.dim + found.landmarks),
                "queries": (batch_size, found.sticky - 1, found.dim),
            }
            parts: dict[str, Any] = {
                name: array(size, jnp.float32, (None,) * len(size)) for name, size in sizes.items()
            }
            if kind.shares:
                parts["landmarks"] = parts["pending"] = None
            index = IndexCache(**parts)
        layers.append(LayerCache(rows, rows, tail, index))  # type: ignore[arg-type]
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
        k, v = layer.k, layer.v
        if not kind.shares:
            k, v = (constrain(x, *_axes(kind, mesh)) for x in (k, v))
        tail, index = jax.tree.map(
            lambda x: constrain(x, *(None,) * x.ndim), (layer.tail, layer.index)
        )
        layers.append(LayerCache(k, v, tail, index))
    return dataclasses.replace(cache, length=constrain(cache.length), layers=tuple(layers))


def _axes(kind: LayerKind, mesh: Any | None) -> Axes:
    """Logical axes of a layer's keys and values."""
    if kind.bounded:
        return (None, None, "kv_heads", None)
    return buffer_axes(kind.kv_heads, mesh)


def full_layers(config: ModelConfig) -> tuple[int, ...]:
    """Indices of the layers that keep keys and values that grow with the context."""
    return tuple(index for index, kind in enumerate(config.layer_kinds) if kind.grows)


def map_state(config: ModelConfig, cache: Cache, change: Callable[[str, Any], Any]) -> Cache:
    """The cache with `change(path, array)` for each array of its state: `length`, `layers/0/k`,
    `layers/0/v`, `layers/0/tail`, and of an indexed layer `layers/2/pending`, `layers/2/queries`."""
    layers = []
    for at, (kind, layer) in enumerate(zip(config.layer_kinds, cache.layers, strict=True)):
        where = f"layers/{at}/"
        new = {"tail": change(where + "tail", layer.tail)}
        if kind.bounded:
            new |= {name: change(where + name, getattr(layer, name)) for name in "kv"}
        if layer.index is not None:
            kept = {"pending": layer.index.pending, "queries": layer.index.queries}
            parts = {name: change(where + name, x) for name, x in kept.items() if x is not None}
            new["index"] = dataclasses.replace(layer.index, **parts)
        layers.append(dataclasses.replace(layer, **new))
    return dataclasses.replace(cache, length=change("length", cache.length), layers=tuple(layers))


def untouched(config: ModelConfig, cache: Cache, pages: int) -> Cache:
    """The cache, with no page touched of so many that there is room for."""
    none = np.zeros(pages, np.bool)
    paged = paged_layers(config)
    layers = list(cache.layers)
    for at, layer in enumerate(layers):
        if config.source(at) in paged:
            assert layer.index is not None
            layers[at] = dataclasses.replace(
                layer, index=dataclasses.replace(layer.index, touched=jnp.asarray(none))
            )
    return dataclasses.replace(cache, layers=tuple(layers))


def touched_by(cache: Cache, other: Cache) -> Cache:
    """The cache, with the pages touched too that another one touched."""
    layers = list(cache.layers)
    for at, (own, its) in enumerate(zip(cache.layers, other.layers, strict=True)):
        if own.index is not None and own.index.touched is not None:
            assert its.index is not None
            assert its.index.touched is not None
            touched = own.index.touched | its.index.touched
            layers[at] = dataclasses.replace(
                own, index=dataclasses.replace(own.index, touched=touched)
            )
    return dataclasses.replace(cache, layers=tuple(layers))


def touched_pages(config: ModelConfig, cache: Cache) -> dict[int, np.ndarray]:
    """Numbers of the pages that were touched, int64 [n], by the layer whose keys they hold."""
    found: dict[int, np.ndarray] = {}
    for at, layer in enumerate(cache.layers):
        if layer.index is not None and layer.index.touched is not None:
            source, own = config.source(at), np.asarray(layer.index.touched)
            found[source] = found[source] | own if source in found else own
    return {at: np.flatnonzero(own) for at, own in found.items()}


def state_arrays(config: ModelConfig, cache: Cache) -> dict[str, np.ndarray]:
    """All of a cache but its blocks, by the paths of `map_state`."""
    arrays: dict[str, np.ndarray] = {}
    map_state(config, cache, lambda path, x: arrays.setdefault(path, np.asarray(x)))
    return arrays
