"""The kernels for TPUs, by the real compiler: shapes of the presets, on four generations of chips.

Results are those of the suite in test_kernels.py, where the kernels are interpreted; here they must
compile within the memory of each chip. No TPU is needed, only its compiler (`pip install jax[tpu]`).
"""

from __future__ import annotations

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemtool.aot.topology import open_topology, prepare_process
from gemtool.kernels import expert_mlp
from gemtool.kernels.attention import partial_attention
from gemtool.kernels.blocks import choose_blocks, partial_block_attention
from gemtool.kernels.dispatch import compiling_for

if importlib.util.find_spec("libtpu") is None:
    pytest.skip("the TPU compiler is not installed", allow_module_level=True)

CHIPS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
MILLION = 2**20
BFLOAT16, FLOAT16, FLOAT32 = jnp.bfloat16, jnp.float16, jnp.float32


@pytest.fixture(scope="module", params=CHIPS)
def device(request: pytest.FixtureRequest) -> Any:
    """One chip of a generation."""
    prepare_process()
    return open_topology(CHIPS[request.param]).devices[0]


def compiled(
    device: Any,
    function: Any,
    arguments: Any,
    with_kernels: bool = True,
    donate: tuple[int, ...] = (),
) -> Any:
    """The program for one chip; it holds kernels written in Pallas, or does not."""
    sharding = NamedSharding(Mesh(np.array([device]), ("x",)), PartitionSpec())
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments
    )
    with compiling_for("tpu"):
        program = jax.jit(function, donate_argnums=donate).lower(*placed).compile()
    assert ("tpu_custom_call" in program.as_text()) == with_kernels
    return program


def shape(*sides: int, dtype: Any = FLOAT32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sides, dtype)


def squares(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(x.astype(FLOAT32)))


# name: (B, T, S, H, KV, D), type, options. A share of a layer is what tensor parallelism leaves of it.
TRAINING: dict[str, tuple[tuple[int, ...], Any, dict[str, Any]]] = {
    "nano L": ((2, 1024, 1024, 4, 4, 32), FLOAT32, {"window": 64}),
    "mini G": ((1, 2048, 2048, 8, 2, 64), BFLOAT16, {"sink": True}),
    "share of flash L, halo": ((1, 2048, 3071, 8, 2, 128), BFLOAT16, {"window": 1024, "at": 1023}),
    "share of pro G": ((1, 4096, 4096, 16, 1, 128), BFLOAT16, {"sink": True}),
    "share of pro G, ring": ((1, 2048, 2048, 16, 1, 128), BFLOAT16, {"causal": False}),
    "pro L, float32, soft cap": (
        (1, 4096, 4096, 64, 8, 128),
        FLOAT32,
        {"window": 2048, "soft_cap": 30.0},
    ),
}


@pytest.mark.parametrize("name", TRAINING)
def test_attention_in_training(device: Any, name: str) -> None:
    (B, T, S, H, KV, D), dtype, options = TRAINING[name]
    options = dict(options)
    with_sink, start = options.pop("sink", False), options.pop("at", 0)
    arrays = {
        "q": shape(B, T, H, D, dtype=dtype),
        "k": shape(B, S, KV, D, dtype=dtype),
        "v": shape(B, S, KV, D, dtype=dtype),
    }
    if with_sink:
        arrays["sink"] = shape(H)
    segments = {
        "q_segments": shape(B, T, dtype=jnp.int32),
        "kv_segments": shape(B, S, dtype=jnp.int32),
    }

    def loss(arrays: dict[str, Any], segments: dict[str, Any]) -> jax.Array:
        out, lse = partial_attention(**arrays, **segments, q_start=start, **options)
        return squares(out) + squares(lse)

    compiled(device, jax.grad(loss), (arrays, segments))


# name: (T, H, KV, D), type of queries, of the buffer, how many MiB the program may need beside it.
# Only what has to be moved or converted is copied, and that piece by piece.
BUFFER: dict[str, tuple[tuple[int, ...], Any, Any, int]] = {
    "nano G decodes": ((1, 2, 1, 64), BFLOAT16, BFLOAT16, 1),
    "nano G decodes from float16": ((1, 2, 1, 64), FLOAT32, FLOAT16, 100),
    "flash G decodes": ((1, 32, 2, 128), BFLOAT16, BFLOAT16, 1),
    "pro G decodes": ((1, 64, 4, 128), BFLOAT16, BFLOAT16, 1),
    "pro G decodes in float32": ((1, 64, 4, 128), FLOAT32, FLOAT32, 1),
    "pro G decodes from float16": ((1, 64, 4, 128), BFLOAT16, FLOAT16, 200),
    "share of pro G prefills": ((512, 16, 1, 128), BFLOAT16, BFLOAT16, 20),
    "pro G prefills": ((512, 64, 4, 128), BFLOAT16, BFLOAT16, 300),
}


@pytest.mark.parametrize("name", BUFFER)
def test_attention_over_a_million_keys(device: Any, name: str) -> None:
    (T, H, KV, D), dtype, buffer_dtype, most = BUFFER[name]
    buffer = shape(1, MILLION, KV, D, dtype=buffer_dtype)
    place = shape(dtype=jnp.int32)
    arguments = (shape(1, T, H, D, dtype=dtype), buffer, buffer, shape(H), place)

    def step(q: Any, k: Any, v: Any, sink: Any, at: Any) -> Any:
        return partial_attention(q, k, v, sink=sink, q_start=at, kv_length=at + T)

    program = compiled(device, step, arguments)
    assert program.memory_analysis().temp_size_in_bytes < most * 2**20


