"""The decoder: steps equal the whole, documents stay apart, experts hold at their extremes."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemtool.errors import GemtoolError
from gemtool.model import cache as caches
from gemtool.model import moe, params, transformer
from gemtool.model.batch import Batch, MediaGroups
from gemtool.model.config import (
    EncoderConfig,
    LayerKind,
    ModelConfig,
    MoEConfig,
)
from gemtool.model.kinds import RopeScaling
from gemtool.model.layers import round_to
from gemtool.model.rope import rotary

WINDOW = LayerKind("L", "window", 2, 2, 8, 16, rope_theta=1e4, qk_conv=4)
RECALL = LayerKind(
    "G", "full", 2, 1, 16, sink=True, qk_conv=8, conv_init="spread", key_shift=1, tie_qk_init=True
)
ROTARY = LayerKind("R", "full", 4, 2, 8, rope_theta=1e4, qk_norm="rms")
PLAIN = LayerKind(
    "P", "window", 2, 1, 8, 16, rope_theta=1e4, qk_norm="none", sink=True, key_shift=1
)

TINY = ModelConfig(
    name="tiny",
    vocab_size=97,
    d_model=32,
    layers="LG",
    kinds=(WINDOW, RECALL),
    d_ff=48,
    moe=MoEConfig(experts=4, top_k=2, d_expert=16),
    encoders=(
        EncoderConfig("visual", 16, features=12, width=16, hidden=24, heads=2, overlap=1),
        EncoderConfig("audio", 5, features=8, width=16, hidden=24, mels=2, kernels=(3, 6)),
    ),
    kv_dtype="float32",
)
IMPORTED = dataclasses.replace(
    TINY,
    layers="PR",
    kinds=(PLAIN, ROTARY),
    moe=MoEConfig(4, 2, 16, shared_experts=1, balance="auxiliary", score="sigmoid"),
    tie_embeddings=False,
)
CHUNK = LayerKind(
    "C", "chunk", 2, 1, 8, 16, rope_theta=1e4, rope_scaling=RopeScaling("yarn", 4.0, 64),
    qk_norm="rms_plain", soft_cap=2.0, sink=True, qkv_bias=True, out_bias=True, qk_conv=3, key_shift=1,
)  # fmt: skip
GROWING = LayerKind(
    "F", "full", 4, 2, 8, qk_norm="rms_joint", soft_cap=1.5, length_scale=0.3, length_floor=8
)
CHUNKED = dataclasses.replace(
    TINY,
    layers="CFC",
    kinds=(CHUNK, GROWING),
    activation="geglu",
    mlp_bias=True,
    norm_offset=True,
    post_norms=True,
    logit_soft_cap=3.0,
    moe=MoEConfig(4, 1, 16, groups=2, score="sigmoid", normalise=False, weigh="input", every=2),
)
PARALLEL = dataclasses.replace(
    TINY,
    layers="LR",
    kinds=(
        dataclasses.replace(WINDOW, soft_cap=1.0, sink=True),
        dataclasses.replace(ROTARY, rope_scaling=RopeScaling("llama3", 8.0, 64, fast=4.0)),
    ),
    activation="clamped_swiglu",
    glu_limit=0.5,
    parallel=True,
    moe=MoEConfig(4, 2, 16, shared_experts=1, router_bias=True, expert_bias=True),
)
LENGTH = 130
CAPACITY = 240  # one for most tests: fewer programs to compile

# Hidden states are of size one. Steps multiply matrices of other shapes than the whole does, so sums
# differ in their last bits; a float16 cache turns some of those into the next float16 value.
TOLERANCE = {"float32": 1e-4, "float16": 5e-3}


def random_params(config: ModelConfig, seed: int = 0) -> params.Tree:
    """Initial parameters, disturbed so that no zero or one among them hides a mistake."""
    rng = np.random.default_rng(seed)
    flat = params.flatten(params.init_params(config, jax.random.key(seed)))
    disturbed = {
        path: leaf + rng.normal(scale=0.05, size=leaf.shape).astype(np.float32)
        for path, leaf in flat.items()
    }
    return params.unflatten(disturbed)


def random_tokens(seed: int, batch_size: int = 2, length: int = LENGTH) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, 97, (batch_size, length), np.int32))


def random_media(seed: int, absent: bool = False) -> dict[str, MediaGroups]:
    """Two frames and a short second of audio in two sequences of LENGTH, and an absent group."""
    rng = np.random.default_rng(seed)
    far = 2 * LENGTH if absent else 0
    at = np.array([3 + far, LENGTH + 60 + far, 2 * LENGTH], np.int32)
    return {
        "visual": MediaGroups(
            rng.integers(0, 256, (3, 16, 12), np.uint8), at, np.array([16, 16, 16], np.int32)
        ),
        "audio": MediaGroups(
            rng.normal(size=(1, 5, 8)).astype(np.float16),
            np.array([30 + far], np.int32),
            np.array([3], np.int32),
        ),
    }


def batch_of(
    tokens: jax.Array,
    segments: jax.Array | None = None,
    positions: jax.Array | None = None,
    media: dict[str, MediaGroups] | None = None,
) -> Batch:
    if segments is None:
        segments = jnp.ones_like(tokens)
    if positions is None:
        positions = jnp.broadcast_to(
            jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :], tokens.shape
        )
    weights = jnp.ones(tokens.shape, jnp.float32)
    media = media or random_media(0, absent=True)  # one tree for all tests: one program to compile
    return Batch(tokens, segments, positions, tokens, weights, media)


@partial(jax.jit, static_argnums=1)
def jitted_forward(p: params.Tree, config: ModelConfig, batch: Batch) -> Any:
    return transformer.forward(p, config, batch)


@partial(jax.jit, static_argnums=1)
def jitted_step(p: params.Tree, config: ModelConfig, x: jax.Array, cache: Any, valid: Any) -> Any:
    return transformer.step(p, config, x, cache, valid)


@partial(jax.jit, static_argnums=1)
def jitted_step_kv(p: params.Tree, config: ModelConfig, x: jax.Array, cache: Any, n: Any) -> Any:
    return transformer.step_kv(p, config, x, cache, n)


jitted_moe = jax.jit(moe.moe_mlp, static_argnums=1)


def run_steps(
    p: params.Tree, config: ModelConfig, x: jax.Array, chunk: int, cache: Any = None
) -> tuple[jax.Array, Any]:
    """All of x [B, T, D] in steps of ``chunk``; the last one is padded with noise."""
    length = x.shape[1]
    if cache is None:
        cache = caches.init_cache(config, x.shape[0], CAPACITY)
    noise = jax.random.normal(jax.random.key(9), (x.shape[0], chunk, x.shape[2]))
    padded = jnp.concatenate([x, noise], axis=1)
    hidden = []
    for start in range(0, length, chunk):
        valid = min(chunk, length - start)
        part = padded[:, start : start + chunk]
        y, cache = jitted_step(p, config, part, cache, jnp.asarray(valid, jnp.int32))
        hidden.append(y[:, :valid])
    return jnp.concatenate(hidden, axis=1), cache


def assert_close(actual: jax.Array, expected: jax.Array, kv_dtype: str = "float32") -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE[kv_dtype])


# --- steps equal the whole ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "chunks"),
    [
        (TINY, (1, 3, 64, 100)),
        (IMPORTED, (64,)),
        pytest.param(CHUNKED, (1, 7, 100), marks=pytest.mark.slow),
        pytest.param(PARALLEL, (7, 64), marks=pytest.mark.slow),
        (dataclasses.replace(TINY, kv_dtype="float16"), (1,)),
    ],
    ids=["tiny", "imported", "chunked", "parallel", "float16"],
)
def test_steps_of_any_size_equal_forward(config: ModelConfig, chunks: tuple[int, ...]) -> None:
    p = random_params(config)
    tokens, media = random_tokens(1), random_media(2)
    whole, _ = jitted_forward(p, config, batch_of(tokens, media=media))
    x = transformer.embed(p, config, tokens, media)
    for chunk in chunks:
        hidden, cache = run_steps(p, config, x, chunk)
        assert_close(hidden, whole, config.kv_dtype)
        assert int(cache.length) == LENGTH


def test_chunk_sizes_may_change_between_steps() -> None:
    p, tokens = random_params(TINY), random_tokens(3)
    whole, _ = jitted_forward(p, TINY, batch_of(tokens))
    x = transformer.embed(p, TINY, tokens)
    cache = caches.init_cache(TINY, 2, CAPACITY)
    first, cache = run_steps(p, TINY, x[:, :70], 64, cache)
    second, cache = run_steps(p, TINY, x[:, 70:90], 3, cache)
    third, _ = run_steps(p, TINY, x[:, 90:], 64, cache)
    assert_close(jnp.concatenate([first, second, third], axis=1), whole)


@pytest.mark.parametrize(
    ("config", "reach"),
    [
        (dataclasses.replace(TINY, layers="LGLL", moe=None), 2 * (15 + 3)),
        (dataclasses.replace(CHUNKED, layers="CFCC", moe=None), 2 * (15 + 3)),
        (dataclasses.replace(PARALLEL, layers="LRL", moe=None), 15 + 3),
    ],
    ids=["window", "chunk", "parallel"],
)
def test_kv_only_prefill_is_exact_beyond_its_reach(config: ModelConfig, reach: int) -> None:
    p = random_params(config)
    x = transformer.embed(p, config, random_tokens(4))
    whole, _ = run_steps(p, config, x, 64)
    assert transformer.tail_reach(config) == reach
    skipped = LENGTH - 1 - reach
    assert skipped > 64
    cache = caches.init_cache(config, 2, CAPACITY)
    for start in range(0, skipped, 64):
        valid = min(64, skipped - start)
        part = x[:, start : start + 64]
        cache = jitted_step_kv(p, config, part, cache, jnp.asarray(valid, jnp.int32))
    tail, _ = run_steps(p, config, x[:, skipped:], 64, cache)
    assert_close(tail[:, -1], whole[:, -1])
    assert float(jnp.abs(tail[:, 0] - whole[:, skipped]).max()) > 0.01  # within reach: not exact


def test_longer_input_does_not_change_earlier_states() -> None:
    p, tokens = random_params(TINY), random_tokens(5)
    whole, _ = jitted_forward(p, TINY, batch_of(tokens))
    changed, _ = jitted_forward(p, TINY, batch_of(tokens.at[:, 100].add(-tokens[:, 100])))
    assert_close(changed[:, :100], whole[:, :100])
    assert float(jnp.abs(changed[:, 100:] - whole[:, 100:]).max()) > 0.01


def test_state_is_all_but_the_growing_rows() -> None:
    cache = caches.init_cache(dataclasses.replace(TINY, kv_dtype="float16"), 2, CAPACITY)
    assert [layer.k.shape[1] for layer in cache.layers] == [16, CAPACITY]
    state = caches.state_arrays(TINY, cache)
    shapes = {path: (array.shape, array.dtype.name) for path, array in state.items()}
    assert shapes == {
        "length": ((), "int32"),
        "layers/0/k": ((2, 16, 2, 8), "float16"),
        "layers/0/v": ((2, 16, 2, 8), "float16"),
        "layers/0/tail": ((2, 3, 32), "float32"),
        "layers/1/tail": ((2, 8, 32), "float32"),
    }


def test_equal_shapes_compile_once() -> None:
    p = random_params(TINY)
    run = jax.jit(transformer.step, static_argnums=1, donate_argnums=3)
    cache = caches.init_cache(TINY, 1, 64)
    x = transformer.embed(p, TINY, random_tokens(7, 1, 8))
    for valid in (8, 5, 8):
        # The config is made anew: equal, not the same object.
        config = ModelConfig.from_dict(TINY.to_dict())
        _, cache = run(p, config, x, cache, jnp.asarray(valid, jnp.int32))
    assert run._cache_size() == 1


# --- packed documents -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [TINY, IMPORTED, CHUNKED, PARALLEL], ids=["tiny", "imported", "chunked", "parallel"]
)
def test_packed_documents_do_not_see_each_other(config: ModelConfig) -> None:
    p, tokens = random_params(config), random_tokens(8)
    edges = [(0, 50, 1), (50, 53, 2), (53, 120, 3), (120, LENGTH, 0)]
    segments = np.zeros((2, LENGTH), np.int32)
    positions = np.zeros((2, LENGTH), np.int32)
    for start, stop, segment in edges:
        segments[:, start:stop] = segment
        positions[:, start:stop] = np.arange(stop - start)
    packed = batch_of(tokens, jnp.asarray(segments), jnp.asarray(positions))
    hidden, aux = jitted_forward(p, config, packed)
    for start, stop, segment in edges:
        if segment:
            count = stop - start
            document = jnp.zeros_like(tokens).at[:, :count].set(tokens[:, start:stop])
            inside = jnp.zeros_like(tokens).at[:, :count].set(1)
            alone, _ = jitted_forward(p, config, batch_of(document, inside))
            assert_close(hidden[:, start:stop], alone[:, :count])
    # Padding neither counts as load nor changes it.
    other = dataclasses.replace(packed, tokens=tokens.at[:, 120:].set(0))
    _, aux_other = jitted_forward(p, config, other)
    for layer, load in aux["load"].items():
        np.testing.assert_allclose(jnp.sum(load), 1.0, atol=1e-6)
        np.testing.assert_array_equal(load, aux_other["load"][layer])


def test_media_fill_their_soft_positions_only() -> None:
    p, tokens, media = random_params(TINY), random_tokens(9), random_media(10)
    plain = transformer.embed(p, TINY, tokens).reshape(-1, 32)
    mixed = transformer.embed(p, TINY, tokens, media).reshape(-1, 32)
    frames, sound = (
        transformer.encode_media(p, TINY, kind, media[kind].values, media[kind].rows)
        for kind in ("visual", "audio")
    )
    expected = np.array(plain)
    expected[3:19], expected[LENGTH + 60 : LENGTH + 76] = frames[0], frames[1]
    expected[30:33] = sound[0, :3]
    np.testing.assert_array_equal(mixed, expected)
    with pytest.raises(GemtoolError, match="no visual encoder"):
        transformer.embed(p, dataclasses.replace(TINY, encoders=()), tokens, media)


# --- recall by construction -----------------------------------------------------------------------


def test_recall_layer_points_at_what_followed_before_training() -> None:
    """At initialisation, the query after a repeated phrase matches the key of the token that came
    after the phrase the first time."""
    from gemtool.model import projections

    kind = dataclasses.replace(RECALL, heads=1, head_dim=32, qk_conv=4)
    config = dataclasses.replace(TINY, kinds=(WINDOW, kind), layers="G")
    p = params.init_params(config, jax.random.key(0))["layers"]["0"]["attention"]
    x = jax.random.normal(jax.random.key(1), (1, 60, 32))
    x = x.at[:, 50:58].set(x[:, 10:18])  # the phrase 10..17 again at 50..57: 58 should find 18
    sources = projections.sources_of(p, kind, jnp.pad(x, ((0, 0), (4, 0), (0, 0))))
    q = projections.queries_of(p, config, kind, sources)
    k, _ = projections.keys_and_values_of(p, config, kind, sources)
    scores = jnp.einsum("hd,sd->hs", q[0, 57], k[0, :58, 0])
    assert int(jnp.argmax(scores)) == 18


# --- experts --------------------------------------------------------------------------------------


def expert_setup(**changes: Any) -> tuple[params.Tree, ModelConfig, jax.Array]:
    config = dataclasses.replace(TINY, moe=dataclasses.replace(TINY.moe, **changes))
    x = jax.random.normal(jax.random.key(3), (40, 32))
    return random_params(config)["layers"]["1"]["moe"], config, x


def naive_experts(p: params.Tree, config: ModelConfig, x: jax.Array) -> np.ndarray:
    assert config.moe is not None
    ids, weights, _, _ = moe.route(p, config.moe, x)
    gate, up, down = (np.asarray(p[name]) for name in ("gate", "up", "down"))
    y = np.zeros_like(x)
    at_input = config.moe.weigh == "input"
    for t, token in enumerate(np.asarray(x)):
        for e, weight in zip(np.asarray(ids)[t], np.asarray(weights)[t], strict=True):
            row, weight = (weight * token, 1) if at_input else (token, weight)
            before = row @ gate[e]
            y[t] += weight * ((before / (1 + np.exp(-before)) * (row @ up[e])) @ down[e])
    return y


@pytest.mark.parametrize("case", ["plain", "input", "tie", "one expert", "empty expert"])
def test_experts_equal_a_loop_over_tokens(case: str) -> None:
    weigh = "input" if case == "input" else "output"
    p, config, x = expert_setup(weigh=weigh, top_k=1 if case == "one expert" else 2)
    if case == "tie":
        p = {**p, "router": jnp.zeros_like(p["router"]), "bias": jnp.zeros((4,))}
    if case == "one expert":
        p = {**p, "bias": jnp.asarray([0.0, 9.0, 0.0, 0.0])}
    if case == "empty expert":
        p = {**p, "bias": jnp.asarray([0.0, 0.0, -9.0, 0.0])}
    present = jnp.ones((40,), bool)
    y, stats = jitted_moe(p, config, x, present)
    np.testing.assert_allclose(y, naive_experts(p, config, x), atol=1e-5)
    expected = {"tie": [0.5, 0.5, 0, 0], "one expert": [0, 1, 0, 0]}
    if case in expected:
        np.testing.assert_allclose(stats["load"], expected[case], atol=1e-6)
    if case == "empty expert":
        assert float(stats["load"][2]) == 0


def test_absent_tokens_get_nothing() -> None:
    p, config, x = expert_setup()
    present = jnp.arange(40, dtype=jnp.int32) < 30
    y, stats = jitted_moe(p, config, x, present)
    alone, stats_alone = jitted_moe(p, config, x[:30], present[:30])
    np.testing.assert_allclose(y[:30], alone, atol=1e-6)
    assert not np.asarray(y[30:]).any()
    for name, value in stats.items():
        np.testing.assert_allclose(value, stats_alone[name], rtol=1e-5)


def test_weights_of_the_chosen() -> None:
    p, config, x = expert_setup(balance="auxiliary", normalise=False, weight_scale=3.0)
    assert config.moe is not None
    ids, weights, scores, logits = moe.route(p, config.moe, x)
    np.testing.assert_allclose(weights, 3 * jnp.take_along_axis(scores, ids, axis=1), rtol=1e-6)
    # Normalised, softmax before the choice is softmax after it.
    after = dataclasses.replace(config.moe, normalise=True, weight_scale=1.0)
    _, weights, _, _ = moe.route(p, after, x)
    chosen = jax.nn.softmax(jnp.take_along_axis(logits, ids, axis=1))
    np.testing.assert_allclose(weights, chosen, rtol=1e-5)


def test_router_losses() -> None:
    """At perfect balance the balance loss is one; the z loss is the squared log-partition."""
    p, config, x = expert_setup(balance="auxiliary")
    p = {**p, "router": jnp.zeros_like(p["router"])}
    _, stats = jitted_moe(p, config, x, jnp.ones((40,), bool))
    assert config.moe is not None
    np.testing.assert_allclose(stats["balance_loss"], 1, rtol=1e-6)
    np.testing.assert_allclose(stats["z_loss"], np.log(4) ** 2, rtol=1e-6)
    loss = config.moe.z_loss * np.log(4) ** 2 + config.moe.auxiliary_loss
    np.testing.assert_allclose(moe.router_loss(config.moe, stats), loss, rtol=1e-6)


def test_bias_updates_bring_balance() -> None:
    p, config, x = expert_setup()
    p = {**p, "bias": jnp.asarray([0.2, 0.0, 0.0, -0.2])}
    tree: params.Tree = {"layers": {"1": {"moe": p}}}
    present = jnp.ones((40,), bool)
    for _ in range(400):
        _, stats = jitted_moe(tree["layers"]["1"]["moe"], config, x, present)
        tree = moe.update_biases(tree, config, {"1": stats["load"]})
    assert float(jnp.abs(stats["load"] - 0.25).max()) < 0.06
    untouched = moe.update_biases(tree, IMPORTED, {"1": stats["load"]})
    assert untouched is tree


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        CHUNKED,
        pytest.param(IMPORTED, marks=pytest.mark.slow),
        pytest.param(PARALLEL, marks=pytest.mark.slow),
    ],
    ids=["tiny", "chunked", "imported", "parallel"],
)
def test_every_parameter_has_a_finite_gradient(config: ModelConfig) -> None:
    config = dataclasses.replace(config, kv_dtype="float16")
    batch = batch_of(random_tokens(11), media=random_media(12))

    def loss(p: params.Tree) -> jax.Array:
        hidden, aux = transformer.forward(p, config, batch)
        scores = jax.nn.log_softmax(transformer.logits(p, config, hidden))
        targets = jnp.roll(batch.tokens, -1, axis=1)
        return aux["loss"] - jnp.mean(jnp.take_along_axis(scores, targets[..., None], axis=-1))

    gradient = params.flatten(
        jax.jit(jax.grad(loss))(params.init_params(config, jax.random.key(0)))
    )
    for path, leaf in gradient.items():
        assert bool(jnp.isfinite(leaf).all()), path
        assert bool((leaf != 0).any()) != params.is_balance_bias(path), path


def test_rounding_keeps_gradients_and_clips() -> None:
    x = jnp.asarray([1.0001, -3e5, 1e-9, 0.3], jnp.float32)
    rounded = round_to(x, "float16")
    np.testing.assert_array_equal(rounded[:1], np.float16(x[:1]).astype(np.float32))
    np.testing.assert_array_equal(rounded[1:3], np.array([-65504, 0], np.float32))
    np.testing.assert_array_equal(rounded.astype(jnp.float16).astype(jnp.float32), rounded)
    gradient = jax.grad(lambda v: jnp.sum(round_to(v, "float16") * 1e-6))(x)
    np.testing.assert_array_equal(gradient, np.full(4, 1e-6, np.float32))


def test_rotary_scores_depend_on_distance_only() -> None:
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    def score(at: int, distance: int) -> jax.Array:
        a = rotary(q, jnp.full((1, 1), at + distance, jnp.int32), 1e4)
        b = rotary(k, jnp.full((1, 1), at, jnp.int32), 1e4)
        return jnp.sum(a * b)

    np.testing.assert_allclose(score(0, 5), score(900, 5), atol=1e-4)
    assert abs(float(score(0, 5) - score(0, 6))) > 1e-3
