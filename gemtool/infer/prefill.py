"""Documents -> contexts: runs them through a model and writes blocks as they are finished."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, BinaryIO

import numpy as np

from gemtool.errors import GemtoolError
from gemtool.infer.contexts import Base
from gemtool.infer.engine import Engine
from gemtool.infer.mapped import can_map
from gemtool.infer.pieces import GROUPS, Piece, Tile, check_span, pieces_of
from gemtool.infer.sequence import Sequence
from gemtool.infer.spill import begin_of, can_spill, kept, spill
from gemtool.stream.checked import Counts
from gemtool.stream.context import BLOCK, STATE_EVERY, ContextHeader, ContextWriter
from gemtool.stream.header import provenance
from gemtool.stream.spans import Span

Row = Mapping[str, Any]
"""A JSON object."""


class Tally:
    """Counts tokens by kind and hashes media as spans pass through, from a parent's footer on."""

    def __init__(self, before: Mapping[str, Any]) -> None:
        self.kinds: dict[str, int] = dict(before.get("kinds", {}))
        self._media: dict[str, Any] = {
            kind: hashlib.sha256(digest.encode())
            for kind, digest in before.get("media_sha256", {}).items()
        }

    def through(self, spans: Iterable[Span]) -> Iterator[Span]:
        for span in spans:
            self.kinds[span.kind] = self.kinds.get(span.kind, 0) + len(span.tokens)
            if span.payload is not None:
                digest = self._media.setdefault(span.kind, hashlib.sha256())
                digest.update(np.ascontiguousarray(span.payload).view(np.uint8).reshape(-1))
            yield span

    def media(self) -> dict[str, str]:
        return {kind: digest.hexdigest() for kind, digest in self._media.items()}


def write_context(
    engine: Engine,
    doc: str,
    spans: Iterable[Span],
    sink: BinaryIO,
    *,
    base: Base | None = None,
    begun: Begun | None = None,
    pg: tuple[Any, ...] | None = (),
    expected: int = 0,
    on_tokens: Callable[[int], None] = lambda count: None,
    on_state: Callable[[], None] = lambda: None,
    logprobs: int | None = None,
    on_rows: Callable[[Iterable[Row]], None] = lambda rows: None,
) -> dict[str, Any]:
    """Runs a document through the model, writes its context to `sink`, and returns the footer.

    Args:
        engine: the model.
        doc: id of the document.
        spans: of the document, without its end-of-document token; at least one token.
        sink: where the context goes.
        base: the context that the document continues, which is named, not copied, if it has a name. It
            can be continued again, also by another document.
        begun: what is there of this context, at whose end `sink` is; the rest is written as if it had
            not been interrupted.
        pg: provenance of the spans, to which this program is added; None leaves it out.
        expected: tokens that are likely to come, to make room for them at once.
        on_tokens: called with the number of tokens of each tile; not of what is there.
        on_state: called when a state before the last is written.
        logprobs: score every token, and so many of the most likely in its place; None: only what
            comes after the last. The context is the same, but for the states before the last: those
            of scored tokens have the windows of layers that `step_kv` leaves as they were.
        on_rows: called with what `Entries.rows` says of the tokens of each tile, if they are scored.

    Raises:
        GemtoolError: scores were asked for and are not finite numbers, or `begun` is not of this
            document.
    """
    header = engine.header(doc)
    if pg is not None:
        header = replace(header, pg=(*pg, provenance("prefill", pg)))
    spilling = base is None and logprobs is None and can_spill(engine, sink)
    begin = begin_of(sink) if spilling else 0
    if base is None:
        room = expected if begun is None else 0
        sequence = engine.begin(room, kept=kept(room) if spilling else None)
        whole: AbstractContextManager[Sequence] = nullcontext(sequence)
        waiting, tally = np.empty(0, np.int32), Tally({})
    else:
        base.sequence.reserve(base.sequence.length + expected)
        whole, tally = base.sequence.fork(), Tally(base.footer)
        waiting = base.tokens if base.parent is None else base.tail
        start = base.sequence.length - len(waiting)
        header = replace(header, parent=base.parent, start=start)
    with whole as sequence:
        if begun is None:
            writer = ContextWriter(sink, header)
            pieces = pieces_of(tally.through(spans), engine.config, engine.encode)
        else:
            require_begun(begun.header, header)
            known = begun.tokens[len(waiting) :]
            writer = ContextWriter(sink, begun.header, begun.counts, begun.tokens)
            pieces = _pieces_behind(known, tally.through(spans), doc, engine)
            sequence, waiting = begun.sequence, np.empty(0, np.int32)
            begin = begun.begin
        tiles = engine.tiles(pieces, boundary=STATE_EVERY, start=sequence.length)

        def after_state() -> None:
            on_state()
            if spilling:
                spill(engine, sequence, sink, begin)

        _run(
            engine, doc, sequence, tiles, waiting, writer, on_tokens, after_state, logprobs, on_rows
        )
        return writer.close(tally.kinds, tally.media())


