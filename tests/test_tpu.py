"""The presets, compiled by the real TPU compiler: `make test-tpu`. Nothing here runs on a TPU.

Programs are those of the command, with the kernels that TPUs get. A compilation takes minutes, so most
are slow.
"""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import numpy as np
import pytest

from gemtool.errors import GemtoolError
from tests.conftest import Command

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs gemtool[tpu]"),
    pytest.mark.timeout(3600),
]

# A slice of each generation that holds the model in training, and positions of a sequence.
SLICES = {
    ("nano", "1k"): ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"),
    ("mini", "4k"): ("v4:2x2x1", "v5e:2x4", "v5p:2x2x1", "v6e:2x2"),
    ("flash", "4k"): ("v4:2x2x2", "v5e:4x4", "v5p:2x2x1", "v6e:2x4"),
}
EXPERTS = {"nano", "mini"}
INFERENCE = [("nano", "v5e:2x2"), ("mini", "v4:2x2x1"), ("flash", "v6e:2x4")]


def compiled(gemtool: Command, verb: str, model: str, topology: str, *more: str) -> dict[str, Any]:
    wanted = ("--model", model, "--topology", topology, *more)
    done = gemtool(verb, "--compile-only", *wanted, timeout=3600)
    return json.loads(done.stdout)


def marks(model: str, topology: str) -> list[pytest.MarkDecorator]:
    return [] if model == "nano" and topology.startswith("v5e") else [pytest.mark.slow]


@pytest.mark.parametrize(
    ("model", "length", "topology"),
    [
        pytest.param(model, length, topology, marks=marks(model, topology))
        for (model, length), slices in SLICES.items()
        for topology in slices
    ],
)
def test_training_fits(gemtool: Command, model: str, length: str, topology: str) -> None:
    experts = {"gmm", "tgmm"} if model in EXPERTS else set()
    row = compiled(gemtool, "train", model, topology, "--length", length)
    require_training_fits(row, kernels=experts)


def require_training_fits(row: dict[str, Any], kernels: set[str]) -> None:
    """It fits, with kernels for attention and these, and what it takes was all found."""
    assert row["fits"], row["says"]
    assert row["says"].startswith("It fits: it takes ")
    assert row["hbm"]["total"] <= row["hbm"]["capacity"]
    attention = {"forward_attention", "d_queries_attention", "d_keys_attention"}
    assert row["kernels"].keys() >= attention | kernels
    # What is found in the program. A layer computes again what its backward pass needs.
    assert row["needed_flops"] < row["flops"] < 3 * row["needed_flops"]
    assert 0 < row["kernel_flops"] < row["flops"]
    assert row["silent_kernels"] == []
    assert row["unknown_loops"] == 0
    assert row["seconds"]["step"] == max(
        row["seconds"][part] for part in ("compute", "memory", "links")
    )
    assert row["collectives"]
    # Rows to experts; columns of a cut embedding to rows.
    if "all-to-all" in row["collectives"]:
        assert "expert=" in row["mesh"] or "fsdp=" in row["mesh"]


@pytest.mark.slow
def test_experts_are_counted_as_chosen_evenly(gemtool: Command) -> None:
    """Further rounds of rows between devices come where they are not: a loop that data ends."""
    row = compiled(
        gemtool, "train", "nano", "v5e:2x2", "--length", "1k", "--mesh", "data=2,expert=2"
    )
    assert row["unknown_loops"] == 0
    assert row["kernels"]["gmm"] == 27  # three layers of three matrices: forward, again, back
    assert row["needed_flops"] < row["flops"] < 3 * row["needed_flops"]


@pytest.mark.parametrize("verb", ["prefill", "decode"])
@pytest.mark.parametrize(
    ("model", "topology"),
    [pytest.param(*wanted, marks=marks(*wanted)) for wanted in INFERENCE],
)
def test_inference_fits(gemtool: Command, verb: str, model: str, topology: str) -> None:
    experts = {"gmm"} if model in EXPERTS else set()
    row = compiled(gemtool, verb, model, topology, "--length", "1M")
    require_inference_fits(row, kernels=experts)
    require_little_is_sent(row)


