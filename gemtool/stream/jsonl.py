"""The span stream as JSONL: for people, jq and hand-written input.

A header line `{"gemtool": {...}, "crc32": ...}` with its own CRC-32, one line a span, a footer line
`{"footer": {...}}` with counts and the CRC-32 of the lines between. Hand-written input may leave
out header and footer.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from gemtool.errors import CorruptInput, did_you_mean, not_json
from gemtool.stream.checked import Source, check_kind, encode_json
from gemtool.stream.header import VERSION, Header, require_same
from gemtool.stream.spans import (
    KINDS,
    PAYLOAD_DTYPES,
    SPAN_SCHEMA,
    Counts,
    Span,
    warn_of_damage,
)

_COLUMNS = SPAN_SCHEMA.names
_BITS = {"span": 31, "start": 63, "seq": 63, "offset": 63, "segment": 31}


def span_to_dict(span: Span) -> dict[str, Any]:
    """A span as JSON: nulls left out, the payload in base64."""
    row: dict[str, Any] = {
        "doc": span.doc,
        "span": span.span,
        "kind": span.kind,
        "tokens": span.tokens.tolist(),
        "start": span.start,
    }
    if span.loss is not None:
        row["loss"] = span.loss.tolist()
    if span.payload is not None:
        raw = np.ascontiguousarray(span.payload).tobytes()
        row["payload"] = base64.b64encode(raw).decode()
        row["payload_shape"] = list(span.payload.shape)
        row["payload_dtype"] = span.payload.dtype.name
    if span.time is not None:
        row["time"] = {"start": span.time[0], "end": span.time[1]}
    for key in ("meta", "seq", "offset", "segment"):
        if getattr(span, key) is not None:
            row[key] = getattr(span, key)
    return row


def span_from_dict(row: dict[str, Any]) -> Span:
    """The inverse of `span_to_dict`.

    Raises:
        ValueError: a field is missing, unknown or of the wrong type; the message names it.
    """
    for key in row:
        if key not in _COLUMNS:
            raise ValueError(f"unknown field {key!r}{did_you_mean(key, _COLUMNS)}")
    for key, kind in (("doc", str), ("span", int), ("kind", str), ("tokens", list)):
        if not isinstance(row.get(key), kind) or isinstance(row.get(key), bool):
            raise ValueError(f"field {key!r} is missing or not of type {kind.__name__}")
    if row["kind"] not in KINDS:
        raise ValueError(f"kind {row['kind']!r} is not one of {', '.join(KINDS)}")
    for key, bits in _BITS.items():
        value = row.get(key)
        if value is not None and (type(value) is not int or not 0 <= value < 1 << bits):
            raise ValueError(f"{key!r} is {value!r}; expected a whole number below 2**{bits}")
    if not isinstance(row.get("meta", {}), dict | None):
        raise ValueError("'meta' is not an object")
    json.dumps([row["doc"], row.get("meta")], ensure_ascii=False).encode()  # no half surrogates
    try:
        if not all(type(token) is int for token in row["tokens"]):
            raise TypeError
        tokens = np.array(row["tokens"], np.int32)
        loss = None if row.get("loss") is None else np.array(row["loss"], np.float32)
    except (TypeError, ValueError, OverflowError):
        raise ValueError("'tokens' must be a list of whole numbers, 'loss' of numbers") from None
    if len(tokens) and tokens.min() < 0:
        raise ValueError("'tokens' must not be negative")
    if loss is not None and loss.shape != tokens.shape:
        raise ValueError(f"'loss' has {loss.size} values for {len(tokens)} tokens")
    time = row.get("time")
    try:
        return Span(
            doc=row["doc"],
            span=row["span"],
            kind=row["kind"],
            tokens=tokens,
            start=row.get("start") or 0,
            loss=loss,
            payload=_payload(row),
            time=None if time is None else (int(time["start"]), int(time["end"])),
            meta=row.get("meta"),
            seq=row.get("seq"),
            offset=row.get("offset"),
            segment=row.get("segment"),
        )
    except (KeyError, TypeError, OverflowError) as problem:
        raise ValueError(f"a field has the wrong form ({problem})") from None


def _payload(row: dict[str, Any]) -> np.ndarray | None:
    if row.get("payload") is None:
        return None
    shape, dtype = row.get("payload_shape"), row.get("payload_dtype")
    if dtype not in PAYLOAD_DTYPES or not isinstance(shape, list):
        raise ValueError(f"'payload' needs 'payload_shape' and 'payload_dtype' ({PAYLOAD_DTYPES})")
    try:
        raw = base64.b64decode(row["payload"], validate=True)
        return np.frombuffer(raw, dtype).reshape(shape)
    except (binascii.Error, TypeError, ValueError) as problem:
        raise ValueError(f"'payload' is not base64 of {dtype} {shape} ({problem})") from None


FOOTER_LINE = b'{"footer"'
"""How the last line of a stream begins, and no other."""


class JsonlSpanWriter:
    """Writes one JSONL span stream."""

    def __init__(self, sink: BinaryIO, header: Header) -> None:
        self._sink = sink
        self._crc = 0
        self._rows = 0
        self._counts = Counts()
        described = header.to_dict()
        self._line({"gemtool": described, "crc32": zlib.crc32(encode_json(described))})

    def _line(self, value: dict[str, Any]) -> bytes:
        line = json.dumps(value, ensure_ascii=False).encode() + b"\n"
        self._sink.write(line)
        return line

    def append(self, span: Span) -> None:
        self._crc = zlib.crc32(self._line(span_to_dict(span)), self._crc)
        self._rows += 1
        self._counts.add(span)

    def close(self) -> None:
        self._line({"footer": {**self._counts.to_dict(), "rows": self._rows, "crc32": self._crc}})


class JsonlSpanReader:
    """Spans of JSONL: one or more streams with header and footer, or bare rows."""

    def __init__(self, source: Source, name: str, *, recover: bool = False) -> None:
        self._source, self._name, self._recover = source, name, recover
        self._number = 0
        self.header = Header()
        self.footer: dict[str, Any] = {}
        self._first = self._next()
        self._framed = self._first is not None and "gemtool" in self._first[1]
        if self._framed:
            assert self._first is not None
            self.header = self._read_header(self._first[1])
            self._first = None

    def _read_header(self, line: dict[str, Any]) -> Header:
        value = line["gemtool"]
        if not isinstance(value, dict):
            raise self._damaged("the header is not an object")
        if unknown := sorted(line.keys() - {"gemtool", "crc32"}):
            raise self._damaged(f"unknown field {unknown[0]!r} beside the header")
        if line.get("crc32", found := zlib.crc32(encode_json(value))) != found:
            raise self._damaged("the header does not match its checksum")
        check_kind(value, self._name, "spans", VERSION)
        return Header.from_dict(value)

    def _damaged(self, what: str) -> CorruptInput:
        return CorruptInput(f"{self._name}: line {self._number}: {what}")

    def _next(self) -> tuple[bytes, dict[str, Any]] | None:
        """The next line that is not blank, as bytes and as JSON."""
        while line := self._source.readline():
            self._number += 1
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except RecursionError:
                raise self._damaged("not JSON that can be read: it is nested too deeply") from None
            except ValueError as problem:
                raise self._damaged(not_json(problem)) from None
            if not isinstance(value, dict):
                raise self._damaged("not a JSON object")
            return line, value
        return None

    def __iter__(self) -> Iterator[Span]:
        kept = 0
        try:
            for span in self._spans():
                kept += 1
                yield span
        except CorruptInput as problem:
            if not self._recover:
                raise
            warn_of_damage(problem, kept, "a line is whole or not at all")

    def _spans(self) -> Iterator[Span]:
        crc, rows, total, counts, is_open = 0, 0, 0, Counts(), self._framed
        item = self._first or self._next()
        while item is not None:
            line, value = item
            if "footer" in value and "doc" not in value:
                footer = value["footer"]
                found = {"rows": rows, "crc32": crc}
                if not isinstance(footer, dict) or not found.items() <= footer.items():
                    raise self._damaged(f"the footer does not agree with the lines ({found})")
                crc, rows, is_open = 0, 0, False
            elif "gemtool" in value and "doc" not in value:
                if is_open:
                    raise self._damaged("a new header before the footer of the stream")
                require_same(self.header, self._read_header(value), self._name)
                is_open = True
            else:
                try:
                    span = span_from_dict(value)
                except ValueError as problem:
                    raise self._damaged(str(problem)) from None
                crc, rows, total = zlib.crc32(line, crc), rows + 1, total + 1
                counts.add(span)
                yield span
            item = self._next()
        if is_open:
            raise self._damaged("truncated: the stream ends without its footer line")
        self.footer = {**counts.to_dict(), "rows": total}
