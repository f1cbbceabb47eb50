"""Compiling for slices that are not here: what is read off a program, and what is said of it. The TPU
compiler itself is tested where it is installed (test_tpu.py)."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gemtool.aot import hlo
from gemtool.aot.programs import Program, inference_mesh, training_mesh
from gemtool.aot.report import _says, compile_program, table
from gemtool.aot.topology import CHIPS, Topology, parse_topology
from gemtool.errors import GemtoolError, UsageError
from gemtool.kernels.attention.pallas_tpu import PIECE, attention_pallas_tpu
from gemtool.kernels.turns import counted_turns
from gemtool.model.config import load_preset
from gemtool.train.objectives import CHUNK, next_token_loss
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


@pytest.mark.parametrize("turns", [0, 5])
def test_loops_that_data_ends_count_as_their_scope_tells(turns: int) -> None:
    def run(x: jax.Array, n: jax.Array) -> jax.Array:
        with counted_turns(turns):
            return jax.lax.fori_loop(0, n, lambda _, x: jnp.tanh(x @ x), x)

    found = analysed(run, jnp.ones((16, 16)), jnp.int32(7))
    assert (found.unknown_loops, found.flops) == (0, turns * 2 * 16**3)


def test_scoring_counts_as_if_all_positions_were() -> None:
    """Its loop ends with the last position that has a weight."""
    config = load_preset("nano")
    table = jnp.ones((config.vocab_size, config.d_model))
    hidden, weights = jnp.ones((2, 2 * CHUNK, config.d_model)), jnp.ones((2, 2 * CHUNK))
    ids = jnp.zeros(weights.shape, jnp.int32)

    def loss(params: Any, hidden: jax.Array, weights: jax.Array) -> jax.Array:
        return next_token_loss(params, config, hidden, ids, weights)

    params = {"embedding": table, "unembedding": table}
    scores = 2 * 4 * CHUNK * table.size
    for function, products in ((loss, 1), (jax.grad(loss, (0, 1)), 3)):
        found = analysed(function, params, hidden, weights)
        assert (found.unknown_loops, found.flops) == (0, products * scores)


def test_attention_by_pieces_counts_as_of_a_full_buffer() -> None:
    q = jax.ShapeDtypeStruct((1, 16, 2, 64), np.float32)
    k = jax.ShapeDtypeStruct((1, 3 * PIECE + 1, 1, 64), np.float16)  # converted, so copied
    absent = dict.fromkeys(("q_segments", "kv_segments", "sink", "soft_cap"))

    def attend(q: jax.Array, k: jax.Array, start: jax.Array, window: int | None) -> Any:
        at = {"q_start": start, "kv_length": start + 16}
        options = {"scale": 1.0, "causal": True, "window": window}
        return attention_pallas_tpu(q, k, k, **options, **at, **absent)

    for window, pieces in ((None, 4), (64, 2), (PIECE + 1, 3), (3 * PIECE, 4)):
        text = jax.jit(attend, static_argnums=3).lower(q, k, jnp.int32(9), window)
        named = re.findall(r"counted_(\d+)/while", text.as_text(debug_info=True))
        assert set(named) == {str(pieces)}, window


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
    assert (found.kernel_flops, found.silent) == (77, set())
    found = hlo.analyse(text.replace("cost_estimate", "estimate"))
    assert (found.flops, found.kernels, found.silent) == (0, {"gmm": 1}, {"gmm"})


@pytest.mark.parametrize("both", [False, True])
def test_a_slice_that_is_written_counts_as_a_slice(both: bool) -> None:
    """Not as the buffer that it is a slice of, also where a fusion writes into several."""
    array = "f32[1000,8]{1,0}"
    result = f"({array}, {array})" if both else array
    text = f"""HloModule m

fused (a: f32[1000,8], b: f32[1000,8], x: f32[1,8], i: s32[]) -> {result} {{
  %a = {array} parameter(0)
  %b = {array} parameter(1)
  %x = f32[1,8]{{1,0}} parameter(2)
  %i = s32[] parameter(3)
  %zero = s32[] constant(0)
  %u = {array} dynamic-update-slice(%a, %x, %i, %zero)
  {"" if both else "ROOT "}%renamed = {array} bitcast(%u)
  %w = {array} dynamic-update-slice(%b, %x, %i, %zero)
  {"ROOT " if both else ""}%t = ({array}, {array}) tuple(%renamed, %w)
}}