def require_inference_fits(row: dict[str, Any], kernels: set[str]) -> None:
    assert row["fits"], row["says"]
    assert row["kernels"].keys() >= {"forward_attention"} | kernels
    assert row["unknown_loops"] == 0


def require_little_is_sent(row: dict[str, Any]) -> None:
    """Keys and values of a million positions are never sent: a step's own rows are."""
    sent = sum(total["bytes"] for total in row["collectives"].values())
    assert sent < row["hbm"]["arguments"]


def test_compiling_again_says_the_same(gemtool: Command) -> None:
    """Programs for chips that are not here cannot be read from the cache of programs."""
    first, again = (
        gemtool("decode", "--compile-only", "--topology", "v5e:2x2", "--length", "8k")
        for _ in range(2)
    )
    assert b"arning" not in again.stderr
    assert len(again.stderr.splitlines()) == 2
    rows = [json.loads(done.stdout) for done in (first, again)]
    for row in rows:
        del row["compile_seconds"]
    assert rows[0] == rows[1]


def test_what_does_not_fit_is_said(gemtool: Command) -> None:
    row = compiled(gemtool, "train", "flash", "v5e:2x2", "--length", "2k")
    assert row["fits"] is False
    assert row["hbm"]["total"] is None or row["hbm"]["total"] > row["hbm"]["capacity"]
    assert row["says"].startswith("It does not fit: it takes ")
    assert "fsdp" in row["says"]
    assert row["needed_flops"] > 0
    assert "at least" in row["says"] or "At best" in row["says"]


def test_meshes_that_do_not_fit_are_refused(gemtool: Command) -> None:
    for mesh, message in (
        ("data=8", "takes 8 devices; there are 4"),
        ("tensor=4", "tensor = 4 does not divide 2 heads"),
    ):
        done = gemtool(
            *("train", "--compile-only", "--topology", "v5e:2x2", "--mesh", mesh), check=False
        )
        assert done.returncode == 2
        assert message in done.stderr.decode()


@pytest.mark.parametrize("text", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_a_chip_is_one_device(text: str) -> None:
    from gemtool.aot.topology import open_topology, prepare_process

    prepare_process()
    assert len(open_topology(text).devices) == 4


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((2048, 4096), "Scoped allocation with size 64.00M"),
        ((8192, 4096), "Used 256.00M of 128.00M vmem"),
        ((8192, 8192), "would exceed memory"),
    ],
)
def test_kernels_that_need_too_much_of_a_core(shape: tuple[int, int], words: str) -> None:
    """They are refused in the words that gemtool knows; so much fits the memory of a chip."""
    import jax
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    from gemtool.aot.programs import Program
    from gemtool.aot.report import compile_program
    from gemtool.aot.topology import open_topology, prepare_process

    def double(x_ref: Any, out_ref: Any, scratch: Any) -> None:
        scratch[...] = x_ref[...]
        out_ref[...] = scratch[...] + x_ref[...]

    prepare_process()
    topology = open_topology("v5e:2x2")
    where = jax.sharding.SingleDeviceSharding(topology.devices[0])
    x = jax.ShapeDtypeStruct(shape, np.float32, sharding=where)
    call = pl.pallas_call(
        double,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype)],
        name="double",
    )
    with pytest.raises(GemtoolError) as problem:
        compile_program(Program("train step", jax.jit(call).lower(x), 1, 1.0), topology)
    assert words in str(problem.value)
    assert "memory of a core (vmem)" in str(problem.value)


def test_slices_that_do_not_exist(gemtool: Command) -> None:
    done = gemtool("train", "--compile-only", "--topology", "v5e:3x5", check=False)
    assert done.returncode == 2
    assert b"knows no such slice" in done.stderr
