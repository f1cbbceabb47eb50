"""Stacked layers, recomputed layers and bfloat16 change how a model is computed, not what."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemtool.model import params
from gemtool.model.config import PRESETS, ModelConfig, load_preset
from gemtool.model.execution import FLOAT32, Execution, suitable
from gemtool.model.moe import route
from gemtool.model.stacking import Repeats, repeats, stack_layers, unstack_layers
from gemtool.model.transformer import forward
from gemtool.train.objectives import next_token_loss
from gemtool.train.optimizer import decayed, make_optimizer
from gemtool.train.step import TrainState, init_state, make_train_step, stack
from tests.test_mesh import CONFIG, make_batch

# Layers before, repeated and after, dense and of experts.
DEEP = dataclasses.replace(CONFIG, layers="LLGLGLGC", dense_layers=2)
STACKED = Execution(stacked=True)


def stacked_params(config: ModelConfig) -> params.Tree:
    return stack_layers(
        config, params.init_params(config, jax.random.key(0)), lambda *x: jnp.stack(x)
    )


def test_which_layers_repeat() -> None:
    assert repeats(DEEP) == Repeats(first=2, period=2, times=2)
    assert repeats(dataclasses.replace(DEEP, layers="LGC")) is None
    assert repeats(dataclasses.replace(DEEP, layers="LLLLL", moe=None)) == Repeats(0, 1, 5)
    assert repeats(load_preset("pro")) == Repeats(first=4, period=4, times=11)
    assert repeats(load_preset("flash")) == Repeats(first=0, period=4, times=8)
    assert repeats(load_preset("nano")) is None


@pytest.mark.parametrize("name", PRESETS)
def test_stacked_tables_hold_the_same_parameters(name: str) -> None:
    config = load_preset(name)
    apart, stacked = params.param_specs(config), params.param_specs(config, stacked=True)
    sizes = [sum(spec.size for spec in params.flatten(x).values()) for x in (apart, stacked)]
    assert sizes[0] == sizes[1]
    back = unstack_layers(
        config,
        stacked,
        lambda spec, _: dataclasses.replace(spec, shape=spec.shape[1:], axes=spec.axes[1:]),
    )
    assert params.flatten(back) == params.flatten(apart)
    decays = params.flatten(decayed(config, stacked=True))
    of_all = stack_layers(config, decayed(config), lambda *same: same[0])
    assert decays == params.flatten(of_all)


def test_stacking_and_back() -> None:
    tree = params.init_params(DEEP, jax.random.key(0))
    back = unstack_layers(DEEP, stacked_params(DEEP), lambda x, i: x[i])
    jax.tree.map(np.testing.assert_array_equal, back, tree)


@functools.cache
def value_and_gradients(
    execution: Execution, config: ModelConfig = DEEP
) -> tuple[Any, Any, params.Tree]:
    tree = params.init_params(config, jax.random.key(0))
    batch = jax.tree.map(jnp.asarray, make_batch())

    def objective(p: params.Tree) -> tuple[jax.Array, Any]:
        if execution.stacked:
            p = stack_layers(config, p, lambda *x: jnp.stack(x))
        hidden, router = forward(p, config, batch, execution)
        loss = next_token_loss(p, config, hidden, batch.targets, batch.weights, chunk=16)
        load = router["load"]
        if execution.stacked:
            load = unstack_layers(config, {"layers": load}, lambda x, i: x[i])["layers"]
        return loss + router["loss"], (hidden, load)

    # Runs once: optimising would cost more than it saves.
    function = jax.jit(
        jax.value_and_grad(objective, has_aux=True),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    (loss, rest), gradients = function(tree)
    return loss, rest, gradients


@pytest.fixture(autouse=True)
def _plain_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMTOOL_KERNELS", "reference")  # compile in less time


@pytest.mark.parametrize(
    "execution",
    [
        pytest.param(STACKED, marks=pytest.mark.slow),
        pytest.param(Execution(remat=True), marks=pytest.mark.slow),
        Execution(remat=True, stacked=True),
    ],
    ids=str,
)
def test_stacked_and_recomputed_layers_change_nothing(execution: Execution) -> None:
    loss, (hidden, load), gradients = value_and_gradients(execution)
    want, (want_hidden, want_load), want_gradients = value_and_gradients(FLOAT32)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    np.testing.assert_allclose(hidden, want_hidden, rtol=1e-4, atol=1e-4)
    assert load.keys() == want_load.keys() == {str(i) for i in range(2, 8)}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), load, want_load)
    wanted = params.flatten(want_gradients)
    for path, got in params.flatten(gradients).items():
        atol = 2e-5 * np.abs(wanted[path]).max() + 1e-6
        np.testing.assert_allclose(got, wanted[path], rtol=1e-3, atol=atol, err_msg=path)


def test_bfloat16_rounds_and_does_nothing_else() -> None:
    """A bfloat16 has 8 bits: sums of its products are off by parts in a hundred."""
    # A rounded score now and then sends a token to another expert, which is no small change.
    dense = dataclasses.replace(DEEP, moe=None)
    loss, (hidden, _), gradients = value_and_gradients(Execution("bfloat16"), dense)
    want, (want_hidden, _), want_gradients = value_and_gradients(FLOAT32, dense)
    assert hidden.dtype == jnp.bfloat16
    np.testing.assert_allclose(loss, want, rtol=0.01)
    off = np.asarray(hidden, np.float32) - want_hidden
    assert 1e-4 < np.abs(off).max() < 0.2
    for path, got in params.flatten(gradients).items():
        assert got.dtype == jnp.float32, path
        wanted = np.asarray(params.flatten(want_gradients)[path])
        cosine = np.sum(got * wanted) / (np.linalg.norm(got) * np.linalg.norm(wanted))
        assert cosine > 0.98, (path, cosine)


def test_bfloat16_goes_through_experts() -> None:
    loss, _, gradients = value_and_gradients(Execution("bfloat16", remat=True, stacked=True))
    want, _, _ = value_and_gradients(FLOAT32)
    np.testing.assert_allclose(loss, want, rtol=0.01)
    for path, got in params.flatten(gradients).items():
        assert got.dtype == jnp.float32, path
        assert np.isfinite(got).all(), path


def test_matrices_are_rounded_and_what_decides_is_not() -> None:
    rounded = params.flatten(
        params.in_dtype(params.init_params(DEEP, jax.random.key(0)), "bfloat16")
    )
    wide = {path.rpartition("/")[2] for path, x in rounded.items() if x.dtype == jnp.float32}
    norms = {"norm", "attention_norm", "mlp_norm", "q_norm", "k_norm"}
    assert wide == norms | {"router", "bias", "sink", "log_temperature"}


def test_routers_multiply_in_all_of_float32() -> None:
    """Accelerators take fewer bits unless they are told: then near ties choose other experts."""
    moe = CONFIG.moe
    assert moe is not None
    p = params.init_params(CONFIG, jax.random.key(0))["layers"]["1"]["moe"]
    x = jnp.ones((3, CONFIG.d_model), jnp.bfloat16)
    traced = jax.make_jaxpr(lambda p, x: route(p, moe, x)[3])(p, x)
    products = [e for e in traced.jaxpr.eqns if e.primitive.name == "dot_general"]
    assert [e.outvars[0].aval.dtype for e in products] == [jnp.float32]
    assert products[0].params["precision"] == (jax.lax.Precision.HIGHEST,) * 2


@pytest.mark.slow
def test_a_training_step_of_stacked_layers_is_one_of_layers_apart() -> None:
    batch = stack([dataclasses.replace(make_batch(seed)) for seed in (0, 1)])

    def after(execution: Execution) -> TrainState:
        optimizer = make_optimizer(DEEP, execution.stacked)
        tree = None if not execution.stacked else stacked_params(DEEP)
        state = init_state(DEEP, optimizer, 0, tree)
        step = make_train_step(DEEP, optimizer, execution=execution)
        for _ in range(2):
            state, metrics = step(state, batch, 1e-3)
        assert metrics["expert_load"].shape == ()
        return state

    apart, stacked = after(FLOAT32), after(STACKED)
    back = unstack_layers(DEEP, stacked.params, lambda x, i: x[i])
    for path, got in params.flatten(back).items():
        want = params.flatten(apart.params)[path]
        np.testing.assert_allclose(got, want, rtol=0, atol=5e-5, err_msg=path)


def test_accelerators_get_bfloat16_and_a_loop() -> None:
    assert suitable("cpu") == Execution("float32", remat=False, stacked=False)
    assert suitable("tpu") == suitable("gpu") == Execution("bfloat16", True, True)
