"""The cache of a model: what every layer keeps of the past.

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
    """`length` int32 []: positions seen, by every sequence of the batch; `layers`: one each."""

    length: jax.Array
    layers: tuple[LayerCache, ...]


def init_cache(config: ModelConfig, batch_size: int, capacity: int) -> Cache:
    """An empty cache that can take `capacity` positions.

    A step writes all T rows that it is given: `length + T` must never exceed the capacity, padding
    of the last chunk included.
    """
    dtype = jnp.dtype(config.kv_dtype)
    layers = []
    for kind in config.layer_kinds:
        size = kind.window if kind.bounded else capacity
        shape = (batch_size, size, kind.kv_heads, kind.head_dim)
        tail = jnp.zeros((batch_size, kind.conv_tail, config.d_model), jnp.float32)
        layers.append(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), tail))
    return Cache(jnp.zeros((), jnp.int32), tuple(layers))


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
