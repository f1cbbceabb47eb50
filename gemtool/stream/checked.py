"""Arrow IPC streams that notice damage.

Arrow itself has no checksums, and reads a stream that was cut between two batches as a clean end.
So a gemtool stream has, inside what any Arrow reader understands:

* in the schema's metadata, a JSON header (`gemtool`) and its CRC-32 (`gemtool.crc32`);
* in each batch's custom metadata, the CRC-32 of the batch (`crc32`), and where its rows are to be
  verified one by one, when they are used, those of the rows (`crc32.rows`, JSON);
* as last batch, one without rows whose custom metadata is the footer (`gemtool.footer`, JSON):
  counts and a running checksum. A stream without it is truncated.

Streams may be concatenated (`cat a b`): readers go on until the real end of the file.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

import pyarrow as pa

from gemtool.errors import CorruptInput, GemtoolError

ARROW_MAGIC = b"\xff\xff\xff\xff"
"""First bytes of an Arrow IPC stream (its continuation marker)."""

_END = ARROW_MAGIC + bytes(4)
"""The end marker of a stream: a message of no length."""

_READ_STEP = 64 << 20

_CUT = "truncated, or still being written"

_STREAMS = {"spans": "span stream", "context": "context"}
_MAKERS = {"spans": "`gemtool tokenize`", "context": "`gemtool prefill`"}


class Source:
    """A binary input that counts its bytes and knows its end.

    Pipes give short reads, and a damaged length must not allocate what it claims: `read` loops in
    bounded steps.

    Attributes:
        position: bytes that were read.
        is_short: whether there were ever fewer bytes than asked for.
    """

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._ahead = b""
        self.position = 0
        self.is_short = False

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:
            data = self._ahead + self._file.read()
            self._ahead = b""
            self.position += len(data)
            return data
        pieces = [self._ahead[:size]] if self._ahead else []
        self._ahead = self._ahead[size:]
        missing = size - sum(map(len, pieces))
        while missing > 0:
            piece = self._file.read(min(missing, _READ_STEP))
            if not piece:
                break
            pieces.append(piece)
            missing -= len(piece)
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self.position += len(data)
        self.is_short |= missing > 0
        return data

    def readline(self, limit: int = -1) -> bytes:
        """One line with its end; empty at the end of the input.

        Of a line longer than `limit` (at least what was peeked at) it is the first `limit` bytes.
        """
        head, self._ahead = self._ahead, b""
        if b"\n" in head:
            line, self._ahead = head[: head.index(b"\n") + 1], head[head.index(b"\n") + 1 :]
        else:
            line = head + self._file.readline(limit if limit < 0 else max(0, limit - len(head)))
        self.position += len(line)
        return line

    def peek(self, size: int) -> bytes:
        """The next `size` bytes (fewer at the end), without consuming them."""
        while len(self._ahead) < size:
            piece = self._file.read(size - len(self._ahead))
            if not piece:
                break
            self._ahead += piece
        return self._ahead[:size]

    def at_end(self) -> bool:
        return not self.peek(1)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def writable(self) -> bool:
        return False

    def close(self) -> None:
        """Closing belongs to whoever opened the file."""


def stream_kind(source: Source) -> str | None:
    """What the Arrow stream ahead calls itself ("spans", "context"), without consuming it.

    None if no header can be read: the reader of the kind that is wanted says what is wrong.
    """
    start = source.peek(8)
    if len(start) < 8 or start[:4] != ARROW_MAGIC:
        return None
    size = int.from_bytes(start[4:], "little")
    if size > _READ_STEP:
        return None
    try:
        schema = pa.ipc.read_schema(pa.py_buffer(source.peek(8 + size)))
        kind = json.loads((schema.metadata or {})[b"gemtool"])["stream"]
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError):
        return None
    return kind if isinstance(kind, str) else None


def encode_json(value: Mapping[str, Any]) -> bytes:
    """JSON as headers and footers are written: compact, UTF-8, keys in their order."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def batch_crc32(batch: pa.RecordBatch) -> int:
    """CRC-32 of a batch as Arrow lays it out; the same before writing and after reading."""
    return zlib.crc32(batch.serialize())


def chain_crc32(running: int, crc: int) -> int:
    """The checksum of a sequence of checksums."""
    return zlib.crc32(crc.to_bytes(4, "big"), running)


@dataclass(frozen=True)
class Counts:
    """What a stream holds so far."""

    batches: int = 0
    rows: int = 0
    crc32: int = 0
    """The running checksum."""

    def plus(self, crc: int, rows: int) -> Counts:
        """With one more batch."""
        return Counts(self.batches + 1, self.rows + rows, chain_crc32(self.crc32, crc))

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


