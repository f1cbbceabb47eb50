"""The span stream: what tokenize writes, pack rewrites, shard and prefill read.

A row is a *span*: a run of tokens of one kind from one document. Media stay raw in the payload
(pixels, log-mel), and their tokens are placeholders. On a pipe this is a checked Arrow IPC stream
(`gemtool.stream.checked`); for people and jq, the same rows as JSONL (`gemtool.stream.jsonl`).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

import numpy as np
import pyarrow as pa

from gemtool import log
from gemtool.control import CONTROL_COUNT, UNTRAINED_TARGETS
from gemtool.errors import CorruptInput, GemtoolError, counted
from gemtool.stream.checked import ARROW_MAGIC, CheckedReader, CheckedWriter, Source
from gemtool.stream.columns import binary_view, large_binary, large_list, list_view
from gemtool.stream.files import display_name, open_input, open_output
from gemtool.stream.header import VERSION, Header, require_same

KINDS = ("text", "image", "video", "audio", "control")
BATCH_BYTES = 16 << 20
BATCH_ROWS = 1000

_KIND_TYPE = pa.dictionary(pa.int8(), pa.string())
_KIND_NAMES = pa.array(KINDS, pa.string())
_KIND_INDEX = {kind: index for index, kind in enumerate(KINDS)}

SPAN_SCHEMA = pa.schema(
    [
        pa.field("doc", pa.string(), nullable=False),
        pa.field("span", pa.int32(), nullable=False),
        pa.field("kind", _KIND_TYPE, nullable=False),
        pa.field("tokens", pa.large_list(pa.int32()), nullable=False),
        pa.field("start", pa.int64(), nullable=False),
        pa.field("loss", pa.large_list(pa.float32())),
        pa.field("payload", pa.large_binary()),
        pa.field("payload_shape", pa.list_(pa.int32())),
        pa.field("payload_dtype", pa.string()),
        pa.field("time", pa.struct([("start", pa.int64()), ("end", pa.int64())])),
        pa.field("meta", pa.string()),
        pa.field("seq", pa.int64()),
        pa.field("offset", pa.int64()),
        pa.field("segment", pa.int32()),
    ]
)

_SCALARS = "span start payload_shape payload_dtype time meta seq offset segment".split()
PAYLOAD_DTYPES = ("uint8", "float16", "float32")

# Default weight of a control token as a target. The last one, which is reserved, stands for all
# tokens behind it too.
_WEIGHTS = np.ones(CONTROL_COUNT, np.float32)
_WEIGHTS[sorted(UNTRAINED_TARGETS)] = 0


@dataclass(slots=True)
class Span:
    """A run of tokens of one kind from one document. The fields are the columns of the stream."""

    doc: str
    """Document id; the spans of a document are contiguous, and it begins at `span` 0."""
    span: int
    """Index within the document."""
    kind: str
    """One of KINDS."""
    tokens: np.ndarray
    """int32 [n]; soft positions hold their kind's placeholder."""
    start: int = 0
    """Token offset in the document, kept when a span is cut."""
    loss: np.ndarray | None = None
    """float32 [n], the weight of each token as a target; None is the default of `weights`."""
    payload: np.ndarray | None = None
    """Features of the soft positions, one row each: uint8 [n, 14, 14, 3] or float16 [n, 4, 80]."""
    time: tuple[int, int] | None = None
    """Start and end in the source media, in microseconds."""
    meta: dict[str, Any] | None = None
    """What the source supplied: path, tile box, frame number, language."""
    seq: int | None = None
    """Which packed sequence."""
    offset: int | None = None
    """Position of the first token in the packed sequence."""
    segment: int | None = None
    """Which document of the packed sequence, from 1."""

    def weights(self) -> np.ndarray:
        """float32 [n]: `loss`, or 1 for every token but placeholders and media markers."""
        if self.loss is not None:
            return self.loss
        if self.kind == "text":
            return np.ones(len(self.tokens), np.float32)
        return default_weights(self.tokens)


def default_weights(tokens: np.ndarray) -> np.ndarray:
    """float32 [n]: the weights of tokens that are not in a text."""
    return _WEIGHTS.take(tokens, mode="clip")


class Counts:
    """What a footer says of the rows before it."""

    def __init__(self) -> None:
        self.documents = 0
        self.tokens = 0
        self.kinds: dict[str, int] = {}

    def add(self, span: Span) -> None:
        self.documents += span.span == 0 and span.start == 0
        self.tokens += len(span.tokens)
        self.kinds[span.kind] = self.kinds.get(span.kind, 0) + len(span.tokens)

    def to_dict(self) -> dict[str, Any]:
        return {"documents": self.documents, "tokens": self.tokens, "kinds": self.kinds}


# Arrow batches <-> spans


Stored = tuple[np.ndarray, str, list[int]]
"""A payload as it is stored: its bytes, `payload_dtype` and `payload_shape`."""

Encoder = Callable[[Span], Stored | None]
Decoder = Callable[[np.ndarray, str, list[int]], np.ndarray | None]
"""The payload of its stored form; None if this decoder does not know it.

Raises ValueError for damage.
"""


