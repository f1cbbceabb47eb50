"""Speed of the kernels against this machine's own matmul: `python bench/kernels.py`.

Prints one JSON object a line on stdout and a table on stderr. A figure is the median of several
runs; `ratio` is GFLOP/s over those of a 2048 x 2048 x 2048 float32 matmul timed beside each run,
so that it holds on a shared machine. Needed operations only are counted: what a causal mask or a
window hides is not, and a backward pass counts 2.5 forwards (attention) or 2 (experts).
For one core: `taskset -c 0 python bench/kernels.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from gemtool.kernels import attention, expert_mlp, experts, flash_attention

Case = tuple[str, float, Callable[..., Any], tuple[Any, ...], int]
REPEATS = 5


def compiled(function: Callable[..., Any], *arguments: Any) -> Callable[[], float]:
    """A compiled, warmed-up call that returns the seconds it took."""
    program = jax.jit(function).lower(*arguments).compile()

    def call() -> float:
        start = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        return time.perf_counter() - start

    call()
    return call


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


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of the kernels against matmul.")
    parser.add_argument("--impl", default="xla", choices=sorted(set(attention.IMPLEMENTATIONS)))
    parser.add_argument("--only", default="", help="run the cases whose label contains this")
    options = parser.parse_args()
    square = normal(2048, 2048)
    matmul = compiled(jnp.dot, square, square)
    table = {attention: attention_cases, experts: expert_cases}
    print(f"{'case':58} {'ms':>9} {'GFLOP/s':>8} {'ratio':>6} {'GB/s':>6}", file=sys.stderr)
    for module, cases in table.items():
        operation = module.__name__.rpartition(".")[2]
        for label, work, function, arguments, read in cases(options.impl):
            if options.only not in f"{operation} {label}":
                continue
            call = compiled(function, *arguments)
            # A peak beside each run: neighbours on a shared machine slow both.
            pairs = [(2 * 2048**3 / matmul(), call()) for _ in range(REPEATS)]
            peak, taken = (statistics.median(x) for x in zip(*pairs, strict=True))
            ratio = statistics.median(work / seconds / peak for peak, seconds in pairs)
            row = {
                "kernel": operation,
                "impl": options.impl,
                "platform": jax.default_backend(),
                "case": label,
                "ms": round(1e3 * taken, 3),
                "gflops": round(work / taken / 1e9, 2),
                "matmul_gflops": round(peak / 1e9, 2),
                "ratio": round(ratio, 3),
                "read_gb_s": round(read / taken / 1e9, 2) if read else None,
            }
            print(json.dumps(row), flush=True)
            shown = f"{row['read_gb_s']:6.1f}" if read else ""
            print(
                f"{operation + ': ' + label:58} {row['ms']:9.2f} {row['gflops']:8.1f} "
                f"{row['ratio']:6.2f} {shown}",
                file=sys.stderr,
            )


if __name__ == "__main__":
    main()
