"""The context stream: what a model keeps of a document, as a file (prefill writes, decode reads).

A checked Arrow IPC stream (`gemtool.stream.checked`); several documents are several streams, one
after the other. The header says which model, vocabulary and layout the arrays belong to. A record
batch is one *part*, a row one array:

* `block`: a range of at most 4,096 tokens: their ids, and the rows that the full-attention
  layers keep of them for good (keys and values);
* `state`: what the next position needs besides the blocks (windows, convolution tails), after
  every 16th block, so that an interrupted prefill could go on there, and at the end;
* `end`: the scores of the next token after the last one.

Each row has a checksum of its own, so that a context can be opened without reading keys and values:
these are verified when they are used. The footer has the length, the tokens of each kind and hashes
of tokens and media. The id of a context is the SHA-256 of its footer. Anything that reads Arrow reads
this: `data` holds `shape` values of `dtype`, C order, little endian.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from gemtool.errors import CorruptInput, GemtoolError
from gemtool.stream.checked import CheckedReader, CheckedWriter, Counts, Source, encode_json
from gemtool.stream.columns import binary_view, large_binary
from gemtool.stream.files import display_name, is_stdin, open_input
from gemtool.stream.mapped import MappedSource, source_of

VERSION = 1
BLOCK = 4096
"""Tokens in a block."""
STATE_EVERY = 16 * BLOCK
"""Tokens between states."""

CONTEXT_SCHEMA = pa.schema(
    [
        pa.field("part", pa.string(), nullable=False),
        pa.field("start", pa.int64(), nullable=False),
        pa.field("stop", pa.int64(), nullable=False),
        pa.field("layer", pa.int32()),
        pa.field("name", pa.string(), nullable=False),
        pa.field("shape", pa.list_(pa.int64()), nullable=False),
        pa.field("dtype", pa.string(), nullable=False),
        pa.field("data", pa.large_binary(), nullable=False),
    ]
)

_DTYPES = ("float16", "float32", "int32", "int64", "uint8")


@dataclass(frozen=True)
class Parent:
    """The context that another one continues."""

    id: str
    path: str
    """Its file, relative to the folder of the file that names it."""
    index: int = 0
    """Which of the contexts in that file."""


@dataclass(frozen=True)
class ContextHeader:
    """What is known of a context before its first token."""

    doc: str
    """Id of the document."""
    model: str
    """Fingerprint of the checkpoint."""
    vocab: Mapping[str, Any]
    """`fingerprint` and `size` of the vocabulary."""
    layout: tuple[Mapping[str, Any], ...]
    """One table a layer: how it attends and the shapes of what it keeps."""
    kv_dtype: str
    """Of keys and values."""
    block: int = BLOCK
    parent: Parent | None = None
    """The context that this one continues: its blocks before `start` are in that file alone."""
    start: int = 0
    """Tokens that are the parent's, whole blocks; the first block here begins with the next."""
    pg: tuple[Mapping[str, Any], ...] = ()
    """Provenance: one entry a program, oldest first."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "stream": "context",
            "version": VERSION,
            "doc": self.doc,
            "model": self.model,
            "vocab": dict(self.vocab),
            "layout": [dict(layer) for layer in self.layout],
            "kv_dtype": self.kv_dtype,
            "block": self.block,
            "parent": None if self.parent is None else asdict(self.parent),
            "start": self.start,
            "pg": [dict(entry) for entry in self.pg],
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> ContextHeader:
        return cls(
            doc=value["doc"],
            model=value["model"],
            vocab=value["vocab"],
            layout=tuple(value["layout"]),
            kv_dtype=value["kv_dtype"],
            block=value["block"],
            parent=None if value.get("parent") is None else Parent(**value["parent"]),
            start=value.get("start", 0),
            pg=tuple(value.get("pg", ())),
        )


def require_match(found: ContextHeader, wanted: ContextHeader, name: str) -> None:
    """Refuses a context that was not made by this model.

    Args:
        found: the header of the context.
        wanted: the header that the model would write (its `doc`, `parent` and `pg` do not matter).
        name: what messages call the context.

    Raises:
        GemtoolError: naming what differs: model, vocabulary, layout, precision or block size.
    """
    pairs = (
        ("model", found.model, wanted.model),
        ("vocabulary", found.vocab.get("fingerprint"), wanted.vocab.get("fingerprint")),
        ("layout", _layout_text(found), _layout_text(wanted)),
        ("key and value type", found.kv_dtype, wanted.kv_dtype),
        ("block size", found.block, wanted.block),
    )
    differing = [f"its {what} is {a}, the checkpoint's {b}" for what, a, b in pairs if a != b]
    if differing:
        raise GemtoolError(
            f"{name}: this context belongs to another model: {'; '.join(differing)}; decode with "
            "the checkpoint that made it, or prefill the document again"
        )


def _layout_text(header: ContextHeader) -> str:
    """The layout in a few words: '4 layers (window window full window), 3f2a91c4'."""
    encoded = json.dumps([dict(layer) for layer in header.layout], sort_keys=True)
    digest = hashlib.sha256(encoded.encode()).hexdigest()[:8]
    kinds = " ".join(str(layer.get("attention", "?")) for layer in header.layout)
    return f"{len(header.layout)} layers ({kinds}), {digest}"


@dataclass(frozen=True)
class Origin:
    """The mapped file of which the arrays of a part are views."""

    name: str
    """In messages."""
    source: MappedSource
    checksums: Mapping[str, int]
    """By path; empty where the part was verified as a whole."""
    left: set[str]
    """The paths of the arrays that nobody has compared with theirs."""


@dataclass(frozen=True)
class Part:
    """One record batch of a context."""

    part: str
    """"block", "state" or "end"."""
    start: int
    """First token that the arrays are about; of a state, the number of tokens before it."""
    stop: int
    """Token behind the last."""
    arrays: Mapping[str, np.ndarray]
    """By path: "tokens", "logits", "layers/2/k"."""
    origin: Origin | None = None
    """None: nothing of it is a view of a file."""

    def crc32(self, path: str) -> int:
        """The checksum of one of its arrays, with what the file says about it."""
        array = self.arrays[path]
        about = f"{self.part} {self.start} {self.stop} {path} {array.dtype.name} {array.shape}"
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        return zlib.crc32(data, zlib.crc32(about.encode()))

    def verify(self, path: str, *, again: bool = False) -> None:
        """Compares an array with its checksum, unless that was done when it was read, or `again`.

        Raises:
            CorruptInput: it is damaged.
        """
        origin = self.origin
        if origin is None or not (path in origin.left or again):
            return
        if again and path not in origin.checksums:
            raise CorruptInput(f"{origin.name}: was written to while it was read; begin again")
        if origin.checksums[path] != self.crc32(path):
            raise CorruptInput(
                f"{origin.name}: near byte {origin.source.offset(self.arrays[path]):,}: {path} of "
                f"tokens {self.start:,} to {self.stop:,} does not match its checksum"
            )


@dataclass(frozen=True)
class Row:
    """One array of a context, as it stands in the stream."""

    part: str
    start: int
    stop: int
    layer: int | None
    """None: of no layer."""
    name: str
    data: np.ndarray

    def describe(self) -> dict[str, Any]:
        """Everything but the values."""
        return {
            "part": self.part,
            "start": self.start,
            "stop": self.stop,
            "layer": self.layer,
            "name": self.name,
            "shape": list(self.data.shape),
            "dtype": self.data.dtype.name,
        }


def context_id(footer: Mapping[str, Any]) -> str:
    """The id of a context: the SHA-256 of its footer, as it stands in the stream."""
    return hashlib.sha256(encode_json(footer)).hexdigest()


class ContextWriter:
    """Writes one context. Without `close`, what was written has no footer and is truncated.

    With `after`, `sink` is at the end of a context that holds so much, of `tokens` int32 [n], and it
    goes on.
    """

    def __init__(
        self,
        sink: BinaryIO,
        header: ContextHeader,
        after: Counts | None = None,
        tokens: np.ndarray | None = None,
    ) -> None:
        self.header = header
        self.length = header.start
        self._writer = CheckedWriter(sink, CONTEXT_SCHEMA, header.to_dict(), after)
        self._tokens = hashlib.sha256()
        if tokens is not None:
            self._tokens.update(np.ascontiguousarray(tokens, "<i4").tobytes())
            self.length += len(tokens)

    def block(self, tokens: np.ndarray, arrays: Mapping[str, np.ndarray]) -> None:
        """Appends the next tokens, int32 [n], and what layers keep of them, each [1, n, ...]."""
        start, stop = self.length, self.length + len(tokens)
        tokens = np.ascontiguousarray(tokens, "<i4")
        self._tokens.update(tokens.tobytes())
        self._write(Part("block", start, stop, {"tokens": tokens, **arrays}))
        self.length = stop

    def state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Appends what the next position needs besides the blocks so far."""
        self._write(Part("state", self.length, self.length, arrays))

    def end(self, logits: np.ndarray) -> None:
        """Appends the scores float32 [V] of the token after the last."""
        self._write(Part("end", self.length, self.length, {"logits": logits}))

    def close(self, kinds: Mapping[str, int], media: Mapping[str, str]) -> dict[str, Any]:
        """Writes the footer and returns it.

        Args:
            kinds: tokens by kind of span, those of its parent too.
            media: SHA-256 of the raw features by modality, in the order of the document; of a
                modality that the parent has, of the parent's (in hexadecimal) and the features after.
        """
        return self._writer.close(
            {
                "doc": self.header.doc,
                "model": self.header.model,
                "length": self.length,
                "kinds": dict(kinds),
                "tokens_sha256": self._tokens.hexdigest(),
                "media_sha256": dict(media),
            }
        )

    def _write(self, part: Part) -> None:
        arrays = list(part.arrays.values())
        layers, names = zip(*map(_split, part.arrays), strict=True)
        schema = CONTEXT_SCHEMA
        count = len(arrays)
        columns = [
            pa.array([part.part] * count, pa.string()),
            pa.array([part.start] * count, pa.int64()),
            pa.array([part.stop] * count, pa.int64()),
            pa.array(layers, pa.int32()),
            pa.array(names, pa.string()),
            pa.array([list(array.shape) for array in arrays], schema.field("shape").type),
            pa.array([array.dtype.name for array in arrays], pa.string()),
            large_binary(arrays),
        ]
        rows = [part.crc32(path) for path in part.arrays]
        self._writer.write(pa.RecordBatch.from_arrays(columns, schema=schema), rows)