class _Gate:
    """A sink that takes nothing while it is closed."""

    closed = False

    def __init__(self, sink: BinaryIO) -> None:
        self._sink = sink
        self.is_open = True

    def write(self, data: Any) -> int:
        return self._sink.write(data) if self.is_open else memoryview(data).nbytes

    def flush(self) -> None:
        self._sink.flush()

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False

    def close(self) -> None:
        """Closing belongs to whoever opened the sink."""


class CheckedWriter:
    """Writes one checked stream. Without `close` it has no footer, so it counts as truncated.

    With `after`, `sink` is at the end of a stream that holds so much, and it goes on.
    """

    def __init__(
        self,
        sink: BinaryIO,
        schema: pa.Schema,
        header: dict[str, Any],
        after: Counts | None = None,
    ) -> None:
        self._sink = _Gate(sink)
        encoded = encode_json(header)
        metadata = {"gemtool": encoded, "gemtool.crc32": str(zlib.crc32(encoded))}
        self._schema = schema.with_metadata(metadata)
        self._writer = pa.ipc.new_stream(self._sink, self._schema)
        if after is not None:
            # Arrow writes the schema with the first batch: here it is there already.
            self._sink.is_open = False
            self._writer.write_batch(pa.RecordBatch.from_pylist([], schema=self._schema))
            self._sink.is_open = True
        self._counts = after or Counts()

    def write(self, batch: pa.RecordBatch, rows: Sequence[int] = ()) -> None:
        """Appends a batch; `rows`, checksums of its rows, for readers that leave some of them out."""
        crc = batch_crc32(batch)
        metadata = {"crc32": str(crc)}
        if rows:
            metadata["crc32.rows"] = json.dumps(list(rows), separators=(",", ":"))
        self._writer.write_batch(batch, custom_metadata=metadata)
        self._counts = self._counts.plus(crc, batch.num_rows)

    def close(self, footer: dict[str, Any]) -> dict[str, Any]:
        """Writes the footer (`footer` and the counts) and the end of the stream; returns it."""
        whole = {**footer, **self._counts.to_dict()}
        encoded = encode_json(whole)
        empty = pa.RecordBatch.from_pylist([], schema=self._schema)
        self._writer.write_batch(
            empty,
            custom_metadata={"gemtool.footer": encoded, "crc32": str(zlib.crc32(encoded))},
        )
        self._writer.close()
        return whole


