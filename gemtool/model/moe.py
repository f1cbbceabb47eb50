"""Mixture of experts: a router in float32 sends each token to its best `top_k` experts.

No token is dropped and no expert has a capacity. Balance comes from a bias that decides only *who* is
chosen and that training moves against the load (arXiv 2408.15664), or from an auxiliary loss.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gemtool.kernels.experts import expert_mlp
from gemtool.model.config import ModelConfig, MoEConfig
from gemtool.model.layers import swiglu
from gemtool.model.params import Tree

Stats = dict[str, jax.Array]


def moe_mlp(p: Tree, moe: MoEConfig, x: jax.Array, present: jax.Array) -> tuple[jax.Array, Stats]:
    """Experts' outputs for tokens `x` [M, D]; rows where `present` bool [M] is False give zeros
    from the routed experts and count in no statistic. Returns [M, D] and

    - "load" float32 [E]: each expert's share of all choices (1 / E is balance);
    - "z_loss" float32 []: mean squared log-partition of the router;
    - "balance_loss" float32 []: E * <load, mean probability>, 1 at balance.
    """
    with jax.named_scope("router"):
        ids, weights, scores, logits = route(p, moe, x)
    ids = jnp.where(present[:, None], ids, moe.experts)
    with jax.named_scope("experts"):
        y = expert_mlp(x, ids, weights, p["gate"], p["up"], p["down"])
    if moe.shared_experts:
        y = y + swiglu(x, **p["shared"])
    count = jnp.maximum(jnp.sum(present.astype(jnp.float32)), 1.0)
    chosen = ids[:, :, None] == jnp.arange(moe.experts, dtype=jnp.int32)[None, None, :]
    load = jnp.sum(chosen.astype(jnp.float32), axis=(0, 1)) / (count * moe.top_k)
    here = present.astype(jnp.float32)
    probability = scores / jnp.sum(scores, axis=-1, keepdims=True)
    z = jax.nn.logsumexp(logits, axis=-1)
    return y, {
        "load": load,
        "z_loss": jnp.sum(jnp.square(z) * here) / count,
        "balance_loss": moe.experts
        * jnp.dot(load, jnp.einsum("me,m->e", probability, here) / count),
    }


def route(
    p: Tree, moe: MoEConfig, x: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Who computes what: experts' ids int32 [M, top_k] (the lower id where scores tie), their weights
    float32 [M, top_k] that sum to 1, and all scores and logits float32 [M, E]."""
    logits = jnp.einsum("md,de->me", x.astype(jnp.float32), p["router"])
    scores = jax.nn.softmax(logits) if moe.score == "softmax" else jax.nn.sigmoid(logits)
    ranking = scores + p["bias"][None, :] if moe.balance == "bias" else scores
    _, ids = jax.lax.top_k(jax.lax.stop_gradient(ranking), moe.top_k)
    weights = jnp.take_along_axis(scores, ids, axis=-1)
    return ids, weights / jnp.sum(weights, axis=-1, keepdims=True), scores, logits


def router_loss(moe: MoEConfig, stats: Stats) -> jax.Array:
    """What one layer's router adds to the training loss, float32 []."""
    loss = moe.z_loss * stats["z_loss"]
    if moe.balance == "auxiliary":
        loss = loss + moe.auxiliary_loss * stats["balance_loss"]
    return loss


def update_biases(params: Tree, config: ModelConfig, load: dict[str, jax.Array]) -> Tree:
    """Parameters with each balance bias moved by `bias_rate` towards the less chosen experts.

    `load` maps a layer ("1") to float32 [E], as in `aux["load"]` of the forward pass (averaged
    over whatever made up the batch). Without balance by bias, the parameters as they are.
    """
    moe = config.moe
    if moe is None or moe.balance != "bias":
        return params
    layers = dict(params["layers"])
    for index, share in load.items():
        experts = dict(layers[index]["moe"])
        experts["bias"] = experts["bias"] + moe.bias_rate * jnp.sign(1.0 / moe.experts - share)
        layers[index] = {**layers[index], "moe": experts}
    return {**params, "layers": layers}
