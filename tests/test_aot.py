"""Compiling for slices that are not here: what is read off a program, and what is said of it. The TPU
compiler itself is tested where it is installed (test_tpu.py)."""

from __future__ import annotations

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gemtool.aot import hlo
from gemtool.aot.programs import inference_mesh, training_mesh
from gemtool.aot.report import _refused, _says, table
from gemtool.aot.topology import CHIPS, Topology, parse_topology
from gemtool.errors import UsageError
from gemtool.model.config import load_preset
from tests.conftest import Command


def analysed(function: Any, *arguments: Any, **options: Any) -> hlo.Analysis:
    return hlo.analyse(jax.jit(function, **options).lower(*arguments).compile().as_text())


def test_loops_count_as_often_as_they_turn() -> None:
    """XLA's own analysis counts the body once."""

    def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(x @ w), None

    def inner(x: jax.Array, ws: jax.Array) -> tuple[jax.Array, None]:
        return jax.lax.scan(layer, x, ws)

    x, ws = jnp.ones((16, 32)), jnp.ones((3, 5, 32, 32))
    found = analysed(lambda x, ws: jax.lax.scan(inner, x, ws)[0], x, ws)
    assert found.flops == 3 * 5 * 2 * 16 * 32 * 32
    assert found.unknown_loops == 0
    # A turn copies its own weights and multiplies by them; it does not read all of them.
    weights = 3 * 5 * 32 * 32 * 4
    assert 3 * weights < found.bytes < 8 * weights


def test_loops_of_unknown_length_count_once_and_are_told() -> None:
    def turn(_: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ x)

    found = analysed(
        lambda x, n: jax.lax.fori_loop(0, n, turn, x), jnp.ones((16, 16)), jnp.int32(7)
    )
    assert found.unknown_loops == 1
    assert found.flops == 2 * 16**3


def test_of_branches_the_longest_counts() -> None:
    def choose(x: jax.Array, first: jax.Array) -> jax.Array:
        return jax.lax.cond(first, lambda x: x @ x @ x, lambda x: x + 1, x)

    assert analysed(choose, jnp.ones((16, 16)), jnp.bool_(True)).flops == 2 * 2 * 16**3


def test_batched_products() -> None:
    a, b = jnp.ones((4, 8, 16)), jnp.ones((4, 16, 32))
    found = analysed(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), a, b)
    assert found.flops == 2 * 4 * 8 * 16 * 32


@pytest.mark.parametrize(
    ("window", "labels", "shapes", "flops"),
    [
        # A batched product as the TPU compiler writes it: one kernel position of each meets a value.
        (
            "window={size=4 stride=3 lhs_dilate=4}, ", "0bf_0oi->0bf",
            ("4,128,32", "4,128,32", "4,128,128"), 2 * 4 * 128 * 32 * 128,
        ),
        (
            "window={size=4 pad=3_3 rhs_reversal=1}, ", "bf0_i0o->b0f",
            ("1024,128,1", "128,4,32", "1024,4,32"), 2 * 1024 * 128 * 4 * 32,
        ),
        ("", "bf_io->bf", ("64,32", "32,16", "64,16"), 2 * 64 * 32 * 16),
        # A convolution over time that looks beyond both ends.
        (
            "window={size=3 pad=1_1}, ", "b0f_0io->b0f",
            ("1,10,8", "3,8,16", "1,10,16"), 2 * 8 * 16 * (3 * 10 - 2),
        ),
    ],
    ids=["batched", "heads", "plain", "time"],
)  # fmt: skip
def test_products_written_as_convolutions(
    window: str, labels: str, shapes: tuple[str, ...], flops: int
) -> None:
    a, b, c = (f"bf16[{shape}]{{2,1,0:T(8,128)(2,1)S(1)}}" for shape in shapes)
    text = f"""HloModule m

ENTRY %main (a: x) -> y {{
  %a = {a} parameter(0)
  %b = {b} parameter(1)
  ROOT %c = {c} convolution(%a, %b), {window}dim_labels={labels}
}}
"""
    found = hlo.analyse(text)
    assert found.flops == flops
    assert found.bytes == 0  # all of it in the memory of the chip's core


def test_kernels_count_as_what_they_say() -> None:
    text = """HloModule m

ENTRY %main (a: x) -> y {
  %a = bf16[1024,1024]{1,0} parameter(0)
  ROOT %gmm.5 = bf16[64,64]{1,0} custom-call(%a), custom_call_target="tpu_custom_call", \
backend_config={"custom_call_config":{"body":"x","cost_estimate":{"flops":"77","transcendentals":"0",\
"bytes_accessed":"500"}}}
}
"""
    found = hlo.analyse(text)
    assert (found.flops, found.bytes, found.kernels) == (77, 500, {"gmm": 1})


