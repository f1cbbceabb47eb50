"""Training: the objective, the optimizer and the step, as functions."""

from __future__ import annotations

import json
import math
import tomllib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gemtool.model.batch import Batch, MediaGroups
from gemtool.model.config import ModelConfig
from gemtool.model.mesh import make_mesh
from gemtool.model.params import flatten, init_params
from gemtool.model.transformer import logits
from gemtool.train.loop import to_json
from gemtool.train.objectives import next_token_loss
from gemtool.train.optimizer import FLOOR, Schedule, clip_by_norm, decayed, make_optimizer
from gemtool.train.placement import place_batches
from gemtool.train.state import open_run
from gemtool.train.step import init_state, make_train_step, stack

MODEL = """
name = "tiny"
vocab_size = 1
d_model = 32
layers = "LG"
d_ff = 48

[kinds.L]
attention = "window"
heads = 2
kv_heads = 2
head_dim = 8
window = 8
rope_theta = 10000.0

[kinds.G]
heads = 2
kv_heads = 1
head_dim = 16
qk_conv = 2
sink = true

[moe]
experts = 4
top_k = 2
d_expert = 16
"""
VOCAB_SIZE = 500
CONFIG = ModelConfig.from_dict({**tomllib.loads(MODEL), "vocab_size": VOCAB_SIZE})
LENGTH = 32