def _split(path: str) -> tuple[int | None, str]:
    """Layer and name of a path: "layers/2/k" is (2, "k"), "tokens" is (None, "tokens")."""
    if path.startswith("layers/"):
        _, layer, name = path.split("/", 2)
        return int(layer), name
    return None, path


class ContextReader:
    """Reads one context; its parts can be gone through once.

    Attributes:
        header: what the context was made with.
        footer: counts and hashes; empty until `parts` is exhausted.
        name: what messages call it.
        folder: where its file is, to which the path of its parent is relative.
        index: which of the contexts of its file it is.
    """

    def __init__(
        self, source: Source, name: str, folder: Path | None = None, index: int = 0
    ) -> None:
        self.folder, self.index = folder or Path(), index
        self._source = source
        self._stream = CheckedReader(source, name, stream="context", version=VERSION)
        if not self._stream.schema.equals(CONTEXT_SCHEMA):
            raise CorruptInput(f"{name}: the columns are not those of a context")
        try:
            self.header = ContextHeader.from_dict(self._stream.header)
        except (KeyError, TypeError) as problem:
            raise CorruptInput(f"{name}: the header lacks {problem}") from None
        start, block = self.header.start, self.header.block
        if (start and self.header.parent is None) or start < 0 or start % block:
            raise CorruptInput(f"{name}: begins at token {start:,}, which no parent ends with")
        self.name = name
        self.footer: dict[str, Any] = {}
        self._lazy = False
        self._parts = self._read()

    @property
    def position(self) -> int:
        """Bytes of the input up to the end of the last part that was given."""
        return self._stream.position

    @property
    def counts(self) -> Counts:
        """What the parts so far hold."""
        return self._stream.counts

    @property
    def id(self) -> str:
        """The context's id, once `parts` is exhausted."""
        return context_id(self.footer)

    def parts(self, lazy: bool = False) -> Iterator[Part]:
        """The parts in order, each verified before it is given. Arrays are views of the input.

        With `lazy`, of a file that is mapped, the keys and values of blocks are not: they are not even
        read. Whoever uses one calls `Part.verify` first.

        Raises:
            CorruptInput: damaged or truncated, or its parts do not fit together.
        """
        self._lazy = lazy and isinstance(self._source, MappedSource)
        return self._parts

    def rows(self) -> Iterator[Row]:
        """The arrays of all parts, one by one; raises as `parts`."""
        for part in self._parts:
            for path, array in part.arrays.items():
                yield Row(part.part, part.start, part.stop, *_split(path), array)

    def _read(self) -> Iterator[Part]:
        length, ended, tokens = self.header.start, False, hashlib.sha256()
        for part in self._lazy_parts() if self._lazy else self._whole_parts():
            if ended or part.start != length or part.stop < length:
                raise CorruptInput(
                    f"{self.name}: a {part.part} of tokens {part.start:,} to {part.stop:,} "
                    f"follows token {length:,}"
                )
            if part.part == "block":
                ids = part.arrays.get("tokens", np.empty(0, np.int32))
                if len(ids) != part.stop - part.start:
                    raise CorruptInput(f"{self.name}: the block at token {length:,} is not whole")
                tokens.update(ids.tobytes())
                length = part.stop
            ended = part.part == "end"
            yield part
        found = {"length": length, "tokens_sha256": tokens.hexdigest()}
        if not ended:
            raise CorruptInput(f"{self.name}: the context has no end part")
        for key, value in found.items():
            if self._stream.footer.get(key) != value:
                raise CorruptInput(f"{self.name}: the footer does not agree with the parts ({key})")
        self.footer = self._stream.footer

    def _whole_parts(self) -> Iterator[Part]:
        source, origin = self._source, None
        if isinstance(source, MappedSource):
            origin = Origin(self.name, source, {}, set())
        for batch in self._stream.batches():
            yield replace(_part_of(batch, self.name), origin=origin)

    def _lazy_parts(self) -> Iterator[Part]:
        source = self._source
        assert isinstance(source, MappedSource)
        for batch, rows in self._stream.lazy_batches():
            try:
                part = _part_of(batch, self.name)
                checksums = dict(zip(part.arrays, rows, strict=bool(rows)))
            except (ValueError, TypeError) as problem:
                count = self._stream.counts.batches - 1
                raise CorruptInput(
                    f"{self.name}: record batch {count} cannot be read ({problem})"
                ) from None
            left = set(checksums)
            part = replace(part, origin=Origin(self.name, source, checksums, left))
            for path in part.arrays:
                if part.part != "block" or path.rpartition("/")[2] not in ("k", "v"):
                    part.verify(path)
                    left.discard(path)
            yield part


