"""The decoder, top to bottom. All functions are pure; `config` is static under `jax.jit`.

    embed -> [ x + attention(norm(x)) -> x + mlp(norm(x)) ] for each layer -> norm -> logits

`forward` runs whole packed sequences (training, likelihoods). `step` runs T new positions
after a cache; prefill (T = chunk) and decode (T = 1) are that same function, and any way to cut a
sequence into steps gives what `forward` gives. The mathematics of attention is in attention.py.

Axes: B sequences, T positions, D model, V vocabulary, N media groups of P soft tokens of F features.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gemtool.model import attention, encoders
from gemtool.model.batch import Batch, MediaGroups
from gemtool.model.cache import Cache, full_layers
from gemtool.model.config import ModelConfig
from gemtool.model.layers import rms_norm, swiglu
from gemtool.model.mesh import constrain
from gemtool.model.moe import Stats, moe_mlp, router_loss
from gemtool.model.params import Tree


def embed(
    params: Tree,
    config: ModelConfig,
    tokens: jax.Array,
    media: dict[str, MediaGroups] | None = None,
) -> jax.Array:
    """Tokens int32 [B, T], and media in the place of their soft positions -> float32 [B, T, D]."""
    x = jnp.take(params["embedding"], tokens, axis=0) * jnp.float32(config.embedding_scale)
    flat = x.reshape(-1, config.d_model)
    for kind, groups in (media or {}).items():
        soft = encode_media(params, config, kind, groups.values)
        row = jnp.arange(soft.shape[1], dtype=jnp.int32)[None, :]
        # Rows that do not exist get an index past the end, which the scatter drops.
        where = jnp.where(row < groups.rows[:, None], groups.at[:, None] + row, flat.shape[0])
        flat = flat.at[where].set(soft, mode="drop")
    return flat.reshape(x.shape)


def encode_media(params: Tree, config: ModelConfig, kind: str, values: jax.Array) -> jax.Array:
    """Raw features [N, P, F] of "visual" or "audio" -> soft tokens float32 [N, P, D]."""
    encoder = config.encoder(kind)
    with jax.named_scope(f"encode_{kind}"):
        return encoders.encode(params["encoders"][kind], encoder, values, config.norm_eps)


def forward(params: Tree, config: ModelConfig, batch: Batch) -> tuple[jax.Array, dict[str, Any]]:
    """Hidden states of whole packed sequences, float32 [B, T, D], after the last norm.

    Also a dict of what the routers did: "load" {layer: float32 [E]}, "z_loss" and "balance_loss" (means
    over layers), and "loss" float32 [], what routers add to the training loss.
    """
    x = constrain(embed(params, config, batch.tokens, batch.media), "batch", "length", None)
    present = batch.segments > 0
    stats: dict[str, Stats] = {}
    for index, kind in enumerate(config.layer_kinds):
        p = params["layers"][str(index)]
        with jax.named_scope(f"layer_{index}"):
            x = x + attention.attend_packed(
                p["attention"],
                config,
                kind,
                rms_norm(x, p["attention_norm"], config.norm_eps),
                batch.positions,
                batch.segments,
            )
            x, routed = _feed_forward(p, config, x, present)
            x = constrain(x, "batch", "length", None)
        if routed:
            stats[str(index)] = routed
    return rms_norm(x, params["norm"], config.norm_eps), _router_summary(config, stats)


def step(
    params: Tree, config: ModelConfig, embeddings: jax.Array, cache: Cache, valid: jax.Array
) -> tuple[jax.Array, Cache]:
    """Hidden states of T new positions after `cache.length`, and the cache with them added.

    `embeddings` [B, T, D] from `embed`; `valid` int32 [], how many of the T are real, so that
    the last chunk of a sequence keeps the shape of the others: hidden rows from `valid` on mean
    nothing and leave no trace. Needs `cache.length + T` within the capacity.
    """
    x = embeddings
    present = _real_rows(x, valid)
    layers = []
    for index, kind in enumerate(config.layer_kinds):
        p = params["layers"][str(index)]
        with jax.named_scope(f"layer_{index}"):
            y, layer = attention.attend_cached(
                p["attention"],
                config,
                kind,
                rms_norm(x, p["attention_norm"], config.norm_eps),
                cache.layers[index],
                cache.length,
                valid,
            )
            x, _ = _feed_forward(p, config, x + y, present)
        layers.append(layer)
    hidden = rms_norm(x, params["norm"], config.norm_eps)
    return hidden, Cache(cache.length + valid, tuple(layers))


def step_kv(
    params: Tree, config: ModelConfig, embeddings: jax.Array, cache: Cache, valid: jax.Array
) -> Cache:
    """The part of `step` that far later positions can see: work stops once the last
    full-attention layer has its keys and values.

    The layers above keep their old windows, so the last `tail_reach` positions before the first
    hidden state of interest must run through `step`; then it is exact.
    """
    x = embeddings
    present = _real_rows(x, valid)
    layers = list(cache.layers)
    last = full_layers(config)[-1] if full_layers(config) else -1
    for index, kind in enumerate(config.layer_kinds[: last + 1]):
        p = params["layers"][str(index)]
        with jax.named_scope(f"layer_{index}"):
            h = rms_norm(x, p["attention_norm"], config.norm_eps)
            known = (p["attention"], config, kind, h, layers[index], cache.length, valid)
            if index == last:
                layers[index] = attention.write_keys(*known)
            else:
                y, layers[index] = attention.attend_cached(*known)
                x, _ = _feed_forward(p, config, x + y, present)
    return Cache(cache.length + valid, tuple(layers))


def tail_reach(config: ModelConfig) -> int:
    """How many positions before the first hidden state of interest must run through `step`
    rather than `step_kv`: what the window layers above the last full layer look back to."""
    last = full_layers(config)[-1] if full_layers(config) else -1
    above = config.layer_kinds[last + 1 :]
    return sum(kind.window - 1 + kind.conv_tail for kind in above)


def logits(params: Tree, config: ModelConfig, hidden: jax.Array) -> jax.Array:
    """Scores of every next token: hidden [..., D] from forward or step -> float32 [..., V]."""
    table = params["embedding" if config.tie_embeddings else "unembedding"]
    return jnp.einsum("...d,vd->...v", hidden, table)


def _feed_forward(
    p: Tree, config: ModelConfig, x: jax.Array, present: jax.Array
) -> tuple[jax.Array, Stats]:
    """x + mlp(norm(x)), dense or by experts: [B, T, D], `present` bool [B, T] -> [B, T, D]."""
    h = rms_norm(x, p["mlp_norm"], config.norm_eps)
    if "mlp" in p:
        with jax.named_scope("mlp"):
            return x + swiglu(h, **p["mlp"]), {}
    assert config.moe is not None
    with jax.named_scope("moe"):
        y, stats = moe_mlp(p["moe"], config.moe, h, present)
    return x + y, stats


def _real_rows(x: jax.Array, valid: jax.Array) -> jax.Array:
    """bool [B, T]: the first `valid` of the T rows of x [B, T, D]."""
    batch_size, steps, _ = x.shape
    return jnp.broadcast_to(
        jnp.arange(steps, dtype=jnp.int32)[None, :] < valid, (batch_size, steps)
    )


def _router_summary(config: ModelConfig, stats: dict[str, Stats]) -> dict[str, Any]:
    zero = jnp.zeros((), jnp.float32)
    if config.moe is None or not stats:
        return {"load": {}, "z_loss": zero, "balance_loss": zero, "loss": zero}
    return {
        "load": {index: s["load"] for index, s in stats.items()},
        "z_loss": sum((s["z_loss"] for s in stats.values()), zero) / len(stats),
        "balance_loss": sum((s["balance_loss"] for s in stats.values()), zero) / len(stats),
        "loss": sum((router_loss(config.moe, s) for s in stats.values()), zero),
    }