# name: (T, C, H, KV, D), keys of a block, type of queries, of the buffer.
BLOCKS: dict[str, tuple[tuple[int, ...], int, Any, Any]] = {
    "nano G decodes": ((1, 21, 2, 1, 64), 64, FLOAT32, FLOAT32),
    "nano G prefills": ((512, 21, 2, 1, 64), 64, FLOAT32, BFLOAT16),
    "mini G prefills, more than is prefetched": ((2048, 21, 8, 2, 64), 128, BFLOAT16, BFLOAT16),
    "nano G decodes from float16": ((1, 21, 2, 1, 64), 64, FLOAT32, FLOAT16),
    "mini G prefills from float16": ((2048, 21, 8, 2, 64), 128, BFLOAT16, FLOAT16),
    "pro G decodes": ((1, 69, 64, 4, 128), 64, BFLOAT16, BFLOAT16),
    "pro G decodes from float16": ((1, 69, 64, 4, 128), 64, BFLOAT16, FLOAT16),
    "share of pro G decodes from float16": ((1, 69, 16, 1, 128), 64, BFLOAT16, FLOAT16),
    "share of pro G prefills": ((512, 69, 16, 1, 128), 64, BFLOAT16, BFLOAT16),
    "pro G prefills from float16": ((512, 69, 64, 4, 128), 64, BFLOAT16, FLOAT16),
    "pro G in float32, small blocks": ((512, 69, 64, 4, 128), 16, FLOAT32, FLOAT32),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_attention_to_blocks_of_a_million_keys(device: Any, name: str) -> None:
    """Nothing of the size of a buffer is made."""
    (T, C, H, KV, D), block, dtype, buffer_dtype = BLOCKS[name]
    buffer = shape(1, MILLION, KV, D, dtype=buffer_dtype)
    place = shape(dtype=jnp.int32)
    named = shape(1, T, C, dtype=jnp.int32)
    arguments = (shape(1, T, H, D, dtype=dtype), buffer, buffer, named, shape(H), place)

    def step(q: Any, k: Any, v: Any, named: Any, sink: Any, at: Any) -> Any:
        options = {"block": block, "q_start": at, "kv_length": at + T, "soft_cap": 30.0}
        return partial_block_attention(
            q, k, v, named, sink=sink, starts=named * block, impl="pallas_tpu", **options
        )

    program = compiled(device, step, arguments)
    assert program.memory_analysis().temp_size_in_bytes < 100 * 2**20


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_blocks_of_a_buffer_that_is_written_to(device: Any, dim: int, kv_heads: int) -> None:
    """In a loop, as in decoding: float16 is neither copied nor converted but by the kernel."""
    buffer = shape(1, MILLION, kv_heads, dim, dtype=FLOAT16)
    arguments = (shape(1, 1, 16, dim), buffer, buffer, shape(1, 1, 69, dtype=jnp.int32))

    def steps(q: Any, k: Any, v: Any, named: Any, at: Any) -> Any:
        def step(i: Any, carry: Any) -> Any:
            q, k, v = carry
            rows = q[:, :, :kv_heads].astype(FLOAT16)
            k, v = (jax.lax.dynamic_update_slice_in_dim(x, rows, at + i, axis=1) for x in (k, v))
            options = {"block": 64, "q_start": at + i, "impl": "pallas_tpu"}
            return partial_block_attention(q, k, v, named, **options)[0], k, v

        return jax.lax.fori_loop(jnp.int32(0), jnp.int32(4), step, (q, k, v))

    program = compiled(device, steps, (*arguments, shape(dtype=jnp.int32)), donate=(1, 2))
    assert program.memory_analysis().temp_size_in_bytes < 2**23
    assert program.memory_analysis().alias_size_in_bytes >= 4 * MILLION * kv_heads * dim


def test_choice_of_blocks_of_a_million_keys(device: Any) -> None:
    """Plain XLA: the memory it needs is that of a group's scores."""
    T, blocks = 512, MILLION // 64
    numbers = shape(T, dtype=jnp.int32)
    arguments = (shape(1, 7 + T, 32), shape(1, 4, 32, blocks), numbers, numbers)

    def step(u: Any, landmarks: Any, candidates: Any, width: Any) -> Any:
        return choose_blocks(u, landmarks, candidates=candidates, width=width, most=16)

    program = compiled(device, step, arguments, with_kernels=False)
    assert program.memory_analysis().temp_size_in_bytes < 200 * 2**20


# name: (T, K, E, D, F), type, whether gradients are taken.
EXPERTS: dict[str, tuple[tuple[int, ...], Any, bool]] = {
    "nano": ((1024, 2, 8, 128, 192), FLOAT32, True),
    "share of pro": ((1024, 8, 8, 6144, 2048), BFLOAT16, True),
    "share of pro, float32": ((256, 8, 8, 6144, 256), FLOAT32, True),
    "pro decodes": ((1, 8, 128, 6144, 2048), BFLOAT16, False),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_experts(device: Any, name: str) -> None:
    (T, K, E, D, F), dtype, with_gradients = EXPERTS[name]
    arrays = {
        "x": shape(T, D, dtype=dtype),
        "weights": shape(T, K),
        "w_gate": shape(E, D, F, dtype=dtype),
        "w_up": shape(E, D, F, dtype=dtype),
        "w_down": shape(E, F, D, dtype=dtype),
    }

    def run(arrays: dict[str, Any], ids: Any) -> jax.Array:
        return squares(expert_mlp(expert_ids=ids, **arrays))

    function = jax.grad(run) if with_gradients else run
    compiled(device, function, (arrays, shape(T, K, dtype=jnp.int32)))
