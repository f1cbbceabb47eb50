"""Every sharded form equals the unsharded one on 8 devices: outputs, gradients, a training step."""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gemtool.errors import UsageError
from gemtool.model.batch import Batch, MediaGroups
from gemtool.model.config import PRESETS, ModelConfig, load_preset
from gemtool.model.kinds import IndexConfig
from gemtool.model.mesh import (
    AXES,
    RULES,
    describe,
    make_mesh,
    param_shardings,
    parse_mesh,
    partition,
    require_fit,
)
from gemtool.model.params import flatten, init_params, param_specs
from gemtool.model.transformer import forward
from gemtool.model.vocab_parallel import embedding_rows
from gemtool.train.objectives import next_token_loss
from gemtool.train.optimizer import make_optimizer
from gemtool.train.placement import place_batches, state_shardings
from gemtool.train.step import init_state, make_train_step, stack
from tests.conftest import quickly_compiled

# float32 keys and values: rounding them to float16 would turn other orders of summation into steps.
CONFIG = ModelConfig.from_dict(
    {
        "name": "mesh",
        "vocab_size": 96,
        "d_model": 32,
        "layers": "LGC",
        "d_ff": 64,
        "kv_dtype": "float32",
        "kinds": {
            "L": {
                "attention": "window", "window": 11, "heads": 4, "kv_heads": 4, "head_dim": 8,
                "rope_theta": 1e4, "qk_norm": "rms", "qk_conv": 4,
            },
            "G": {
                "heads": 8, "kv_heads": 2, "head_dim": 8, "sink": True, "qk_conv": 8,
                "key_shift": 1, "tie_qk_init": True,
            },
            "C": {
                "attention": "chunk", "window": 10, "heads": 4, "kv_heads": 1, "head_dim": 8,
                "rope_theta": 1e4, "qk_norm": "none", "soft_cap": 5.0,
            },
        },
        "moe": {"experts": 8, "top_k": 3, "d_expert": 16, "shared_experts": 1},
        "encoders": {
            "visual": {
                "tokens": 4, "features": 12, "width": 16, "hidden": 16, "heads": 2, "overlap": 1
            }
        },
    }
)  # fmt: skip

ALONE = [f"{name}=8" for name in ("data", "fsdp", "expert", "context")] + ["tensor=4"]
THREE = ("data=2,fsdp=2,tensor=2", "expert=2,context=2,tensor=2")
MORE = ("data=2,expert=4", "fsdp=2,context=4", "context=2")


def slow(*texts: str) -> list[Any]:
    return [pytest.param(text, marks=pytest.mark.slow) for text in texts]


# Llama 4 weighs inputs, gpt-oss has biases: what a device adds must be added once.
BIASED = dataclasses.replace(
    CONFIG,
    layers="LG",
    logit_soft_cap=8.0,
    moe=dataclasses.replace(
        CONFIG.moe, weigh="input", expert_bias=True, router_bias=True, shared_experts=0
    ),
)
OUTPUT = {"rtol": 2e-4, "atol": 2e-4}


def make_batch(seed: int = 0) -> Batch:
    """Documents of many lengths, some longer than what a device has, padding, media."""
    rng = np.random.default_rng(seed)
    B, T = 8, 32
    segments = np.zeros((B, T), np.int32)
    positions = np.zeros((B, T), np.int32)
    for row in range(B):
        at, number = 0, 1
        while at < T - (row == 3) * 9:  # the fourth ends in padding
            length = min(int(rng.integers(1, 30)), T - at)
            segments[row, at : at + length] = number
            positions[row, at : at + length] = np.arange(length)
            at, number = at + length, number + 1
    tokens, targets = (rng.integers(0, CONFIG.vocab_size, (B, T)).astype(np.int32) for _ in "ab")
    weights = (rng.random((B, T)) * (rng.random((B, T)) < 0.7)).astype(np.float32)
    media = MediaGroups(
        values=rng.integers(0, 256, (3, 4, 12)).astype(np.uint8),
        at=np.array([5, 40, B * T], np.int32),
        rows=np.array([4, 4, 0], np.int32),
    )
    return Batch(tokens, segments, positions, targets, weights * (segments > 0), {"visual": media})


def objective(params: Any, config: ModelConfig, batch: Batch) -> Any:
    hidden, router = forward(params, config, batch)
    loss = next_token_loss(params, config, hidden, batch.targets, batch.weights, chunk=16)
    return loss + router["loss"], (loss, hidden, router["load"])


