"""Attention to chosen blocks and the choice of blocks: every implementation against the reference.

Tolerances are those of test_kernels.py. The references are held against float64 loops in numpy, and
a choice must be the same numbers in the same order.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemtool.kernels import blocks as operations
from gemtool.kernels.attention import flash_attention, merge_attention, partial_attention
from gemtool.kernels.blocks import (
    block_attention,
    choose_blocks,
    last_scores,
    partial_block_attention,
)
from gemtool.kernels.blocks.reference import block_scores
from gemtool.kernels.dispatch import compiling_for

FORWARD = {"rtol": 2e-5, "atol": 2e-5}
BFLOAT16 = {"rtol": 2e-2, "atol": 2e-2}

# Cases that an implementation refuses; it computes every other one.
UNSUPPORTED = {"pallas_tpu": ("float64", "odd-blocks", "too-large")}

# What is interpreted here is slow to compile: of it these cases, each of which takes another path,
# and those it refuses run always, all others among the slow tests.
INTERPRETED = {
    "pallas_tpu": (
        *("decode", "starts", "no-keys", "empty-lists", "large-blocks", "wide-grouped"),
        *("everything", "bfloat16", "decode-float16-buffer", "wide-float16-buffer"),
        *UNSUPPORTED["pallas_tpu"],
    )
}
FAST = [name for name in operations.IMPLEMENTATIONS if name != "reference"]


def normal(seed: int, *shape: int, dtype: Any = np.float32, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


def compiled(function: Any, impl: str) -> Any:
    """Jitted; what runs once is not worth optimising."""
    level = {"xla_backend_optimization_level": 0} if impl != "xla" else None
    return jax.jit(function, compiler_options=level)


# Attention ---------------------------------------------------------------------------------------

# name: (B, T, blocks of the buffer, block, C, H, KV, D), options. Lists are random, a fifth of their
# places empty, and name blocks beyond the query and beyond kv_length too.
ATTENTION: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "one-by-one": ((1, 1, 1, 1, 1, 1, 1, 4), {"q_start": 0}),
    "decode": ((2, 1, 12, 16, 5, 4, 2, 8), {"q_start": 170}),
    "decode-many": ((1, 1, 60, 16, 50, 2, 1, 8), {"q_start": 900, "kv_length": 901}),
    "decode-first": ((1, 1, 4, 16, 3, 2, 1, 8), {"q_start": 0, "kv_length": 1}),
    "group": ((1, 16, 12, 16, 5, 2, 1, 8), {"q_start": 150}),
    "ragged-group": ((2, 37, 12, 16, 5, 2, 1, 8), {"q_start": 150}),
    "few": ((1, 3, 12, 16, 5, 2, 1, 8), {"q_start": 20}),
    "grouped": ((1, 20, 12, 16, 5, 6, 2, 8), {"q_start": 150}),
    "one-block": ((1, 40, 1, 64, 1, 2, 1, 8), {"q_start": 0}),
    "one-choice": ((2, 40, 9, 8, 1, 2, 2, 8), {"q_start": 30}),
    "from-the-start": ((1, 70, 5, 16, 5, 2, 1, 8), {"q_start": 0}),
    "before-the-start": ((1, 20, 5, 16, 5, 2, 1, 8), {"q_start": -10}),
    "sink": ((2, 33, 12, 16, 5, 4, 2, 8), {"q_start": 150, "sink": True}),
    "soft-cap": ((1, 33, 12, 16, 5, 2, 1, 8), {"q_start": 150, "soft_cap": 1.5}),
    "scale": ((1, 18, 12, 16, 5, 2, 1, 8), {"q_start": 150, "scale": 0.7}),
    "cut": ((1, 33, 12, 16, 8, 2, 1, 8), {"q_start": 150, "kv_length": 101}),
    "starts": ((2, 33, 6, 16, 4, 2, 1, 8), {"q_start": 150, "share": (3, 1), "kv_length": 90}),
    "starts-decode": ((2, 1, 6, 16, 4, 2, 1, 8), {"q_start": 150, "share": (2, 1), "sink": True}),
    "no-keys": ((1, 20, 4, 16, 4, 2, 1, 8), {"q_start": 50, "kv_length": 0}),
    "empty-lists": ((2, 20, 4, 16, 0, 2, 1, 8), {"q_start": 50}),
    "all-absent": ((2, 20, 4, 16, 3, 2, 1, 8), {"q_start": 50, "absent": 1.0}),
    "all-absent-sink": ((1, 1, 4, 16, 3, 2, 1, 8), {"q_start": 50, "absent": 1.0, "sink": True}),
    "large-blocks": ((1, 20, 3, 1024, 3, 2, 1, 8), {"q_start": 2500}),
    "small-blocks": ((1, 20, 90, 1, 30, 2, 1, 8), {"q_start": 70}),
    "odd-blocks": ((1, 20, 9, 24, 4, 2, 1, 8), {"q_start": 190}),
    "too-large": ((1, 2, 2, 16384, 2, 2, 1, 32), {"q_start": 20000}),
    "wide": ((1, 20, 9, 16, 4, 2, 1, 128), {"q_start": 120, "sink": True}),
    "wide-grouped": ((2, 20, 9, 16, 4, 6, 3, 128), {"q_start": 120, "kv_length": 125}),
    "everything": (
        (2, 37, 12, 16, 6, 4, 2, 8),
        {
            "q_start": 150,
            "kv_length": 170,
            "share": (1, 0),
            "soft_cap": 3.0,
            "scale": 0.5,
            "sink": True,
        },
    ),
    "float16-buffer": ((1, 33, 12, 16, 5, 4, 2, 8), {"q_start": 150, "kv_dtype": np.float16}),
    "decode-float16-buffer": ((1, 1, 12, 16, 5, 2, 1, 8), {"q_start": 150, "kv_dtype": np.float16}),
    "wide-float16-buffer": (
        (1, 3, 9, 16, 4, 6, 3, 128),
        {"q_start": 120, "kv_dtype": np.float16, "sink": True},
    ),
    "bfloat16-float16-buffer": (
        (1, 33, 12, 16, 5, 4, 2, 8),
        {"q_start": 150, "dtype": jnp.bfloat16, "kv_dtype": np.float16},
    ),
    "bfloat16-buffer": ((1, 33, 12, 16, 5, 4, 2, 8), {"q_start": 150, "kv_dtype": jnp.bfloat16}),
    "bfloat16": (
        (1, 33, 12, 16, 5, 4, 2, 8),
        {"q_start": 150, "dtype": jnp.bfloat16, "sink": True},
    ),
}


def lists(name: str) -> np.ndarray:
    (B, T, count, _, C, *_), options = ATTENTION[name]
    rng = np.random.default_rng(5)
    chosen = rng.random((B, T, count)).argsort(axis=-1)[..., :C].astype(np.int32)
    return np.where(rng.random(chosen.shape) < options.get("absent", 0.2), -1, chosen)


def case(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Traced arguments, options."""
    (B, T, count, block, _, H, KV, D), options = ATTENTION[name]
    options = {"block": block, **options}
    dtype = options.pop("dtype", np.float32)
    kv_dtype = options.pop("kv_dtype", dtype)
    traced = {
        "q": normal(1, B, T, H, D, dtype=dtype, scale=2),
        "k": normal(2, B, count * block, KV, D, dtype=kv_dtype),
        "v": normal(3, B, count * block, KV, D, dtype=kv_dtype),
        "blocks": lists(name),
    }
    options.pop("absent", None)
    if options.pop("sink", False):
        traced["sink"] = normal(4, H)
    if "share" in options:
        # The buffer has every so-and-so-many-th block.
        every, first = options.pop("share")
        traced["starts"] = (traced["blocks"] * every + first) * block
    traced |= {x: np.int32(options.pop(x)) for x in ("q_start", "kv_length") if x in options}
    return traced, options


