"""Writing shard folders: whole or in parts by several machines, and going on after a stop.

What stands in the folder already is compared with what would be written, byte by byte, as it comes:
a file that is the same stays as it is. So a run that was stopped at any moment is continued by the
same command, a finished one is found finished, and either way the folder is what an undisturbed
run leaves. What replaces a complete folder is written beside it first, and can be continued, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from gemtool.data.manifest import (
    FORMAT,
    VERSION,
    Names,
    OtherManifest,
    encode_manifest,
    read_manifest,
    staged_name,
    whose,
)
from gemtool.data.pixels import RAW, PixelFormat
from gemtool.data.shardfile import FILES, ShardFile, other_content
from gemtool.errors import CorruptInput, GemtoolError, UsageError, no_room, reason
from gemtool.stream.files import atomic_write, locked, sync_folder
from gemtool.stream.folders import output_folder
from gemtool.stream.header import Header
from gemtool.stream.spans import KINDS, Encoder, Span, batch_of

CHUNK = 4096
SHARD_SIZE = 1 << 30


@contextlib.contextmanager
def create_shards(
    path: str | Path,
    header: Header,
    *,
    shard_size: int = SHARD_SIZE,
    chunk: int | None = None,
    part: tuple[int, int] | None = None,
    pixels: PixelFormat = RAW,
    file_format: str = "arrow",
    force: bool = False,
    name: str = "the stream",
) -> Iterator[ShardWriter]:
    """Writes a shard folder; it is complete when the block ends without an exception.

    After an exception or a kill, the files that are finished stay, without a manifest. The next
    run compares them with what it would write, and keeps those that are the same. A complete
    folder is compared in the same way, and never changed; with `force` it is replaced once the
    new files are whole. A lock keeps a second writer out.

    Args:
        path: the folder; made if it does not exist.
        header: of the packed stream; its vocabulary, settings and provenance go to the manifest.
        shard_size: bytes after which a file is ended, with the sequence that reaches them.
        chunk: positions of a chunk; at most, and by default, min(length, 4096), or the length
            where a record is a whole sequence (array_record).
        part: (i, n), where this is the i-th of n writers of the folder.
        pixels: how they are stored.
        file_format: "arrow" or "array_record".
        force: replace a complete folder.
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
    job = {
        "length": length,
        "chunk": min(chunk or CHUNK, length) if file_format == "arrow" else length,
        "shard_size": shard_size,
        "media": str(pixels),
        "file_format": file_format,
        "vocab": dict(header.vocab),
        "settings": dict(header.settings),
    }
    names = Names(*part) if part else Names()
    with _claim(folder, names, force) as finished:
        if finished is not None and not force:
            _require_same_job(folder, finished, {"version": VERSION, **job})
        writer = ShardWriter(folder, names, job, pixels.encode, finished is not None, force)
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
            if finished is None:
                _remove_beyond(folder, names, writer.files)
                atomic_write(folder / names.manifest, encode_manifest(manifest))
            elif force:
                atomic_write(folder / staged_name(names.manifest), encode_manifest(manifest))
                _adopt(folder, names)
            else:
                unlike = {"pg": None, "crc32": None}
                if {**finished, **unlike} != {**manifest, **unlike}:
                    raise other_content(folder, "it ends later")
                writer.was_complete = True
        except OSError as problem:
            if not no_room(problem):
                raise
            raise GemtoolError(f"{folder}: cannot be written: {reason(problem)}") from None


def _require_same_job(folder: Path, finished: dict[str, Any], job: dict[str, Any]) -> None:
    for key, value in job.items():
        if finished.get(key) != value:
            raise UsageError(
                f"{folder}: is complete with another {key.replace('_', ' ')} "
                f"({finished.get(key)}, not {value}); add -f to replace it"
            )


