"""Text of any size in bounded memory, cut where tokens are unlikely to cross."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

CHUNK = 32 << 10
"""Bytes of text in a span, at most."""

_READ = 1 << 20


class Readable(Protocol):
    """What text is read from: a file, a pipe, `io.BytesIO`."""

    def read(self, size: int, /) -> bytes: ...


def text_chunks(file: Readable) -> Iterator[bytes]:
    """The bytes of a text in chunks of at most CHUNK bytes, none empty; joined they are the text.

    Each ends behind the last newline of its second half; without one, before the last space or
    tab there; without those, anywhere but inside a UTF-8 sequence. Where depends on the text
    alone, not on how a pipe happened to deliver it.
    """
    held = b""
    while block := file.read(_READ):
        held += block
        start = 0
        while len(held) - start > CHUNK:
            end = _cut(held, start)
            yield held[start:end]
            start = end
        held = held[start:]
    if held:
        yield held


def _cut(text: bytes, start: int) -> int:
    """Where the chunk that begins at `start` ends; more than CHUNK bytes lie ahead."""
    half, limit = start + CHUNK // 2, start + CHUNK
    newline = text.rfind(b"\n", half, limit)
    if newline >= 0:
        return newline + 1
    # Pieces of words begin with their space, so the cut comes before it.
    blank = max(text.rfind(b" ", half, limit), text.rfind(b"\t", half, limit))
    if blank >= 0:
        return blank
    for end in range(limit, limit - 4, -1):
        if text[end] & 0xC0 != 0x80:  # not a continuation byte
            return end
    return limit  # ill-formed: as good a place as any
