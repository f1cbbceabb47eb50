"""Files, folders and pipes as documents."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from gemtool import log
from gemtool.data.documents import Document, Part, control, media_parts, text_parts
from gemtool.data.pieces import Piece
from gemtool.data.records import Record, parse_record
from gemtool.data.settings import MediaSettings
from gemtool.data.sniff import EXTENSIONS, HEAD, RECORDS, Modality, extension_kind, sniff
from gemtool.data.text import text_chunks
from gemtool.errors import CorruptInput, GemtoolError, UsageError, reason
from gemtool.stream.checked import Source
from gemtool.stream.files import display_name, is_stdin, open_input


def list_inputs(paths: Sequence[str], modality: Modality, *, check: bool = True) -> list[str]:
    """Files to read, in order: folders replaced by the files in them of the wanted modality.

    Folders are walked in sorted order; hidden entries and links to folders are left out.

    Args:
        paths: files, folders, `-`.
        modality: what to look for in folders, by file name.
        check: refuse paths that do not exist now, not when their turn comes.

    Raises:
        UsageError: `-` twice.
        GemtoolError: a file does not exist, or a folder holds nothing of the modality.
    """
    if sum(map(is_stdin, paths)) > 1:
        raise UsageError("standard input (-) can be given only once")
    files: list[str] = []
    for path in paths:
        if not is_stdin(path) and Path(path).is_dir():
            found = list(_walk(path, modality))
            if not found and check:
                what = "known" if modality == Modality.auto else modality
                raise GemtoolError(f"{path}: the folder holds no {what} files")
            files += found
        else:
            if check and not is_stdin(path) and not os.path.lexists(path):
                raise GemtoolError(f"{path}: cannot be read: no such file or directory")
            files.append(path)
    return files


def _walk(folder: str, modality: Modality) -> Iterator[str]:
    wanted = {modality.value} if modality != Modality.auto else set(EXTENSIONS)
    with os.scandir(folder) as entries:
        listing = sorted(entries, key=lambda entry: entry.name)
    for entry in listing:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path, modality)
        elif entry.is_file() and extension_kind(entry.name) in wanted:
            yield entry.path
        else:
            log.debug(f"{entry.path}: left out, by its name or because it is a link to a folder")


def read_list(path: str) -> list[str]:
    """Paths from a file, one a line, or with a NUL behind each (`find -print0`)."""
    with open_input(path) as file:
        content = file.read()
    paths = content.split(b"\0") if b"\0" in content else content.splitlines()
    return [os.fsdecode(path) for path in paths if path.strip()]


def read_documents(
    paths: Iterable[str | None], settings: MediaSettings, modality: Modality = Modality.auto
) -> Iterator[Document]:
    """The documents of each input in turn: one, or for JSONL one a line.

    What is wrong with a document is raised by its parts, so that others can still be read.

    Args:
        paths: as from `list_inputs`; None is stdin.
        settings: the token budgets of media.
        modality: what to take the inputs for; `auto` looks at their content, then their name.
    """
    for path in paths:
        name = _printable(display_name(path))
        try:
            with open_input(path) as file:
                source = Source(file)
                kind = modality.value
                if modality == Modality.auto:
                    kind = sniff(source.peek(HEAD), name)
                if kind == RECORDS:
                    folder = Path() if is_stdin(path) else Path(str(path)).parent
                    yield from _records(source, name, folder, settings)
                elif kind == "text":
                    yield Document(name, _guarded(text_parts(text_chunks(source)), name))
                else:
                    # A regular file can be read twice, and seeking helps some containers.
                    seekable = not is_stdin(path) and Path(str(path)).is_file()
                    media = str(path) if seekable else source
                    yield Document(name, _media(kind, media, settings, name))
        except (GemtoolError, OSError) as problem:
            yield Document(name, _failing(problem, name))


def _printable(path: str) -> str:
    """A path as a document id: file names are bytes, ids are text."""
    return os.fsencode(path).decode("utf-8", "replace")


def _media(
    kind: str,
    source: str | Source,
    settings: MediaSettings,
    name: str,
    weight: float | None = None,
) -> Iterator[Part]:
    pieces = _pieces(kind, source, settings, name)
    return _guarded(media_parts(pieces, runs=kind == "audio", weight=weight), name)


def _pieces(kind: str, source: Any, settings: MediaSettings, name: str) -> Iterator[Piece]:
    """Runs the front end of a kind, imported only now."""
    if kind == "image":
        from gemtool.data.image import image_pieces

        # Pillow seeks.
        return image_pieces(source if isinstance(source, str) else source.read(), settings, name)
    if kind == "audio":
        from gemtool.data.audio import audio_pieces

        return audio_pieces(source, settings, name)
    from gemtool.data.video import video_pieces

    return video_pieces(source, settings, name)


def _guarded(parts: Iterator[Part], name: str) -> Iterator[Part]:
    """Failures to read become GemtoolErrors that name the input."""
    try:
        yield from parts
    except OSError as problem:
        raise _unreadable(name, problem) from None


def _failing(problem: GemtoolError | OSError, name: str) -> Iterator[Part]:
    raise problem if isinstance(problem, GemtoolError) else _unreadable(name, problem)
    yield


def _unreadable(name: str, problem: OSError) -> GemtoolError:
    return GemtoolError(f"{name}: cannot be read: {reason(problem)}")


# JSONL


def _records(
    source: Source, name: str, folder: Path, settings: MediaSettings
) -> Iterator[Document]:
    """A document a line; blank lines are ignored."""
    for number, line in enumerate(iter(source.readline, b""), 1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            record = parse_record(line)
        except ValueError as problem:
            yield Document(where, _failing(CorruptInput(f"{name}: line {number}: {problem}"), name))
            continue
        parts = _record_parts(record, where, folder, settings)
        yield Document(record.id or where, parts, record.meta)


def _record_parts(
    record: Record, where: str, folder: Path, settings: MediaSettings
) -> Iterator[Part]:
    for item in record.items:
        if item.kind == "control":
            yield control(int(item.value), item.weight)
        elif item.kind == "text":
            text = str(item.value).encode("utf-8", "surrogatepass")
            yield from text_parts(text_chunks(BytesIO(text)), item.weight)
        else:
            path = str(folder / str(item.value))
            try:
                yield from _media(item.kind, path, settings, _printable(path), item.weight)
            except GemtoolError as problem:
                raise type(problem)(f"{where}: {problem}") from None
