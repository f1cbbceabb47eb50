"""Prints recall by length from rows of `gemtool probe needle --shared`: JSONL files as arguments.

Intervals are Wilson's at 95%, for as many independent cases as the scores of contexts speak for:
needles of one haystack share its fate, so a length whose contexts differ more than chance allows
counts as fewer (the design effect of Kish, 1965).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

Z = 1.959964


def wilson(share: float, count: float) -> tuple[float, float]:
    """The interval (Wilson, 1927) of a share found in `count` independent cases."""
    centre = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z / (1 + Z * Z / count)
    half *= (share * (1 - share) / count + Z * Z / (4 * count * count)) ** 0.5
    return max(centre - half, 0.0), min(centre + half, 1.0)


def effective_count(contexts: Sequence[Sequence[float]]) -> float:
    """Independent cases that the scores of some contexts, equally many each, are worth."""
    total = sum(len(scores) for scores in contexts)
    size = total / len(contexts)
    share = sum(map(sum, contexts)) / total
    spread = share * (1 - share)
    if len(contexts) < 2 or size <= 1 or spread == 0:
        return float(total)
    means = [sum(scores) / len(scores) for scores in contexts]
    between = sum((mean - share) ** 2 for mean in means) / (len(means) - 1)
    effect = between / (spread / size)
    return total / min(max(effect, 1.0), size)


def rows_of(paths: Iterable[str]) -> dict[int, list[dict]]:
    found: dict[int, list[dict]] = {}
    for path in paths:
        for line in Path(path).read_text().splitlines():
            row = json.loads(line)
            found.setdefault(row["length"], []).append(row)
    return dict(sorted(found.items()))


def main(paths: list[str]) -> None:
    print(f"{'tokens':>12}  {'found':>9}  {'recall':>7}  {'95%':15}  prefill, tokens/s")
    for length, rows in rows_of(paths).items():
        contexts: dict[tuple[str, int, int], list[float]] = {}
        seconds = {}
        for row in rows:
            key = row["model"], row["seed"], row["case"]
            contexts.setdefault(key, []).append(row["score"])
            seconds[key] = row["prefill_seconds"]
        scores = [score for context in contexts.values() for score in context]
        share = sum(scores) / len(scores)
        low, high = wilson(share, effective_count(list(contexts.values())))
        speed = length * len(seconds) / sum(seconds.values())
        print(
            f"{length:12,}  {sum(scores):4.0f}/{len(scores):4}  {100 * share:6.1f}%  "
            f"{100 * low:5.1f}..{100 * high:5.1f}%  {speed:,.0f}"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