def test_kernels_count_alike_with_what_is_fused_into_them() -> None:
    text = """HloModule m

%bits (p: x) -> y {
  %p = f16[1048576,128]{1,0} parameter(0)
  ROOT %b = s16[1048576,128]{1,0} bitcast-convert(%p)
}

%fused (q: x) -> y {
  %q = f16[1048576,128]{1,0} parameter(0)
  %f = s16[1048576,128]{1,0} fusion(%q), kind=kLoop, calls=%bits
  ROOT %block_attention.5 = f32[64,64]{1,0} custom-call(%f), custom_call_target="tpu_custom_call", \
backend_config={"custom_call_config": {"body": "x", "cost_estimate": {
"bytes_accessed":500,
"flops":77,
"transcendentals":0
}, "serialization_format": 1, "allow_input_fusion": [true]}}
}

ENTRY %main (a: x) -> y {
  %a = f16[1048576,128]{1,0} parameter(0)
  ROOT %c = f32[64,64]{1,0} fusion(%a), kind=kCustom, calls=%fused
}
"""
    found = hlo.analyse(text)
    assert (found.flops, found.bytes, found.kernels) == (77, 500, {"block_attention": 1})


SHAPE = (8, 64)


@pytest.mark.parametrize(
    ("kind", "function", "size"),
    [
        ("all-reduce", lambda x: jax.lax.psum(x, "a"), 2 * 64 * 4 * 3 / 4),
        ("all-gather", lambda x: jax.lax.all_gather(x, "a"), 4 * 64 * 4 * 3 / 4),
        (
            "reduce-scatter",
            lambda x: jax.lax.psum_scatter(x, "a", scatter_dimension=1, tiled=True),
            16 * 4 * 3,
        ),
        ("collective-permute", lambda x: jax.lax.ppermute(x, "a", [(0, 1), (1, 0)]), 64 * 4),
        (
            "all-to-all",
            lambda x: jax.lax.all_to_all(x.reshape(4, 16), "a", 0, 0, tiled=True),
            64 * 4 * 3 / 4,
        ),
    ],
)
def test_collectives(kind: str, function: Any, size: float) -> None:
    """Of 64 float32 on each of four devices in a row of two."""
    mesh = jax.make_mesh((2, 4), ("b", "a"), axis_types=(AxisType.Auto,) * 2)
    spread = NamedSharding(mesh, P(("b", "a")))
    x = jax.device_put(np.ones(SHAPE, np.float32), spread)
    with jax.set_mesh(mesh):
        run = jax.shard_map(
            function, in_specs=P(("b", "a")), out_specs=P(("b", "a")), check_vma=False
        )
        found = analysed(run, x)
    assert found.collectives == {kind: hlo.Collective(1, size)}


def test_a_fused_reduce_scatter_is_one() -> None:
    text = """HloModule m

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%all-reduce-scatter.3 (input: f32[8,16]) -> f32[2,16] {
  %input = f32[8,16]{1,0} parameter(0)
  %all-reduce.1 = f32[8,16]{1,0} all-reduce(%input), replica_groups={{0,1,2,3}}, to_apply=%sum
  %zero = s32[] constant(0)
  ROOT %slice = f32[2,16]{1,0} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={2,16}
}

ENTRY %main (a: f32[8,16]) -> f32[2,16] {
  %a = f32[8,16]{1,0} parameter(0)
  ROOT %fusion = f32[2,16]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.3
}
"""
    found = hlo.analyse(text)
    assert found.collectives == {"reduce-scatter": hlo.Collective(1, 8 * 16 * 4 * 3 / 4)}


def test_groups_are_read_in_all_spellings() -> None:
    assert hlo._group_size("replica_groups={{0,1},{2,3}}, x") == 2
    assert hlo._group_size("replica_groups=[2,4]<=[8], x") == 4
    assert hlo._group_size("replica_groups=mesh['a'=2,'b'=4,'c'=3] {'a','c'}, x") == 6


# --- slices and meshes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("v5q:2x2", "no chip 'v5q'; did you mean"),
        ("v5p", "give the slice a shape, as in v5p:4x4x4"),
        ("v5p:4x", "give the slice a shape"),
        ("v5e:2x2x2", "slices of v5e have 2 dimensions, not 3"),
    ],
)
def test_mistyped_slices(text: str, what: str) -> None:
    with pytest.raises(UsageError) as problem:
        parse_topology(text)
    assert what in str(problem.value)


