"""Prefill of nano against this machine's own matrix multiplication: `python bench/prefill.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measure import Row, call, compare, keep_to_one_core, report

REPEATS = 7
LENGTH = 4096


def rows(folder: Path, length: int = LENGTH) -> Iterator[Row]:
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

    work = operations(config, length)
    row = compare(
        f"prefill nano, {length} tokens, against matmul",
        lambda: call(ours),
        lambda: call(peer),
        repeats=REPEATS,
        unit="GFLOP/s",
        work=(work / 1e9, 4 * 2 * 2048**3 / 1e9),
    )
    yield {**row, "tokens_s": length * row["ours"] / (work / 1e9)}


def operations(config: Any, length: int) -> float:
    """What the layers of a model need to compute for a sequence, forward: two operations for each
    parameter of a matrix that a token runs through, and attention to what it sees."""
    from gemtool.model.params import flatten, param_specs

    moe, active = config.moe, 0.0
    for path, spec in flatten(param_specs(config)).items():
        if path.startswith("layers/") and len(spec.shape) > 1:
            routed = moe is not None and spec.axes[0] == "expert"
            active += spec.size * (moe.top_k / moe.experts if routed else 1)
    pairs = 0.0
    for kind in config.layer_kinds:
        seen = min(kind.window or length, length)
        pairs += kind.heads * kind.head_dim * (seen * (length - seen) + seen * (seen + 1) / 2)
    return 2 * length * active + 4 * pairs


if __name__ == "__main__":
    keep_to_one_core()
    report(rows)
