"""Spans of a document -> pieces (tokens, and vectors of soft positions) -> tiles for the model.

Media are encoded whole frame by whole frame, in batches of a fixed number of groups, before
anything is cut: where tiles end cannot change what a frame looks like.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from gemtool.control import PLACEHOLDERS
from gemtool.data.arrays import ENCODERS
from gemtool.errors import CorruptInput, GemtoolError
from gemtool.model.config import ModelConfig
from gemtool.stream.spans import Span

GROUPS = 8
"""Frames, or seconds of audio, that are encoded at a time."""
_QUEUE_TOKENS = 8192

_SOFT = np.array(sorted(PLACEHOLDERS), np.int32)

Encode = Callable[[str, np.ndarray, np.ndarray], np.ndarray]
"""(kind, raw features [GROUPS, P, F], real rows int32 [GROUPS]) -> soft tokens float32
[GROUPS, P, D]."""


@dataclass(frozen=True)
class Piece:
    """A run of positions of one document."""

    tokens: np.ndarray
    """int32 [n]"""
    soft: np.ndarray | None = None
    """float32 [n, D]: what stands at soft positions; rows of other positions mean nothing."""

    def __len__(self) -> int:
        return len(self.tokens)

    def cut(self, at: int) -> tuple[Piece, Piece]:
        """The first `at` positions and the others."""
        if self.soft is None:
            return Piece(self.tokens[:at]), Piece(self.tokens[at:])
        return Piece(self.tokens[:at], self.soft[:at]), Piece(self.tokens[at:], self.soft[at:])


def tokens_of(pieces: Iterable[Piece]) -> np.ndarray:
    """The tokens int32 [n] of all pieces."""
    return np.concatenate([np.empty(0, np.int32), *(piece.tokens for piece in pieces)])


@dataclass(frozen=True)
class Tile:
    """Positions that run through the model in one step."""

    piece: Piece
    scored: bool
    """False: nobody needs what the last layers make of it, only keys and values for later."""
    last: bool


def soft_positions(tokens: np.ndarray) -> np.ndarray:
    """Which tokens are placeholders of soft positions, bool [n]."""
    return np.isin(tokens, _SOFT)


def pieces_of(spans: Iterable[Span], config: ModelConfig, encode: Encode) -> Iterator[Piece]:
    """The pieces of a document.

    Raises:
        CorruptInput: a span whose tokens and payload do not fit together or to the model.
        GemtoolError: media that the model has no encoder for.
    """
    queue: list[Span] = []
    tokens = 0
    groups = {"visual": 0, "audio": 0}
    for span in spans:
        check_span(span, config)
        queue.append(span)
        tokens += len(span.tokens)
        if span.payload is not None:
            groups[ENCODERS[span.kind]] += 1
        if tokens >= _QUEUE_TOKENS or GROUPS in groups.values() or not any(groups.values()):
            yield from _encoded(queue, config, encode)
            queue, tokens = [], 0
            groups = dict.fromkeys(groups, 0)
    yield from _encoded(queue, config, encode)


def check_span(span: Span, config: ModelConfig) -> None:
    """Refuses tokens outside the vocabulary, and payloads that do not fill the soft positions."""
    where = f"document {span.doc!r}, span {span.span}"
    if len(span.tokens) and not 0 <= span.tokens.min() <= span.tokens.max() < config.vocab_size:
        raise CorruptInput(
            f"{where}: token ids from {span.tokens.min()} to {span.tokens.max()}; the model knows "
            f"0 to {config.vocab_size - 1}"
        )
    soft = int(np.count_nonzero(soft_positions(span.tokens)))
    rows = 0 if span.payload is None else len(span.payload)
    if soft != rows:
        raise CorruptInput(f"{where}: {soft} soft positions, but a payload of {rows} rows")
    if span.payload is None:
        return
    if span.kind not in ENCODERS:
        raise CorruptInput(f"{where}: a span of kind {span.kind} with a payload")
    encoder = config.encoder(ENCODERS[span.kind])
    if rows > encoder.tokens or span.payload[0].size != encoder.features:
        raise GemtoolError(
            f"{where}: its payload is {list(span.payload.shape)}; the {encoder.kind} encoder takes "
            f"at most {encoder.tokens} rows of {encoder.features} features"
        )


def _encoded(queue: list[Span], config: ModelConfig, encode: Encode) -> Iterator[Piece]:
    soft: dict[int, np.ndarray] = {}
    for kind in ("visual", "audio"):
        media = [
            i for i, s in enumerate(queue) if s.payload is not None and ENCODERS[s.kind] == kind
        ]
        for first in range(0, len(media), GROUPS):
            batch = media[first : first + GROUPS]
            encoder = config.encoder(kind)
            shape = (GROUPS, encoder.tokens, encoder.features)
            values = np.zeros(shape, np.uint8 if kind == "visual" else np.float16)
            rows = np.zeros(GROUPS, np.int32)
            for slot, i in enumerate(batch):
                payload = queue[i].payload
                assert payload is not None
                values[slot, : len(payload)] = payload.reshape(len(payload), -1)
                rows[slot] = len(payload)
            soft |= dict(zip(batch, encode(kind, values, rows), strict=False))
    for i, span in enumerate(queue):
        if i not in soft:
            yield Piece(span.tokens)
            continue
        at = soft_positions(span.tokens)
        vectors = np.zeros((len(span.tokens), config.d_model), np.float32)
        vectors[at] = soft[i][: np.count_nonzero(at)]
        yield Piece(span.tokens, vectors)


def tiles_of(
    pieces: Iterable[Piece],
    chunk: int,
    *,
    reach: int,
    boundary: int | None = None,
    start: int = 0,
) -> Iterator[Tile]:
    """Cuts pieces into tiles of at most `chunk` positions.

    Args:
        pieces: one document, or what continues it.
        chunk: at least 1.
        reach: how many positions before the last one are scored at least; tiles that hold none of
            them are not.
        boundary: tiles never extend over a multiple of this position.
        start: the position of the first piece.
    """
    waiting: list[Piece] = []
    available, position = 0, start

    def take(size: int) -> Piece:
        nonlocal available, position
        available, position = available - size, position + size
        taken: list[Piece] = []
        while size:
            first, rest = waiting[0].cut(size)
            taken.append(first)
            size -= len(first)
            waiting[:1] = [rest] if len(rest) else []
        return taken[0] if len(taken) == 1 else _join(taken)

    def next_size() -> int:
        return chunk if boundary is None else min(chunk, boundary - position % boundary)

    for piece in pieces:
        if not len(piece):
            continue
        waiting.append(piece)
        available += len(piece)
        while available > (size := next_size()) + reach:
            yield Tile(take(size), scored=False, last=False)
    while available:
        piece = take(min(next_size(), available))
        yield Tile(piece, scored=available <= reach, last=available == 0)


def _join(pieces: list[Piece]) -> Piece:
    tokens = np.concatenate([piece.tokens for piece in pieces])
    width = next((piece.soft.shape[1] for piece in pieces if piece.soft is not None), None)
    if width is None:
        return Piece(tokens)
    soft = [
        np.zeros((len(piece), width), np.float32) if piece.soft is None else piece.soft
        for piece in pieces
    ]
    return Piece(tokens, np.concatenate(soft))
