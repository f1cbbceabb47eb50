"""Documents become spans: markers around media, text as tokens, everything numbered.

A `Document` is an id and a run of `Part`s; a part is a span whose text has no tokens yet. Parts are
produced and consumed one after the other, so an hour of video never lies in memory.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from gemtool.control import (
    AUDIO,
    BEGIN_AUDIO,
    BEGIN_FRAME,
    BEGIN_IMAGE,
    END_AUDIO,
    END_FRAME,
    END_IMAGE,
    EOD,
    IMAGE,
    PLACEHOLDERS,
    VIDEO,
)
from gemtool.errors import GemtoolError
from gemtool.stream.spans import Span

if TYPE_CHECKING:
    from gemtool.data.pieces import Piece
    from gemtool.data.vocab import Vocab

AHEAD = 4 << 20
"""Bytes of text and media gathered before they are encoded together."""

AHEAD_PARTS = 4096
"""The same for short documents: how many parts."""

HELD = 64 << 20
"""Bytes of a document that are held back to see whether the rest of it can be read."""

_MARKERS = {
    "image": (BEGIN_IMAGE, IMAGE, END_IMAGE),
    "video": (BEGIN_FRAME, VIDEO, END_FRAME),
    "audio": (BEGIN_AUDIO, AUDIO, END_AUDIO),
}
_PLACEHOLDERS = np.array(sorted(PLACEHOLDERS), np.int32)


@dataclass(slots=True)
class Part:
    """A span to be. Either `text` or `tokens` is given.

    Attributes:
        kind: of the span.
        text: its text, at most a chunk of `gemtool.data.text`.
        tokens: its tokens, int32 [n].
        weight: of each token as a target (placeholders are never targets); None is the default.
        payload, time, meta: as in Span.
    """

    kind: str
    text: bytes | None = None
    tokens: np.ndarray | None = None
    weight: float | None = None
    payload: np.ndarray | None = None
    time: tuple[int, int] | None = None
    meta: dict[str, Any] | None = None

    @property
    def nbytes(self) -> int:
        return len(self.text or b"") + (0 if self.payload is None else self.payload.nbytes)


@dataclass(slots=True)
class Document:
    """A document whose parts are made as they are asked for, before the next document's."""

    id: str
    parts: Iterator[Part]
    meta: dict[str, Any] | None = None
    """What its author noted; it goes into `meta["document"]` of the first span."""


_Batch = list[tuple[str, bool, Part]]


def control(token: int, weight: float | None = None) -> Part:
    """A control token by itself."""
    return Part("control", tokens=np.array([token], np.int32), weight=weight)


def text_parts(chunks: Iterable[bytes], weight: float | None = None) -> Iterator[Part]:
    """A part a chunk."""
    for chunk in chunks:
        yield Part("text", text=chunk, weight=weight)


def media_parts(
    pieces: Iterable[Piece], *, runs: bool, weight: float | None = None
) -> Iterator[Part]:
    """The pieces of one image, recording or video between their markers.

    Args:
        pieces: what a front end made; text among them (the time of a frame) is never a target.
        runs: one pair of markers around pieces that follow one another without a gap (sound by
            itself), not one around each piece.
        weight: of the markers as targets.
    """
    begin, held = True, None
    for piece in pieces:
        if held is not None:
            end = not (runs and held.time and piece.time and held.time[1] == piece.time[0])
            yield _media_part(held, begin, end, weight)
            begin = end
        held = piece
    if held is not None:
        yield _media_part(held, begin, True, weight)


def _media_part(piece: Piece, begin: bool, end: bool, weight: float | None) -> Part:
    if piece.kind == "text":
        text = (piece.text or "").encode()
        return Part("text", text=text, weight=0.0, time=piece.time, meta=piece.meta)
    assert piece.payload is not None
    opening, placeholder, closing = _MARKERS[piece.kind]
    body = [placeholder] * len(piece.payload)
    tokens = np.array([opening] * begin + body + [closing] * end, np.int32)
    return Part(
        piece.kind,
        tokens=tokens,
        weight=weight,
        payload=piece.payload,
        time=piece.time,
        meta=piece.meta,
    )


def as_one(documents: Iterable[Document]) -> Iterator[Document]:
    """All documents as one, with the id and meta of the first."""
    remaining = iter(documents)
    for first in remaining:
        rest = chain.from_iterable(document.parts for document in remaining)
        yield replace(first, parts=chain(first.parts, rest))


def left_out(count: int) -> str:
    """How a run ends that went on without so many inputs or documents; LEFT_OUT reads it."""
    what = "input or document" if count == 1 else "inputs or documents"
    return f"{count} {what} could not be read (see above)"


LEFT_OUT = re.compile(r"(\d+) inputs? or documents? could not be read")


def skip_bad(
    documents: Iterable[Document], report: Callable[[GemtoolError, bool], None]
) -> Iterator[Document]:
    """Leaves out documents that cannot be read.

    A document is held back until it is whole or longer than HELD bytes. One that turns out
    damaged after that ends where the damage is.

    Args:
        documents: whose parts may raise GemtoolError.
        report: called with each problem, and whether what came before it was kept.
    """

    def until_damage(parts: Iterator[Part]) -> Iterator[Part]:
        try:
            yield from parts
        except GemtoolError as problem:
            report(problem, True)

    for document in documents:
        held: list[Part] = []
        size = 0
        try:
            for part in document.parts:
                held.append(part)
                size += part.nbytes
                if size > HELD:
                    break
        except GemtoolError as problem:
            report(problem, False)
            continue
        yield replace(document, parts=chain(held, until_damage(document.parts)))


