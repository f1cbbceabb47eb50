"""Experts on a mesh, whichever way rows travel, equal experts on one device, gradients too."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemtool.kernels.dispatch import compiling_for
from gemtool.kernels.glu import Glu
from gemtool.model import expert_parallel
from gemtool.model.expert_parallel import routed_experts
from gemtool.model.mesh import make_mesh, parse_mesh

E, D, F, C = 8, 16, 24, 3


def arguments(batch: int, length: int, choice: str = "any", biases: bool = False) -> Any:
    """Arrays to differentiate, and ids of experts."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(0.5 * rng.standard_normal(shape), jnp.float32)

    w = {"w_gate": normal(E, D, F), "w_up": normal(E, D, F), "w_down": normal(E, F, D)}
    if biases:
        w |= {"b_gate": normal(E, F), "b_up": normal(E, F), "b_down": normal(E, D)}
    arrays = {"x": normal(batch, length, D), "weights": normal(batch, length, C), "w": w}
    ranking = rng.random((batch, length, E))
    if choice == "skewed":  # hardly anybody but the last three, which live on one device or two
        ranking -= (np.arange(E) > 4) * (rng.random((batch, length, 1)) < 0.9)
    ids = ranking.argsort(axis=-1)[..., :C]
    ids = np.where(rng.random(ids.shape) < 0.2, E, ids)
    if choice == "nobody":
        ids = np.full_like(ids, E)
    return arrays, jnp.asarray(ids, jnp.int32)


def results(arrays: Any, ids: jax.Array, **options: Any) -> Any:
    """The output, and gradients of a function of it."""
    along = jnp.cos(jnp.arange(ids[..., 0].size * D, dtype=jnp.float32))

    def loss(arrays: Any) -> Any:
        out = routed_experts(arrays["x"], ids, arrays["weights"], arrays["w"], **options)
        return jnp.dot(out.reshape(-1), along), out

    step = jax.jit(
        jax.grad(loss, has_aux=True), compiler_options={"xla_backend_optimization_level": 0}
    )
    return step(arrays)


def require_equal(mesh: str, arrays: Any, ids: jax.Array, **options: Any) -> None:
    expected = results(arrays, ids, **options)
    with jax.set_mesh(make_mesh(parse_mesh(mesh))):
        found = results(arrays, ids, **options)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)


def simulated(
    operand: jax.Array,
    output: jax.Array,
    input_offsets: jax.Array,
    send_sizes: jax.Array,
    output_offsets: jax.Array,
    recv_sizes: jax.Array,
    *,
    axis_name: str,
) -> jax.Array:
    """`jax.lax.ragged_all_to_all` as documented, out of what CPUs have; NaN where sizes disagree."""
    here = jax.lax.axis_index(axis_name)
    shared = (operand, input_offsets, send_sizes, output_offsets)
    rows, starts, sizes, places = (jax.lax.all_gather(x, axis_name) for x in shared)
    index = jnp.arange(len(output), dtype=jnp.int32)
    for source in range(len(rows)):
        behind = index - places[source, here]
        came = (behind >= 0) & (behind < sizes[source, here])
        agreed = sizes[source, here] == recv_sizes[source]
        block = rows[source].at[starts[source, here] + behind].get(mode="clip")
        output = jnp.where(came[:, None], jnp.where(agreed, block, jnp.nan), output)
    return output


@pytest.fixture
def ragged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows travel as for an accelerator, by a simulation of the operation that CPUs lack."""
    monkeypatch.setattr(expert_parallel, "target_platform", lambda: "tpu")
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", simulated)


@pytest.mark.parametrize(
    ("mesh", "choice"),
    [
        ("expert=4", "skewed"),
        ("expert=2,context=2,tensor=2", "any"),
        ("expert=2", "nobody"),
    ],
)
@pytest.mark.usefixtures("ragged")
def test_rows_travel_without_padding(mesh: str, choice: str) -> None:
    require_equal(mesh, *arguments(8, 10, choice))


@pytest.mark.parametrize(("mesh", "room"), [("expert=8", 0.3), ("data=2,expert=2", 1.01)])
@pytest.mark.usefixtures("ragged")
def test_what_does_not_fit_comes_in_further_rounds(
    mesh: str, room: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_parallel, "ROOM", room)
    require_equal(mesh, *arguments(8, 10, "skewed", biases=True))


@pytest.mark.usefixtures("ragged")
def test_weighed_rows_travel_without_padding() -> None:
    arrays, ids = arguments(4, 6, biases=True)
    require_equal("expert=2,tensor=2", arrays, ids, weigh="input", glu=Glu("geglu"))


def test_skewed_rows_travel_in_padded_blocks() -> None:
    require_equal("expert=2,tensor=2", *arguments(4, 10, "skewed", biases=True))


@pytest.mark.parametrize(
    ("mesh", "weigh"), [("data=2,expert=2,tensor=2", "output"), ("expert=4,context=2", "input")]
)
def test_rows_that_all_devices_have_do_not_travel(mesh: str, weigh: str) -> None:
    require_equal(mesh, *arguments(1, 6, biases=True), weigh=weigh)


def abstract_mesh(text: str) -> jax.sharding.AbstractMesh:
    """A mesh without devices: programs can be lowered on it."""
    sizes = parse_mesh(text)
    return jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))


def program(arrays: Any, ids: jax.Array, platform: str) -> str:
    mesh = abstract_mesh("data=2,expert=4")
    with (
        compiling_for(platform),
        jax.sharding.use_abstract_mesh(mesh),
    ):
        step = jax.jit(lambda a: jax.grad(lambda a: routed_experts(ids=ids, **a).sum())(a))
        return step.trace(arrays).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    ("platform", "batch", "ragged", "padded"),
    [("cpu", 8, 0, 5), ("cpu", 1, 0, 0), ("tpu", 8, 4 + 6, 3), ("tpu", 1, 0, 0)],
)
def test_what_is_sent(platform: str, batch: int, ragged: int, padded: int) -> None:
    """There, back, and the same for gradients; ahead of it whose the rows are, or who sends how many;
    and the same again in the loops over further rounds, whose backward pass goes there once more."""
    text = program(*arguments(batch, 6), platform)
    assert text.count("@ragged_all_to_all(") == ragged
    assert text.count('"stablehlo.all_to_all"') == padded
