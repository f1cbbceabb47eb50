"""The heat map of a probe: context length by depth, coloured by score."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemtool.errors import GemtoolError, reason
from gemtool.stream.files import atomic_write


def grid(
    rows: Sequence[Mapping[str, Any]],
) -> tuple[list[int], list[float], np.ndarray, np.ndarray]:
    """Lengths, depths, mean score [depth, length] (NaN without cases) and number of cases.

    A row is a case, or a cell of as many as its "cases".
    """
    lengths = sorted({int(row["length"]) for row in rows})
    depths = sorted({float(row["depth"]) for row in rows})
    total = np.zeros((len(depths), len(lengths)))
    count = np.zeros((len(depths), len(lengths)), int)
    for row in rows:
        cell = depths.index(float(row["depth"])), lengths.index(int(row["length"]))
        cases = int(row.get("cases", 1))
        total[cell] += cases * float(row["score"])
        count[cell] += cases
    with np.errstate(invalid="ignore"):
        return lengths, depths, total / np.where(count == 0, np.nan, count), count


def short_count(value: float) -> str:
    """1000 -> 1k, 10500000 -> 10.5M."""
    for size, suffix in ((1_000_000, "M"), (1_000, "k")):
        if value >= size:
            return f"{value / size:.4g}{suffix}"
    return f"{value:.4g}"


def plot_heat_map(rows: Sequence[Mapping[str, Any]], target: Path, *, title: str) -> None:
    """Draws PNG (or what the file's ending says) of the mean score of each cell.

    Raises:
        GemtoolError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lengths, depths, mean, count = grid(rows)
    figure, axes = plt.subplots(
        figsize=(max(4.5, 1.6 + 0.75 * len(lengths)), max(3.0, 1.2 + 0.38 * len(depths))),
        layout="constrained",
    )
    image = axes.imshow(mean, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(lengths)), [short_count(n) for n in lengths])
    axes.set_yticks(range(len(depths)), [f"{100 * d:.0f}%" for d in depths])
    axes.set_xlabel("context length (tokens)")
    axes.set_ylabel("depth of the needle")
    axes.set_title(title, fontsize=10)
    for i, j in np.ndindex(mean.shape):
        if count[i, j]:
            ink = "black" if 0.2 < mean[i, j] < 0.85 else "white"
            axes.text(j, i, f"{mean[i, j]:.2f}", ha="center", va="center", fontsize=8, color=ink)
    figure.colorbar(image, ax=axes, label="score")
    drawn = io.BytesIO()
    figure.savefig(drawn, format=target.suffix.lstrip(".") or "png", dpi=150)
    plt.close(figure)
    try:
        atomic_write(target, drawn.getvalue())
    except OSError as problem:
        raise GemtoolError(f"{target}: cannot be written: {reason(problem)}") from None
