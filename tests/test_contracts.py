"""What a training step of each preset sends, and what it never holds, on the mesh it is made for.

The mesh is abstract and parameters are shapes: 512 devices and 230 billion parameters cost nothing.
One layer of each kind stands for all. Sums that XLA's partitioner adds for dense parts are not seen.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import NamedSharding, PartitionSpec

from gemtool.kernels.dispatch import compiling_for
from gemtool.model.batch import Batch
from gemtool.model.config import PRESETS, ModelConfig, load_preset
from gemtool.model.expert_parallel import ROOM
from gemtool.model.mesh import RULES, partition, require_fit
from gemtool.train.objectives import CHUNK
from gemtool.train.optimizer import make_optimizer
from gemtool.train.placement import state_shardings
from gemtool.train.step import abstract_state, make_train_step
from tests.test_expert_parallel import abstract_mesh

LENGTH = 10240
"""Positions of a sequence: the size of no other axis, nor is a device's share of it, also where the
queries of a key head are one axis with the positions."""

ROWS_TO_EXPERTS = {"cpu": {"all_to_all"}, "tpu": {"all_to_all", "ragged_all_to_all"}}
"""The padded blocks; the counts and the rows."""


def columns(axes: str) -> dict[str, set[str]]:
    """Of tables whose columns are cut along `axes`: they become rows; ids and hidden states are
    gathered, gradients of the latter summed."""
    return {"all_to_all": {axes}, "all_gather": {axes}, "reduce_scatter": {axes}}


# Preset: its mesh; which collectives there are along which axes, those of `ROWS_TO_EXPERTS` aside.
# Sums are gradients of what the devices of these axes share, and the loss of a cut vocabulary, whose
# rows the tensor axis cuts, and for the loss those axes too that cut columns.
CONTRACTS: dict[str, tuple[str, dict[str, set[str]]]] = {
    "nano": (
        "data=2,fsdp=2,expert=2",
        {
            "pmax": {"fsdp expert"},
            "psum": {"data fsdp", "data fsdp expert", "data", "fsdp expert"},
            **columns("fsdp expert"),
        },
    ),
    "mini": (
        "data=2,context=8,tensor=2",
        {"ppermute": {"context"}, "pmax": {"tensor"}, "psum": {"data context", "tensor"}},
    ),
    "flash": (
        "data=2,fsdp=4,context=2,tensor=4",
        {
            "ppermute": {"context"},
            "pmax": {"tensor fsdp", "fsdp"},
            "psum": {"data fsdp context", "data context", "tensor", "tensor fsdp"},
            **columns("fsdp"),
        },
    ),
    "pro": (
        "data=2,fsdp=8,expert=8,context=2,tensor=2",
        {
            "ppermute": {"context"},
            "pmax": {"tensor fsdp expert", "fsdp expert"},
            "psum": {
                *("data fsdp context", "data fsdp expert context", "data context"),
                *("tensor", "tensor fsdp expert"),
            },
            **columns("fsdp expert"),
        },
    ),
}
CASES = [(preset, platform) for preset in CONTRACTS for platform in ROWS_TO_EXPERTS]


@dataclasses.dataclass(frozen=True)
class Program:
    config: ModelConfig
    sizes: dict[str, int]
    """Devices along each axis of the mesh."""
    jaxpr: Jaxpr
    text: str
    """The same, lowered."""


@functools.cache
def program(preset: str, platform: str) -> Program:
    """The step over one sequence a device (of those that the batch is spread over)."""
    config = load_preset(preset)
    kinds = "".join(dict.fromkeys(config.layers))
    config = dataclasses.replace(config, layers=kinds, dense_layers=1)
    mesh, optimizer = abstract_mesh(CONTRACTS[preset][0]), make_optimizer(config)
    sequences = math.prod(mesh.shape[axis] for axis in RULES["batch"])
    require_fit(config, mesh, sequences, LENGTH)
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract_state(config, optimizer),
        state_shardings(config, optimizer, mesh),
    )
    spec = partition(("batch", "length"), (sequences, LENGTH), mesh)
    rows = NamedSharding(mesh, PartitionSpec(None, *spec))
    types = {field.name: jnp.int32 for field in dataclasses.fields(Batch)[:-1]}
    types["weights"] = jnp.float32
    batch = Batch(
        **{
            name: jax.ShapeDtypeStruct((1, sequences, LENGTH), dtype, sharding=rows)
            for name, dtype in types.items()
        }
    )
    with compiling_for(platform), jax.sharding.use_abstract_mesh(mesh):
        step = make_train_step(config, optimizer)
        traced = step.trace(state, batch, jax.ShapeDtypeStruct((), jnp.float32))
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    return Program(config, dict(mesh.shape), traced.jaxpr.jaxpr, text)


def operations(jaxpr: Jaxpr, on_device: bool = False) -> Iterator[tuple[Any, bool]]:
    """All operations, nested ones too, and whether they run per device; kernels are one operation."""
    for operation in jaxpr.eqns:
        yield operation, on_device
        if operation.primitive.name == "pallas_call":
            continue
        inside = on_device or operation.primitive.name == "shard_map"
        for nested in jax.tree.leaves(
            list(operation.params.values()), is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr)
        ):
            if isinstance(nested, ClosedJaxpr | Jaxpr):
                yield from operations(getattr(nested, "jaxpr", nested), inside)


def collectives(program: Program) -> dict[str, set[str]]:
    """Name of a collective -> the axes, of more than one device, along which it is used."""
    found: dict[str, set[str]] = {}
    for operation, _ in operations(program.jaxpr):
        name, params = operation.primitive.name, operation.params
        axes = params.get("axis_name", params.get("axes", ()))
        axes = axes if isinstance(axes, tuple) else (axes,)
        used = " ".join(axis for axis in axes if program.sizes.get(axis, 1) > 1)
        if used and name != "axis_index":
            found.setdefault(name, set()).add(used)
    return found


def test_every_preset_has_a_contract() -> None:
    assert tuple(CONTRACTS) == PRESETS


@pytest.mark.parametrize(("preset", "platform"), CASES)
def test_what_is_sent_along_which_axis(preset: str, platform: str) -> None:
    this = program(preset, platform)
    expected = dict(CONTRACTS[preset][1])
    if this.sizes["expert"] > 1:
        for name in ROWS_TO_EXPERTS[platform]:
            expected[name] = expected.get(name, set()) | {"expert"}
    if "ragged_all_to_all" in expected:
        # Whether rows need a further round is agreed by all.
        everybody = {" ".join(axis for axis, size in this.sizes.items() if size > 1)}
        expected["pmax"] = expected.get("pmax", set()) | everybody
    found = collectives(this)
    assert found == expected
    lowered = {
        "ppermute": "stablehlo.collective_permute",
        "all_to_all": "stablehlo.all_to_all",
        "ragged_all_to_all": "@ragged_all_to_all(",
        "psum": "stablehlo.all_reduce",
        "all_gather": "stablehlo.all_gather",
        "reduce_scatter": "stablehlo.reduce_scatter",
    }
    assert {name for name, spelt in lowered.items() if spelt in this.text} == {*found} & {*lowered}


@pytest.mark.parametrize(("preset", "platform"), CASES)
def test_what_no_device_holds(preset: str, platform: str) -> None:
    """Scores of more than a few positions, a whole table, attention of all to all, the whole
    sequence."""
    this = program(preset, platform)
    config, sizes = this.config, this.sizes
    share = LENGTH // sizes["context"]
    halo = min(config.layer_kinds[0].window - 1, LENGTH - share)
    positions = {LENGTH, share, share + halo}
    for operation, on_device in operations(this.jaxpr):
        rows, width = config.vocab_size, config.d_model
        pieces = sizes["fsdp"] * sizes["expert"]
        if on_device:
            rows, width = rows // sizes["tensor"], width // pieces
        # The loss cuts rows of the table further.
        of_table = {rows, rows // pieces} if on_device else {rows}
        for out in operation.outvars:
            shape = tuple(getattr(out.aval, "shape", ()))
            said = f"{operation.primitive.name} {shape}"
            if of_table & {*shape}:
                scores = config.vocab_size * CHUNK
                assert out.aval.size <= scores or out.aval.size == rows * width, said
            assert sum(size in positions for size in shape) <= 1, said
            if on_device and share < LENGTH:
                assert LENGTH not in shape, said


def test_devices_hold_little_more_than_they_compute() -> None:
    """Of pro on TPUs: no worst case of rows from everybody. The largest array is of an even share of
    rows for the experts and its allowance, or a device's part of a table or of the experts.
    """
    this = program("pro", "tpu")
    config, sizes, moe = this.config, this.sizes, this.config.moe
    assert moe is not None
    table = (
        config.vocab_size // sizes["tensor"] * config.d_model // sizes["fsdp"] // sizes["expert"]
    )
    experts = moe.experts // sizes["expert"] * config.d_model * moe.d_expert // sizes["tensor"]
    pairs = LENGTH // sizes["context"] * moe.top_k
    rows = math.ceil(ROOM * pairs) + moe.experts * 64  # blocks of rows that are not full
    largest = max(
        out.aval.size
        for operation, on_device in operations(this.jaxpr)
        for out in operation.outvars
        if on_device and hasattr(out.aval, "size")
    )
    assert pairs * config.d_model < largest <= max(table, experts, rows * config.d_model)
