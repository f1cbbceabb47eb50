"""What the benchmarks share: ratios of CPU times of runs side by side, and how they are shown."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

REPEATS = 7


def cpu_seconds(action: Callable[[], Any]) -> float:
    """User and system time of all threads of this process."""
    start = time.process_time()
    action()
    return time.process_time() - start


def alternate_cpu(ours: Callable[[], Any], peer: Callable[[], Any]) -> tuple[float, float, float]:
    """Median CPU seconds of each, and the median of the ratios peer / ours of runs side by side."""
    ours(), peer()
    pairs = [(cpu_seconds(ours), cpu_seconds(peer)) for _ in range(REPEATS)]
    mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    return mine, theirs, statistics.median(b / a for a, b in pairs)


def show(rows: Iterable[dict[str, Any]]) -> None:
    """Each row as JSON on stdout, and for a person on stderr."""
    for row in rows:
        print(json.dumps({**row, "repeats": REPEATS}), flush=True)
        shown = f"{row['ours']:9.2f} {row['peer']:9.2f} {row['unit']:12} {row['ratio']:6.2f}"
        print(f"{shown}  {row['what']}", file=sys.stderr)