def spans_of_documents(
    documents: Iterable[Document], vocab: Vocab, *, threads: int = 1
) -> Iterator[Span]:
    """The spans of all documents, each document ended by a control span `<eod>`.

    Text is encoded in batches of a few MiB, on `threads` threads, while the caller uses the spans
    of the batch before; the spans do not depend on that.
    """
    span = start = 0
    for batch, encoded in _encoded(documents, vocab, threads):
        for doc, first, part in batch:
            if first:
                span = start = 0
            tokens = next(encoded) if part.tokens is None else part.tokens
            yield Span(
                doc=doc,
                span=span,
                kind=part.kind,
                tokens=tokens,
                start=start,
                loss=_loss(part.kind, tokens, part.weight),
                payload=part.payload,
                time=part.time,
                meta=part.meta,
            )
            span, start = span + 1, start + len(tokens)


def _encoded(
    documents: Iterable[Document], vocab: Vocab, threads: int
) -> Iterator[tuple[_Batch, Iterator[np.ndarray]]]:
    """Batches with the tokens of their texts, of which one is encoded ahead.

    What goes wrong with the documents is raised behind the batches before it.
    """
    batches = _batches(documents)
    ahead: deque[tuple[_Batch, Future[list[np.ndarray]]]] = deque()
    problem = None
    with ThreadPoolExecutor(1) as encoder:
        while True:
            try:
                batch = next(batches, None)
            except Exception as error:
                batch, problem = None, error
            if batch is not None:
                texts = [part.text for _, _, part in batch if part.text is not None]
                ahead.append((batch, encoder.submit(vocab.encode_batch, texts, threads)))
            elif not ahead:
                break
            if batch is None or len(ahead) > 1:
                done, tokens = ahead.popleft()
                yield done, iter(tokens.result())
    if problem is not None:
        raise problem


def _batches(documents: Iterable[Document]) -> Iterator[_Batch]:
    """Document id, whether it begins here, and part: some MiB at a time."""
    batch: _Batch = []
    size = 0
    problem = None
    try:
        for document in documents:
            first = True
            for part in chain(document.parts, [control(EOD)]):
                if first and document.meta is not None:
                    part.meta = {**(part.meta or {}), "document": document.meta}
                batch.append((document.id, first, part))
                first = False
                size += part.nbytes
                if size >= AHEAD or len(batch) >= AHEAD_PARTS:
                    yield batch
                    batch, size = [], 0
    except Exception as error:
        problem = error
    if batch:
        yield batch
    if problem is not None:
        raise problem


def _loss(kind: str, tokens: np.ndarray, weight: float | None) -> np.ndarray | None:
    if weight is None or (weight == 1 and kind in ("text", "control")):  # the default
        return None
    loss = np.full(len(tokens), weight, np.float32)
    loss[np.isin(tokens, _PLACEHOLDERS)] = 0
    return loss


class Tally:
    """Counts the spans of a document at a time, and of all documents.

    Seconds are those of sound and video; the sound of a video does not count twice.
    """

    def __init__(self) -> None:
        self.total = _no_counts()
        self._doc: str | None = None
        self._counts = _no_counts()
        self._source: object = None
        self._starts: dict[str, int] = {}
        self._end = 0

    def add(self, span: Span) -> dict[str, Any] | None:
        """Counts a span; returns the counts of the document before it, if one has just ended."""
        done = self.finish() if span.span == 0 else None
        self._doc = span.doc
        self._counts["tokens"] += len(span.tokens)
        self._counts[span.kind] += len(span.tokens)
        if span.time is not None and span.kind in ("audio", "video"):
            start, end = span.time
            source = (span.meta or {}).get("source")
            if source != self._source or start <= self._starts.get(span.kind, -1):
                self._leave_source()
                self._source = source
            self._starts[span.kind] = start
            self._end = max(self._end, end)
        return done

    def _leave_source(self) -> None:
        self._counts["seconds"] += self._end / 1e6
        self._source, self._starts, self._end = None, {}, 0

    def finish(self) -> dict[str, Any] | None:
        """Ends the document; returns its counts, None if there was none."""
        if self._doc is None:
            return None
        self._leave_source()
        done, self._doc = {"doc": self._doc, **_rounded(self._counts)}, None
        for key, count in self._counts.items():
            self.total[key] += count
        self._counts = _no_counts()
        return done

    def summary(self) -> dict[str, Any]:
        """The counts of all documents that have ended."""
        return {"total": True, **_rounded(self.total)}


def _no_counts() -> dict[str, float]:
    return dict.fromkeys(("tokens", "text", "image", "video", "audio", "control", "seconds"), 0)


def _rounded(counts: dict[str, float]) -> dict[str, float]:
    return {**counts, "seconds": round(counts["seconds"], 3)}
