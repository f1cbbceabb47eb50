"""What the decoder is defined as, in float64 and loops, beside what it computes.

Nothing of the model is used for what is expected: documents one by one, positions one by one, taps one
by one. Features that no model of transformers has (test_parity.py) are held against this.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, softmax

from gemtool.kernels.glu import Glu
from gemtool.model import moe, params, transformer
from gemtool.model.batch import Batch
from gemtool.model.cache import init_cache
from gemtool.model.config import LayerKind, ModelConfig, MoEConfig
from gemtool.model.layers import gated_mlp
from tests.test_model import random_params

Array = np.ndarray
LIMIT = 0.5
ATOL = 2e-5

# --- the definition -------------------------------------------------------------------------------


def decoder(p: params.Tree, config: ModelConfig, tokens: Array) -> Array:
    """Hidden states [T, D] of one document, tokens [T]."""
    x = p["embedding"][tokens]
    for at, kind in enumerate(config.layer_kinds):
        layer = p["layers"][str(at)]
        h = normed(x, layer["attention_norm"])
        y = attended(layer["attention"], kind, h)
        if config.parallel:
            x = x + y + network(layer["mlp"], config.activation, h)
        else:
            x = x + y
            x = x + network(layer["mlp"], config.activation, normed(x, layer["mlp_norm"]))
    return normed(x, p["norm"])


def normed(x: Array, scale: Array) -> Array:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * scale


def network(p: params.Tree, activation: str, x: Array) -> Array:
    gate, up = (x @ p[name] + p.get(f"{name}_bias", 0) for name in ("gate", "up"))
    return activated(activation, gate, up) @ p["down"] + p.get("down_bias", 0)


def activated(name: str, gate: Array, up: Array) -> Array:
    if name.startswith("clamped"):
        gate, up = np.minimum(gate, LIMIT), np.clip(up, -LIMIT, LIMIT)
    match name:
        case "swiglu":
            return gate * expit(gate) * up
        case "clamped_swiglu":
            return gate * expit(1.702 * gate) * (up + 1)
        case _:
            tanh = np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))
            return gate / 2 * (1 + tanh) * up


def attended(p: params.Tree, kind: LayerKind, x: Array) -> Array:
    """Attention of the normed rows x [T, D] of one document."""
    mixed = np.zeros_like(x)
    for t in range(len(x)):
        for tap in range(kind.qk_conv):
            if t - tap >= 0:
                mixed[t] += x[t - tap] * (p["conv"][tap] if kind.qk_conv > 1 else 1)
    earlier = np.zeros_like(x)
    for t in range(kind.key_shift, len(x)):
        earlier[t] = mixed[t - kind.key_shift]
    y = np.zeros_like(x)
    for head in range(kind.heads):
        shared = head * kind.kv_heads // kind.heads
        q = projected(p, "q", head, mixed)
        k, v = projected(p, "k", shared, earlier), projected(p, "v", shared, x)
        if kind.qk_norm == "unit":
            q, k = (u / np.sqrt((u**2).sum(axis=-1, keepdims=True) + 1e-6) for u in (q, k))
            q = q * np.exp(p["log_temperature"][head])
        scale = 1.0 if kind.qk_norm == "unit" else kind.head_dim**-0.5
        if kind.rope_theta:
            q, k = turned(q, kind.rope_theta), turned(k, kind.rope_theta)
        for t in range(len(x)):
            first = {
                "full": 0,
                "window": max(t - kind.window + 1, 0),
                "chunk": t - t % (kind.window or 1),
            }
            seen = slice(first[kind.attention], t + 1)
            y[t] += softmax(scale * k[seen] @ q[t]) @ v[seen] @ p["o"][head]
    return y + p.get("o_bias", 0)


def projected(p: params.Tree, name: str, head: int, x: Array) -> Array:
    bias = p[f"{name}_bias"][head] if f"{name}_bias" in p else 0
    return x @ p[name][:, head] + bias


def turned(x: Array, theta: float) -> Array:
    """The two halves of rows [T, K] are the parts of complex numbers, which turn with the position."""
    half = x.shape[1] // 2
    angle = np.arange(len(x))[:, None] * theta ** (-np.arange(half) / half)
    z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], axis=1)


# --- whole layers ---------------------------------------------------------------------------------

LENGTHS = (1, 9, 2, 3, 25, 1, 7)  # of packed documents, some shorter than a convolution
FULL = LayerKind(
    "F", "full", 2, 1, 8, qk_conv=4, conv_init="spread", key_shift=1, qkv_bias=True, out_bias=True
)
NEAR = LayerKind("W", "window", 4, 2, 8, 6, rope_theta=100.0, qk_conv=3, conv_init="spread")
PLAIN = dataclasses.replace(NEAR, qk_norm="none", qk_conv=1, key_shift=1)
CHUNK = LayerKind(
    "C", "chunk", 2, 2, 8, 5, rope_theta=100.0, qk_norm="none", qk_conv=2, conv_init="spread"
)
ONE_AFTER_ANOTHER = ModelConfig(
    "tiny", 31, 16, "FW", (FULL, NEAR), d_ff=24, mlp_bias=True, kv_dtype="float32"
)
SIDE_BY_SIDE = ModelConfig(
    "tiny", 31, 16, "WC", (PLAIN, CHUNK), d_ff=24, parallel=True, activation="clamped_geglu",
    glu_limit=LIMIT, kv_dtype="float32",
)  # fmt: skip
CONFIGS = pytest.mark.parametrize(
    "config", [ONE_AFTER_ANOTHER, SIDE_BY_SIDE], ids=["one-after-another", "side-by-side"]
)


# What runs once or a few times is quick to compile.
compiled = partial(
    jax.jit, static_argnums=1, compiler_options={"xla_backend_optimization_level": 0}
)
forward, step = compiled(transformer.forward), compiled(transformer.step)


def wide(tree: params.Tree) -> params.Tree:
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


@CONFIGS
def test_packed_documents(config: ModelConfig) -> None:
    p = random_params(config)
    tokens = np.random.default_rng(1).integers(0, 31, (1, sum(LENGTHS) + 4), np.int32)
    segments, positions = np.zeros_like(tokens), np.zeros_like(tokens)
    expected, at = [], 0
    for number, length in enumerate(LENGTHS, start=1):
        document = slice(at, at + length)
        segments[0, document], positions[0, document] = number, np.arange(length)
        expected.append(decoder(wide(p), config, tokens[0, document]))
        at += length
    ones = np.ones(tokens.shape, np.float32)
    batch = Batch(*map(jnp.asarray, (tokens, segments, positions, tokens, ones)))
    hidden, _ = forward(p, config, batch)
    np.testing.assert_allclose(hidden[0, :at], np.concatenate(expected), rtol=0, atol=ATOL)


@CONFIGS
def test_steps(config: ModelConfig) -> None:
    p = random_params(config)
    tokens = np.random.default_rng(2).integers(0, 31, (2, 23), np.int32)
    expected = np.stack([decoder(wide(p), config, row) for row in tokens])
    x = transformer.embed(p, config, jnp.asarray(np.pad(tokens, ((0, 0), (0, 1)))))
    state = init_cache(config, 2, 24)
    for at in range(0, 23, 2):  # fewer than the taps: what is kept of the past outlives a step
        valid = min(2, 23 - at)
        y, state = step(p, config, x[:, at : at + 2], state, jnp.asarray(valid, jnp.int32))
        want = expected[:, at : at + valid]
        np.testing.assert_allclose(y[:, :valid], want, rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", ["swiglu", "geglu", "clamped_swiglu", "clamped_geglu"])
def test_gated_network(name: str) -> None:
    rng = np.random.default_rng(3)
    shapes = {"gate": (8, 12), "up": (8, 12), "down": (12, 8)}
    p = {part: rng.normal(size=shape) for part, shape in shapes.items()}
    p |= {f"{part}_bias": rng.normal(size=shape[1]) for part, shape in shapes.items()}
    x = rng.normal(size=(2, 5, 8))
    with jax.enable_x64(True):
        actual = gated_mlp(jnp.asarray(x), jax.tree.map(jnp.asarray, p), Glu(name, limit=LIMIT))
        np.testing.assert_allclose(actual, network(p, name, x), rtol=1e-12, atol=1e-12)


# --- balance by a loss ----------------------------------------------------------------------------


def lopsided(**changes: Any) -> tuple[params.Tree, ModelConfig, Array]:
    """A mixture whose router likes some experts better, and rows [40, D] with a mean."""
    mixture = MoEConfig(4, 2, 8, balance="auxiliary", **changes)
    config = dataclasses.replace(ONE_AFTER_ANOTHER, dense_layers=0, moe=mixture)
    x = np.random.default_rng(4).normal(0.5, 1, (40, 16)).astype(np.float32)
    return random_params(config)["layers"]["0"]["moe"], config, x


@pytest.mark.parametrize(("score", "top_k"), [("softmax", 1), ("softmax", 2), ("sigmoid", 2)])
def test_balance_loss_is_the_definition(score: str, top_k: int) -> None:
    """Experts times the sum over them of the share of choices and of the mean probability (arXiv
    2101.03961, equations 4 to 6); of sigmoids, which are divided by their sum (arXiv 2412.19437)."""
    p, config, x = lopsided()
    assert config.moe is not None
    mixture = dataclasses.replace(config.moe, score=score, top_k=top_k)
    present = np.arange(40) % 3 > 0
    share, probability, z = np.zeros(4), np.zeros(4), []
    for row in x[present].astype(np.float64):
        logits = row @ np.asarray(p["router"], np.float64)
        scores = np.exp(logits) if score == "softmax" else expit(logits)
        probability += scores / scores.sum() / present.sum()
        for expert in np.argsort(-scores)[:top_k]:
            share[expert] += 1 / (top_k * present.sum())
        z.append(np.log(np.exp(logits).sum()) ** 2)
    expected = 4 * (share * probability).sum()
    assert abs(expected - 1) > 0.01  # neither balance nor a constant
    _, stats = compiled(moe.moe_mlp)(
        p, dataclasses.replace(config, moe=mixture), jnp.asarray(x), jnp.asarray(present)
    )
    np.testing.assert_allclose(stats["load"], share, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stats["balance_loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(stats["z_loss"], np.mean(z), rtol=1e-5)
    loss = mixture.z_loss * np.mean(z) + mixture.auxiliary_loss * expected
    np.testing.assert_allclose(moe.router_loss(mixture, stats), loss, rtol=1e-5)


def test_training_by_the_balance_loss_brings_balance() -> None:
    p, config, x = lopsided(z_loss=0.0)
    present = jnp.ones(40, bool)

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def gradient(router: jax.Array) -> tuple[jax.Array, jax.Array]:
        _, stats = moe.moe_mlp({**p, "router": router}, config, jnp.asarray(x), present)
        assert config.moe is not None
        return moe.router_loss(config.moe, stats), stats["load"]

    router, loads = p["router"], []
    for _ in range(200):
        change, load = gradient(router)
        router = router - 10 * change
        loads.append(np.asarray(load))
    assert np.abs(loads[0] - 0.25).max() > 0.1
    assert np.abs(loads[-1] - 0.25).max() < 0.06