@contextlib.contextmanager
def _claim(folder: Path, names: Names, force: bool) -> Iterator[dict[str, Any] | None]:
    """Locks a writer's part of a folder; gives its manifest if that part is complete.

    With `force`, a complete part is given as {} whatever is the matter with it.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(output_folder(folder))
        try:
            _require_ours(folder, names, force)
            stack.enter_context(locked(folder, names.lock))
            _require_ours(folder, names, force)  # while another held the lock it may have changed
            waiting = folder / staged_name(names.manifest)
            if waiting.exists():
                try:
                    _adopt(folder, names)
                except CorruptInput:  # what it lists is compared again, as after any stop
                    waiting.unlink()
            complete = (folder / names.manifest).exists()
            for entry in sorted(folder.iterdir()):
                found = whose(entry.name)
                if found == ("temporary", names) or (
                    found == ("staged", names) and not (complete and force)
                ):
                    entry.unlink(missing_ok=True)
        except OSError as problem:
            raise GemtoolError(f"{folder}: cannot be written: {reason(problem)}") from None
        if not complete:
            yield None
        else:
            yield {} if force else read_manifest(folder, names)


def _adopt(folder: Path, names: Names) -> None:
    """Puts staged files, which are whole, in the place of the earlier ones.

    May be stopped at any moment and called again.
    """
    files = read_manifest(folder, names, staged=True)["files"]
    # The old manifest goes first: without one, nobody reads a mixture of old and new files.
    (folder / names.manifest).unlink(missing_ok=True)
    sync_folder(folder)
    for entry in files:
        with contextlib.suppress(FileNotFoundError):  # it has its name already
            (folder / staged_name(entry["name"])).replace(folder / entry["name"])
    _remove_beyond(folder, names, files)
    sync_folder(folder)
    (folder / staged_name(names.manifest)).replace(folder / names.manifest)
    sync_folder(folder)


def _remove_beyond(folder: Path, names: Names, files: list[dict[str, Any]]) -> None:
    """Removes the files of earlier runs that are not among `files`, staged ones included."""
    kept = {entry["name"] for entry in files} | {staged_name(names.manifest)}
    for entry in sorted(folder.iterdir()):
        if entry.name not in kept and whose(entry.name) in (("file", names), ("staged", names)):
            entry.unlink()


def _require_ours(folder: Path, names: Names, force: bool) -> None:
    """Refuses a folder of other things, or of another division than `names`.

    A folder with a manifest is one of shards, whatever somebody put beside them; without one,
    there must be nothing else.

    Raises:
        UsageError: which of these it is.
    """
    found = [whose(entry.name) for entry in folder.iterdir()]
    ours = [one for one in found if one is not None]
    if len(ours) < len(found) and not any(kind in ("manifest", "staged") for kind, _ in ours):
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


class ShardWriter:
    """Cuts packed sequences into chunks and writes them to files. Made by `create_shards`.

    Attributes:
        sequences: sequences seen.
        tokens: tokens of each kind.
        files: of each finished file its name, sequences, bytes and checksums.
        kept: how many of the files were there already.
        was_complete: whether the folder was, with the same content.
    """

    def __init__(
        self,
        folder: Path,
        names: Names,
        job: dict[str, Any],
        encoder: Encoder,
        complete: bool,
        replacing: bool,
    ) -> None:
        """See `create_shards`; `job` is what the manifest says of it.

        Args:
            complete: whether the folder is.
            replacing: whether other sequences may replace those of a complete folder.
        """
        self._folder, self._names, self._encoder = folder, names, encoder
        self._file_format = job["file_format"]
        self._length, self._shard_size = job["length"], job["shard_size"]
        self._frozen = complete and not replacing
        self._staging = complete and replacing
        self.chunk = job["chunk"]
        self.chunks = -(-self._length // self.chunk)
        self.sequences = self.kept = 0
        self.was_complete = False
        self.tokens = dict.fromkeys(KINDS, 0)
        self.files: list[dict[str, Any]] = []
        self._file: ShardFile | None = None  # that is open
        self._in_file = 0
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
            self._in_file += 1
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
        if self._file is None:
            self._file = self._open_file()
        self._file.write(batch_of(self._pending, self._encoder))
        self._pending = []
        self._chunk_index += 1

    def _end_sequence(self) -> None:
        if self._end:
            while self._chunk_index < self.chunks:
                self._write_chunk()
            if self._file is not None and self._file.bytes >= self._shard_size:
                self._end_file(self._file)
        self._chunk_index = self._end = self._segment = 0

    def _next_name(self) -> str:
        return self._names.file(len(self.files), self._file_format)

    def _open_file(self) -> ShardFile:
        name = self._next_name()
        target = self._folder / (staged_name(name) if self._staging else name)
        return FILES[self._file_format](target, self._frozen)

    def _end_file(self, file: ShardFile) -> None:
        summary = file.finish()
        self.kept += file.kept
        self.files.append({"name": self._next_name(), "sequences": self._in_file, **summary})
        self._file, self._in_file = None, 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *failure: Any) -> None:
        try:
            if failure[0] is None:
                self._end_sequence()
                if self._file is not None:
                    self._end_file(self._file)
        except BaseException as problem:
            failure = type(problem), problem, problem.__traceback__
            raise
        finally:
            if self._file is not None:
                self._file.abandon(*failure)
