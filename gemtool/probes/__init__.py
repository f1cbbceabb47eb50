"""Probes: what a model finds in long contexts. One probe a file; a row in this table.

A probe is a module with `cases(vocab, haystack, *, lengths, depths, repetitions, seed, ...) ->
Iterator[Case]` (what to ask) and `score(case, text) -> float`. What else `cases` takes, with a default
each, are the probe's own options. The verb runs them, writes a JSONL row a case, and draws the grid of
length by depth.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

PROBES = {
    "needle": "Text needle: one magic number hidden in essays, at each depth of each length.",
    "multi-needle": "Many needles in one context, all asked for in one turn.",
}
"""Probe -> one line of help. The module is gemtool.probes.NAME, with _ for -."""


def open_probe(name: str) -> Any:
    """The module of a probe."""
    return importlib.import_module(f"gemtool.probes.{name.replace('-', '_')}")


def probe_options(name: str) -> dict[str, Any]:
    """The options of a probe and their defaults."""
    parameters = inspect.signature(open_probe(name).cases).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}