def random_batch(seed: int, rows: int = 2, **changes: Any) -> Batch:
    rng = np.random.default_rng(seed)
    shape = (rows, LENGTH)
    tokens = rng.integers(64, VOCAB_SIZE, shape).astype(np.int32)
    segments = np.repeat([[1, 2]], LENGTH // 2, axis=1).repeat(rows, 0).astype(np.int32)
    positions = np.tile(np.arange(LENGTH // 2, dtype=np.int32), (rows, 2))
    weights = (rng.random(shape) < 0.7).astype(np.float32)
    return Batch(tokens, segments, positions, np.roll(tokens, -1, 1), weights, **changes)


def plain_loss(params, hidden, targets, weights):
    scores = jax.nn.log_softmax(logits(params, CONFIG, hidden))
    return -jnp.sum(weights * jnp.take_along_axis(scores, targets[..., None], -1)[..., 0])


@pytest.mark.parametrize(("chunk", "density"), [(7, 0.0), (7, 0.3), (64, 1.0), (100, 0.3)])
def test_the_loss_is_cross_entropy(chunk, density):
    rng = np.random.default_rng(0)
    params = {"embedding": init_params(CONFIG, jax.random.key(0))["embedding"]}
    hidden = jnp.asarray(rng.standard_normal((2, LENGTH, CONFIG.d_model)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, VOCAB_SIZE, (2, LENGTH)), jnp.int32)
    weights = rng.random((2, LENGTH)) * (rng.random((2, LENGTH)) < density)
    weights = jnp.asarray(weights, jnp.float32)

    def ours(params, hidden):
        return 2.5 * next_token_loss(params, CONFIG, hidden, targets, weights, chunk)

    def plain(params, hidden):
        return 2.5 * plain_loss(params, hidden, targets, weights)

    np.testing.assert_allclose(ours(params, hidden), plain(params, hidden), rtol=1e-5)
    found = jax.grad(ours, (0, 1))(params, hidden)
    expected = jax.grad(plain, (0, 1))(params, hidden)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


@pytest.fixture(scope="module")
def one_step():
    """The state before a step (numpy), the step, its batch, and what came of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEMTOOL_KERNELS", "reference")  # compiles in less time
        yield from make_one_step()


def make_one_step():
    optimizer = make_optimizer(CONFIG)
    step = make_train_step(CONFIG, optimizer)
    batch = random_batch(0)
    before = jax.tree.map(np.array, init_state(CONFIG, optimizer, 0))
    after, metrics = step(init_state(CONFIG, optimizer, 0), stack([batch]), 0.01)
    yield before, step, batch, jax.tree.map(np.array, after), metrics


def test_a_step_improves_every_parameter_it_should(one_step):
    before, step, batch, after, metrics = one_step
    assert math.isclose(float(metrics["loss"]), math.log(VOCAB_SIZE), rel_tol=0.25)
    assert 1 <= float(metrics["expert_load"]) <= 4
    for path, value in flatten(after.params).items():
        assert np.any(value != flatten(before.params)[path]), f"{path} did not change"
    again, state = [], after
    for _ in range(5):
        state, metrics = step(state, stack([batch]), 0.01)
        again.append(float(metrics["loss"]))
    assert again == sorted(again, reverse=True)


def test_balance_biases_move_by_load_alone(one_step):
    before, _, _, after, _ = one_step
    moved = after.params["layers"]["1"]["moe"]["bias"] - before.params["layers"]["1"]["moe"]["bias"]
    assert set(np.round(np.abs(moved), 9)) <= {np.float32(0), np.float32(0.001)}
    for moments in jax.tree.leaves(
        after.optimizer, is_leaf=lambda x: isinstance(x, dict) and "layers" in x
    ):
        if isinstance(moments, dict):
            assert not np.any(moments["layers"]["1"]["moe"]["bias"]), "a gradient reached the bias"


def test_micro_batches_give_the_same_step(one_step):
    before, step, batch, after, metrics = one_step
    halves = [jax.tree.map(lambda x, i=i: x[i : i + 1], batch) for i in range(2)]
    state, halved = step(jax.tree.map(jnp.asarray, before), stack(halves), 0.01)
    np.testing.assert_allclose(halved["loss"], metrics["loss"], rtol=1e-5)
    # Adam divides by the gradient's size, so that rounding shows where a gradient is tiny.
    for path, value in flatten(state.params).items():
        if not path.endswith("/bias"):
            np.testing.assert_allclose(value, flatten(after.params)[path], atol=2e-3, err_msg=path)


def test_stacked_batches_have_room_for_all_media():
    def media(count: int) -> dict[str, MediaGroups]:
        ones = np.ones(count, np.int32)
        return {"audio": MediaGroups(np.ones((count, 25, 320), np.float16), ones, ones)}

    both = stack([random_batch(0, media=media(3)), random_batch(1, media=media(1))])
    assert both.tokens.shape == (2, 2, LENGTH)
    assert both.media["audio"].values.shape == (2, 3, 25, 320)
    assert both.media["audio"].rows.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_stacked_batches_know_documents_where_they_are_given():
    assert stack([random_batch(0), random_batch(1)]).documents is None
    both = [random_batch(i, documents=np.full((2, LENGTH), i + 1, np.int32)) for i in range(2)]
    assert stack(both).documents[:, 0, 0].tolist() == [1, 2]


@pytest.mark.parametrize("known", [False, True])
def test_documents_lie_where_segments_do(known):
    mesh = make_mesh({"data": 2, "context": 2}, jax.devices()[:4])
    more = {"documents": np.ones((2, LENGTH), np.int32)} if known else {}
    placed = place_batches(stack([random_batch(0, **more)]), mesh)
    assert (placed.documents is None) != known
    if known:
        assert placed.documents.sharding == placed.segments.sharding
        assert placed.segments.addressable_shards[0].data.shape == (1, 1, LENGTH // 2)


def test_the_schedule():
    schedule = Schedule(steps=100, peak=1.0, warmup=10)
    rates = [schedule.rate(step) for step in range(1, 101)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert math.isclose(rates[-1], FLOOR)
    assert Schedule(steps=1, peak=0.5, warmup=1).rate(1) == 0.5
    assert math.isclose(Schedule(steps=3, peak=0.5, warmup=0).rate(3), 0.5 * FLOOR)


def test_matrices_decay_and_nothing_else():
    chosen = flatten(decayed(CONFIG))
    assert chosen["layers/1/moe/gate"]
    assert chosen["embedding"]
    kept = {path.rpartition("/")[2] for path, decays in chosen.items() if not decays}
    names = {"norm", "attention_norm", "mlp_norm", "bias", "conv", "sink", "log_temperature"}
    assert kept == names


def test_numbers_that_are_not_finite_are_null_with_a_reason():
    row = json.loads(to_json({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 0.1}))
    assert row == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
        "lr": 0.1,
        "reason": "loss is nan, grad_norm is inf",
    }


def test_a_state_is_saved_as_it_was_when_saved(tmp_path):
    """Steps reuse the memory of the state that is still being written."""
    increment = jax.jit(lambda x: x + 1.0, donate_argnums=0)
    state = {"x": jnp.arange(3_000_000, dtype=jnp.float32)}
    with open_run(tmp_path / "run", resume=False) as run:
        run.save(1, state, {"tokens": 5})
        for _ in range(20):
            state = {"x": increment(state["x"])}
        jax.block_until_ready(state)
        run.finish()
        restored = run.restore(1, jax.eval_shape(lambda: {"x": jnp.zeros(3_000_000)}))
        assert run.record(1) == {"tokens": 5}
    np.testing.assert_array_equal(restored["x"], np.arange(3_000_000, dtype=np.float32))


@pytest.mark.parametrize("size", [0.0, 0.5, 3.0])
def test_clipping_is_that_of_optax(size: float) -> None:
    tree = {"a": np.full((2, 3), size, np.float32), "b": {"c": -np.full(4, size, np.float32)}}
    ours, theirs = clip_by_norm(1.0), optax.clip_by_global_norm(1.0)
    found, _ = ours.update(tree, ours.init(tree))
    expected, _ = theirs.update(tree, theirs.init(tree))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), found, expected)
    assert size != 3.0 or math.isclose(float(optax.tree.norm(found)), 1, rel_tol=1e-6)
