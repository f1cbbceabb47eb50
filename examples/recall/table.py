"""Prints recall by length from rows of `gemtool probe needle --shared`: JSONL files as arguments, of
one training seed or of several together. With --plot it draws them too.

Intervals are Wilson's at 95%, for as many independent cases as the scores of contexts speak for:
needles of one haystack share its fate, so a length whose contexts differ more than chance allows
counts as fewer (the design effect of Kish, 1965).
"""

from __future__ import annotations

import argparse
import json
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


PLAIN = {"wording": "report", "distractors": 0, "values": 1, "absent": False, "prefix": True}
"""What a row says where nothing else was asked for."""


def variant(row: dict) -> str:
    """What sets a row apart from the plain needle: "german, 4 distractors"."""
    words = [] if row["probe"] == "needle" else [row["probe"]]
    found = {name: row.get(name, usual) for name, usual in PLAIN.items()}
    words += [found["wording"]] * (found["wording"] != "report")
    numbers = [name for name in ("distractors", "values") if found[name] != PLAIN[name]]
    words += [f"{found[name]} {name}" for name in numbers]
    words += ["absent"] * found["absent"] + ["no prefix"] * (not found["prefix"])
    return ", ".join(words)


def rows_of(paths: Iterable[str]) -> dict[tuple[str, int], list[dict]]:
    """Rows by variant and length, in the order of the files."""
    found: dict[tuple[str, int], list[dict]] = {}
    for path in paths:
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        cases = max(sum(row["case"] == 0 for row in rows) // len({r["length"] for r in rows}), 1)
        for row in rows:
            name = variant(row) + (f" {cases}" if row["probe"] != "needle" else "")
            found.setdefault((name, row["length"]), []).append(row)
    return found


DEPTHS = 25


def plot(rows: Iterable[dict], target: Path) -> None:
    """The heat map of plain needles, deeper by steps of one in 24."""
    from gemtool.probes.plot import plot_heat_map

    last = DEPTHS - 1
    drawn = [{**row, "depth": round(last * row["depth"]) / last} for row in rows]
    plot_heat_map(drawn, target, title=f"needle: {len(drawn):,} cases")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="+", help="JSONL of the probe")
    parser.add_argument("--plot", type=Path, help="a picture")
    options = parser.parse_args()
    found = rows_of(options.rows)
    if options.plot:
        plot((row for (name, _), rows in found.items() if not name for row in rows), options.plot)
    print_table(found)


def print_table(found: dict[tuple[str, int], list[dict]]) -> None:
    width = max(len(name) for name, _ in found)
    title = f"{'':{width}}  " if width else ""
    print(f"{title}{'tokens':>12}  {'found':>9}  {'recall':>7}  {'95%':15}  prefill, tokens/s")
    for (name, length), rows in found.items():
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
            (f"{name:{width}}  " if width else "")
            + f"{length:12,}  {sum(scores):4.0f}/{len(scores):4}  {100 * share:6.1f}%  "
            f"{100 * low:5.1f}..{100 * high:5.1f}%  {speed:,.0f}"
        )


if __name__ == "__main__":
    main()
