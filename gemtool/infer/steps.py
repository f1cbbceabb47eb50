"""The compiled programs of inference: a step that scores the next token, one that scores every token,
one that only writes keys and values, one of many forks, and what reads and grows the buffers between
them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gemtool.model import transformer
from gemtool.model.buffers import buffer_capacity, grow, read_rows
from gemtool.model.cache import (
    Cache,
    abstract_cache,
    constrain_cache,
    full_layers,
    map_state,
    touched_by,
)
from gemtool.model.config import ModelConfig
from gemtool.model.forks import Forks
from gemtool.model.index import block_capacity, position_capacity
from gemtool.model.mesh import constrain
from gemtool.model.pages import Pages, paged_layers
from gemtool.model.params import Tree

Buffers = tuple[dict[str, jax.Array], ...]
"""What grows with a context, of each unbounded layer: "k" and "v", as `gemtool.model.buffers` has
them, and "landmarks" of one that is indexed."""

PageTables = Mapping[int, Pages]
"""Where the first positions of some layers lie, if not in buffers, by layer."""

SCORED = 512
"""Positions that are scored at a time, at most: [512, V] is 32 MB at V = 16,384."""


class Scores(NamedTuple):
    """How likely the tokens of a tile are, each after all that goes before it."""

    logprobs: jax.Array
    """float32 [T]"""
    best: jax.Array
    """int32 [T, K]: the most likely tokens in its place, the best first."""
    best_logprobs: jax.Array
    """float32 [T, K]"""


def abstract_sequence(
    config: ModelConfig, capacity: int, mesh: Mesh | None = None, behind: int | None = None
) -> tuple[Buffers, Cache]:
    """Shapes, dtypes and on a mesh shardings of the buffers and the state of a sequence with room for
    `capacity` positions: what `scored_step` can be lowered with. `behind` as in `abstract_cache`."""
    return split(config, abstract_cache(config, 1, capacity, mesh, behind))


def join(config: ModelConfig, buffers: Buffers, state: Cache, pages: PageTables) -> Cache:
    layers = list(state.layers)
    for index, own in zip(full_layers(config), buffers, strict=True):
        layer = replace(layers[index], k=own["k"], v=own["v"])
        if layer.index is not None:
            layer = replace(layer, index=replace(layer.index, landmarks=own["landmarks"]))
        layers[index] = layer
    return Cache(state.length, tuple(layers), pages)


def split(config: ModelConfig, cache: Cache) -> tuple[Buffers, Cache]:
    """The parts of a cache that are donated, and the small ones, which stay valid; without pages, which
    never change."""
    layers, buffers = list(cache.layers), []
    for at in full_layers(config):
        layer = layers[at]
        own, index = {"k": layer.k, "v": layer.v}, layer.index
        if index is not None:
            assert index.landmarks is not None
            own["landmarks"] = index.landmarks
            index = replace(index, landmarks=None)
        buffers.append(own)
        layers[at] = replace(layer, k=None, v=None, index=index)  # type: ignore[arg-type]
    return tuple(buffers), Cache(cache.length, tuple(layers))


def _embedded(
    params: Tree, config: ModelConfig, tokens: jax.Array, soft: tuple[jax.Array, jax.Array] | None
) -> jax.Array:
    x = transformer.embed(params, config, tokens[None, :])
    if soft is not None:
        vectors, present = soft
        x = jnp.where(present[None, :, None], vectors[None].astype(x.dtype), x)
    return x


@partial(jax.jit, static_argnames="config", donate_argnames="buffers")
def scored_step(
    params: Tree,
    config: ModelConfig,
    tokens: jax.Array,
    soft: tuple[jax.Array, jax.Array] | None,
    valid: jax.Array,
    buffers: Buffers,
    state: Cache,
    pages: PageTables,
) -> tuple[jax.Array, Buffers, Cache]:
    """Runs tokens int32 [T], the first `valid` of them real, with the cache that `buffers`, `state` and
    `pages` are parts of; scores [V] after the last real one."""
    x = _embedded(params, config, tokens, soft)
    hidden, cache = transformer.step(params, config, x, join(config, buffers, state, pages), valid)
    last = jax.lax.dynamic_index_in_dim(hidden[0], valid - 1, axis=0, keepdims=False)
    return transformer.logits(params, config, last), *split(config, constrain_cache(config, cache))


@partial(jax.jit, static_argnames=("config", "top"), donate_argnames="buffers")
def logprobs_step(
    params: Tree,
    config: ModelConfig,
    tokens: jax.Array,
    soft: tuple[jax.Array, jax.Array] | None,
    valid: jax.Array,
    buffers: Buffers,
    state: Cache,
    pages: PageTables,
    before: jax.Array,
    top: int,
) -> tuple[Scores, jax.Array, Buffers, Cache]:
    """What `scored_step` does, and scores of all its tokens and of the `top` most likely in their
    places. `before` float32 [V] are the scores of the first, as the step before returned them."""
    x = _embedded(params, config, tokens, soft)
    hidden, cache = transformer.step(params, config, x, join(config, buffers, state, pages), valid)
    hidden = constrain(hidden[0], None, None)
    last = jax.lax.dynamic_index_in_dim(hidden, valid - 1, axis=0, keepdims=False)
    after = constrain(transformer.logits(params, config, last), None)
    first = _scores_of(before[None], tokens[:1], top)
    others = _score(params, config, hidden, jnp.roll(tokens, -1), top)
    scores = jax.tree.map(lambda a, b: jnp.concatenate([a, b[:-1]]), first, others)
    return scores, after, *split(config, constrain_cache(config, cache))


def _score(
    params: Tree, config: ModelConfig, hidden: jax.Array, targets: jax.Array, top: int
) -> Scores:
    """Scores of the tokens `targets` int32 [T] that follow the positions of `hidden` [T, D]."""
    count = len(targets)
    chunks = -(-count // SCORED)
    size = -(-count // chunks)  # chunks alike: hardly any rows are added to fill the last

    def cut(x: jax.Array) -> jax.Array:
        padded = jnp.pad(
            x, [(0, chunks * size - count if axis == 0 else 0) for axis in range(x.ndim)]
        )
        return padded.reshape(chunks, size, *x.shape[1:])

    def score(chunk: tuple[jax.Array, jax.Array]) -> Scores:
        x = constrain(chunk[0], "length", None)  # devices that share positions share the work
        return _scores_of(transformer.logits(params, config, x), chunk[1], top)

    with jax.named_scope("score"):
        found = jax.lax.map(score, (cut(hidden), cut(targets)))
    return jax.tree.map(lambda x: x.reshape(chunks * size, *x.shape[2:])[:count], found)


def _scores_of(logits: jax.Array, targets: jax.Array, top: int) -> Scores:
    """Scores of tokens int32 [C] by logits float32 [C, V]."""
    logits = logits - jnp.max(logits, axis=-1, keepdims=True)
    total = jnp.log(jnp.sum(jnp.exp(logits), axis=-1, keepdims=True))
    own = jnp.take_along_axis(logits, targets[:, None], axis=-1) - total
    best, which = jax.lax.top_k(logits, top)
    return Scores(own[:, 0], which.astype(jnp.int32), best - total)


@partial(jax.jit, static_argnames=("config", "count"), donate_argnames="buffers")
def each_scored_step(
    params: Tree,
    config: ModelConfig,
    tokens: jax.Array,
    soft: tuple[jax.Array, jax.Array] | None,
    valid: jax.Array,
    buffers: Buffers,
    state: Cache,
    pages: PageTables,
    count: int,
) -> tuple[jax.Array, Buffers, Cache]:
    """What `scored_step` does, with scores [count, V] after each of the last `count` real tokens; if
    there are fewer, after these and as many that are not."""
    x = _embedded(params, config, tokens, soft)
    hidden, cache = transformer.step(params, config, x, join(config, buffers, state, pages), valid)
    first = jnp.maximum(valid - count, 0)
    last = jax.lax.dynamic_slice_in_dim(constrain(hidden[0], None, None), first, count, axis=0)
    return transformer.logits(params, config, last), *split(config, constrain_cache(config, cache))


@partial(jax.jit, static_argnames="config", donate_argnames="buffers")
def kv_step(
    params: Tree,
    config: ModelConfig,
    tokens: jax.Array,
    soft: tuple[jax.Array, jax.Array] | None,
    valid: jax.Array,
    buffers: Buffers,
    state: Cache,
    pages: PageTables,
) -> tuple[Buffers, Cache]:
    """The part of `scored_step` that far later positions can see."""
    x = _embedded(params, config, tokens, soft)
    cache = transformer.step_kv(params, config, x, join(config, buffers, state, pages), valid)
    return split(config, constrain_cache(config, cache))


@partial(jax.jit, static_argnames="config", donate_argnames="buffers")
def forks_step(
    params: Tree,
    config: ModelConfig,
    tokens: jax.Array,
    buffers: Buffers,
    state: Cache,
    pages: PageTables,
    forks: Forks,
    running: jax.Array,
) -> tuple[jax.Array, Buffers, Cache]:
    """Runs one token of each fork, int32 [B], with the `state` of all; scores [B, V] after them. Those
    that are not `running`, bool [B], look at no blocks."""
    x = transformer.embed(params, config, tokens[:, None])
    cache = replace(join(config, buffers, state, pages), forks=replace(forks, running=running))
    hidden, cache = transformer.step(params, config, x, cache, jnp.int32(1))
    return transformer.logits(params, config, hidden[:, 0]), *split(config, cache)


@partial(jax.jit, static_argnames="config", donate_argnames="buffers")
def place_fork(
    config: ModelConfig,
    buffers: Buffers,
    states: Cache,
    state: Cache,
    which: jax.Array,
    forks: Forks,
    first: jax.Array,
) -> tuple[Buffers, Cache]:
    """Makes a sequence with this `state` one of the forks, `which` int32 []: with what `buffers` have
    of it from `forks.start` on. `first` as in `read_block`."""
    there, paged, found = forks.rows[which], paged_layers(config), []
    for at, own in zip(full_layers(config), buffers, strict=True):
        skipped, index = first if at in paged else 0, config.layer_kinds[at].index
        new = {
            name: _copied(own[name], forks.start - skipped, there - skipped, forks.room, 1)
            for name in "kv"
        }
        if index is not None:
            source, target = forks.start // index.block, there // index.block
            count = forks.room // index.block
            new["landmarks"] = _copied(own["landmarks"], source, target, count, 3)
        found.append(new)
    rows: dict[str, jax.Array] = {}
    map_state(config, state, lambda path, x: rows.setdefault(path, x))

    def put(path: str, all_rows: jax.Array) -> jax.Array:
        row = rows[path].reshape(1, *all_rows.shape[1:])
        return jax.lax.dynamic_update_slice_in_dim(all_rows, row, which, axis=0)

    return tuple(found), touched_by(map_state(config, states, put), state)


def _copied(x: jax.Array, source: jax.Array, target: jax.Array, count: int, axis: int) -> jax.Array:
    rows = jax.lax.dynamic_slice_in_dim(x, source, count, axis)
    return jax.lax.dynamic_update_slice_in_dim(x, rows, target, axis)


@partial(jax.jit, static_argnames=("config", "count"))
def no_forks(config: ModelConfig, state: Cache, count: int) -> Cache:
    """The state of so many forks of a sequence with this one, none of which has begun."""

    def empty(path: str, x: jax.Array) -> jax.Array:
        return jnp.zeros((count, *x.shape[1:]), x.dtype)

    return map_state(config, state, empty)


@partial(jax.jit, static_argnames=("config", "kind"))
def encode(
    params: Tree, config: ModelConfig, kind: str, values: jax.Array, rows: jax.Array
) -> jax.Array:
    return transformer.encode_media(params, config, kind, values, rows).astype(jnp.float32)


@partial(jax.jit, static_argnames=("config", "size"))
def read_block(
    config: ModelConfig, buffers: Buffers, start: jax.Array, first: jax.Array, size: int
) -> Buffers:
    """What buffers have of positions `start` to `start + size`, both whole blocks of their indices.

    `first` is the position of the first row of those that go on behind pages; what they give of
    positions before it means nothing.
    """
    found, paged = [], paged_layers(config)
    for at, own in zip(full_layers(config), buffers, strict=True):
        row = start - first if at in paged else start
        rows = {name: read_rows(own[name], row, size) for name in "kv"}
        index = config.layer_kinds[at].index
        if index is not None:
            block, count = start // index.block, size // index.block
            rows["landmarks"] = jax.lax.dynamic_slice_in_dim(own["landmarks"], block, count, axis=3)
        found.append(rows)
    return tuple(found)


def has_room(config: ModelConfig, buffers: Buffers, length: int, first: int) -> bool:
    """Whether buffers have room for `length` positions in all; `first` as in `read_block`."""
    paged = paged_layers(config)
    for at, own in zip(full_layers(config), buffers, strict=True):
        index = config.layer_kinds[at].index
        if buffer_capacity(own["k"]) < (length - first if at in paged else length):
            return False
        if index is not None and position_capacity(index, own["landmarks"].shape[3]) < length:
            return False
    return True


@partial(jax.jit, static_argnames=("config", "capacity", "behind"))
def grown(config: ModelConfig, buffers: Buffers, capacity: int, behind: int) -> Buffers:
    """Buffers with room for at least `capacity` positions that begin as these; those of layers that may
    be paged have room for keys and values of `behind`."""
    found, paged = [], paged_layers(config)
    for at, own in zip(full_layers(config), buffers, strict=True):
        new = {name: grow(own[name], behind if at in paged else capacity) for name in "kv"}
        index = config.layer_kinds[at].index
        if index is not None:
            blocks = block_capacity(index, max(capacity, buffer_capacity(new["k"])))
            room = max(blocks - own["landmarks"].shape[3], 0)
            new["landmarks"] = jnp.pad(own["landmarks"], ((0, 0), (0, 0), (0, 0), (0, room)))
        found.append(new)
    return tuple(found)