@functools.cache
def results(name: str, impl: str) -> tuple[np.ndarray, np.ndarray]:
    traced, options = case(name)
    if impl == "reference":
        traced = {
            x: a.astype(np.float32) if a.dtype in (jnp.bfloat16, np.float16) else a
            for x, a in traced.items()
        }
    run = functools.partial(partial_block_attention, **options, impl=impl)
    out, lse = compiled(run, impl)(**traced)
    return np.asarray(out), np.asarray(lse)


def runs() -> list[Any]:
    """Every implementation but the reference with every case."""
    return [
        pytest.param(impl, name, marks=pytest.mark.slow)
        if name not in INTERPRETED.get(impl, ATTENTION)
        else (impl, name)
        for impl in FAST
        for name in ATTENTION
    ]


@pytest.mark.parametrize(("impl", "name"), runs())
def test_attention(impl: str, name: str) -> None:
    if name in UNSUPPORTED.get(impl, ()):
        with pytest.raises(NotImplementedError) as refused:
            results(name, impl)
        pytest.skip(f"{impl}: {refused.value}")
    out, lse = results(name, impl)
    q = case(name)[0]["q"]
    assert out.dtype == q.dtype
    assert out.shape == q.shape
    assert lse.dtype == np.float32
    tolerance = BFLOAT16 if q.dtype == jnp.bfloat16 else FORWARD
    for got, want in zip((out, lse), results(name, "reference"), strict=True):
        np.testing.assert_allclose(got.astype(np.float32), want, **tolerance)


