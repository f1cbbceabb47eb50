"""Writing shard folders: whole or in parts by several machines, and going on after a stop.

What stands in the folder already is compared with what would be written, byte by byte, as it comes:
a file that is the same stays as it is. So a run that was stopped at any moment is continued by the
same command, a finished one is found finished, and either way the folder is what an undisturbed
run leaves.
"""

from __future__ import annotations

import contextlib
import errno
import json
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from gemtool.data.pixels import RAW, PixelFormat
from gemtool.data.shards import (
    FORMAT,
    INDEX,
    VERSION,
    Names,
    OtherManifest,
    encode_index,
    read_manifest,
    whose,
)
from gemtool.errors import CorruptInput, GemtoolError, UsageError, reason
from gemtool.stream.files import atomic_file, atomic_write, locked, sync_folder
from gemtool.stream.folders import output_folder
from gemtool.stream.header import Header
from gemtool.stream.spans import KINDS, SPAN_SCHEMA, Encoder, Span, batch_of

CHUNK = 4096
SHARD_SIZE = 1 << 30

_BUFFER = 1 << 20


@contextlib.contextmanager
def create_shards(
    path: str | Path,
    header: Header,
    *,
    shard_size: int = SHARD_SIZE,
    chunk: int | None = None,
    part: tuple[int, int] | None = None,
    pixels: PixelFormat = RAW,
    force: bool = False,
    name: str = "the stream",
) -> Iterator[ShardWriter]:
    """Writes a shard folder; it is complete when the block ends without an exception.

    After an exception or a kill, the files that are finished stay, without a manifest. The next
    run compares them with what it would write, and keeps those that are the same. A complete
    folder is compared in the same way, and never changed. A lock keeps a second writer out.

    Args:
        path: the folder; made if it does not exist.
        header: of the packed stream; its vocabulary, settings and provenance go to the manifest.
        shard_size: bytes after which a file is ended, with the sequence that reaches them.
        chunk: positions of a chunk; at most, and by default, min(length, 4096).
        part: (i, n), where this is the i-th of n writers of the folder.
        pixels: how they are stored.
        force: start a folder afresh that is complete or unfinished.
        name: what messages call the stream.

    Raises:
        UsageError: the folder is complete, holds something else and `force` is false; or it holds
            other things, or parts of another division.
        CorruptInput: the stream is not packed.
        GemtoolError: another process writes the folder, no space.
    """
    if header.packed is None:
        raise CorruptInput(f"{name}: not packed; pipe it through `gemtool pack` first")
    folder = Path(path)
    length = int(header.packed["length"])
    positions = min(chunk or CHUNK, length)
    job = {
        "length": length,
        "chunk": positions,
        "shard_size": shard_size,
        "media": str(pixels),
        "vocab": dict(header.vocab),
        "settings": dict(header.settings),
    }
    names = Names(*part) if part else Names()
    with _claim(folder, names, force):
        finished = None
        if (folder / names.manifest).exists():
            finished = read_manifest(folder, names)
            _require_same_job(folder, finished, {"version": VERSION, **job})
        writer = ShardWriter(
            folder, names, length, positions, shard_size, pixels.encode, finished is not None
        )
        try:
            with writer:
                yield writer
            manifest = {
                "format": FORMAT,
                "version": VERSION,
                "complete": True,
                **({"part": [names.index, names.of]} if part else {}),
                **job,
                "sequences": writer.sequences,
                "tokens": writer.tokens,
                "files": writer.files,
                "pg": [dict(entry) for entry in header.pg],
            }
            if finished is not None:
                if {**finished, "pg": None} != {**manifest, "pg": None}:
                    raise _other_content(folder, "it ends later")
                writer.was_complete = True
                return
            _remove_beyond(folder, names, len(writer.files))
            text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
            atomic_write(folder / names.manifest, text.encode())
        except OSError as problem:
            if problem.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise GemtoolError(f"{folder}: cannot be written: {reason(problem)}") from None


def _require_same_job(folder: Path, finished: dict[str, Any], job: dict[str, Any]) -> None:
    for key, value in job.items():
        if finished.get(key) != value:
            raise UsageError(
                f"{folder}: is complete with another {key.replace('_', ' ')} "
                f"({finished.get(key)}, not {value}); add -f to replace it"
            )