ENTRY main (a: f32[1000,8], b: f32[1000,8], x: f32[1,8], i: s32[]) -> {result} {{
  %a = {array} parameter(0)
  %b = {array} parameter(1)
  %x = f32[1,8]{{1,0}} parameter(2)
  %i = s32[] parameter(3)
  ROOT %f = {result} fusion(%a, %b, %x, %i), kind=kLoop, calls=fused
}}
"""
    whole = 4 * 1000 * 8
    slices = 2 * 32 * (2 if both else 1)
    # Of a fusion that gives one result, whatever else it names counts as read.
    assert hlo.analyse(text).bytes == slices + 32 + 4 + (0 if both else whole)


def test_a_slice_that_a_fusion_within_reads_counts_as_a_slice() -> None:
    text = """HloModule m

inner (p: f32[1000,8], i: s32[]) -> f32[1,8] {
  %p = f32[1000,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %s = f32[1,8]{1,0} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,8}
}

outer (q: f32[1000,8], j: s32[]) -> f32[1,8] {
  %q = f32[1000,8]{1,0} parameter(0)
  %j = s32[] parameter(1)
  %f = f32[1,8]{1,0} fusion(%q, %j), kind=kLoop, calls=inner
  ROOT %n = f32[1,8]{1,0} negate(%f)
}