def attention_loop(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    blocks: np.ndarray,
    *,
    block: int,
    q_start: int,
    kv_length: int | None = None,
    starts: np.ndarray | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sink: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The definition, one query at a time in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, T, H, D = q.shape
    out, lse = np.zeros(q.shape), np.full((B, T, H), -1e30)
    for b, t, h in np.ndindex(B, T, H):
        logits, values = [], []
        for c, j in enumerate(blocks[b, t]):
            start = j * block if starts is None else starts[b, t, c]
            for i in range(block if j >= 0 else 0):
                key = j * block + i
                if start + i > int(q_start) + t or (kv_length is not None and key >= kv_length):
                    continue
                head = h // (H // k.shape[2])
                logit = q[b, t, h] @ k[b, key, head] * (D**-0.5 if scale is None else scale)
                logits.append(soft_cap * np.tanh(logit / soft_cap) if soft_cap else logit)
                values.append(v[b, key, head])
        if sink is not None:
            logits.append(float(sink[h]))
            values.append(np.zeros(D))
        if logits:
            p = np.exp(np.array(logits) - max(logits))
            out[b, t, h] = p @ np.array(values) / p.sum()
            lse[b, t, h] = max(logits) + np.log(p.sum())
    return out, lse


@pytest.mark.parametrize(
    "name",
    ["grouped", "everything", "float16-buffer", "all-absent", "starts", "decode", "empty-lists"],
)
@pytest.mark.parametrize("impl", operations.IMPLEMENTATIONS)
def test_attention_in_float64_is_the_definition(impl: str, name: str) -> None:
    traced, options = case(name)
    expected = attention_loop(**traced, **options)
    with jax.enable_x64(True):
        wide = {
            x: jnp.asarray(a, jnp.float64 if x in ("q", "sink") else a.dtype)
            for x, a in traced.items()
        }
        run = functools.partial(partial_block_attention, **wide, **options, impl=impl)
        if impl in UNSUPPORTED:
            with pytest.raises(NotImplementedError, match="float64"):
                run()
            return
        out, lse = compiled(lambda: run(), "reference")()
    assert out.dtype == lse.dtype == jnp.float64
    np.testing.assert_allclose(out, expected[0], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(lse, expected[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("dim", [8, 128])
def test_attention_to_every_block_is_attention(impl: str, dim: int) -> None:
    """Every block that begins at or before a query, in any order."""
    B, T, count, block, at = 2, 50, 8, 16, 70
    q, k, v = (normal(i, B, n, h, dim) for i, n, h in ((1, T, 4), (2, 128, 2), (3, 128, 2)))
    order = np.random.default_rng(4).permutation(count).astype(np.int32)
    named = np.broadcast_to(order, (B, T, count))
    named = np.where(named * block <= at + np.arange(T)[None, :, None], named, -1)
    options = {"q_start": jnp.int32(at), "kv_length": jnp.int32(at + T), "sink": normal(5, 4)}
    run = functools.partial(block_attention, block=block, impl=impl)
    got = compiled(run, impl)(q, k, v, named.astype(np.int32), **options)
    np.testing.assert_allclose(got, flash_attention(q, k, v, **options), **FORWARD)


@pytest.mark.parametrize("impl", operations.IMPLEMENTATIONS)
def test_attention_to_parts_merges(impl: str) -> None:
    """Blocks and, apart from them, keys that all see."""
    (q, k, v), sink = (normal(i, 1, 128, 4, 8) for i in (1, 2, 3)), normal(4, 4)
    every = np.broadcast_to(np.arange(8, dtype=np.int32), (1, 128, 8))
    run = functools.partial(partial_block_attention, block=16, q_start=0, impl=impl)
    parts = [
        compiled(run, impl)(q, k, v, np.where(every % 2 == half, every, -1)) for half in (0, 1)
    ]
    want = partial_attention(q, k, v, sink=sink)
    for got, expected in zip(merge_attention(parts, sink), want, strict=True):
        np.testing.assert_allclose(got, expected, **FORWARD)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("length", [1, 24])
def test_blocks_that_nobody_sees_are_not_read(impl: str, length: int) -> None:
    """NaN in blocks that are not named, hidden, or beyond kv_length must not reach the result."""
    k = normal(1, 1, 4096, 1, 128)
    poisoned = k.copy()
    poisoned[:, :128], poisoned[:, 1024:] = np.nan, np.nan
    named = np.tile(np.array([-1, 7, 3, 9, 5], np.int32), (1, length, 1))
    named[:, ::2, 1] = -1
    run = compiled(functools.partial(block_attention, block=128, impl=impl), impl)
    options = {"q_start": jnp.int32(1000), "kv_length": jnp.int32(1024)}
    q = normal(2, 1, length, 2, 128)
    clean = run(q, k, k, named, **options)
    np.testing.assert_array_equal(run(q, poisoned, poisoned, named, **options), clean)
    assert np.isfinite(clean).all()


def test_kernels_read_float16_exactly() -> None:
    """Every finite number, of both signs, subnormal ones too."""
    from gemtool.kernels.blocks.pallas_tpu import _widened

    values = np.arange(2**16, dtype=np.uint16).view(np.float16)
    values = values[np.isfinite(values)]
    found = np.asarray(jax.jit(_widened)(values.view(np.int16)))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.view(np.int32), values.astype(np.float32).view(np.int32))


@pytest.mark.parametrize("length", [1, 40])
def test_buffers_are_not_copied(length: int) -> None:
    """What the program needs beside them is far smaller than a buffer of 2^20 keys (128 MiB), also
    where a loop writes to it."""

    def steps(q: jax.Array, k: jax.Array, v: jax.Array, named: jax.Array, at: jax.Array) -> Any:
        def step(i: jax.Array, carry: Any) -> Any:
            k, v, out = carry
            place = (jnp.int32(0), at + i, jnp.int32(0), jnp.int32(0))
            k, v = (
                jax.lax.dynamic_update_slice(x, out.astype(x.dtype)[:, :1, :1], place)
                for x in (k, v)
            )
            out = block_attention(q, k, v, named, block=64, q_start=at + i, impl="xla")
            return k, v, out

        return jax.lax.fori_loop(jnp.int32(0), jnp.int32(4), step, (k, v, q))

    buffer = jax.ShapeDtypeStruct((1, 2**20, 1, 64), jnp.float16)
    q = jax.ShapeDtypeStruct((1, length, 2, 64), jnp.float32)
    named = jax.ShapeDtypeStruct((1, length, 21), jnp.int32)
    at = jax.ShapeDtypeStruct((), jnp.int32)
    program = jax.jit(steps, donate_argnums=(1, 2)).lower(q, buffer, buffer, named, at).compile()
    assert program.memory_analysis().temp_size_in_bytes < 2**23


@pytest.mark.parametrize("impl", operations.PAGED_IMPLEMENTATIONS)
@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_pages_anywhere_in_memory(impl: str, length: int, kv_heads: int) -> None:
    """In any order, with other things between them; as if their keys were in buffers."""
    block, page, count, dim = 4, 16, 5, 8
    rng = np.random.default_rng(length)
    q = normal(1, 2, length, 4, dim)
    k, v = normal(2, 2, 1, count * page, kv_heads, dim).astype(np.float16)
    numbers = range(count * page // block)
    blocks = np.array([rng.permutation(numbers)[:6] for _ in range(2 * length)], np.int32)
    blocks = blocks.reshape(2, length, 6)
    blocks[:, :, 2] = -1
    blocks[0, 0] = -1
    rows = page * kv_heads * dim // 4  # of a page, of four values each
    memory, table = normal(3, 13 * rows, 4).astype(np.float16), np.zeros((2, count), np.int32)
    for slot, (which, at) in enumerate(rng.permutation(np.argwhere(np.ones((2, count))))):
        table[which, at] = slot * (rows + 3) + 1
        keys = (k, v)[which][0, at * page : (at + 1) * page]
        memory[table[which, at] : table[which, at] + rows] = keys.reshape(rows, 4)
    options: dict[str, Any] = {"block": block, "scale": 0.3, "soft_cap": 5.0}
    found = jax.jit(
        functools.partial(
            operations.paged_block_attention, page=page, kv_heads=kv_heads, impl=impl, **options
        )
    )(q, memory, table, blocks)
    everywhere = (np.repeat(x, 2, axis=0) for x in (k, v))
    wanted = operations.partial_block_attention(
        q, *everywhere, blocks, q_start=count * page, impl="reference", **options
    )
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"block": 3}, "no whole rows"), ({"page": 6}, "no whole blocks"), ({"table": (3, 1)}, "got")],
)
def test_pages_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"block": 4, "page": 16, "kv_heads": 1, "table": (2, 1), **change}
    table = np.zeros(given.pop("table"), np.int32)
    blocks = np.zeros((1, 1, 1), np.int32)
    with pytest.raises(ValueError, match=message):
        operations.paged_block_attention(
            normal(1, 1, 1, 1, 8), normal(2, 32, 16), table, blocks, **given
        )


