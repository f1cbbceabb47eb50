"""Shard folders: packed sequences on disk, memory-mapped and in random access.

A folder holds `part-00000.arrow`, ... and `manifest.json`; or, of each of n writers, files
`part-00001-of-00004-00000.arrow`, ... and `manifest-00001-of-00004.json`. The files are Arrow IPC
files of the columns of the span stream. Each record batch is one *chunk* of one sequence: the spans
that start in its range of positions, possibly none. Every sequence has the same number of chunks,
so chunk `c` of the `i`-th sequence of a file is its batch `i * chunks + c`; who needs a slice of a
long sequence reads only that. One more batch, without rows, has the index in its custom metadata:
where each batch ends and the CRC-32 of its bytes as they lie in the file. The manifest is written
last: a folder without one is not finished.

Version 1 had no index, and the CRC-32 of a batch in its own metadata.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import struct
import threading
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from gemtool.data.manifest import MANIFEST, read_folder
from gemtool.data.pixels import decode_pixels
from gemtool.errors import CorruptInput, GemtoolError
from gemtool.stream.checked import batch_crc32
from gemtool.stream.rows import Rows
from gemtool.stream.spans import wrong_columns

INDEX = "gemtool.index"


def encode_index(cuts: Sequence[tuple[int, int]]) -> bytes:
    """The index of a file, from the end and the CRC-32 of each batch: base64 of int64, uint32."""
    ends, crcs = zip(*cuts, strict=True)
    return base64.b64encode(struct.pack(f"<{len(ends)}q{len(crcs)}I", *ends, *crcs))


def _decode_index(text: bytes, count: int) -> tuple[memoryview, memoryview]:
    raw = base64.b64decode(text, validate=True)
    if len(raw) != 12 * count:
        raise ValueError(f"its index is of {len(raw) / 12:g} batches, not {count}")
    # Views, whose items are plain numbers: numpy's would cost more than they are worth here.
    return memoryview(raw)[: 8 * count].cast("q"), memoryview(raw)[8 * count :].cast("I")


class _File:
    """One mapped file, from any thread. Each batch is verified before it is given first."""

    def __init__(self, path: Path, entry: dict[str, Any], batches: int, version: int) -> None:
        self.path, self._batches = path, batches
        self._verified = bytearray(batches)
        self._local = threading.local()  # each thread has its own reader: no lock between them
        self._ends: memoryview | None = None
        try:
            self._map = pa.memory_map(os.fsencode(path))
            self._bytes = memoryview(self._map.read_buffer(entry["bytes"]))
            if version > 1:
                tail = self._bytes[len(self._bytes) - entry["tail"]["bytes"] :]
                if zlib.crc32(tail) != entry["tail"]["crc32"]:
                    raise ValueError("its end does not match its checksum")
            reader = self._reader()
            found = reader.num_record_batches - (version > 1)
            if found != batches:
                raise ValueError(f"{found} record batches, expected {batches}")
            if version > 1:
                _, fields = reader.get_batch_with_custom_metadata(batches)
                self._ends, self._crcs = _decode_index(dict(fields)[INDEX.encode()], batches)
                # The first stretch has the schema and the names of the kinds, too.
                if (wrong := wrong_columns(self.batch(0))) is not None:
                    raise ValueError(wrong)
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as problem:
            raise self._damaged(str(problem)) from None

    def _reader(self) -> Any:
        try:
            return self._local.reader
        except AttributeError:
            self._local.reader = pa.ipc.open_file(self._map)
            return self._local.reader

    def batch(self, number: int) -> pa.RecordBatch:
        """Raises CorruptInput if it does not match its checksum."""
        try:
            if self._verified[number]:
                return self._reader().get_batch(number)
            batch = self._first(number) if self._ends is None else self._checked(number)
        except (pa.ArrowException, OSError, ValueError) as problem:
            raise self._damaged(f"record batch {number}: {problem}") from None
        self._verified[number] = 1
        return batch

    def _checked(self, number: int) -> pa.RecordBatch:
        assert self._ends is not None
        start, end = self._ends[number - 1] if number else 0, self._ends[number]
        if zlib.crc32(self._bytes[start:end]) != self._crcs[number]:
            raise ValueError("it does not match its checksum")
        return self._reader().get_batch(number)

    def _first(self, number: int) -> pa.RecordBatch:
        """A batch of a file of version 1."""
        batch, fields = self._reader().get_batch_with_custom_metadata(number)
        batch.validate()
        if (wrong := wrong_columns(batch)) is not None:
            raise ValueError(wrong)
        if fields is None or fields.get(b"crc32") != str(batch_crc32(batch)).encode():
            raise ValueError("it does not match its checksum")
        return batch

    def _damaged(self, what: str) -> CorruptInput:
        line = what.splitlines()[0] if what else "unreadable"
        return CorruptInput(f"{self.path}: damaged: {line}")

    def verify(self, crc32: int) -> None:
        """Raises CorruptInput if the bytes of the file have another CRC-32."""
        found = 0
        for start in range(0, len(self._bytes), 8 << 20):
            found = zlib.crc32(self._bytes[start : start + (8 << 20)], found)
        if found != crc32:
            raise self._damaged("it does not match the checksum in the manifest")


class ShardFolder:
    """The sequences of a complete shard folder: `len(folder)`, `folder[i] -> Rows`.

    Files are memory-mapped, and the arrays of the spans are views of the maps. What is read for
    the first time is compared with its checksum. May be used from several threads.

    Attributes:
        manifest: the manifest as written; of several parts, all of them as one.
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
        self.manifest = read_folder(self.path)
        if (kept_as := self.manifest.get("file_format", "arrow")) != "arrow":
            raise GemtoolError(
                f"{self.path}: an export for other trainers ({kept_as}), which gemtool does not read; "
                "write a folder with `gemtool shard --to arrow`"
            )
        try:
            self.length: int = self.manifest["length"]
            self.vocab: dict[str, Any] = self.manifest["vocab"]
            self.settings: dict[str, Any] = self.manifest["settings"]
            self.kinds = frozenset(k for k, count in self.manifest["tokens"].items() if count)
            self._chunks = -(-self.length // self.manifest["chunk"])
            self._entries: list[dict[str, Any]] = self.manifest["files"]
            self._first = []  # of each file, its first sequence
            total = 0
            for entry in self._entries:
                self._first.append(total)
                total += entry["sequences"]
                self._check_size(entry)
        except (KeyError, TypeError, AttributeError, ZeroDivisionError) as problem:
            raise CorruptInput(f"{self.path / MANIFEST}: malformed ({problem!r})") from None
        if total != self.manifest["sequences"]:
            raise CorruptInput(
                f"{self.path / MANIFEST}: says {self.manifest['sequences']} sequences, its files "
                f"hold {total}"
            )
        self._sequences = total
        self._files: dict[int, _File] = {}
        self._lock = threading.Lock()

    def _check_size(self, entry: dict[str, Any]) -> None:
        file = self.path / entry["name"]
        try:
            size = file.stat().st_size
        except OSError:
            raise CorruptInput(f"{file}: is missing; run `gemtool shard` again") from None
        if size != entry["bytes"]:
            raise CorruptInput(
                f"{file}: has {size:,} bytes where the manifest says {entry['bytes']:,}; copy the "
                "folder again or run `gemtool shard` again"
            )

    @property
    def fingerprint(self) -> str:
        """16 hex digits of what the folder holds, without its provenance."""
        held = {key: value for key, value in self.manifest.items() if key not in ("pg", "crc32")}
        return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return self._sequences

    def __getitem__(self, index: int) -> Rows:
        """The spans of a sequence, by ascending offset."""
        if not 0 <= index < self._sequences:
            raise IndexError(f"sequence {index} of {self._sequences}")
        number = bisect_right(self._first, index) - 1
        file = self._files.get(number) or self._open(number)
        first = (index - self._first[number]) * self._chunks
        batches = [file.batch(chunk) for chunk in range(first, first + self._chunks)]
        return Rows(batches, seq=index, decoder=decode_pixels)

    def _open(self, number: int) -> _File:
        with self._lock:
            if number not in self._files:
                entry = self._entries[number]
                path, batches = self.path / entry["name"], entry["sequences"] * self._chunks
                self._files[number] = _File(path, entry, batches, self.manifest["version"])
            return self._files[number]

    def verify(self) -> None:
        """Reads every file and compares its CRC-32 with the manifest.

        Raises:
            CorruptInput: naming the first file that differs.
        """
        for number, entry in enumerate(self._entries):
            self._open(number).verify(entry["crc32"])
