"""What a span stream says of itself before its first row."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gemtool import __version__
from gemtool.errors import GemtoolError
from gemtool.stream.files import printable

VERSION = 1


@dataclass(frozen=True)
class Header:
    """What is known of a stream before its first row."""

    vocab: Mapping[str, Any] = field(default_factory=dict)
    """`fingerprint` and `size` of the vocabulary; empty in hand-written JSONL."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """MediaSettings as a dict."""
    pg: tuple[Mapping[str, Any], ...] = ()
    """Provenance: one entry a program, oldest first, as in SAM headers."""
    packed: Mapping[str, Any] | None = None
    """`length` of the packed sequences, once packed."""

    def derive(
        self, verb: str, *, pg: bool = True, seed: int | None = None, **changes: Any
    ) -> Header:
        """The header of what `verb` makes of this stream; with `pg`, its provenance grows."""
        chain: tuple[Mapping[str, Any], ...] = ()
        if pg:
            chain = (*self.pg, provenance(verb, self.pg, seed))
        return replace(self, pg=chain, **changes)

    def to_dict(self) -> dict[str, Any]:
        result: dict[str, Any] = {
            "stream": "spans",
            "version": VERSION,
            "vocab": dict(self.vocab),
            "settings": dict(self.settings),
            "pg": [dict(entry) for entry in self.pg],
        }
        if self.packed is not None:
            result["packed"] = dict(self.packed)
        return result

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Header:
        return cls(
            vocab=value.get("vocab", {}),
            settings=value.get("settings", {}),
            pg=tuple(value.get("pg", ())),
            packed=value.get("packed"),
        )


def provenance(
    verb: str, chain: tuple[Mapping[str, Any], ...], seed: int | None = None
) -> dict[str, Any]:
    """One provenance entry: who made this, with which command line, from what."""
    taken = {entry.get("id") for entry in chain}
    name, count = verb, 1
    while name in taken:
        count += 1
        name = f"{verb}.{count}"
    entry: dict[str, Any] = {
        "id": name,
        "version": __version__,
        "command": shlex.join(["gemtool", *map(printable, sys.argv[1:])]),
        "previous": chain[-1].get("id") if chain else None,
    }
    if seed is not None:
        entry["seed"] = seed
    return entry


def require_same(first: Header, other: Header, name: str) -> None:
    """Refuses to mix streams that do not mean the same by their tokens.

    Raises:
        GemtoolError: naming what differs.
    """
    for what, mine, theirs in (
        ("vocabulary", first.vocab.get("fingerprint"), other.vocab.get("fingerprint")),
        ("media settings", dict(first.settings), dict(other.settings)),
        ("packed length", first.packed, other.packed),
    ):
        if mine != theirs:
            raise GemtoolError(
                f"{name}: its {what} is {theirs}, that of the streams before it {mine}; "
                "streams are joined only when these agree"
            )