def run(config: ModelConfig, params: Any, batch: Batch) -> tuple[Any, str]:
    """Outputs and gradients, and the program."""
    function = jax.value_and_grad(partial(objective, config=config), has_aux=True)
    with quickly_compiled():
        step = jax.jit(lambda p, b: function(p, batch=b)).lower(params, batch).compile()
    (_, outputs), gradients = step(params, batch)
    return jax.tree.map(np.asarray, (outputs, gradients)), step.as_text()


@pytest.fixture(scope="module")
def unsharded() -> tuple[Any, Batch, Any]:
    params, batch = init_params(CONFIG, jax.random.key(0)), make_batch()
    return params, batch, run(CONFIG, params, batch)[0]


def spread(batch: Batch, mesh: Any) -> Batch:
    def put(x: np.ndarray) -> jax.Array:
        spec = partition(("batch", "length"), x.shape, mesh)
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))

    given = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)[:-1]}
    own = {name: put(value) for name, value in given.items() if value is not None}
    return Batch(**own, media=batch.media)


# What a program sends, and what not. Compiled for CPU devices, where sums that are cut stay sums of
# everything.
SENDS = ("all-reduce", "all-gather", "all-to-all", "collective-permute")
SENT = {
    "fsdp=8": ({"all-gather", "all-reduce"}, {"collective-permute"}),
    "expert=8": ({"all-to-all", "all-reduce"}, {"collective-permute"}),
    "context=8": ({"collective-permute", "all-reduce"}, {"all-to-all"}),
    "tensor=4": ({"all-reduce"}, {"all-to-all", "collective-permute"}),
}


def sent(program: str) -> set[str]:
    return {name for name in SENDS if re.search(rf"\b{name}(-start)?\(", program)}


@pytest.mark.parametrize("text", [*ALONE, *THREE, *slow(*MORE)])
def test_sharded_equals_unsharded(text: str, unsharded: tuple[Any, Batch, Any]) -> None:
    params, batch, expected = unsharded
    found = sent(require_equal(CONFIG, text, params, batch, expected))
    must, must_not = SENT.get(text, (set(), set()))
    assert must <= found
    assert not must_not & found


def test_of_texts_only_sums_are_sent() -> None:
    batch = dataclasses.replace(make_batch(), media={})
    mesh = make_mesh(parse_mesh("data=8"))
    with jax.set_mesh(mesh):
        params = init_params(CONFIG, jax.random.key(0))
        params = jax.device_put(params, param_shardings(CONFIG, mesh))
        _, program = run(CONFIG, params, spread(batch, mesh))
    assert sent(program) == {"all-reduce"}


def test_what_each_device_adds_is_added_once() -> None:
    params, batch = init_params(BIASED, jax.random.key(1)), make_batch(1)
    params = jax.tree.map(lambda x: x + 0.02, params)  # biases begin at zero
    require_equal(BIASED, THREE[1], params, batch, run(BIASED, params, batch)[0])


@pytest.fixture(scope="module")
def one_step() -> tuple[Any, dict[str, jax.Array]]:
    return train_step(None)


def train_step(mesh: Any) -> tuple[Any, dict[str, jax.Array]]:
    """A state after a step on two micro-batches, and the step's metrics."""
    optimizer = make_optimizer(CONFIG)
    batches = stack([make_batch(seed) for seed in (0, 1)])
    state = init_state(CONFIG, optimizer, 0)
    shardings = None
    if mesh is not None:
        shardings = state_shardings(CONFIG, optimizer, mesh)
        state = jax.device_put(state, shardings)
        batches = place_batches(batches, mesh)
    with quickly_compiled():
        after, metrics = make_train_step(CONFIG, optimizer, shardings)(state, batches, 0.01)
    if shardings is not None:
        for x, place in zip(*map(jax.tree.leaves, (after, shardings)), strict=True):
            assert x.sharding.is_equivalent_to(place, x.ndim)
    return jax.tree.map(np.asarray, (after, metrics))


