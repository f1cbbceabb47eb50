"""How often loops turn, told to those who count what a program does (`gemtool.aot.hlo`)."""

from __future__ import annotations

from contextlib import AbstractContextManager

import jax


def counted_turns(turns: int) -> AbstractContextManager[None]:
    """The scope of a loop that data ends: it is counted as so many turns."""
    return jax.named_scope(f"counted_{turns}")
