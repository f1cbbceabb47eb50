"""Packing documents of any size into sequences of one length: online best-fit over a few open bins.

Documents longer than a sequence are cut where sequences end; what is left of them, and every
shorter document, goes whole into the open sequence that it fills best. With 16 open sequences about
0.4% of 8k-token positions stay empty, where concatenating in order and padding would leave 16%.
"""

from __future__ import annotations

import math
import tempfile
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import BinaryIO, Generic, TypeVar

import numpy as np

from gemtool.errors import GemtoolError, no_room
from gemtool.stream.spans import Span

MEDIA_KINDS = frozenset({"image", "video", "audio"})
"""Kinds whose spans are never cut: a payload row belongs to each of their soft positions."""

MEMORY = 256 << 20
"""Bytes of waiting spans kept in memory before the rest goes to a temporary file."""

Item = TypeVar("Item")


class BestFit(Generic[Item]):
    """Online best-fit bin packing.

    Args:
        capacity: size of a bin.
        open_bins: bins that wait for more items at any time. When none of them has room for an
            item, the fullest makes way for a new bin.
    """

    def __init__(self, capacity: int, open_bins: int) -> None:
        self.capacity, self.open_bins = capacity, open_bins
        # Parallel lists, ascending by room; among equals, the bin touched last comes first.
        self._room: list[int] = []
        self._bins: list[list[Item]] = []

    def place(self, size: int, item: Item) -> list[Item] | None:
        """Places an item (0 < size <= capacity); returns the bin that this closed, if any."""
        if size == self.capacity:
            return [item]
        rooms, bins = self._room, self._bins
        evicted = None
        at = bisect_left(rooms, size)
        if at < len(rooms):
            room, chosen = rooms.pop(at) - size, bins.pop(at)
            chosen.append(item)
            if room == 0:
                return chosen
        else:
            if len(rooms) == self.open_bins:
                del rooms[0]
                evicted = bins.pop(0)
            room, chosen = self.capacity - size, [item]
        at = bisect_left(rooms, room)
        rooms.insert(at, room)
        bins.insert(at, chosen)
        return evicted

    def close(self) -> Iterator[list[Item]]:
        """Closes the bins that are open, fullest first."""
        while self._bins:
            self._room.pop(0)
            yield self._bins.pop(0)


@dataclass(slots=True)
class _Slot:
    """Where a waiting span's arrays lie in the temporary file, one after the other."""

    offset: int
    size_class: int
    tokens: int
    loss: bool
    payload: tuple[tuple[int, ...], np.dtype] | None


class WaitingRoom:
    """Holds spans until their sequence is complete: in memory up to a budget, then on disk.

    What it holds is its own copy: a span from a reader is a view that keeps a whole record batch
    (16 MiB) alive, and those who wait longest come from the most different batches. The file is
    unlinked from the start, so nothing is left behind whatever happens; its space is reused.
    """

    def __init__(self, memory: int = MEMORY) -> None:
        self._budget, self._held = memory, 0
        self._file: BinaryIO | None = None
        self._end = 0
        self._free: dict[int, list[int]] = {}

    def __enter__(self) -> WaitingRoom:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    @property
    def spilled(self) -> int:
        """Bytes that the temporary file has grown to."""
        return self._end

    def put(self, span: Span, start: int, stop: int) -> tuple[Span, _Slot | None]:
        """Takes in a copy of tokens [start, stop) of a span; give the result to `take` once."""
        tokens = span.tokens[start:stop]
        loss = None if span.loss is None else span.loss[start:stop]
        payload = span.payload
        size = tokens.nbytes + (0 if loss is None else loss.nbytes)
        size += 0 if payload is None else payload.nbytes
        slot = None
        if self._held + size > self._budget:
            slot = self._write(size, tokens, loss, payload)
            tokens, loss, payload = _NO_TOKENS, None, None
        else:
            self._held += size
            tokens = tokens.copy()
            loss = None if loss is None else loss.copy()
            payload = None if payload is None else payload.copy()
        # Spelled out: dataclasses.replace would take half of all the time.
        part = Span(
            span.doc,
            span.span,
            span.kind,
            tokens,
            span.start + start,
            loss,
            payload,
            span.time,
            span.meta,
        )
        return part, slot

    def take(self, part: Span, slot: _Slot | None) -> Span:
        """Gives a span back and forgets it."""
        if slot is not None:
            part.tokens, part.loss, part.payload = self._read(slot)
            return part
        self._held -= part.tokens.nbytes + (0 if part.loss is None else part.loss.nbytes)
        self._held -= 0 if part.payload is None else part.payload.nbytes
        return part

    def _write(
        self, size: int, tokens: np.ndarray, loss: np.ndarray | None, payload: np.ndarray | None
    ) -> _Slot:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="gemtool-pack-")  # noqa: SIM115
        # Slots are powers of two, so that free ones fit again; what a span does not fill of its
        # slot is a hole in the file and takes no space.
        size_class = (size - 1).bit_length()
        free = self._free.get(size_class)
        if free:
            offset = free.pop()
        else:
            offset = self._end
            self._end += 1 << size_class
        try:
            self._file.seek(offset)
            for array in (tokens, loss, payload):
                if array is not None:
                    self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            self._file.flush()  # a full disk shows here, not where other spans are read
        except OSError as problem:
            if not no_room(problem):
                raise
            raise GemtoolError(
                f"{tempfile.gettempdir()}: no space left for the {self._end:,} bytes of spans that "
                "wait for their sequence; point TMPDIR to a larger disk or lower --open-bins"
            ) from None
        shape = None if payload is None else (payload.shape, payload.dtype)
        return _Slot(offset, size_class, len(tokens), loss is not None, shape)

    def _read(self, slot: _Slot) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        assert self._file is not None
        self._file.seek(slot.offset)
        self._free.setdefault(slot.size_class, []).append(slot.offset)
        tokens = _read_array(self._file, (slot.tokens,), np.dtype(np.int32))
        loss = payload = None
        if slot.loss:
            loss = _read_array(self._file, (slot.tokens,), np.dtype(np.float32))
        if slot.payload is not None:
            payload = _read_array(self._file, *slot.payload)
        return tokens, loss, payload


