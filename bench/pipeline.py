"""Speed of the data path and of nano against peers in the same run: `python bench/pipeline.py`.

Prints one JSON object a line on stdout and a table on stderr. `ratio` is our throughput over the
peer's, the median of several alternating runs, so that it holds on a shared machine:

* packed records from a shard folder, against a bare memory-mapped Arrow read of the same file;
* prefill of nano, as matrix multiplications a second, against this machine's own matmul.
"""

from __future__ import annotations

import gzip
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
REPEATS = 5


def seconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def alternate(ours: Callable[[], Any], peer: Callable[[], Any]) -> tuple[float, float, float]:
    """Median seconds of each, and the median of the ratios peer / ours of runs side by side."""
    ours(), peer()
    pairs = [(seconds(ours), seconds(peer)) for _ in range(REPEATS)]
    mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    return mine, theirs, statistics.median(b / a for a, b in pairs)


def gemtool(command: str, folder: Path) -> None:
    shell = command.replace("gemtool", f"{sys.executable} -m gemtool")
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    subprocess.run(shell, shell=True, check=True, cwd=folder, env=environment)


def rows(folder: Path) -> Iterator[dict[str, Any]]:
    text = gzip.decompress((ROOT / "gemtool/probes/haystack.txt.gz").read_bytes()) * 30
    (folder / "text.txt").write_bytes(text)
    gemtool(
        "gemtool tokenize -q text.txt | gemtool pack -q --length 8192 | gemtool shard -q -o shards",
        folder,
    )
    yield shard_row(folder / "shards")
    yield prefill_row()


def shard_row(folder: Path) -> dict[str, Any]:
    import pyarrow as pa

    from gemtool.data.shards import ShardFolder

    def peer() -> int:
        total = 0
        for part in sorted(folder.glob("*.arrow")):
            with pa.memory_map(str(part)) as file:
                reader = pa.ipc.open_file(file)
                for i in range(reader.num_record_batches):
                    tokens = reader.get_batch(i).column("tokens")
                    total += int(tokens.values.to_numpy().sum())
        return total

    def ours() -> int:
        shards = ShardFolder(folder)
        return sum(int(span.tokens.sum()) for i in range(len(shards)) for span in shards[i])

    mine, theirs, ratio = alternate(ours, peer)
    count = sum(ShardFolder(folder).manifest["tokens"].values()) / 1e6
    return {
        "what": "8k records from shards, checked, against a bare Arrow map",
        "unit": "M tokens/s",
        "ours": count / mine,
        "peer": count / theirs,
        "ratio": ratio,
    }


def prefill_row(length: int = 4096) -> dict[str, Any]:
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
    mine, theirs, _ = alternate(ours, peer)
    return {
        "what": f"prefill nano, {length} tokens ({length / mine:,.0f} a second), against matmul",
        "unit": "GFLOP/s",
        "ours": work / mine / 1e9,
        "peer": 4 * 2 * 2048**3 / theirs / 1e9,
        "ratio": (work / mine) / (4 * 2 * 2048**3 / theirs),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for row in rows(Path(folder)):
            print(json.dumps({**row, "repeats": REPEATS}), flush=True)
            shown = f"{row['ours']:9.2f} {row['peer']:9.2f} {row['unit']:12} {row['ratio']:6.2f}"
            print(f"{shown}  {row['what']}", file=sys.stderr)


if __name__ == "__main__":
    main()