@pytest.mark.parametrize("text", [THREE[1], *slow(THREE[0], *MORE, *ALONE)])
def test_a_training_step_is_that_of_one_device(text: str, one_step: tuple[Any, Any]) -> None:
    expected, expected_metrics = one_step
    mesh = make_mesh(parse_mesh(text))
    with jax.set_mesh(mesh):
        after, metrics = train_step(mesh)
    assert metrics.keys() == expected_metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(value, expected_metrics[name], rtol=1e-4, err_msg=name)
    # Adam divides by the gradient's size, so that rounding shows where a gradient is tiny; moments,
    # which are gradients and their squares, tell the rest.
    wanted = flatten(expected.params)
    for path, value in flatten(after.params).items():
        np.testing.assert_allclose(value, wanted[path], atol=2e-3, err_msg=path)
    for value, want in zip(
        *map(jax.tree.leaves, (after.optimizer, expected.optimizer)), strict=True
    ):
        np.testing.assert_allclose(value, want, rtol=2e-3, atol=2e-4 * np.abs(want).max())


@pytest.mark.parametrize("text", ["expert=4,tensor=2", *slow(THREE[0], "context=2")])
@quickly_compiled()
def test_what_an_index_and_negatives_do_is_the_same_on_a_mesh(text: str) -> None:
    kinds = {kind.letter: kind for kind in CONFIG.kinds}
    index = IndexConfig(block=4, landmarks=2, dim=4, hidden=8, local=1, select=2)
    kinds["G"] = dataclasses.replace(kinds["G"], attention="indexed", index=index, rope_theta=0.0)
    own = {"key_shift": 0, "tie_qk_init": False}
    kinds["S"] = dataclasses.replace(kinds["G"], letter="S", shares="G", **own)
    layers = CONFIG.layers + "S"
    config = dataclasses.replace(CONFIG, layers=layers, kinds=tuple(kinds.values()), encoders=())
    params = init_params(config, jax.random.key(0))
    batch = make_batch()
    documents = np.arange(8, dtype=np.int32)[:, None] * 100 + batch.segments
    batch = dataclasses.replace(batch, media={}, documents=np.where(batch.segments, documents, 0))
    batch = jax.tree.map(jax.numpy.asarray, batch)
    negatives = 0 if "context" in text else 2

    def objective(params: Any, batch: Batch) -> Any:
        hidden, summary = forward(params, config, batch, negatives=negatives, learn_index=True)
        index = summary["index"]
        return (hidden**2).mean() + index["loss"].sum() / index["weight"].sum(), (hidden, index)

    step = jax.jit(jax.value_and_grad(objective, has_aux=True))
    (_, outputs), gradients = step(params, batch)
    mesh = make_mesh(parse_mesh(text))
    with jax.set_mesh(mesh):
        cut = jax.device_put(params, param_shardings(config, mesh))
        (_, got_outputs), got_gradients = step(cut, spread(batch, mesh))
    for got, want in zip(jax.tree.leaves(got_outputs), jax.tree.leaves(outputs), strict=True):
        np.testing.assert_allclose(got, want, **OUTPUT)
    wanted = flatten(gradients)
    for path, got in flatten(got_gradients).items():
        atol = 2e-5 * np.abs(wanted[path]).max() + 1e-6
        np.testing.assert_allclose(got, wanted[path], rtol=1e-3, atol=atol, err_msg=path)


@pytest.mark.parametrize(
    ("text", "table_shape", "sequences"),
    [
        ("data=2,context=4", (96, 32), 3),
        ("fsdp=2,expert=2,tensor=2", (96, 32), 3),
        ("fsdp=5", (96, 32), 5),
        ("fsdp=4", (90, 32), 4),
        ("fsdp=2,expert=4", (96, 34), 8),
    ],
)
def test_rows_that_do_not_divide_count_once(
    text: str, table_shape: tuple[int, int], sequences: int
) -> None:
    """As positions do not where evaluation shards have another length than the mesh was made for, nor
    rows and columns of a table on a mesh of any size."""
    rng = np.random.default_rng(2)
    rows = (sequences, 10)
    table = rng.standard_normal(table_shape).astype(np.float32)
    hidden = rng.standard_normal((*rows, table_shape[1])).astype(np.float32)
    targets = jax.numpy.asarray(rng.integers(0, table_shape[0], rows).astype(np.int32))
    weights = jax.numpy.asarray(rng.random(rows).astype(np.float32))

    def loss(table: Any, hidden: Any) -> Any:
        params = {"embedding": table}
        hidden = hidden + embedding_rows(table, targets)
        return next_token_loss(params, CONFIG, hidden, targets, weights, chunk=8)

    expected = jax.value_and_grad(loss, (0, 1))(table, hidden)
    with jax.set_mesh(make_mesh(parse_mesh(text))):
        found = jax.jit(jax.value_and_grad(loss, (0, 1)))(table, hidden)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected
    )