def _read_array(file: BinaryIO, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return np.frombuffer(file.read(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)


_NO_TOKENS = np.empty(0, np.int32)

# A piece is what one document has in one sequence.
_Piece = list[tuple[Span, _Slot | None]]


class Packer:
    """Packs a stream of spans; the counts grow as `pack` is consumed.

    Args:
        length: positions of a sequence.
        open_bins: sequences that wait for more documents at any time.
        memory: bytes of waiting spans kept in memory; what exceeds it waits in a temporary file.

    Attributes:
        documents: documents seen.
        tokens: tokens of the sequences given out.
        sequences: sequences given out.
    """

    def __init__(self, length: int, open_bins: int = 16, memory: int = MEMORY) -> None:
        self.length = length
        self.documents = self.tokens = self.sequences = 0
        self._bins: BestFit[_Piece] = BestFit(length, open_bins)
        self._memory = memory

    @property
    def waste(self) -> float:
        """Share of the positions given out that hold no token."""
        return 1 - self.tokens / (self.sequences * self.length) if self.sequences else 0.0

    def pack(self, spans: Iterable[Span]) -> Iterator[Span]:
        """Gives the spans back with `seq`, `offset` and `segment`, cut where sequences end.

        Sequences come one after the other, numbered from 0, their spans by ascending offset and
        without gaps. `segment` counts the documents of a sequence from 1, `start` stays the place
        in the source document. Spans without tokens take no position and are left out.

        A document goes on as long as its id stays and `span` grows. Beyond its current sequence
        nothing of a long document is held.

        Raises:
            GemtoolError: a media span longer than a sequence, or no space for the temporary file.
        """
        with WaitingRoom(self._memory) as room:
            piece: _Piece = []
            size = 0
            doc, last = None, -1
            for span in spans:
                if span.doc != doc or span.span <= last:
                    yield from self._place(room, size, piece)
                    piece, size = [], 0
                    doc = span.doc
                    self.documents += 1
                last = span.span
                count = len(span.tokens)
                start = 0
                while start < count:
                    stop = min(count, start + self.length - size)
                    if stop < count and _is_atomic(span):
                        if count > self.length:
                            raise GemtoolError(
                                f"{span.doc}: span {span.span} is {span.kind} of {count:,} tokens "
                                f"and cannot be cut; use a --length of at least {count:,}"
                            )
                        stop = start
                    if stop > start:
                        piece.append(room.put(span, start, stop))
                        size += stop - start
                    if stop < count or size == self.length:
                        yield from self._place(room, size, piece)
                        piece, size = [], 0
                    start = stop
            yield from self._place(room, size, piece)
            for closed in self._bins.close():
                yield from self._emit(room, closed)

    def _place(self, room: WaitingRoom, size: int, piece: _Piece) -> Iterator[Span]:
        if size:
            closed = self._bins.place(size, piece)
            if closed is not None:
                yield from self._emit(room, closed)

    def _emit(self, room: WaitingRoom, pieces: list[_Piece]) -> Iterator[Span]:
        offset = 0
        for segment, piece in enumerate(pieces, 1):
            for part, slot in piece:
                span = room.take(part, slot)
                span.seq, span.offset, span.segment = self.sequences, offset, segment
                offset += len(span.tokens)
                yield span
        self.sequences += 1
        self.tokens += offset


def _is_atomic(span: Span) -> bool:
    return span.kind in MEDIA_KINDS or span.payload is not None