def test_meshes_that_suit() -> None:
    def slice_of(chip: str, chips: int) -> Topology:
        return Topology("x", CHIPS[chip], tuple(range(chips)))

    assert training_mesh(load_preset("nano"), slice_of("v5e", 4)) == {"data": 4}
    assert training_mesh(load_preset("flash"), slice_of("v5p", 8)) == {"fsdp": 8, "expert": 1}
    assert training_mesh(load_preset("pro"), slice_of("v5p", 64)) == {"fsdp": 8, "expert": 8}
    of_pro = {"tensor": 8, "expert": 8, "context": 1}
    assert inference_mesh(load_preset("pro"), slice_of("v5p", 64)) == of_pro
    of_nano = {"tensor": 2, "expert": 2, "context": 1}
    assert inference_mesh(load_preset("nano"), slice_of("v5e", 4)) == of_nano


# --- what is said ---------------------------------------------------------------------------------

FITS = {
    "program": "train step", "model": "flash", "mesh": "fsdp=4", "topology": "v5p:2x2x1", "fits": True,
    "hbm": {
        "arguments": 20 * 2**30, "outputs": 0, "temporaries": 10 * 2**30, "program": 0,
        "total": 30 * 2**30, "capacity": 95 * 2**30,
    },
    "flops": 2e14, "needed_flops": 1e14, "bytes": 2**30, "kernels": {"gmm": 3},
    "collectives": {"all-gather": {"count": 5, "bytes": 2**20}}, "tokens_per_s": 1234.5,
    "seconds": {"compute": 0.5, "memory": 0.02, "links": 3e-6, "step": 0.5}, "dominates": "compute",
}  # fmt: skip


def test_a_program_that_fits() -> None:
    said = _says(FITS, 95 * 2**30)
    assert said == (
        "It fits: it takes 30.0 of 95.0 GiB of memory a chip. At best a step takes 500 ms, which "
        "arithmetic dominates (reading and writing memory 20 ms, sending 3 us)."
    )
    shown = table({**FITS, "says": said})
    for part in (
        "train step of flash",
        "fsdp=4",
        "20.00 GiB",
        "5, 1.0 MiB sent",
        "gmm",
        "1,23",
        said,
    ):
        assert part in shown


def test_a_program_that_the_compiler_refuses() -> None:
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
        "(36.58G) exceeds available HBM (15.75G).\nmore"
    )
    topology = Topology("v5e:2x2", CHIPS["v5e"], ())
    row = _refused(message, topology, 1.0)
    assert row["fits"] is False
    assert row["hbm"]["total"] == int(36.58 * 2**30)
    assert row["says"].startswith("It does not fit: it takes 36.6 of 15.8 GiB of memory a chip.")
    assert "Ran out of memory" in row["reason"]
    assert "\n" not in row["reason"]
    vague = _refused("RESOURCE_EXHAUSTED: no", topology, 1.0)
    assert "takes more than 15.8 GiB" in vague["says"]


def test_through_the_command(gemtool: Command) -> None:
    for arguments, message in (
        (("train", "--topology", "v5e:2x2"), "--topology goes with --compile-only"),
        (("prefill", "--length", "1k", "--ckpt", "x"), "--length goes with --compile-only"),
        (("decode", "--model", "nano", "--ckpt", "x"), "--model goes with --compile-only"),
        (("train", "--ckpt", "x"), "Missing option '--data'"),
        (("train", "--data", "x"), "Missing option '--ckpt'"),
        (("prefill",), "Missing option '--ckpt'"),
        (("decode", "--prompt", "x"), "Missing option '--ckpt'"),
        (("train", "--compile-only"), "name the slice with --topology"),
        (("train", "--compile-only", "--topology", "v5e:2"), "2 dimensions"),
        (("prefill", "--compile-only", "--topology", "v5e:2x2", "--length", "1x"), "no length"),
    ):
        done = gemtool(*arguments, check=False)
        assert done.returncode == 2, arguments
        assert message in done.stderr.decode(), done.stderr
        assert done.stderr.count(b"\n") <= 2


def test_the_compiler_may_be_absent(gemtool: Command) -> None:
    if importlib.util.find_spec("libtpu") is not None:
        pytest.skip("the TPU compiler is installed")
    done = gemtool("train", "--compile-only", "--topology", "v5e:2x2", check=False)
    assert done.returncode == 1
    assert b"pip install 'gemtool[tpu]'" in done.stderr
    assert done.stdout == b""