@pytest.mark.parametrize("impl", FAST)
def test_attention_of_huge_scores_is_finite(impl: str) -> None:
    q, k, v = (normal(i, 1, 32, 2, 8, scale=1e4 if i < 3 else 1) for i in (1, 2, 3))
    named = np.broadcast_to(np.array([1, 0], np.int32), (1, 32, 2))
    run = functools.partial(partial_block_attention, block=16, q_start=0, impl=impl)
    assert all(np.isfinite(x).all() for x in compiled(run, impl)(q, k, v, named))


@pytest.mark.parametrize("batch", [1, 3])
def test_long_lists_are_prefetched_by_pieces(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from gemtool.kernels.blocks import pallas_tpu

    monkeypatch.setattr(pallas_tpu, "PREFETCHED", 64)
    q, k, v = (normal(i, batch, n, 2, 8) for i, n in ((1, 37), (2, 128), (3, 128)))
    named = (
        np.random.default_rng(4).random((batch, 37, 8)).argsort(axis=-1).astype(np.int32)[..., :5]
    )
    run = functools.partial(block_attention, block=16, q_start=60)
    want = run(q, k, v, named, impl="reference")
    got = compiled(functools.partial(run, impl="pallas_tpu"), "pallas_tpu")(q, k, v, named)
    np.testing.assert_allclose(got, want, **FORWARD)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (1, 32, 3, 8)}, "B, T|S, heads, D"),
        ({"k": (1, 32, 3, 8), "v": (1, 32, 3, 8)}, "do not match"),
        ({"block": 12}, "32 keys are no whole blocks of 12"),
        ({"block": 0}, "whole blocks of 0"),
        ({"blocks": (1, 8, 3)}, r"\[B, T, C\]"),
        ({"starts": (1, 9, 2)}, "starts"),
        ({"sink": (3,)}, "sink"),
    ],
)
def test_attention_says_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    given = {"q": (1, 9, 4, 8), "k": (1, 32, 2, 8), "v": (1, 32, 2, 8), "blocks": (1, 9, 3)}
    arguments = {"block": 16, "q_start": 0, **given, **change}
    arguments = {
        x: jnp.zeros(s, jnp.int32 if x in ("blocks", "starts") else jnp.float32)
        if isinstance(s, tuple)
        else s
        for x, s in arguments.items()
    }
    with pytest.raises(ValueError, match=message):
        block_attention(**arguments)