class CheckedReader:
    """Reads one checked stream from `source`, which is left at the byte behind it.

    Attributes:
        header: the JSON header, checked.
        footer: the JSON footer; empty until `batches` is exhausted.
        counts: what the batches so far hold.

    Raises:
        CorruptInput: damaged, truncated, or not a gemtool stream of this kind (`stream`).
        GemtoolError: of a newer version than this reader knows.
    """

    def __init__(self, source: Source, name: str, *, stream: str, version: int) -> None:
        self._source, self._name = source, name
        self.footer: dict[str, Any] = {}
        self.counts = Counts()
        if source.at_end():
            raise CorruptInput(f"{name}: empty input; expected a {_STREAMS[stream]}")
        start = source.peek(len(ARROW_MAGIC))
        if start != ARROW_MAGIC:
            if source.position:
                raise self._damaged(f"no further stream follows (it begins with {start!r})")
            raise CorruptInput(
                f"{name}: not a {_STREAMS[stream]} (it begins with {start!r}); make one with "
                f"{_MAKERS[stream]}"
            )
        try:
            self._reader = pa.ipc.open_stream(source)
            metadata = self._reader.schema.metadata or {}
        except (pa.ArrowException, OSError, ValueError, MemoryError) as problem:
            raise self._unreadable("the stream header", problem) from None
        if b"gemtool" not in metadata:
            raise CorruptInput(
                f"{name}: an Arrow stream, but not one of gemtool's; make one with "
                f"{_MAKERS[stream]}"
            )
        encoded = metadata[b"gemtool"]
        if str(zlib.crc32(encoded)).encode() != metadata.get(b"gemtool.crc32"):
            raise self._damaged("the header does not match its checksum")
        self.header = self._object(encoded, "header")
        check_kind(self.header, name, stream, version)
        self.schema: pa.Schema = self._reader.schema.remove_metadata()

    @property
    def position(self) -> int:
        """Bytes of the source that were read: to the end of the last batch, or of the stream."""
        return self._source.position

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The batches, each verified before it is given; ends after a footer that agrees."""
        for batch, _ in self._entries(lazy=False):
            yield batch

    def lazy_batches(self) -> Iterator[tuple[pa.RecordBatch, tuple[int, ...]]]:
        """The batches without a look at what they hold, each with the checksums of its rows, which
        whoever uses a row compares. Without any, the writer gave none: it is verified as a whole.

        That all batches are there, in their order, the footer's running checksum still tells.
        """
        return self._entries(lazy=True)

    def _entries(self, lazy: bool) -> Iterator[tuple[pa.RecordBatch, tuple[int, ...]]]:
        while True:
            count = self.counts.batches
            where = f"record batch {count}"
            try:
                batch, metadata = self._reader.read_next_batch_with_custom_metadata()
                batch.validate(full=lazy)  # nobody else has looked at its offsets then
            except StopIteration:
                after = f" after record batch {count - 1}" if count else ""
                raise self._damaged(f"{_CUT}: the stream ends{after} without its footer") from None
            except (pa.ArrowException, OSError, ValueError, MemoryError, IndexError) as problem:
                raise self._unreadable(where, problem) from None
            fields = dict(metadata) if metadata is not None else {}
            crc = fields.get(b"crc32", b"")
            encoded = fields.get(b"gemtool.footer")
            if encoded is not None:
                if str(zlib.crc32(encoded)).encode() != crc:
                    raise self._damaged("the footer does not match its checksum")
                footer = self._object(encoded, "footer")
                for key, value in self.counts.to_dict().items():
                    if footer.get(key) != value:
                        raise self._damaged(
                            f"the footer says {key} is {footer.get(key)}, the stream has {value}"
                        )
                self.footer = footer
                self._skip_end_marker()
                return
            rows = self._row_checksums(fields, batch, where) if lazy else ()
            if not rows and str(batch_crc32(batch)).encode() != crc:
                raise self._damaged(f"{where} does not match its checksum")
            if not crc.isdigit() or int(crc) >= 1 << 32:
                raise self._damaged(f"{where} has no readable checksum")
            self.counts = self.counts.plus(int(crc), batch.num_rows)
            yield batch, rows

    def _row_checksums(
        self, fields: Mapping[bytes, bytes], batch: pa.RecordBatch, where: str
    ) -> tuple[int, ...]:
        """Those in the metadata of a batch; none where it has none."""
        try:
            rows = tuple(map(int, json.loads(fields.get(b"crc32.rows", b"[]"))))
        except (ValueError, TypeError, RecursionError):
            raise self._damaged(f"{where} has no readable checksums of its rows") from None
        if len(rows) not in (0, batch.num_rows):
            raise self._damaged(f"{where} has {len(rows)} checksums of {batch.num_rows} rows")
        return rows

    def _object(self, encoded: bytes, what: str) -> dict[str, Any]:
        try:
            value = json.loads(encoded)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise self._damaged(f"the {what} is not a JSON object")
        return value

    def _skip_end_marker(self) -> None:
        # Read here: Arrow takes the end of the file for one.
        found = self._source.read(len(_END))
        if bytes(found) != _END:
            what = "truncated in" if _END.startswith(bytes(found)) else "something else than"
            raise self._damaged(f"{what} the end marker after the footer")

    def _unreadable(self, what: str, problem: BaseException) -> CorruptInput:
        """Of what Arrow cannot read, perhaps because the rest of it is missing."""
        if self._source.is_short:
            return self._damaged(f"{_CUT}: the input ends in {what}")
        return self._damaged(f"{what} cannot be read ({_short(problem)})")

    def _damaged(self, what: str) -> CorruptInput:
        return CorruptInput(f"{self._name}: near byte {self._source.position:,}: {what}")


def check_kind(header: dict[str, Any], name: str, stream: str, version: int) -> None:
    """Refuses a header of another kind of stream or of a newer version.

    Raises:
        CorruptInput: another kind.
        GemtoolError: a newer version.
    """
    found = header.get("stream")
    if found != stream:
        raise CorruptInput(
            f"{name}: a {_STREAMS.get(str(found), f'stream of {found!r}')} where a "
            f"{_STREAMS[stream]} is needed; make one with {_MAKERS[stream]}"
        )
    if not isinstance(header.get("version"), int) or header["version"] > version:
        raise GemtoolError(
            f"{name}: {_STREAMS[stream]} version {header.get('version')}; this gemtool reads up to "
            f"{version}, please upgrade it"
        )


def _short(problem: BaseException) -> str:
    return (str(problem).splitlines() or [type(problem).__name__])[0][:120]
