"""The cache of a model: what every layer keeps of the past, and its way to and from files.

Two kinds of arrays: *blocks*, rows of the full-attention layers' keys and values, that grow with the
context and are written once; and the *state* (windows, convolution tails, length), a few kilobytes
that each step replaces.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from gemtool.model.attention import LayerCache
from gemtool.model.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """``length`` int32 []: positions seen, by every sequence of the batch; ``layers``: one each."""

    length: jax.Array
    layers: tuple[LayerCache, ...]


def init_cache(config: ModelConfig, batch_size: int, capacity: int) -> Cache:
    """An empty cache that can take ``capacity`` positions.

    A step writes all T rows that it is given: ``length + T`` must never exceed the capacity, padding
    of the last chunk included.
    """
    dtype = jnp.dtype(config.kv_dtype)
    layers = []
    for kind in config.layer_kinds:
        size = kind.window if kind.attention == "window" else capacity
        shape = (batch_size, size, kind.kv_heads, kind.head_dim)
        tail = jnp.zeros((batch_size, kind.conv_tail, config.d_model), jnp.float32)
        layers.append(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), tail))
    return Cache(jnp.zeros((), jnp.int32), tuple(layers))


def full_layers(config: ModelConfig) -> tuple[int, ...]:
    """Indices of the layers whose keys and values grow with the context."""
    kinds = enumerate(config.layer_kinds)
    return tuple(index for index, kind in kinds if kind.attention == "full")


def capacity_of(config: ModelConfig, cache: Cache) -> int | None:
    """Positions that the cache can take; None where all layers are windows."""
    full = full_layers(config)
    return cache.layers[full[0]].k.shape[1] if full else None


def grow(config: ModelConfig, cache: Cache, capacity: int) -> Cache:
    """The same cache with room for ``capacity`` positions (a copy; never smaller than it was)."""
    layers = list(cache.layers)
    for index in full_layers(config):
        layer = layers[index]
        more = max(capacity - layer.k.shape[1], 0)
        pad = ((0, 0), (0, more), (0, 0), (0, 0))
        layers[index] = LayerCache(jnp.pad(layer.k, pad), jnp.pad(layer.v, pad), layer.tail)
    return Cache(cache.length, tuple(layers))


def state_arrays(config: ModelConfig, cache: Cache) -> dict[str, np.ndarray]:
    """All but the blocks: ``length``, ``layers/0/k``, ``layers/0/v``, ``layers/0/tail``."""
    arrays = {"length": np.asarray(cache.length)}
    for index, (kind, layer) in enumerate(zip(config.layer_kinds, cache.layers, strict=True)):
        if kind.attention == "window":
            arrays[f"layers/{index}/k"] = np.asarray(layer.k)
            arrays[f"layers/{index}/v"] = np.asarray(layer.v)
        arrays[f"layers/{index}/tail"] = np.asarray(layer.tail)
    return arrays


def block_arrays(config: ModelConfig, cache: Cache, start: int, stop: int) -> dict[str, np.ndarray]:
    """Rows ``start`` to ``stop`` of the blocks: ``layers/2/k``, ``layers/2/v`` [B, rows, N, K]."""
    arrays = {}
    for index in full_layers(config):
        layer = cache.layers[index]
        arrays[f"layers/{index}/k"] = np.asarray(layer.k[:, start:stop])
        arrays[f"layers/{index}/v"] = np.asarray(layer.v[:, start:stop])
    return arrays


def restore(
    config: ModelConfig,
    state: dict[str, np.ndarray],
    blocks: dict[str, np.ndarray],
    capacity: int,
) -> Cache:
    """A cache from :func:`state_arrays` and the blocks of all its rows, joined along axis 1.

    ``blocks`` may hold fewer rows than ``capacity``; the rest is free.
    """
    layers = []
    for index, kind in enumerate(config.layer_kinds):
        arrays = blocks if kind.attention == "full" else state
        size = kind.window if kind.attention == "window" else capacity
        pair = []
        for name in ("k", "v"):
            source = arrays[f"layers/{index}/{name}"]
            pad = ((0, 0), (0, size - source.shape[1]), (0, 0), (0, 0))
            pair.append(jnp.asarray(np.pad(source, pad)))
        layers.append(LayerCache(pair[0], pair[1], jnp.asarray(state[f"layers/{index}/tail"])))
    return Cache(jnp.asarray(state["length"], jnp.int32), tuple(layers))