# Choice ------------------------------------------------------------------------------------------

# name: (B, T, M, NB, D, most, sticky), what is particular.
CHOICE: dict[str, tuple[tuple[int, ...], str]] = {
    "one": ((1, 1, 1, 1, 4, 1, 1), ""),
    "decode": ((2, 1, 4, 700, 8, 16, 8), ""),
    "decode-of-tiles": ((1, 1, 2, 2500, 4, 5, 8), ""),
    "whole-tiles": ((1, 40, 2, 512, 4, 16, 8), "all"),
    "ragged-tiles": ((2, 40, 3, 700, 8, 16, 8), ""),
    "ragged-runs": ((1, 40, 2, 130, 4, 16, 8), "all"),
    "groups": ((2, 300, 2, 300, 4, 7, 8), ""),
    "few-blocks": ((1, 40, 2, 5, 4, 16, 8), ""),
    "fewer-than-most": ((1, 9, 2, 70, 4, 200, 8), "all"),
    "growing": ((1, 150, 2, 200, 4, 16, 8), "growing"),
    "no-candidates": ((1, 40, 2, 300, 4, 6, 8), "none"),
    "some-without": ((1, 140, 2, 300, 4, 6, 8), "from zero"),
    "beyond-the-buffer": ((1, 40, 2, 100, 4, 16, 8), "beyond"),
    "no-blocks": ((2, 5, 2, 0, 4, 3, 8), "beyond"),
    "narrow": ((1, 40, 2, 300, 4, 16, 8), "narrow"),
    "ties": ((2, 140, 2, 500, 2, 20, 8), "ties"),
    "all-equal": ((1, 140, 2, 500, 2, 20, 3), "equal"),
    "decode-ties": ((1, 1, 2, 3000, 2, 40, 8), "ties"),
    "not-sticky": ((1, 70, 2, 300, 4, 6, 1), ""),
    "odd-sticky": ((1, 70, 2, 300, 4, 6, 5), ""),
    "float16-landmarks": ((1, 40, 2, 300, 4, 6, 8), "float16"),
}