def stored_raw(span: Span) -> Stored | None:
    """The payload of a span as it is."""
    payload = span.payload
    return None if payload is None else (payload, payload.dtype.name, list(payload.shape))


def batch_of(spans: list[Span], encoder: Encoder = stored_raw) -> pa.RecordBatch:
    """A record batch of SPAN_SCHEMA, the payloads stored as `encoder` says."""
    kinds = pa.DictionaryArray.from_arrays(
        pa.array([_kind_index(span.kind) for span in spans], pa.int8()), _KIND_NAMES
    )
    stored = [encoder(span) for span in spans]
    times = [None if s.time is None else {"start": s.time[0], "end": s.time[1]} for s in spans]
    metas = [
        None if s.meta is None else json.dumps(s.meta, ensure_ascii=False, sort_keys=True)
        for s in spans
    ]
    schema = SPAN_SCHEMA
    columns = [
        pa.array([s.doc for s in spans], pa.string()),
        pa.array([s.span for s in spans], pa.int32()),
        kinds,
        large_list([s.tokens for s in spans], np.int32),
        pa.array([s.start for s in spans], pa.int64()),
        large_list([s.loss for s in spans], np.float32),
        large_binary([None if one is None else one[0] for one in stored]),
        pa.array(
            [None if one is None else one[2] for one in stored],
            schema.field("payload_shape").type,
        ),
        pa.array([None if one is None else one[1] for one in stored], pa.string()),
        pa.array(times, schema.field("time").type),
        pa.array(metas, pa.string()),
        pa.array([s.seq for s in spans], pa.int64()),
        pa.array([s.offset for s in spans], pa.int64()),
        pa.array([s.segment for s in spans], pa.int32()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _kind_index(kind: str) -> int:
    try:
        return _KIND_INDEX[kind]
    except KeyError:
        known = ", ".join(KINDS)
        raise GemtoolError(f"unknown span kind {kind!r}; expected one of {known}") from None


def wrong_columns(batch: pa.RecordBatch) -> str | None:
    """What keeps a batch from being one of spans, if anything.

    Arrow sends the names of the kinds apart from the batches, so no checksum covers them.
    """
    if not batch.schema.equals(SPAN_SCHEMA):
        return "the columns are not those of spans"
    names = batch.column("kind").dictionary
    try:
        names.validate(full=True)
    except pa.ArrowInvalid:
        return "the names of the kinds are damaged"
    return None if names.equals(_KIND_NAMES) else "the kinds are not those of spans"


def spans_of(batch: pa.RecordBatch, decoder: Decoder | None = None) -> Iterator[Span]:
    """The rows of a batch of SPAN_SCHEMA; tokens, loss and payload are views into its memory.

    Args:
        batch: of SPAN_SCHEMA.
        decoder: asked first for each payload, in case it is not stored as it is.

    Raises:
        CorruptInput: a payload is not what its shape and dtype say.
    """
    column = {name: batch.column(name) for name in batch.schema.names}
    docs = column["doc"].to_pylist()
    kinds = column["kind"].to_pylist()
    scalars = {key: column[key].to_pylist() for key in _SCALARS}
    tokens, token_at = list_view(column["tokens"], np.int32)
    loss, loss_at = list_view(column["loss"], np.float32)
    has_loss = column["loss"].is_valid().to_pylist()
    payload, payload_at = binary_view(column["payload"])
    has_payload = column["payload"].is_valid().to_pylist()
    for i in range(batch.num_rows):
        time, meta = scalars["time"][i], scalars["meta"][i]
        features = None
        if has_payload[i]:
            raw = payload[payload_at[i] : payload_at[i + 1]]
            shape, dtype = scalars["payload_shape"][i], scalars["payload_dtype"][i]
            try:
                features = decoder(raw, dtype, shape) if decoder else None
                if features is None:
                    if dtype not in PAYLOAD_DTYPES or shape is None:
                        raise CorruptInput(f"{docs[i]}: row {i} has a payload of type {dtype}")
                    features = raw.view(dtype).reshape(shape)
            except ValueError:
                raise CorruptInput(
                    f"{docs[i]}: a payload of {len(raw):,} bytes is no {dtype} array of {shape}"
                ) from None
        yield Span(
            doc=docs[i],
            span=scalars["span"][i],
            kind=kinds[i],
            tokens=tokens[token_at[i] : token_at[i + 1]],
            start=scalars["start"][i],
            loss=loss[loss_at[i] : loss_at[i + 1]] if has_loss[i] else None,
            payload=features,
            time=None if time is None else (time["start"], time["end"]),
            meta=None if meta is None else json.loads(meta),
            seq=scalars["seq"][i],
            offset=scalars["offset"][i],
            segment=scalars["segment"][i],
        )


# Readers and writers


class SpanReader(Protocol):
    """What `open_spans` gives, whatever the format on the wire."""

    header: Header
    footer: dict[str, Any]

    def __iter__(self) -> Iterator[Span]: ...


class SpanWriter(Protocol):
    """What `create_spans` gives."""

    def append(self, span: Span) -> None: ...


class ArrowSpanReader:
    """Spans of one or more concatenated Arrow streams; the header is the first one's."""

    def __init__(self, source: Source, name: str, *, recover: bool = False) -> None:
        self._source, self._name, self._recover = source, name, recover
        self._stream = CheckedReader(source, name, stream="spans", version=VERSION)
        self.header = Header.from_dict(self._stream.header)
        self.footer: dict[str, Any] = {}

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Verified record batches.

        Raises:
            CorruptInput: damage, unless the reader recovers: then a warning ends the stream.
            GemtoolError: a concatenated stream with another vocabulary or other media settings.
        """
        kept = 0
        try:
            while True:
                for batch in self._stream.batches():
                    if (wrong := wrong_columns(batch)) is not None:
                        raise CorruptInput(f"{self._name}: {wrong}")
                    kept += batch.num_rows
                    yield batch
                self.footer = _sum_footers(self.footer, self._stream.footer)
                if self._source.at_end():
                    return
                self._stream = CheckedReader(
                    self._source, self._name, stream="spans", version=VERSION
                )
                require_same(self.header, Header.from_dict(self._stream.header), self._name)
        except CorruptInput as problem:
            if not self._recover:
                raise
            warn_of_damage(problem, kept, "a batch of up to 1,000 is whole or not at all")

    def __iter__(self) -> Iterator[Span]:
        for batch in self.batches():
            yield from spans_of(batch)


def warn_of_damage(problem: CorruptInput, kept: int, unit: str) -> None:
    """Says what recovering kept: `kept` spans, where `unit` says what is kept as one."""
    found = f"kept the {counted(kept, 'span')} before it" if kept else "nothing before it is whole"
    log.warning(f"{problem}; {found} ({unit})")


def _sum_footers(total: dict[str, Any], footer: dict[str, Any]) -> dict[str, Any]:
    if not total:
        return footer
    kinds = dict(total.get("kinds", {}))
    for kind, count in footer.get("kinds", {}).items():
        kinds[kind] = kinds.get(kind, 0) + count
    summed = {key: total[key] + footer[key] for key in ("documents", "tokens", "batches", "rows")}
    return {**summed, "kinds": kinds}


class ArrowSpanWriter:
    """Cuts rows into batches by their content (bytes and count) and writes them checked."""

    def __init__(self, sink: BinaryIO, header: Header) -> None:
        self._writer = CheckedWriter(sink, SPAN_SCHEMA, header.to_dict())
        self._pending: list[Span] = []
        self._bytes = 0
        self._counts = Counts()

    def append(self, span: Span) -> None:
        self._pending.append(span)
        self._counts.add(span)
        payload = 0 if span.payload is None else span.payload.nbytes
        loss = 0 if span.loss is None else span.loss.nbytes
        self._bytes += 4 * len(span.tokens) + payload + loss
        if self._bytes >= BATCH_BYTES or len(self._pending) >= BATCH_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            self._writer.write(batch_of(self._pending))
            self._pending, self._bytes = [], 0

    def close(self) -> None:
        self._flush()
        self._writer.close(self._counts.to_dict())


def read_spans(source: Source, name: str, *, recover: bool = False) -> SpanReader:
    """The span stream ahead in `source`, Arrow or JSONL.

    Raises:
        CorruptInput: at once or while reading: empty, damaged, truncated or of another format.
    """
    from gemtool.stream.jsonl import JsonlSpanReader

    start = source.peek(4)
    if start == ARROW_MAGIC:
        return ArrowSpanReader(source, name, recover=recover)
    if start.lstrip()[:1] == b"{" or (start and not start.strip()):
        return JsonlSpanReader(source, name, recover=recover)
    if not start:
        raise CorruptInput(f"{name}: empty input; expected a span stream")
    if start == b"ARRO":
        raise CorruptInput(
            f"{name}: an Arrow file, not a stream; if it is of a shard folder, name the folder"
        )
    raise CorruptInput(
        f"{name}: not a span stream (it begins with {start!r}); make one with `gemtool tokenize`"
    )


@contextlib.contextmanager
def open_spans(path: str | None, *, recover: bool = False) -> Iterator[SpanReader]:
    """Opens a span stream, Arrow or JSONL, from a file or stdin; raises as `read_spans`."""
    with open_input(path) as file:
        yield read_spans(Source(file), display_name(path), recover=recover)


@contextlib.contextmanager
def create_spans(
    path: str | None, header: Header, *, format: str = "arrow", force: bool = False
) -> Iterator[SpanWriter]:
    """Creates a span stream; its footer is written only if the block ends without an exception."""
    from gemtool.stream.jsonl import JsonlSpanWriter

    with open_output(path, force=force, binary=format == "arrow") as sink:
        writer: ArrowSpanWriter | JsonlSpanWriter
        writer = (JsonlSpanWriter if format == "jsonl" else ArrowSpanWriter)(sink, header)
        yield writer
        writer.close()
