"""The decoder, top to bottom. All functions are pure; `config` is static under `jax.jit`.

    embed -> [ x + attention(norm(x)) -> x + mlp(norm(x)) ] for each layer -> norm -> logits

A parallel layer is x + attention(norm(x)) + mlp(norm(x)), with one norm. `_layer` is all that a layer
does but attend, which its caller passes: over whole sequences or with a cache.

`forward` runs whole packed sequences (training, likelihoods), layer by layer or equal layers by a
scan (see execution.py). `step` runs T new positions
after a cache; prefill (T = chunk) and decode (T = 1) are that same function, and any way to cut a
sequence into steps gives what `forward` gives. The mathematics of attention is in attention.py.

Axes: B sequences, T positions, D model, V vocabulary, N media groups of P soft tokens of F features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gemtool.kernels.dtypes import accumulator
from gemtool.model import attention, encoders
from gemtool.model.attention import Keys, LayerCache
from gemtool.model.batch import Batch, MediaGroups
from gemtool.model.cache import Cache, full_layers
from gemtool.model.config import LayerKind, ModelConfig
from gemtool.model.execution import FLOAT32, Execution
from gemtool.model.forks import attend_forks
from gemtool.model.index import DOUBLINGS
from gemtool.model.layers import gated_mlp, glu_of, norm, soft_cap
from gemtool.model.mesh import constrain
from gemtool.model.moe import Stats, moe_mlp, router_loss
from gemtool.model.parallel import on_groups
from gemtool.model.params import Tree, flatten, in_dtype, is_index, unflatten
from gemtool.model.stacking import STACK, repeats
from gemtool.model.vocab_parallel import embedding_rows


def embed(
    params: Tree,
    config: ModelConfig,
    tokens: jax.Array,
    media: dict[str, MediaGroups] | None = None,
) -> jax.Array:
    """Tokens int32 [B, T], and media in the place of their soft positions -> [B, T, D] in the dtype
    of the embedding."""
    x = embedding_rows(params["embedding"], tokens)
    x = x * jnp.asarray(config.embedding_scale, x.dtype)
    flat = x.reshape(-1, config.d_model)
    for kind, groups in (media or {}).items():
        soft = encode_media(params, config, kind, groups.values, groups.rows)
        row = jnp.arange(soft.shape[1], dtype=jnp.int32)[None, :]
        # Rows that do not exist get an index past the end, which the scatter drops.
        where = jnp.where(row < groups.rows[:, None], groups.at[:, None] + row, flat.shape[0])
        flat = flat.at[where].set(soft.astype(x.dtype), mode="drop")
    return flat.reshape(x.shape)


def encode_media(
    params: Tree, config: ModelConfig, kind: str, values: jax.Array, rows: jax.Array
) -> jax.Array:
    """Raw features [N, P, F] of "visual" or "audio", the first `rows` int32 [N] of each group real ->
    soft tokens [N, P, D] in the dtype of the parameters."""
    encoder = config.encoder(kind)

    def encode(p: Tree, values: jax.Array, rows: jax.Array) -> jax.Array:
        return encoders.encode(p, encoder, values, rows, config.norm_eps)

    with jax.named_scope(f"encode_{kind}"):
        return on_groups(encode, params["encoders"][kind], values, rows)


def forward(
    params: Tree,
    config: ModelConfig,
    batch: Batch,
    execution: Execution = FLOAT32,
    *,
    negatives: int = 0,
    learn_index: bool = False,
) -> tuple[jax.Array, dict[str, Any]]:
    """Hidden states of whole packed sequences, [B, T, D] in `execution.dtype`, after the last norm.

    `params` may be stacked; `negatives` as in `attend_packed`. Also a dict of what the routers did:
    "load", float32 [E] a layer in the structure of `params["layers"]`; "z_loss" and "balance_loss"
    (means over layers), and "loss" float32 [], what routers add to the training loss; and if
    `learn_index`, "index": the sums of `index.objective`, of all indexed layers.
    """
    ends = in_dtype({k: v for k, v in params.items() if k != "layers"}, execution.dtype)
    present = batch.segments > 0

    sources = {config.source(i) for i, kind in enumerate(config.layer_kinds) if kind.shares}

    def layer(
        index: int, x: jax.Array, p: Tree, shared: Keys | None
    ) -> tuple[jax.Array, Stats, Keys | None]:
        kind = config.layer_kinds[index]
        attend = partial(_packed, config, kind, batch, shared, negatives, learn_index)
        x, (keys, learned), stats = _layer(p, config, index, x, present, attend)
        x = constrain(x, "batch", "length", None)
        return x, {"router": stats, "index": learned}, keys if index in sources else None

    if execution.remat:
        layer = jax.checkpoint(layer, static_argnums=0)
    x = constrain(embed(ends, config, batch.tokens, batch.media), "batch", "length", None)
    x, stats = _run_layers(config, params["layers"], layer, x)
    summary = _router_summary(config, _only(stats, "router"))
    if learn_index:
        summary["index"] = _index_sums(list(_having(_only(stats, "index"), "weight")))
    return norm(config, x, ends["norm"]), summary


def index_loss(
    params: Tree, config: ModelConfig, batch: Batch, execution: Execution = FLOAT32
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """How far the indices are from what attention looks at: a cross-entropy float32 [], the mean of
    all queries, by how much of their attention candidates get, and of all indexed layers; and in the
    same way "index_top1", "index_topk", "index_mass" (see `index.objective`).

    Only parameters of indices get gradients.
    """

    def kept(path: str, leaf: jax.Array) -> jax.Array:
        return leaf if is_index(path) else jax.lax.stop_gradient(leaf)

    params = unflatten({path: kept(path, leaf) for path, leaf in flatten(params).items()})
    _, summary = forward(params, config, batch, execution, learn_index=True)
    sums = {name: jnp.sum(x) for name, x in summary["index"].items()}
    weight = jnp.maximum(sums.pop("weight"), 1e-9)
    loss = sums.pop("loss") / weight
    return loss, {f"index_{name}": x / weight for name, x in sums.items()}


def index_quality(
    params: Tree, config: ModelConfig, batch: Batch, execution: Execution = FLOAT32
) -> dict[str, jax.Array]:
    """What `index.objective` says of all indexed layers, by doublings of the position of queries, each
    among the blocks of its own sequence alone: float32 [DOUBLINGS] each."""
    # Of one document, whose blocks in other sequences are nobody's candidates.
    together = dataclasses.replace(batch, documents=jnp.minimum(batch.segments, 1))
    _, summary = forward(params, config, together, execution, learn_index=True)
    return summary["index"]


def _run_layers(
    config: ModelConfig,
    layers: Tree,
    layer: Callable[[int, jax.Array, Tree, Keys | None], tuple[jax.Array, Stats, Keys | None]],
    x: jax.Array,
) -> tuple[jax.Array, Tree]:
    """`layer(index, x, parameters, keys that it shares)` one after the other, each of which also
    returns statistics and keys for others; the statistics in the structure of `layers`."""
    found = repeats(config) if STACK in layers else None
    stats: Tree = {}
    keys: dict[int, Keys | None] = {}

    def turn(x: jax.Array, same: Tree) -> tuple[jax.Array, Tree]:
        assert found is not None
        gathered = {}
        for j in range(found.period):
            at = found.first + j
            # No layer that others share the keys of is repeated.
            x, gathered[str(j)], _ = layer(at, x, same[str(j)], keys.get(config.source(at)))
        return x, gathered

    index = 0
    while index < len(config.layers):
        if found is not None and index == found.first:
            x, stats[STACK] = jax.lax.scan(turn, x, layers[STACK])
            index = found.stop
        else:
            shared = keys.get(config.source(index))
            x, stats[str(index)], keys[index] = layer(index, x, layers[str(index)], shared)
            index += 1
    return x, stats


def step(
    params: Tree, config: ModelConfig, embeddings: jax.Array, cache: Cache, valid: jax.Array
) -> tuple[jax.Array, Cache]:
    """Hidden states of T new positions after `cache.length`, and the cache with them added.

    `embeddings` [B, T, D] from `embed`; `valid` int32 [], how many of the T are real, so that
    the last chunk of a sequence keeps the shape of the others: hidden rows from `valid` on mean
    nothing and leave no trace. Needs `cache.length + T` within the capacity. Of forks, T is 1.
    """
    x, present = embeddings, _real_rows(embeddings, valid)
    layers: list[LayerCache] = []
    for index in range(len(config.layers)):
        attend = partial(_cached, config, index, cache, layers, valid)
        x, layer, _ = _layer(params["layers"][str(index)], config, index, x, present, attend)
        layers.append(layer)
    extended = dataclasses.replace(cache, length=cache.length + valid, layers=tuple(layers))
    return norm(config, x, params["norm"]), extended


def step_kv(
    params: Tree, config: ModelConfig, embeddings: jax.Array, cache: Cache, valid: jax.Array
) -> Cache:
    """The part of `step` that far later positions can see: work stops once the last
    unbounded layer has its keys and values.

    The layers above keep their old windows, so the last `tail_reach` positions before the first
    hidden state of interest must run through `step`; then it is exact.
    """
    x, present = embeddings, _real_rows(embeddings, valid)
    layers = list(cache.layers)
    last = full_layers(config)[-1] if full_layers(config) else -1
    for index in range(last):
        attend = partial(_cached, config, index, cache, layers, valid)
        p = params["layers"][str(index)]
        x, layers[index], _ = _layer(p, config, index, x, present, attend)
    if last >= 0:
        p, kind = params["layers"][str(last)], config.layer_kinds[last]
        with jax.named_scope(f"layer_{last}"):
            h = norm(config, x, p["attention_norm"])
            layers[last] = attention.write_keys(
                p["attention"],
                config,
                kind,
                h,
                layers[last],
                cache.length,
                valid,
                cache.pages.get(last),
            )
    return dataclasses.replace(cache, length=cache.length + valid, layers=tuple(layers))


def tail_reach(config: ModelConfig) -> int:
    """How many positions before the first hidden state of interest must run through `step`
    rather than `step_kv`: what the layers above the last one that keeps all of its keys look back to,
    beside what blocks keep."""
    last = full_layers(config)[-1] if full_layers(config) else -1
    above = config.layer_kinds[last + 1 :]
    return sum(kind.reach for kind in above)


def logits(params: Tree, config: ModelConfig, hidden: jax.Array) -> jax.Array:
    """Scores of every next token: hidden [..., D] from forward or step -> float32 [..., V]."""
    table = params["embedding" if config.tie_embeddings else "unembedding"].astype(hidden.dtype)
    wide = accumulator(hidden.dtype)
    scores = jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=wide)
    return soft_cap(scores, config.logit_soft_cap) if config.logit_soft_cap else scores


Attend = Callable[[Tree, jax.Array], tuple[jax.Array, Any]]
"""Attention of one layer: its parameters and normed rows [B, T, D] -> [B, T, D], and a new cache, or
its keys and what its index learned."""


def _packed(
    config: ModelConfig,
    kind: LayerKind,
    batch: Batch,
    shared: Keys | None,
    negatives: int,
    learn_index: bool,
    p: Tree,
    h: jax.Array,
) -> tuple[jax.Array, tuple[Keys, dict[str, jax.Array]]]:
    y, keys, learned = attention.attend_packed(
        p,
        config,
        kind,
        h,
        batch,
        shared=shared,
        negatives=negatives,
        learn_index=learn_index,
    )
    return y, (keys, learned)


def _cached(
    config: ModelConfig,
    index: int,
    cache: Cache,
    extended: Sequence[LayerCache],
    valid: jax.Array,
    p: Tree,
    h: jax.Array,
) -> tuple[jax.Array, LayerCache]:
    """`extended`: the caches of the layers before this one, with the new positions."""
    kind, layer = config.layer_kinds[index], cache.layers[index]
    source = extended[config.source(index)] if kind.shares else None
    pages = cache.pages.get(config.source(index))
    if cache.forks is not None:
        return attend_forks(p, config, kind, h, layer, cache.length, cache.forks, source, pages)
    return attention.attend_cached(p, config, kind, h, layer, cache.length, valid, source, pages)


def _layer(
    p: Tree, config: ModelConfig, index: int, x: jax.Array, present: jax.Array, attend: Attend
) -> tuple[jax.Array, Any, Stats]:
    """One layer, of parameters `p`, over rows x [B, T, D], those real where `present` bool [B, T]
    says so.

    Returns the new rows, what `attend` returned beside them, and statistics of the router.
    """
    p = in_dtype(p, x.dtype)
    with jax.named_scope(f"layer_{index}"):
        h = norm(config, x, p["attention_norm"])
        y, cache = attend(p["attention"], h)
        if config.post_norms:
            y = norm(config, y, p["attention_post_norm"])
        x = x + y
        if not config.parallel:
            h = norm(config, x, p["mlp_norm"])
        y, stats = _feed_forward(p, config, h, present)
        if config.post_norms:
            y = norm(config, y, p["mlp_post_norm"])
    return x + y, cache, stats


def _feed_forward(
    p: Tree, config: ModelConfig, h: jax.Array, present: jax.Array
) -> tuple[jax.Array, Stats]:
    """Of normed rows, dense or by experts: [B, T, D], `present` bool [B, T] -> [B, T, D]."""
    if "mlp" in p:
        with jax.named_scope("mlp"):
            return gated_mlp(h, p["mlp"], glu_of(config)), {}
    with jax.named_scope("moe"):
        return moe_mlp(p["moe"], config, h, present)


def _real_rows(x: jax.Array, valid: jax.Array) -> jax.Array:
    """bool [B, T]: the first `valid` of the T rows of x [B, T, D]."""
    batch_size, steps, _ = x.shape
    return jnp.broadcast_to(
        jnp.arange(steps, dtype=jnp.int32)[None, :] < valid, (batch_size, steps)
    )


def _router_summary(config: ModelConfig, stats: Tree) -> dict[str, Any]:
    """What the routers of all layers did; `stats` in the structure of the layers, some stacked."""
    zero = jnp.zeros((), jnp.float32)

    def load(tree: Tree) -> Tree:
        routed = {i: s["load"] if "load" in s else load(s) for i, s in tree.items()}
        return {i: value for i, value in routed.items() if not isinstance(value, dict) or value}

    found = list(_having(stats, "load"))
    if config.moe is None or not found:
        return {"load": {}, "z_loss": zero, "balance_loss": zero, "loss": zero}
    count = sum(s["z_loss"].size for s in found)
    moe = config.moe
    return {
        "load": load(stats),
        "z_loss": sum((jnp.sum(s["z_loss"]) for s in found), zero) / count,
        "balance_loss": sum((jnp.sum(s["balance_loss"]) for s in found), zero) / count,
        "loss": sum((jnp.sum(router_loss(moe, s)) for s in found), zero),
    }


def _index_sums(found: list[dict[str, jax.Array]]) -> dict[str, jax.Array]:
    """What `index.objective` says of all indexed layers together, some of them stacked."""
    return {
        name: sum(x[name].reshape(-1, DOUBLINGS).sum(axis=0) for x in found)  # type: ignore[misc]
        for name in found[0]
    }


def _only(stats: Tree, part: str) -> Tree:
    """One part of what every layer returned beside x."""
    return {i: s[part] if part in s else _only(s, part) for i, s in stats.items()}


def _having(stats: Tree, name: str) -> Iterator[Stats]:
    """What those layers returned that have this name in it."""
    for value in stats.values():
        if name in value:
            yield value
        elif isinstance(value, dict):
            yield from _having(value, name)