def choice_case(name: str) -> dict[str, np.ndarray]:
    (B, T, M, NB, D, most, sticky), particular = CHOICE[name]
    u, landmarks = normal(1, B, sticky - 1 + T, D), normal(2, B, M, D, NB)
    t = np.arange(T)
    candidates = {
        "all": np.full(T, NB),
        "growing": 1 + t * (NB - 1) // max(T - 1, 1),
        "none": np.zeros(T),
        "from zero": np.maximum(t - 90, 0) * 6,
        "beyond": NB + 5 + t,
    }.get(particular, np.maximum(NB - 3 - (T - t) // 4, 1))
    width = np.full(T, most)
    if particular == "narrow":
        width = t % (most + 1)
    if particular == "ties":  # products are small whole numbers
        u, landmarks = np.round(u), np.round(landmarks)
    if particular == "equal":
        landmarks[...] = 1
    if particular == "float16":
        landmarks = landmarks.astype(np.float16)
    return {
        "u": u,
        "landmarks": landmarks,
        "candidates": candidates.astype(np.int32),
        "width": width.astype(np.int32),
    }


def choice_loop(
    u: np.ndarray,
    landmarks: np.ndarray,
    candidates: np.ndarray,
    width: np.ndarray,
    most: int,
    sticky: int,
) -> np.ndarray:
    """The definition, one query at a time in float64."""
    u, landmarks = u.astype(np.float64), landmarks.astype(np.float64)
    chosen = np.full((len(u), len(candidates), most), -1, np.int32)
    for b, t in np.ndindex(chosen.shape[:2]):
        exist = min(candidates[t], landmarks.shape[3])
        products = u[b, t : t + sticky] @ landmarks[b, :, :, :exist]  # [M, sticky, blocks]
        scores = products.max(axis=(0, 1))
        best = sorted(range(exist), key=lambda j, scores=scores: (-scores[j], j))[: width[t]]
        chosen[b, t, : len(best)] = best
    return chosen


@pytest.mark.parametrize("name", CHOICE)
@pytest.mark.parametrize("impl", operations.CHOICE_IMPLEMENTATIONS)
def test_choice(impl: str, name: str) -> None:
    arrays, (*_, most, sticky) = choice_case(name), CHOICE[name][0]
    run = functools.partial(choose_blocks, most=most, sticky=sticky, impl=impl)
    got = compiled(run, impl)(**arrays)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, choice_loop(**arrays, most=most, sticky=sticky))


def test_scores_are_the_definition() -> None:
    u, landmarks = normal(1, 2, 12, 4), normal(2, 2, 3, 4, 20)
    want = np.einsum("bti,bmij->bmtj", u.astype(np.float64), landmarks).max(axis=1)
    want = np.stack([want[:, t : t + 8].max(axis=1) for t in range(5)], axis=1)
    np.testing.assert_allclose(block_scores(u, landmarks), want, **FORWARD)


@pytest.mark.parametrize("exist", [1, 1500, 3000])
def test_last_scores(exist: int) -> None:
    """Of several sequences at once, of one tile and of several, the last one cut; of the first blocks
    alone."""
    u, landmarks = normal(1, 3, 8, 4), normal(2, 1, 2, 4, exist)
    want = np.stack([block_scores(one[None], landmarks)[0, 0] for one in u])
    for count in (0, min(exist, 1100), exist, exist + 1):
        got = jax.jit(last_scores)(u, landmarks, np.int32(count))
        assert got.shape == (3, exist)
        np.testing.assert_allclose(got[:, :count], want[:, :count], **FORWARD)


@pytest.mark.parametrize("length", [1, 60])
def test_choice_ignores_what_is_beyond_the_candidates(length: int) -> None:
    """NaN there, as in a buffer that is not yet written, changes nothing."""
    u, landmarks = normal(1, 2, 7 + length, 4), normal(2, 2, 2, 4, 3000)
    poisoned = landmarks.copy()
    poisoned[..., 100:] = np.nan
    candidates = np.minimum(90 + np.arange(length, dtype=np.int32), 100)
    given = {"candidates": candidates, "width": np.full(length, 9, np.int32)}
    run = jax.jit(functools.partial(choose_blocks, most=9, impl="xla"))
    np.testing.assert_array_equal(run(u, poisoned, **given), run(u, landmarks, **given))


def test_choice_of_a_row_does_not_depend_on_the_step() -> None:
    """One step of 200 queries, and steps of one."""
    u, landmarks = normal(1, 1, 207, 4), normal(2, 1, 2, 4, 300)
    candidates, width = np.arange(90, 290, dtype=np.int32), np.full(200, 9, np.int32)
    run = jax.jit(functools.partial(choose_blocks, most=9, impl="xla"))
    whole = run(u, landmarks, candidates=candidates, width=width)
    for t in range(0, 200, 23):
        one = run(
            u[:, t : t + 8], landmarks, candidates=candidates[t : t + 1], width=width[t : t + 1]
        )
        np.testing.assert_array_equal(one[:, 0], whole[:, t])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": (1, 16, 5)}, "expected u"),
        ({"u": (2, 16, 4)}, "expected u"),
        ({"u": (1, 7, 4)}, "sticky"),
        ({"width": (8,)}, "candidates and width"),
        ({"most": 0}, "most=0"),
        ({"sticky": 0}, "sticky=0"),
    ],
)
def test_choice_says_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    given = {"u": (1, 16, 4), "landmarks": (1, 2, 4, 20), "candidates": (9,), "width": (9,)}
    arguments = {"most": 3, "sticky": 8, **given, **change}
    arguments = {
        x: jnp.zeros(s, jnp.int32 if x in ("candidates", "width") else jnp.float32)
        if isinstance(s, tuple)
        else s
        for x, s in arguments.items()
    }
    with pytest.raises(ValueError, match=message):
        choose_blocks(**arguments)


def test_on_tpus_the_choice_is_plain_xla() -> None:
    """And attention there computes from float16 buffers too, although not by the kernel."""
    arrays = choice_case("ragged-tiles")
    traced, options = case("float16-buffer")
    with compiling_for("tpu"):
        jax.jit(functools.partial(choose_blocks, most=16)).trace(**arrays)
        jax.jit(functools.partial(block_attention, **options)).trace(**traced)
