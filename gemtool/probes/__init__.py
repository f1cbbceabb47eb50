"""Probes: what a model finds in long contexts. One probe a file; a row in this table.

A probe is a module with `cases(...) -> Iterator[Case]` (what to ask) and
`score(case, text) -> float`. The verb runs them, writes a JSONL row a case, and draws
the grid of length by depth.
"""

from __future__ import annotations

PROBES = {
    "needle": "Text needle: one magic number hidden in essays, at each depth of each length.",
}
"""Probe -> one line of help. The module is gemtool.probes.NAME."""