@dataclass(frozen=True)
class Begun:
    """A context whose writing was interrupted, up to its last state."""

    sequence: Sequence
    header: ContextHeader
    tokens: np.ndarray
    """int32 [n]: those of its blocks, from `header.start` on."""
    counts: Counts
    """What is written of it."""
    begin: int = 0
    """The byte of the file at which it begins."""


def require_begun(found: ContextHeader, wanted: ContextHeader) -> None:
    """Refuses to go on with another context than was begun.

    Raises:
        GemtoolError: it is of another document, or continues another one.
    """
    pairs = (("document", found.doc, wanted.doc), ("parent", found.parent, wanted.parent))
    for what, a, b in pairs:
        if a != b:
            raise GemtoolError(
                f"--resume: the context that was begun has another {what}: {a!r}, not {b!r}; go on "
                "with the input that it was begun with, or leave out --resume"
            )


def _pieces_behind(
    known: np.ndarray, spans: Iterable[Span], doc: str, engine: Engine
) -> Iterator[Piece]:
    """The pieces of a document behind the tokens int32 [n] that went through the model already, of
    which no media is encoded again.

    Raises:
        GemtoolError: the document does not begin with them.
    """
    skipped = at = 0

    def rest() -> Iterator[Span]:
        nonlocal skipped, at
        for span in spans:
            there = known[at : at + len(span.tokens)]
            if not np.array_equal(span.tokens[: len(there)], there):
                break
            at += len(span.tokens)
            if at > len(known):
                yield span
            else:
                skipped = at
        if at < len(known):
            raise GemtoolError(
                f"--resume: document {doc!r} is another than the one that was begun, from token {at:,} "
                "on; leave out --resume"
            )

    for piece in pieces_of(rest(), engine.config, engine.encode):
        cut = min(max(len(known) - skipped, 0), len(piece))
        skipped += len(piece)
        yield piece.cut(cut)[1]


def _run(
    engine: Engine,
    doc: str,
    sequence: Sequence,
    tiles: Iterable[Tile],
    waiting: np.ndarray,
    writer: ContextWriter,
    on_tokens: Callable[[int], None],
    on_state: Callable[[], None],
    logprobs: int | None,
    on_rows: Callable[[Iterable[Row]], None],
) -> None:
    """Runs tiles, and writes blocks as they are full, states and the end; `waiting` int32 [n] are the
    tokens of the block that a sequence ends in."""
    for tile in tiles:
        size, tokens = engine.tile_size(len(tile.piece)), tile.piece.tokens
        if logprobs is None:
            sequence.run(tile, size)
        else:
            start = sequence.length
            scores = sequence.score(tile, size, logprobs)
            on_rows(engine.entries.rows(doc, start, tokens, scores))
        waiting = np.concatenate([waiting, tokens])
        while len(waiting) >= BLOCK:
            writer.block(waiting[:BLOCK], sequence.block(writer.length, writer.length + BLOCK))
            waiting = waiting[BLOCK:]
        if sequence.length % STATE_EVERY == 0 and not tile.last:
            writer.state(sequence.state())
            on_state()
        on_tokens(len(tile.piece))
    if len(waiting):
        writer.block(waiting, sequence.block(writer.length, sequence.length))
    writer.state(sequence.state())
    assert sequence.logits is not None
    writer.end(sequence.logits)