def _other_content(folder: Path, what: str) -> UsageError:
    return UsageError(
        f"{folder}: is complete and holds other sequences than these ({what}); add -f to replace it"
    )


@contextlib.contextmanager
def _claim(folder: Path, names: Names, force: bool) -> Iterator[None]:
    """Locks a writer's part of a folder; with `force` it also empties it of earlier shards."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(output_folder(folder))
        try:
            _require_ours(folder, names, force)
            stack.enter_context(locked(folder, names.lock))
            _require_ours(folder, names, force)  # while another held the lock it may have changed
            if force:
                # The manifest goes first: without it, nobody reads a mixture of old and new.
                (folder / names.manifest).unlink(missing_ok=True)
                sync_folder(folder)
            for entry in sorted(folder.iterdir()):
                found = whose(entry.name)
                if found == ("temporary", names) or (force and found == ("file", names)):
                    entry.unlink(missing_ok=True)
        except OSError as problem:
            raise GemtoolError(f"{folder}: cannot be written: {reason(problem)}") from None
        yield


def _require_ours(folder: Path, names: Names, force: bool) -> None:
    """Refuses a folder of other things, or of another division than `names`.

    A folder with a manifest is one of shards, whatever somebody put beside them; without one,
    there must be nothing else.

    Raises:
        UsageError: which of these it is.
    """
    found = [whose(entry.name) for entry in folder.iterdir()]
    ours = [one for one in found if one is not None]
    if len(ours) < len(found) and not any(kind == "manifest" for kind, _ in ours):
        raise UsageError(f"{folder}: holds other files; name a new or an empty folder")
    for kind, other in ours:
        if kind != "lock" and other.of != names.of:
            theirs = f"parts of {other.of}" if other.of else "shards that are no parts"
            mine = f"part {names.index} of {names.of}" if names.of else "shards that are no parts"
            raise UsageError(f"{folder}: holds {theirs}; {mine} cannot be added to them")
    if force and (folder / names.manifest).exists():
        try:
            read_manifest(folder, names)
        except OtherManifest as problem:
            raise UsageError(f"{problem}; name a new or an empty folder") from None
        except GemtoolError:
            pass  # damaged or of another version: that is what -f is for


def _remove_beyond(folder: Path, names: Names, count: int) -> None:
    """Removes files of an earlier, longer run."""
    for entry in sorted(folder.iterdir()):
        number = names.number(entry.name)
        if number is not None and number >= count:
            entry.unlink()


class _Part:
    """One file as it is written: a sink that counts and sums, and compares with what is there.

    As long as the bytes are those of the file that has the name already, nothing is written.
    """

    closed = False

    def __init__(self, target: Path, frozen: bool) -> None:
        self._target, self._frozen = target, frozen
        self._stack = contextlib.ExitStack()
        self._old: BinaryIO | None = None
        self._new: BinaryIO | None = None
        self.bytes = self.crc32 = self._crc = 0
        self._abandoned = False
        if target.exists():
            self._old = self._stack.enter_context(target.open("rb"))
        else:
            self._begin()

    def _begin(self) -> None:
        """From here on a file of our own, which begins as the old one does."""
        if self._frozen:
            raise _other_content(
                self._target.parent, f"{self._target.name} differs near byte {self.bytes:,}"
            )
        self._new = self._stack.enter_context(atomic_file(self._target))
        if self._old is not None:
            self._old.seek(0)
            left = self.bytes
            while left:
                block = self._old.read(min(left, _BUFFER))
                self._new.write(block)
                left -= len(block)
            self._old.close()
            self._old = None

    def write(self, data: Any) -> int:
        size = len(data)
        if self._abandoned:  # what Arrow still held back: it complains on stderr if refused
            return size
        if self._old is not None and self._old.read(size) != bytes(data):
            self._begin()
        if self._new is not None:
            self._new.write(data)
        self.crc32 = zlib.crc32(data, self.crc32)
        self._crc = zlib.crc32(data, self._crc)
        self.bytes += size
        return size

    def cut(self) -> tuple[int, int]:
        """Bytes so far, and the CRC-32 of those since the last cut."""
        crc, self._crc = self._crc, 0
        return self.bytes, crc

    def finish(self) -> bool:
        """Ends the file; it then has its name. Returns whether it had been there."""
        if self._old is not None and self._old.read(1):
            self._begin()
        was_there = self._new is None
        self._stack.close()  # what is new is synced and renamed
        return was_there

    def abandon(self, *failure: Any) -> None:
        """Leaves what was there as it was."""
        self._abandoned = True
        self._stack.__exit__(*failure)

    def flush(self) -> None:
        """Arrow asks for it after each batch; the file is synced when it is whole."""

    def close(self) -> None:
        """Arrow closes its sink; the file is closed by `finish`."""

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False


class ShardWriter:
    """Cuts packed sequences into chunks and writes them to files. Made by `create_shards`.

    Attributes:
        sequences: sequences seen.
        tokens: tokens of each kind.
        files: of each finished file its name, sequences, bytes, CRC-32, and how it ends.
        kept: how many of the files were there already.
        was_complete: whether the folder was, with the same content.
    """

    def __init__(
        self,
        folder: Path,
        names: Names,
        length: int,
        chunk: int,
        shard_size: int,
        encoder: Encoder,
        frozen: bool,
    ) -> None:
        self._folder, self._names = folder, names
        self._length, self._shard_size = length, shard_size
        self._encoder, self._frozen = encoder, frozen
        self.chunk = chunk
        self.chunks = -(-length // chunk)
        self.sequences = self.kept = 0
        self.was_complete = False
        self.tokens = dict.fromkeys(KINDS, 0)
        self.files: list[dict[str, Any]] = []
        self._part: _Part | None = None  # the file that is open
        self._sink: Any = None
        self._writer: Any = None
        self._cuts: list[tuple[int, int]] = []
        self._in_part = 0
        self._pending: list[Span] = []
        self._chunk_index = 0
        self._end = self._segment = 0

    def append(self, span: Span) -> None:
        """Takes the next span of a packed stream; a sequence begins with the span at offset 0.

        Sequences are numbered anew, so that packed streams can be written one after the other.

        Raises:
            CorruptInput: the spans do not follow one another without gaps.
            UsageError: the folder is complete and holds other sequences.
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
        if self._part is None:
            self._begin_part()
        assert self._part is not None
        self._writer.write_batch(batch_of(self._pending, self._encoder))
        self._sink.flush()
        self._cuts.append(self._part.cut())
        self._pending = []
        self._chunk_index += 1

    def _end_sequence(self) -> None:
        if self._end:
            while self._chunk_index < self.chunks:
                self._write_chunk()
            if self._part is not None and self._part.bytes >= self._shard_size:
                self._end_part()
        self._chunk_index = self._end = self._segment = 0

    def _begin_part(self) -> None:
        name = self._names.file(len(self.files))
        self._part = _Part(self._folder / name, self._frozen)
        self._sink = pa.BufferedOutputStream(pa.PythonFile(self._part, mode="w"), _BUFFER)
        self._writer = pa.ipc.new_file(self._sink, SPAN_SCHEMA)

    def _end_part(self) -> None:
        assert self._part is not None
        index = {INDEX: encode_index(self._cuts)}
        self._writer.write_batch(batch_of([]), custom_metadata=index)
        self._writer.close()
        self._sink.close()
        size, crc = self._part.cut()
        self.kept += self._part.finish()
        self.files.append(
            {
                "name": self._names.file(len(self.files)),
                "sequences": self._in_part,
                "bytes": size,
                "crc32": self._part.crc32,
                "tail": {"bytes": size - self._cuts[-1][0], "crc32": crc},
            }
        )
        self._part, self._cuts, self._in_part = None, [], 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *failure: Any) -> None:
        try:
            if failure[0] is None:
                self._end_sequence()
                if self._part is not None:
                    self._end_part()
        except BaseException as problem:
            failure = type(problem), problem, problem.__traceback__
            raise
        finally:
            if self._part is not None:
                self._part.abandon(*failure)
