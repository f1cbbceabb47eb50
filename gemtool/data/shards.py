"""Shard folders: packed sequences on disk, memory-mapped and in random access.

A folder holds `part-00000.arrow`, ... and `manifest.json`. The parts are Arrow IPC files of the
columns of the span stream. Each record batch is one *chunk* of one sequence: the spans that start
in its range of positions, possibly none; its CRC-32 is in its custom metadata. Every sequence has
the same number of chunks, so chunk `c` of the `i`-th sequence of a part is its batch
`i * chunks + c`; who needs a slice of a long sequence reads only that. The manifest is written
last: a folder without one is not finished.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import threading
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from gemtool.errors import CorruptInput, GemtoolError, UsageError, reason
from gemtool.signals import removed_on_signal
from gemtool.stream.checked import batch_crc32
from gemtool.stream.files import LOCK, atomic_file, atomic_write, locked, sync_folder
from gemtool.stream.folders import output_folder
from gemtool.stream.spans import (
    KINDS,
    SPAN_SCHEMA,
    Header,
    Span,
    batch_of,
    spans_of,
    wrong_columns,
)

VERSION = 1
MANIFEST = "manifest.json"
CHUNK = 4096
SHARD_SIZE = 1 << 30

_OURS = re.compile(r"\.?part-\d{5,}\.arrow(\..*)?|\.manifest\.json\..*")
_BUFFER = 1 << 20


# Writing


@contextlib.contextmanager
def create_shards(
    path: str | Path,
    header: Header,
    *,
    shard_size: int = SHARD_SIZE,
    chunk: int | None = None,
    force: bool = False,
    name: str = "the stream",
) -> Iterator[ShardWriter]:
    """Writes a shard folder; it is complete when the block ends without an exception.

    After an exception nothing is left. After a kill, a folder of parts without a manifest is left,
    and the next run starts it afresh. A lock keeps a second writer out.

    Args:
        path: the folder; made if it does not exist.
        header: of the packed stream; its vocabulary, settings and provenance go to the manifest.
        shard_size: bytes after which a part is ended, with the sequence that reaches them.
        chunk: positions of a chunk; at most, and by default, min(length, 4096).
        force: replace a complete folder.
        name: what messages call the stream.

    Raises:
        UsageError: the folder is complete and `force` is false, or it holds other things.
        CorruptInput: the stream is not packed.
        GemtoolError: another process writes the folder, no space.
    """
    if header.packed is None:
        raise CorruptInput(f"{name}: not packed; pipe it through `gemtool pack` first")
    folder = Path(path)
    length = int(header.packed["length"])
    with _claim(folder, force):
        writer = ShardWriter(folder, length, min(chunk or CHUNK, length), shard_size)
        try:
            with writer:
                yield writer
            manifest = {
                "format": "gemtool shards",
                "version": VERSION,
                "complete": True,
                "length": length,
                "chunk": writer.chunk,
                "sequences": writer.sequences,
                "tokens": writer.tokens,
                "files": writer.files,
                "vocab": dict(header.vocab),
                "settings": dict(header.settings),
                "pg": [dict(entry) for entry in header.pg],
            }
            text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
            atomic_write(folder / MANIFEST, text.encode())
        except OSError as problem:
            if problem.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise GemtoolError(f"{folder}: cannot be written: {reason(problem)}") from None


@contextlib.contextmanager
def _claim(folder: Path, force: bool) -> Iterator[None]:
    """Locks a folder and empties it of earlier shards; empties it again after an exception."""
    if (folder / MANIFEST).exists() and not force:
        raise UsageError(f"{folder}: is a complete shard folder already; add -f to replace it")
    with contextlib.ExitStack() as stack:
        stack.enter_context(output_folder(folder))
        try:
            names = {entry.name for entry in folder.iterdir()}
            if names and MANIFEST not in names and not all(map(_OURS.fullmatch, names - {LOCK})):
                raise UsageError(f"{folder}: holds other files; name a new or an empty folder")
            stack.enter_context(locked(folder))
            stack.enter_context(removed_on_signal(lambda: _clean_unfinished(folder)))
        except OSError as problem:
            raise GemtoolError(f"{folder}: cannot be written: {reason(problem)}") from None
        if (folder / MANIFEST).exists() and not force:  # finished by another one just now
            raise UsageError(f"{folder}: is a complete shard folder already; add -f to replace it")
        try:
            # The manifest goes first: without it, nobody reads a mixture of old and new parts.
            (folder / MANIFEST).unlink(missing_ok=True)
            sync_folder(folder)
            _clean(folder)
            yield
        except BaseException:
            _clean(folder)
            raise


def _clean_unfinished(folder: Path) -> None:
    if not (folder / MANIFEST).exists():
        _clean(folder)


def _clean(folder: Path) -> None:
    for entry in list(folder.iterdir()):
        if _OURS.fullmatch(entry.name):
            entry.unlink(missing_ok=True)


class _Summed:
    """A sink that counts and sums what passes to a file; closing it leaves the file open.

    Once `abandoned`, it takes what Arrow still holds back and drops it.
    """

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.bytes = self.crc32 = 0
        self.abandoned = False

    def write(self, data: Any) -> int:
        if self.abandoned:
            return len(data)
        self.crc32 = zlib.crc32(data, self.crc32)
        self.bytes += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        pass

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False


class ShardWriter:
    """Cuts packed sequences into chunks and writes them to parts. Made by `create_shards`.

    Attributes:
        sequences: sequences seen.
        tokens: tokens of each kind.
        files: of each finished part its name, sequences, bytes and CRC-32.
    """

    def __init__(self, folder: Path, length: int, chunk: int, shard_size: int) -> None:
        self._folder, self._length, self._shard_size = folder, length, shard_size
        self.chunk = chunk
        self.chunks = -(-length // chunk)
        self.sequences = 0
        self.tokens = dict.fromkeys(KINDS, 0)
        self.files: list[dict[str, Any]] = []
        self._stack = contextlib.ExitStack()  # of the part that is open
        self._writer: Any = None
        self._sink: Any = None
        self._summed: _Summed | None = None
        self._in_part = 0
        self._pending: list[Span] = []
        self._chunk_index = 0
        self._end = self._segment = 0

    def append(self, span: Span) -> None:
        """Takes the next span of a packed stream; a sequence begins with the span at offset 0.

        Sequences are numbered anew, so that packed streams can be written one after the other.

        Raises:
            CorruptInput: the spans do not follow one another without gaps.
        """
        count = len(span.tokens)
        if count == 0:
            return
        if span.offset is None or span.segment is None:
            raise CorruptInput(f"{span.doc}: span {span.span} has no place in a packed sequence")
        if span.offset == 0:
            self._end_sequence()
            self.sequences += 1
            self._in_part += 1
        if (
            span.offset != self._end
            or span.segment < max(self._segment, 1)
            or span.offset + count > self._length
        ):
            raise CorruptInput(
                f"{span.doc}: span {span.span} is at {span.offset} to {span.offset + count} as "
                f"segment {span.segment} of a sequence of {self._length} that is packed to "
                f"{self._end}, segment {self._segment}"
            )
        self._end, self._segment = span.offset + count, span.segment
        self.tokens[span.kind] += count
        while self._chunk_index < span.offset // self.chunk:
            self._write_chunk()
        self._pending.append(replace(span, seq=self.sequences - 1))

    def _write_chunk(self) -> None:
        if self._writer is None:
            self._begin_part()
        batch = batch_of(self._pending)
        self._writer.write_batch(batch, custom_metadata={"crc32": str(batch_crc32(batch))})
        self._pending = []
        self._chunk_index += 1

    def _end_sequence(self) -> None:
        if self._end:
            while self._chunk_index < self.chunks:
                self._write_chunk()
            if self._sink.tell() >= self._shard_size:
                self._end_part()
        self._chunk_index = self._end = self._segment = 0

    def _part_name(self) -> str:
        return f"part-{len(self.files):05}.arrow"

    def _begin_part(self) -> None:
        file = self._stack.enter_context(atomic_file(self._folder / self._part_name()))
        self._summed = _Summed(file)
        raw = pa.PythonFile(self._summed, mode="w")
        self._sink = pa.BufferedOutputStream(raw, _BUFFER)
        self._writer = pa.ipc.new_file(self._sink, SPAN_SCHEMA)

    def _end_part(self) -> None:
        assert self._summed is not None
        self._writer.close()
        self._sink.close()
        self._stack.close()  # synced and renamed
        self.files.append(
            {
                "name": self._part_name(),
                "sequences": self._in_part,
                "bytes": self._summed.bytes,
                "crc32": self._summed.crc32,
            }
        )
        self._writer, self._in_part = None, 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> None:
        if kind is not None:
            self._abandon()
            self._stack.__exit__(kind, value, traceback)
            return
        with self._stack:  # a failure here must not rename the part either
            try:
                self._end_sequence()
                if self._writer is not None:
                    self._end_part()
            except BaseException:
                self._abandon()
                raise

    def _abandon(self) -> None:
        """Lets Arrow flush into nothing: it complains on stderr where it cannot."""
        if self._summed is not None:
            self._summed.abandoned = True


# Reading


class ShardFolder:
    """The sequences of a complete shard folder: `len(folder)`, `folder[i] -> list[Span]`.

    Files are memory-mapped, and the arrays of the spans are views of the maps. What is read for
    the first time is compared with its checksum. May be used from several threads.

    Attributes:
        manifest: the manifest as written.
        length: positions of a sequence.
        vocab: `fingerprint` and `size`.
        settings: MediaSettings as a dict.
        kinds: the kinds that occur.

    Raises:
        GemtoolError: no shard folder, not complete, or of a newer version.
        CorruptInput: a file is missing, truncated or, when it is read, damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = _read_manifest(self.path)
        try:
            self.length: int = self.manifest["length"]
            self.vocab: dict[str, Any] = self.manifest["vocab"]
            self.settings: dict[str, Any] = self.manifest["settings"]
            self.kinds = frozenset(k for k, count in self.manifest["tokens"].items() if count)
            self._chunks = -(-self.length // self.manifest["chunk"])
            self._sequences: int = self.manifest["sequences"]
            self._first = []  # of each part, its first sequence
            total = 0
            for index, part in enumerate(self.manifest["files"]):
                self._first.append(total)
                total += part["sequences"]
                self._check_size(index, part)
        except (KeyError, TypeError, AttributeError, ZeroDivisionError) as problem:
            raise CorruptInput(f"{self.path / MANIFEST}: malformed ({problem!r})") from None
        if total != self._sequences:
            raise CorruptInput(
                f"{self.path / MANIFEST}: says {self._sequences} sequences, its files hold {total}"
            )
        self._readers: dict[int, Any] = {}
        self._is_verified: dict[int, bytearray] = {}  # of each part that is open, its batches
        self._lock = threading.Lock()

    def _check_size(self, index: int, part: dict[str, Any]) -> None:
        file = self.path / f"part-{index:05}.arrow"
        if part["name"] != file.name:
            raise CorruptInput(
                f"{self.path / MANIFEST}: file {index} is {part['name']!r}, expected {file.name!r}"
            )
        try:
            size = file.stat().st_size
        except OSError:
            raise CorruptInput(f"{file}: is missing; run `gemtool shard` again") from None
        if size != part["bytes"]:
            raise CorruptInput(
                f"{file}: has {size:,} bytes where the manifest says {part['bytes']:,}; copy the "
                "folder again or run `gemtool shard` again"
            )

    @property
    def fingerprint(self) -> str:
        """16 hex digits of what the folder holds, without its provenance."""
        held = {key: value for key, value in self.manifest.items() if key != "pg"}
        return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return self._sequences

    def __getitem__(self, index: int) -> list[Span]:
        """The spans of a sequence, by ascending offset."""
        if not 0 <= index < self._sequences:
            raise IndexError(f"sequence {index} of {self._sequences}")
        part = bisect_right(self._first, index) - 1
        first = (index - self._first[part]) * self._chunks
        with self._lock:
            batches = [self._batch(part, first + chunk) for chunk in range(self._chunks)]
        return [span for batch in batches for span in spans_of(batch)]

    def _batch(self, part: int, number: int) -> pa.RecordBatch:
        reader = self._open(part)
        try:
            batch, metadata = reader.get_batch_with_custom_metadata(number)
            if not self._is_verified[part][number]:
                batch.validate()
                if (wrong := wrong_columns(batch)) is not None:
                    raise self._damaged(part, wrong)
                crc = str(batch_crc32(batch)).encode()
                if metadata is None or metadata.get(b"crc32") != crc:
                    raise self._damaged(part, f"record batch {number} does not match its checksum")
                self._is_verified[part][number] = True
        except (pa.ArrowException, OSError, ValueError) as problem:
            raise self._damaged(part, f"record batch {number}: {problem}") from None
        return batch

    def _open(self, part: int) -> Any:
        if part not in self._readers:
            file = self.path / f"part-{part:05}.arrow"
            try:
                reader = pa.ipc.open_file(pa.memory_map(os.fsencode(file)))
            except (pa.ArrowException, OSError, ValueError) as problem:
                raise self._damaged(part, str(problem)) from None
            expected = self.manifest["files"][part]["sequences"] * self._chunks
            if reader.num_record_batches != expected:
                found = reader.num_record_batches
                raise self._damaged(part, f"{found} record batches, expected {expected}")
            self._readers[part] = reader
            self._is_verified[part] = bytearray(expected)
        return self._readers[part]

    def _damaged(self, part: int, what: str) -> CorruptInput:
        line = what.splitlines()[0] if what else "unreadable"
        return CorruptInput(f"{self.path / f'part-{part:05}.arrow'}: damaged: {line}")

    def verify(self) -> None:
        """Reads every file and compares its CRC-32 with the manifest.

        Raises:
            CorruptInput: naming the first file that differs.
        """
        for index, part in enumerate(self.manifest["files"]):
            crc = 0
            with (self.path / part["name"]).open("rb") as file:
                while block := file.read(8 << 20):
                    crc = zlib.crc32(block, crc)
            if crc != part["crc32"]:
                raise self._damaged(index, "it does not match the checksum in the manifest")


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    try:
        text = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        if not folder.is_dir():
            what = "is not a folder" if folder.exists() else "no such folder"
            raise GemtoolError(f"{folder}: {what}; expected one of `gemtool shard`") from None
        raise GemtoolError(
            f"{folder}: has no {MANIFEST}: not a shard folder, or `gemtool shard` did not finish it"
        ) from None
    try:
        manifest = json.loads(text)
    except ValueError as problem:
        raise CorruptInput(f"{file}: not JSON ({problem})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != "gemtool shards":
        raise CorruptInput(
            f"{file}: not the manifest of a shard folder; make one with `gemtool shard`"
        )
    version = manifest.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise GemtoolError(
            f"{file}: shard version {version}; this gemtool reads up to {VERSION}, "
            "please upgrade it"
        )
    return manifest