ENTRY main (a: f32[1000,8], k: s32[]) -> f32[1,8] {
  %a = f32[1000,8]{1,0} parameter(0)
  %k = s32[] parameter(1)
  ROOT %c = f32[1,8]{1,0} fusion(%a, %k), kind=kOutput, calls=outer
}
"""
    assert hlo.analyse(text).bytes == 32 + 32 + 4


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
    "flops": 2e14, "kernel_flops": 5e13, "needed_flops": 1e14, "bytes": 2**30, "kernels": {"gmm": 3},
    "silent_kernels": [], "unknown_loops": 0,
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
        "at most 1,23",
        "2e+14",
        "5e+13",
        "1e+14",
        said,
    ):
        assert part in shown


def test_what_is_not_counted_is_said() -> None:
    said = _says({**FITS, "unknown_loops": 2, "silent_kernels": ["gmm"]}, 95 * 2**30)
    assert said.endswith(
        " That is a lower bound: 2 loops whose length depends on data count once. Operations of gmm "
        "are not known."
    )
    once = {**FITS, "unknown_loops": 1}
    assert "1 loop whose length depends on data counts once." in _says(once, 95 * 2**30)
    shown = table({**once, "says": said}).splitlines()
    assert any(line.split() == ["loops", "counted", "once", "1"] for line in shown)
    assert "counted once" not in table({**FITS, "says": ""})


def test_a_program_that_is_too_large_also_has_times() -> None:
    said = _says({**FITS, "fits": False}, 20 * 2**30)
    assert said.startswith("It does not fit: it takes 30.0 of 20.0 GiB of memory a chip. Take more")
    assert said.endswith(
        " At best a step would take 500 ms, which arithmetic dominates (reading and writing memory "
        "20 ms, sending 3 us)."
    )


FOUR_CHIPS = Topology("v5e:2x2", CHIPS["v5e"], tuple(range(4)))


def test_operations_are_those_of_the_program() -> None:
    """Also where these are fewer than what is needed, which then takes the time."""
    x = jnp.ones((16, 16))
    lowered = jax.jit(lambda x: x @ x).lower(x)
    for needed in (4e3, 4e12):
        row = compile_program(Program("train step", lowered, 1, needed), FOUR_CHIPS)
        assert (row["flops"], row["kernel_flops"]) == (2 * 16**3, 0)
        assert row["needed_flops"] == needed / 4
        assert row["seconds"]["compute"] == max(2 * 16**3, needed / 4) / 197e12
        assert row["fits"]


class Refused:
    """A lowered program that the compiler refuses."""

    def __init__(self, message: str) -> None:
        self.message = message

    def compile(self) -> Any:
        raise jax.errors.JaxRuntimeError(self.message)


def refused(message: str) -> dict[str, Any]:
    return compile_program(Program("train step", Refused(message), 1024, 4 * 197e10), FOUR_CHIPS)


@pytest.mark.parametrize(
    ("message", "total"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (36.58G) exceeds available HBM (15.75G).\nmore vmem",
            "36.6 of",
        ),
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom:\nXLA:TPU compile permanent error. Ran out "
            "of memory in memory space hbm. Used 35.83G of 15.75G hbm. Exceeded hbm capacity by "
            "20.08G.\n\nProgram hbm requirement 35G:\n    scoped   4.56M",
            "35.8 of",
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm", "more than"),
    ],
    ids=["temporaries", "used", "vague"],
)
def test_a_program_that_the_compiler_refuses(message: str, total: str) -> None:
    row = refused(message)
    assert row["fits"] is False
    assert row["hbm"]["capacity"] == int(15.75 * 2**30)
    within = f"It does not fit: it takes {total} 15.8 GiB of memory a chip. Take more chips"
    assert row["says"].startswith(within)
    # No figures of the program are known, but what it has to compute.
    assert row["needed_flops"] == 197e10
    assert row["seconds"] == {"compute": 0.01}
    assert row["says"].endswith(" The arithmetic that a step needs takes 10 ms at least.")
    assert "Ran out of memory" in row["reason"]
    assert "\n" not in row["reason"]
    assert "1.97e+12" in table({**row, "model": "nano", "mesh": "data=4"})


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (
            "RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom:\nRan out of memory in memory space "
            "vmem while allocating on stack for %gmm.1 = f32[16384,512]{1,0} custom-call(%hbm), "
            'custom_call_target="tpu_custom_call". Scoped allocation with size 18.00M and limit 16.00M '
            "exceeded scoped vmem limit by 2.00M. It should not be possible to run out of scoped "
            "vmem - \nSee https://openxla.org/xla/errors/error_1001 for more details.",
            "for memory of a core (vmem), not for that of a chip: Ran out of memory in memory space "
            "vmem while allocating on stack for %gmm.1; Scoped allocation with size 18.00M and limit "
            "16.00M exceeded scoped vmem limit by 2.00M; if it is one of our kernels, "
            "--kernels xla does without",
        ),
        (
            "RESOURCE_EXHAUSTED: Allocation (size=268435456) would exceed memory (size=134217728) :: "
            "#allocation2 [shape = 'f32[8192,8192]{1,0:T(8,128)}', space=vmem, size = 0x10000000, "
            "scoped, tag = 'scratch operand'] :: gmm.1",
            "for memory of a core (vmem), not for that of a chip: Allocation (size=268435456) would "
            "exceed memory (size=134217728) :: gmm.1; if it is",
        ),
        (
            "INTERNAL: Scoped allocation with size 18.00M and limit 16.00M exceeded scoped vmem limit",
            "(vmem), not for that of a chip: Scoped allocation with size 18.00M and limit 16.00M "
            "exceeded scoped vmem limit; if it is one",
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
            "vmem. Used 256.00M of 128.00M vmem. Exceeded vmem capacity by 128.00M.",
            "for memory of a core (vmem), not for that of a chip: XLA:TPU compile permanent error.",
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
            "smem. Used 1.01M of 1.00M smem. Exceeded smem capacity by 1.7K.",
            "for memory of a core (smem), not for that of a chip: XLA:TPU compile permanent error.",
        ),
        ("RESOURCE_EXHAUSTED: too many threads", "for v5e:2x2: too many threads"),
        ("RESOURCE_EXHAUSTED: ", "for v5e:2x2: it does not say why"),
    ],
    ids=["stack", "scratch", "scoped", "used", "scalars", "threads", "silent"],
)
def test_a_refusal_for_something_else_is_an_error(message: str, said: str) -> None:
    """Nor is it told to take more chips."""
    with pytest.raises(GemtoolError) as problem:
        refused(message)
    told = str(problem.value)
    assert told.startswith("the TPU compiler refuses the train step for v5e:2x2")
    assert said in told
    assert "\n" not in told
    assert "chips" not in told


def test_another_failure_of_the_compiler_is_none_of_these() -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match="a mistake"):
        refused("INTERNAL: a mistake")


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
