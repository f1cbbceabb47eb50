"""Mixture of experts: a router in float32 sends each token to its best `top_k` experts.

No token is dropped and no expert has a capacity. Balance comes from a bias that decides only *who* is
chosen and that training moves against the load (arXiv 2408.15664), or from an auxiliary loss.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from gemtool.model.config import ModelConfig, MoEConfig
from gemtool.model.expert_parallel import routed_experts
from gemtool.model.layers import gated_mlp, glu_of
from gemtool.model.parallel import on_rows
from gemtool.model.params import Tree

Stats = dict[str, jax.Array]


def moe_mlp(
    p: Tree, config: ModelConfig, x: jax.Array, present: jax.Array
) -> tuple[jax.Array, Stats]:
    """Experts' outputs for tokens `x` [..., D]; rows where `present` bool [...] is False give zeros
    from the routed experts and count in no statistic. Returns [..., D] and

    - "load" float32 [E]: each expert's share of all choices (1 / E is balance);
    - "z_loss" float32 []: mean squared log-partition of the router;
    - "balance_loss" float32 []: E * <load, mean probability>, 1 at balance.
    """
    moe, glu = config.moe, glu_of(config)
    assert moe is not None
    with jax.named_scope("router"):
        ids, weights, scores, logits = route(p, moe, x)
    ids = jnp.where(present[..., None], ids, moe.experts)
    names = ("gate", "up", "down")
    w: Tree = {f"w_{name}": p[name] for name in names}
    w |= {f"b_{name}": p[f"{name}_bias"] for name in names if f"{name}_bias" in p}
    with jax.named_scope("experts"):
        y = routed_experts(x, ids, weights, w, weigh=moe.weigh, glu=glu)
    if moe.shared_experts:
        y = y + gated_mlp(x, p["shared"], glu)
    count = jnp.maximum(jnp.sum(present.astype(jnp.float32)), 1.0)
    chosen = jax.nn.one_hot(ids, moe.experts, dtype=jnp.float32)  # zeros for "no expert"
    load = jnp.sum(chosen, axis=tuple(range(ids.ndim))) / (count * moe.top_k)
    here = present.astype(jnp.float32)
    probability = scores / jnp.sum(scores, axis=-1, keepdims=True)
    z = jax.nn.logsumexp(logits, axis=-1)
    return y, {
        "load": load,
        "z_loss": jnp.sum(jnp.square(z) * here) / count,
        "balance_loss": moe.experts
        * jnp.dot(load, jnp.einsum("...e,...->e", probability, here) / count),
    }


def route(
    p: Tree, moe: MoEConfig, x: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Who computes what, for `x` [..., D]: experts' ids int32 [..., top_k] (the lower id where scores
    tie) and their weights float32 [..., top_k], and all scores and logits float32 [..., E]."""
    # By default accelerators multiply float32 in fewer bits, which changes who is chosen.
    highest = jax.lax.Precision.HIGHEST
    rows = x.astype(jnp.float32)
    logits = jnp.einsum("...d,de->...e", rows, p["router"], precision=highest)
    if moe.router_bias:
        logits = logits + jnp.broadcast_to(p["router_bias"], logits.shape)
    scores = jax.nn.softmax(logits) if moe.score == "softmax" else jax.nn.sigmoid(logits)
    ranking = scores
    if moe.balance == "bias":
        ranking = scores + jnp.broadcast_to(p["bias"], scores.shape)
    ids = on_rows(partial(_chosen, moe), jax.lax.stop_gradient(ranking))
    weights = jnp.take_along_axis(scores, ids, axis=-1)
    if moe.normalise:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return ids, weights * moe.weight_scale, scores, logits


def _chosen(moe: MoEConfig, ranking: jax.Array) -> jax.Array:
    """The best experts int32 [..., top_k] of a ranking [..., E]."""
    return jax.lax.top_k(_within_best_groups(moe, ranking), moe.top_k)[1]


def _within_best_groups(moe: MoEConfig, ranking: jax.Array) -> jax.Array:
    """The ranking [M, E], -inf outside of each token's `top_groups` groups."""
    if moe.top_groups == moe.groups:
        return ranking
    grouped = ranking.reshape(-1, moe.groups, moe.experts // moe.groups)
    best, _ = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))
    _, chosen = jax.lax.top_k(jnp.sum(best, axis=-1), moe.top_groups)
    groups = jnp.arange(moe.groups, dtype=jnp.int32)[None, None, :]
    allowed = jnp.any(chosen[:, :, None] == groups, axis=1)
    return jnp.where(allowed[:, :, None], grouped, -jnp.inf).reshape(ranking.shape)


def router_loss(moe: MoEConfig, stats: Stats) -> jax.Array:
    """What one layer's router adds to the training loss, float32 []."""
    loss = moe.z_loss * stats["z_loss"]
    if moe.balance == "auxiliary":
        loss = loss + moe.auxiliary_loss * stats["balance_loss"]
    return loss


def update_biases(params: Tree, config: ModelConfig, load: Tree) -> Tree:
    """Parameters with each balance bias moved by `bias_rate` towards the less chosen experts.

    `load` is `aux["load"]` of the forward pass (averaged over whatever made up the batch): float32
    [..., E] a layer, in the structure of the layers. Without balance by bias, the parameters as they
    are.
    """
    moe = config.moe
    if moe is None or moe.balance != "bias":
        return params

    def moved(layers: Tree, load: Tree) -> Tree:
        layers = dict(layers)
        for name, share in load.items():
            if isinstance(share, dict):
                layers[name] = moved(layers[name], share)
                continue
            experts = dict(layers[name]["moe"])
            experts["bias"] = experts["bias"] + moe.bias_rate * jnp.sign(1.0 / moe.experts - share)
            layers[name] = {**layers[name], "moe": experts}
        return layers

    return {**params, "layers": moved(params["layers"], load)}
