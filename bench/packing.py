"""Speed and waste of packing: `python bench/packing.py`.

Prints one JSON object a line on stdout and a table on stderr. A million documents, whose sizes are
log-normal like those of web pages (text), some with pictures of 258 tokens (multimodal). The peer is
next-fit: documents in their order, a new sequence where one does not fit. `waste` is the share of
positions that stay empty. The last row packs spans, tokens copied and all, not sizes alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from measure import Row, call, compare, report

from gemtool.data.packing import BestFit, Packer
from gemtool.stream.spans import Span

REPEATS = 7
DOCUMENTS = 1_000_000
OPEN_BINS = 16


def sizes_of(kind: str) -> np.ndarray:
    """int64 [DOCUMENTS]: tokens of each document."""
    rng = np.random.default_rng(0)
    sizes = rng.lognormal(6.5, 1.4, DOCUMENTS).astype(np.int64) + 1
    if kind == "multimodal":
        sizes += 258 * rng.geometric(0.3, DOCUMENTS) * (rng.random(DOCUMENTS) < 0.5)
    return sizes


def rows(_: Path) -> Iterator[Row]:
    for kind, length in (("text", 8192), ("text", 131072), ("multimodal", 8192)):
        sizes = sizes_of(kind)
        whole = int((sizes // length).sum())  # sequences that long documents fill alone
        items = (sizes % length)[sizes % length > 0].tolist()
        waste = [
            1 - int(sizes.sum()) / ((whole + count) * length)
            for count in (best_fit(items, length), next_fit(items, length))
        ]
        row = compare(
            f"best-fit of {kind}, {length}: {waste[0]:.3%} wasted, against next-fit: "
            f"{waste[1]:.1%}",
            lambda: call(lambda: best_fit(items, length)),  # noqa: B023
            lambda: call(lambda: next_fit(items, length)),  # noqa: B023
            repeats=REPEATS,
            unit="M docs/CPU-s",
            work=(len(items) / 1e6, len(items) / 1e6),
        )
        yield {**row, "waste": waste[0]}
    yield spans_row()


def best_fit(items: list[int], length: int) -> int:
    """Sequences that hold the items."""
    bins: BestFit[int] = BestFit(length, OPEN_BINS)
    place = bins.place
    closed = 0
    for item in items:
        if place(item, item) is not None:
            closed += 1
    return closed + sum(1 for _ in bins.close())


def next_fit(items: list[int], length: int) -> int:
    closed, used = 0, length
    for item in items:
        if used + item > length:
            closed, used = closed + 1, 0
        used += item
    return closed


def spans_row(documents: int = 100_000) -> Row:
    tokens = np.zeros(1 << 20, np.int32)
    spans = [
        Span(str(index), 0, "text", tokens[:size])
        for index, size in enumerate(np.minimum(sizes_of("text")[:documents], len(tokens)))
    ]

    def ours() -> int:
        return sum(len(span.tokens) for span in Packer(8192, OPEN_BINS).pack(spans))

    def peer() -> int:
        return sum(len(span.tokens[:].copy()) for span in spans)

    assert ours() == peer()
    return compare(
        "packing spans of text, 8192, against a copy of their tokens",
        lambda: call(ours),
        lambda: call(peer),
        repeats=REPEATS,
        unit="M docs/CPU-s",
        work=(documents / 1e6, documents / 1e6),
    )


if __name__ == "__main__":
    report(rows)