def _part_of(batch: pa.RecordBatch, name: str) -> Part:
    columns = {key: batch.column(key).to_pylist() for key in batch.schema.names if key != "data"}
    places = set(zip(columns["part"], columns["start"], columns["stop"], strict=True))
    if len(places) != 1:
        raise CorruptInput(f"{name}: a record batch of {len(places)} parts; expected one")
    ((kind, start, stop),) = places
    values, at = binary_view(batch.column("data"))
    arrays = {}
    for row in range(batch.num_rows):
        layer, short = columns["layer"][row], columns["name"][row]
        path = short if layer is None else f"layers/{layer}/{short}"
        shape, dtype = columns["shape"][row], columns["dtype"][row]
        raw = values[at[row] : at[row + 1]]
        if dtype not in _DTYPES or len(raw) != math.prod(shape) * np.dtype(dtype).itemsize:
            raise CorruptInput(f"{name}: {path} at token {start:,} is no {dtype} array of {shape}")
        arrays[path] = np.frombuffer(raw, dtype).reshape(shape)
    return Part(kind, start, stop, arrays)


@contextlib.contextmanager
def open_contexts(path: str | None, *, grows: bool = False) -> Iterator[Iterator[ContextReader]]:
    """Opens a file (memory-mapped) or stdin that holds one or more contexts.

    The contexts come in order; parts that were not read are verified before the next one is given.
    `grows`: this process writes behind them, so that only it does.

    Raises:
        GemtoolError: the file cannot be read.
        CorruptInput: at once or while reading: empty, damaged, truncated or not a context.
    """
    name = display_name(path)
    with open_input(path) as file:
        source = source_of(file, grows=grows)
        yield read_contexts(source, name, None if is_stdin(path) else Path(str(path)).parent)


def read_contexts(source: Source, name: str, folder: Path | None = None) -> Iterator[ContextReader]:
    """The contexts ahead in `source`, a file in `folder`; raises as `open_contexts`."""
    for index in itertools.count():
        reader = ContextReader(source, name, folder, index)
        yield reader
        for _ in reader.parts():
            pass
        if source.at_end():
            return


def context_documents(path: str) -> frozenset[str] | None:
    """The documents that the contexts of a file are of, by their headers, without reading the rest.

    None where that cannot be known: a pipe, or damage, which the reader will report.
    """
    if not Path(path).is_file():
        return None
    found = set()
    try:
        with pa.memory_map(path) as file:
            while file.tell() < file.size():
                stream = pa.ipc.open_stream(file)
                found.add(json.loads((stream.schema.metadata or {})[b"gemtool"])["doc"])
                for _ in stream:  # views of the map
                    pass
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError):
        return None
    return frozenset(found) or None