@dataclass(frozen=True)
class Plan:
    """What prefilling would take."""

    tokens: int
    memory: int
    """Bytes on each device: weights, and the buffers of keys and values with room to grow, of those
    that stay in memory if the context goes to a file. Leaves out what Python and the compiler need,
    some hundreds of megabytes."""
    disk: int
    """Bytes of the context."""
    seconds: float
    """Once the programs are compiled."""

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "seconds": round(self.seconds, 3)}


class Planner:
    """Says what prefilling a document of some length takes, from one tile measured at two places.

    The time of a tile is taken to be a constant plus a part that grows with the tokens before it.
    `logprobs` as in `write_context`.
    """

    def __init__(self, engine: Engine, logprobs: int | None = None) -> None:
        self._engine, self._logprobs = engine, logprobs
        self._media: dict[str, float] = {}
        self._tiles: dict[int, tuple[float, float]] = {}

    def _tile_seconds(self, size: int, far: int = 16 * BLOCK) -> tuple[float, float]:
        """Seconds of a tile of this size: the constant, and what each token before it adds."""
        if size not in self._tiles:
            sequence = self._engine.begin(far + 3 * size)
            tile = Tile(Piece(np.full(size, 64, np.int32)), scored=False, last=False)

            def run(place: int) -> None:
                sequence.skip_to(place)
                if self._logprobs is None:
                    sequence.run(tile, size)
                else:
                    sequence.score(tile, size, self._logprobs)
                sequence.wait()

            near = _seconds(lambda: run(0))
            self._tiles[size] = near, max(_seconds(lambda: run(far)) - near, 0.0) / far
        return self._tiles[size]

    def _group_seconds(self, kind: str) -> float:
        if kind not in self._media:
            encoder = self._engine.config.encoder(kind)
            values = np.zeros((GROUPS, encoder.tokens, encoder.features), np.float16)
            if kind == "visual":
                values = values.astype(np.uint8)
            rows = np.full(GROUPS, encoder.tokens, np.int32)
            self._media[kind] = _seconds(lambda: self._engine.encode(kind, values, rows)) / GROUPS
        return self._media[kind]

    def plan(self, spans: Iterable[Span], start: int = 0) -> Plan:
        """Counts the tokens of a document, without running it, and says what it would take behind
        `start` tokens that are there."""
        engine, tokens, groups = self._engine, 0, dict.fromkeys(("visual", "audio"), 0)
        for span in spans:
            check_span(span, engine.config)
            tokens += len(span.tokens)
            if span.payload is not None:
                groups["audio" if span.kind == "audio" else "visual"] += 1
        size = engine.tile_size(min(tokens, engine.chunk, STATE_EVERY))
        constant, slope = self._tile_seconds(size)
        seconds = -(-tokens // size) * (constant + slope * (start + tokens / 2))
        seconds += sum(count * self._group_seconds(kind) for kind, count in groups.items() if count)
        row = engine.row_bytes()
        lean = not start and self._logprobs is None and can_map(engine.config, engine.mesh)
        states = -(-(start % STATE_EVERY + tokens) // STATE_EVERY)
        return Plan(
            tokens=tokens,
            memory=engine.bytes_for(start + tokens, kept(start + tokens) if lean else None),
            disk=(start % BLOCK + tokens) * (row + 4)
            + states * engine.state_bytes()
            + 4 * engine.config.vocab_size,
            seconds=seconds,
        )


def _seconds(action: Callable[[], Any], repetitions: int = 3) -> float:
    """Least time of some calls, after one that compiles."""
    action()
    times = []
    for _ in range(repetitions):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return min(times)