def require_equal(config: ModelConfig, text: str, params: Any, batch: Batch, expected: Any) -> str:
    """Outputs and gradients on a mesh are the expected ones; returns its program."""
    outputs, gradients = expected
    mesh = make_mesh(parse_mesh(text))
    with jax.set_mesh(mesh):
        cut = jax.device_put(params, param_shardings(config, mesh))
        (got_outputs, got_gradients), program = run(config, cut, spread(batch, mesh))
    for got, want in zip(jax.tree.leaves(got_outputs), jax.tree.leaves(outputs), strict=True):
        np.testing.assert_allclose(got, want, **OUTPUT)
    wanted = flatten(gradients)
    for path, got in flatten(got_gradients).items():
        atol = 2e-5 * np.abs(wanted[path]).max() + 1e-6
        np.testing.assert_allclose(got, wanted[path], rtol=1e-3, atol=atol, err_msg=path)
    return program


def test_parameters_are_really_cut() -> None:
    mesh = make_mesh(parse_mesh("fsdp=2,expert=2,tensor=2"))
    shardings = flatten(param_shardings(CONFIG, mesh))
    shapes = {k: v.shape for k, v in flatten(init_params(CONFIG, jax.random.key(0))).items()}
    local = {path: shardings[path].shard_shape(shape) for path, shape in shapes.items()}
    assert local["embedding"] == (48, 8)
    assert local["layers/1/attention/q"] == (8, 4, 8)
    assert local["layers/1/moe/gate"] == (4, 16, 8)
    assert local["layers/1/moe/down"] == (4, 8, 16)
    assert local["layers/0/mlp/down"] == (32, 8)
    assert local["layers/1/attention/sink"] == (4,)


def test_what_does_not_divide_stays_whole() -> None:
    mesh = make_mesh(parse_mesh("tensor=4"))
    assert partition(("embed", "kv_heads", None), (32, 2, 8), mesh)[1] is None
    assert partition(("embed", "heads", None), (32, 8, 8), mesh)[1] == "tensor"
    mesh = make_mesh(parse_mesh("fsdp=2,expert=4"))
    cuts = [partition(("embed",), (size,), mesh)[0] for size in (32, 34, 33)]
    assert cuts == [("fsdp", "expert"), "fsdp", None]
    assert partition(("expert", "embed"), (8, 32), mesh) == P("expert", "fsdp")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("data=3", "data x fsdp x expert = 3 does not divide 8 sequences"),
        ("context=5", "context = 5 does not divide 32 positions"),
        ("tensor=8", "tensor = 8 does not divide 4 heads"),
        ("expert=3", "expert = 3 does not divide 8 experts"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(text: str, what: str) -> None:
    with pytest.raises(UsageError) as problem:
        require_fit(CONFIG, make_mesh(parse_mesh(text)), 8, 32)
    assert what in str(problem.value)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("dta=2", "no axis 'dta'; did you mean 'data'?"),
        ("data=2,data=4", "twice"),
        ("data", "give the axis a size, as in data=2"),
        ("data=0", "give the axis a size"),
        ("data=-1", "give the axis a size"),
    ],
)
def test_mistyped_meshes(text: str, what: str) -> None:
    with pytest.raises(UsageError) as problem:
        parse_mesh(text)
    assert what in str(problem.value)


def test_meshes_have_all_axes() -> None:
    sizes = parse_mesh(" fsdp=2, tensor=4 ")
    assert tuple(sizes) == AXES
    assert describe(sizes) == "fsdp=2,tensor=4"
    assert describe(parse_mesh("")) == "1 device"
    assert make_mesh(parse_mesh("")).shape == dict.fromkeys(AXES, 1)
    with pytest.raises(UsageError, match="takes 16 devices; there are 8"):
        make_mesh({"data": 16})


def test_every_axis_of_every_preset_has_a_rule() -> None:
    for name in PRESETS:
        for path, spec in flatten(param_specs(load_preset(name))).items():
            assert {*spec.axes} - {None} <= RULES.keys(), path
