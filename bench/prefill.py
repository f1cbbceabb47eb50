"""Prefill of nano against this machine's own matrix multiplication: `python bench/prefill.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measure import Row, call, compare, report

REPEATS = 7
LENGTH = 4096


def rows(folder: Path, length: int = LENGTH) -> Iterator[Row]:
    """Counts two operations for each active parameter but the embedding, and the attention."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from gemtool.model import cache, params, transformer
    from gemtool.model.config import load_preset

    config = load_preset("nano")
    weights = params.init_params(config, jax.random.key(0))
    chunk = 512
    tokens = np.random.default_rng(0).integers(320, config.vocab_size, (1, length), np.int32)

    @jax.jit
    def step(tokens: Any, state: Any) -> Any:
        x = transformer.embed(weights, config, tokens)
        return transformer.step(weights, config, x, state, jnp.int32(chunk))[1]

    def ours() -> None:
        state = cache.init_cache(config, 1, length)
        for start in range(0, length, chunk):
            state = step(tokens[:, start : start + chunk], state)
        jax.block_until_ready(state)

    square = jnp.ones((2048, 2048), jnp.float32)
    multiply = jax.jit(lambda a: a @ a)

    def peer() -> None:
        for _ in range(4):
            jax.block_until_ready(multiply(square))

    _, active = params.count_params(config)
    active -= config.vocab_size * config.d_model
    kinds = config.layer_kinds
    pairs = sum(
        kind.heads * kind.head_dim * (min(kind.window, length) if kind.window else length / 2)
        for kind in kinds
    )
    work = length * (2 * active + 4 * pairs)
    row = compare(
        f"prefill nano, {length} tokens, against matmul",
        lambda: call(ours),
        lambda: call(peer),
        repeats=REPEATS,
        unit="GFLOP/s",
        work=(work / 1e9, 4 * 2 * 2048**3 / 1e9),
    )
    yield {**row, "tokens_s": length * row["ours"] / (work / 1e9)}


if __name__ == "__main__":
    report(rows)
