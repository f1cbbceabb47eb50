"""Speed of the kernels against this machine's own matmul: `python bench/kernels.py`.

The peer is a 2048 x 2048 x 2048 float32 matmul, and seconds are those of the clock. Needed
operations only are counted: what a causal mask or a window hides is not, and a backward pass counts
2.5 forwards (attention) or 2 (experts). Rates of attention to blocks and of dense attention (the
rows "attention: prefill" and "decode") compare what a key costs that is attended to.
Both run on one core where the system can be told so (`--all-cores` leaves it alone).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measure import Action, Row, call, compare, keep_to_one_core, report

from gemtool.kernels import attention, blocks, expert_mlp, experts, flash_attention

Case = tuple[str, float, Callable[..., Any], tuple[Any, ...], int]
REPEATS = 5


def compiled(function: Callable[..., Any], *arguments: Any) -> Action:
    """A call of the compiled function."""
    program = jax.jit(function).lower(*arguments).compile()
    return lambda: call(lambda: jax.block_until_ready(program(*arguments)))


def normal(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    values = 0.05 * np.random.default_rng(len(shape)).standard_normal(shape)
    return jnp.asarray(values, dtype)


def with_gradient(function: Callable[..., jax.Array], count: int) -> Callable[..., Any]:
    """Forward and backward; the loss depends on every output, not uniformly."""
    return jax.grad(lambda *a: (function(*a) ** 2).sum(), argnums=tuple(range(count)))


def attention_cases(impl: str) -> Iterator[Case]:
    """(label, floating-point operations, function, arguments, bytes that must be read)."""

    def attend(*arrays: jax.Array, **options: Any) -> jax.Array:
        return flash_attention(*arrays, impl=impl, **options)

    shapes = {
        "causal [1,4096,8,64]": (1, 4096, 8, 8, 64, None),
        "causal, grouped 8:2 [1,4096,8,64]": (1, 4096, 8, 2, 64, None),
        "causal, nano [4,1024,4,32]": (4, 1024, 4, 4, 32, None),
        "window 128 [1,1024,4,32]": (1, 1024, 4, 2, 32, 128),
        "window 128 [1,4096,4,32]": (1, 4096, 4, 2, 32, 128),
        "window 128 [1,16384,4,32]": (1, 16384, 4, 2, 32, 128),
    }
    for label, (B, T, H, KV, D, window) in shapes.items():
        arrays = (normal(B, T, H, D), normal(B, T, KV, D), normal(B, T, KV, D))
        pairs = T * (T + 1) / 2 if window is None else T * window - window * (window - 1) / 2
        work = 4.0 * B * H * D * pairs

        def run(*a: jax.Array, window: int | None = window) -> jax.Array:
            return attend(*a, window=window)

        yield label, work, run, arrays, 0
        yield label + " + backward", 3.5 * work, with_gradient(run, 3), arrays, 0

    buffer = normal(1, 65536, 2, 64, dtype=jnp.float16)
    for label, T, start in (
        ("prefill 512 at 4096, float16 cache", 512, 4096),
        ("prefill 512 at 60000, float16 cache", 512, 60000),
        ("decode at 1000, float16 cache", 1, 1000),
        ("decode at 60000, float16 cache", 1, 60000),
    ):
        work = 4.0 * 8 * 64 * T * (start + T / 2)

        def step(q: jax.Array, k: jax.Array, at: jax.Array, T: int = T) -> jax.Array:
            return attend(q, k, k, q_start=at, kv_length=at + T)

        read = 2 * start * 2 * 64 * 2 if T == 1 else 0
        yield label, work, step, (normal(1, T, 8, 64), buffer, jnp.int32(start)), read


def expert_cases(impl: str) -> Iterator[Case]:
    """As `attention_cases`."""
    for T, K, E, D, F in (
        (4096, 2, 8, 512, 1024),
        (4096, 2, 64, 512, 256),
        (4096, 2, 16, 256, 256),
        (32, 2, 8, 256, 256),
        (1, 2, 8, 512, 1024),
        (1, 8, 64, 512, 256),
    ):
        order = np.random.default_rng(0).random((T, E)).argsort(axis=1)[:, :K]
        ids = jnp.asarray(order, jnp.int32)
        mats = normal(E, D, F), normal(E, D, F), normal(E, F, D)
        arrays = (normal(T, D), normal(T, K), *mats, ids)
        work = 6.0 * T * K * D * F

        def run(x: Any, weights: Any, gate: Any, up: Any, down: Any, ids: Any) -> jax.Array:
            return expert_mlp(x, ids, weights, gate, up, down, impl=impl)

        label = f"{T} tokens, top {K} of {E} experts {D} x {F}"
        yield label, work, run, arrays, 12 * K * D * F if T == 1 else 0
        if T > 32:
            yield label + " + backward", 3 * work, with_gradient(run, 5), arrays, 0


def block_cases(impl: str) -> Iterator[Case]:
    """As `attention_cases`: attention to 21 blocks of a million keys, and the choice of 16 blocks."""
    positions, block, heads, dim, far, near = 2**20, 64, 2, 64, 16, 5
    buffer = normal(1, positions, 1, dim, dtype=jnp.float16)
    for label, T in (("prefill 512", 512), ("decode", 1)):
        start = positions - T
        named = jnp.asarray(neighbours(start // block - near, start, T, block, far, near))
        work = 4.0 * T * heads * dim * block * (far + near)

        def step(
            q: jax.Array, k: jax.Array, named: jax.Array, at: jax.Array, T: int = T
        ) -> jax.Array:
            options = {"block": block, "q_start": at, "kv_length": at + T}
            return blocks.block_attention(q, k, k, named, impl=impl, **options)

        arguments = (normal(1, T, heads, dim), buffer, named, jnp.int32(start))
        read = 2 * (far + near) * block * dim * 2 if T == 1 else 0
        yield f"{label} at 1M, {far + near} of {block} keys, float16", work, step, arguments, read

    slots, width = 4, 32
    for label, T, count in (
        ("for 512 of 16384 blocks", 512, 16384),
        ("for 512 of 1024 blocks", 512, 1024),
        ("for 1 of 16384 blocks", 1, 16384),
        ("for 1 of 163840 blocks", 1, 163840),
    ):
        landmarks = normal(1, slots, width, count)
        candidates, take = jnp.full(T, count, jnp.int32), jnp.full(T, far, jnp.int32)

        def choose(u: jax.Array, marks: jax.Array, most: jax.Array, take: jax.Array) -> jax.Array:
            return blocks.choose_blocks(u, marks, candidates=most, width=take, most=far, impl=impl)

        arguments = (normal(1, 7 + T, width), landmarks, candidates, take)
        # A step of one looks at seven queries before it too.
        rows = T if T > 1 else 8
        read = landmarks.nbytes if T == 1 else 0
        yield f"choice {label}", 2.0 * rows * slots * count * width, choose, arguments, read


def neighbours(below: int, start: int, T: int, block: int, far: int, near: int) -> np.ndarray:
    """Lists [1, T, far + near]: far blocks that are the same for 8 queries and then change by two,
    each query's own, and those before it."""
    rng = np.random.default_rng(0)
    chosen = rng.choice(below, far, replace=False)
    rows = []
    for t in range(T):
        if t and t % 8 == 0:
            chosen = chosen.copy()
            others = np.setdiff1d(rng.choice(below, 4, replace=False), chosen)[:2]
            chosen[rng.choice(far, len(others), replace=False)] = others
        rows.append(np.concatenate([chosen, (start + t) // block - np.arange(near)]))
    return np.asarray(rows, np.int32)[None]


def rows(impl: str, only: str) -> Iterator[Row]:
    square = normal(2048, 2048)
    matmul = compiled(jnp.dot, square, square)
    everything = {attention: attention_cases, blocks: block_cases, experts: expert_cases}
    for module, cases in everything.items():
        operation = module.__name__.rpartition(".")[2]
        if impl not in module.IMPLEMENTATIONS:
            continue
        for label, work, function, arguments, read in cases(impl):
            what = f"{operation}: {label}"
            if only not in what:
                continue
            row = compare(
                what,
                compiled(function, *arguments),
                matmul,
                repeats=REPEATS,
                unit="GFLOP/s",
                work=(work / 1e9, 2 * 2048**3 / 1e9),
                clock="wall",
            )
            seconds = work / 1e9 / row["ours"]
            yield {
                **row,
                "impl": impl,
                "platform": jax.default_backend(),
                "ms": 1e3 * seconds,
                "read_gb_s": read / seconds / 1e9 if read else None,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of the kernels against matmul.")
    parser.add_argument("--impl", default="xla", choices=sorted(set(attention.IMPLEMENTATIONS)))
    parser.add_argument("--only", default="", help="run the cases whose label contains this")
    parser.add_argument("--all-cores", action="store_true", help="do not keep to one core")
    options = parser.parse_args()
    if not options.all_cores:
        keep_to_one_core()
    report(lambda _: rows(options.impl, options.only))


if __name__ == "__main__":
    main()
