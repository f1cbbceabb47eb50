"""Files, folders and pipes as documents."""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from gemtool import log
from gemtool.data.compressed import COMPRESSED, decompressed
from gemtool.data.decoders import Decoders, Job
from gemtool.data.documents import Document, Part, control, media_parts, text_parts
from gemtool.data.records import Item, parse_record
from gemtool.data.settings import MediaSettings
from gemtool.data.sniff import (
    EXTENSIONS,
    HEAD,
    RECORDS,
    Modality,
    extension_kind,
    sniff,
    sniff_text,
)
from gemtool.data.text import text_chunks
from gemtool.errors import CorruptInput, GemtoolError, UsageError, reason
from gemtool.stream.checked import Source
from gemtool.stream.files import display_name, is_stdin, open_input, printable

_AHEAD = 16
"""Documents begun before they are taken, for each worker that decodes media."""

_LONG_LINE = 1 << 20
"""Bytes of a line of JSONL after which no further one is read ahead."""

LONGEST_LINE = 256 << 20
"""Bytes of a line of JSONL, its end included."""


def list_inputs(
    paths: Sequence[str], modality: Modality, *, check: bool = True, follow: bool = False
) -> list[str]:
    """Files to read, in order: folders replaced by the files in them of the wanted modality.

    Folders are walked in sorted order; hidden entries are left out.

    Args:
        paths: files, folders, `-`.
        modality: what to look for in folders, by file name.
        check: refuse paths that do not exist now, not when their turn comes.
        follow: go after symbolic links in folders; else they are left out.

    Raises:
        UsageError: `-` twice.
        GemtoolError: a file does not exist, or a folder holds nothing of the modality.
    """
    if sum(map(is_stdin, paths)) > 1:
        raise UsageError("standard input (-) can be given only once")
    files: list[str] = []
    for path in paths:
        if not is_stdin(path) and Path(path).is_dir():
            found = list(_walk(path, modality, follow, ()))
            if not found and check:
                what = "known" if modality == Modality.auto else modality
                raise GemtoolError(f"{path}: the folder holds no {what} files")
            files += found
        else:
            if check and not is_stdin(path) and not os.path.lexists(path):
                raise GemtoolError(f"{path}: cannot be read: no such file or directory")
            files.append(path)
    return files


def _walk(
    folder: str, modality: Modality, follow: bool, above: tuple[os.stat_result, ...]
) -> Iterator[str]:
    """Files in a folder; `above` are the folders it lies in, to which no link leads back."""
    wanted = {modality.value} if modality != Modality.auto else set(EXTENSIONS)
    above = (*above, Path(folder).stat())
    with os.scandir(folder) as entries:
        listing = sorted(entries, key=lambda entry: entry.name)
    for entry in listing:
        if entry.name.startswith("."):
            continue
        if entry.is_symlink() and not follow:
            log.debug(f"{entry.path}: left out: a symbolic link")
        elif entry.is_dir():
            if any(os.path.samestat(entry.stat(), folder) for folder in above):
                log.debug(f"{entry.path}: left out: a link to a folder that it is in")
            else:
                yield from _walk(entry.path, modality, follow, above)
        elif entry.is_file() and extension_kind(entry.name) in wanted:
            yield entry.path
        else:
            log.debug(f"{entry.path}: left out: its name is that of no {modality} file")


def read_list(path: str) -> list[str]:
    """Paths from a file, one a line, or with a NUL behind each (`find -print0`)."""
    with open_input(path) as file:
        content = file.read()
    paths = content.split(b"\0") if b"\0" in content else content.splitlines()
    return [os.fsdecode(path) for path in paths if path.strip()]


def read_documents(
    paths: Iterable[str | None],
    settings: MediaSettings,
    modality: Modality = Modality.auto,
    *,
    workers: int = 1,
) -> Iterator[Document]:
    """The documents of each input in turn: one, or for JSONL one a line.

    What is wrong with a document is raised by its parts, so that others can still be read. The
    parts of a document are to be taken before the next document.

    Args:
        paths: as from `list_inputs`; None is stdin.
        settings: the token budgets of media.
        modality: what to take the inputs for; `auto` looks at their content, then their name.
        workers: processes that decode media; the documents do not depend on their number.
    """
    with Decoders(workers) as decoders:
        reader = _Reader(settings, modality, decoders)
        yield from _ahead(reader.documents(paths), decoders.count)


def _ahead(documents: Iterator[Document | None], workers: int) -> Iterator[Document]:
    """Begins later documents, and so their decoding, before earlier ones are taken.

    None among the documents says that what follows must wait for all before it.
    """
    most = _AHEAD * workers
    held: deque[Document] = deque()
    for document in documents:
        if document is not None:
            held.append(document)
        while len(held) > (0 if document is None else most):
            yield held.popleft()
    yield from held


class _Reader:
    """Opens inputs and finds out what they are."""

    def __init__(self, settings: MediaSettings, modality: Modality, decoders: Decoders) -> None:
        self._settings = settings
        self._modality = modality
        self._decoders = decoders

    def documents(self, paths: Iterable[str | None]) -> Iterator[Document | None]:
        """The documents of all inputs; None before what blocks, or holds much memory."""
        for path in paths:
            name = display_name(path)
            owned = ExitStack()
            try:
                if is_stdin(path) or not Path(str(path)).is_file():
                    yield None  # a pipe: its writer may wait for an earlier one to be read
                file = owned.enter_context(open_input(path))
                yield from self._input(file, path, name, owned)
            except (GemtoolError, OSError) as problem:
                owned.close()
                yield Document(name, _failing(problem, name))

    def _input(
        self, file: BinaryIO, path: str | None, name: str, owned: ExitStack
    ) -> Iterator[Document | None]:
        regular = _is_regular(file)
        source = Source(file)
        kind = self._modality.value
        if self._modality == Modality.auto:
            kind = sniff(source.peek(HEAD), name)
            if kind in COMPRESSED:
                source = Source(decompressed(source, kind, name))
                kind = sniff_text(source.peek(HEAD), name)
        if kind == RECORDS:
            folder = Path() if is_stdin(path) else Path(str(path)).parent
            with owned:
                yield from self._records(source, name, folder)
        elif kind == "text":
            yield Document(name, _owning(_guarded(text_parts(text_chunks(source)), name), owned))
        else:
            taken = _handed_over(file if regular else source, regular, owned)
            job = Job(kind, name, self._settings, taken, waits=is_stdin(path))
            yield Document(name, self._media(job))

    def _media(self, job: Job, weight: float | None = None) -> Iterator[Part]:
        pieces = self._decoders.pieces(job)
        parts = media_parts(pieces, runs=job.kind == "audio", weight=weight)
        return _guarded(parts, job.name)

    def _records(self, source: Source, name: str, folder: Path) -> Iterator[Document | None]:
        """A document a line; blank lines are ignored."""
        for number, line in enumerate(iter(partial(source.readline, LONGEST_LINE), b""), 1):
            if not line.strip():
                continue
            where = f"{name}:{number}"
            try:
                if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                    raise ValueError(
                        f"longer than {LONGEST_LINE >> 20} MiB; long texts are files of their own"
                    )
                record = parse_record(line)
            except ValueError as problem:
                error = CorruptInput(f"{name}: line {number}: {problem}")
                yield Document(where, _failing(error, name))
                yield None  # what is left of an endless line is never all read
                while line and not line.endswith(b"\n"):
                    line = source.readline(LONGEST_LINE)
                continue
            line_of = f"{name}: line {number}"
            runs = [self._item(item, line_of, folder) for item in record.items]
            yield Document(record.id or where, chain.from_iterable(runs), record.meta)
            if len(line) > _LONG_LINE:
                yield None

    def _item(self, item: Item, where: str, folder: Path) -> Iterator[Part]:
        if item.kind == "control":
            return iter([control(int(item.value), item.weight)])
        if item.kind == "text":
            text = str(item.value).encode("utf-8", "surrogatepass")
            return text_parts(text_chunks(BytesIO(text)), item.weight)
        path = folder / str(item.value)
        job = Job(item.kind, printable(str(path)), self._settings, _opened(path))
        return _within(self._media(job, item.weight), where)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, bool]]:
    with path.open("rb") as file:
        regular = _is_regular(file)
        yield (file if regular else Source(file)), regular  # type: ignore[misc]


@contextmanager
def _handed_over(file: Any, regular: bool, owned: ExitStack) -> Iterator[tuple[BinaryIO, bool]]:
    with owned:
        yield file, regular


def _is_regular(file: BinaryIO) -> bool:
    """Whether this is a regular file at its beginning, of any name, and not a pipe."""
    try:
        return stat.S_ISREG(os.fstat(file.fileno()).st_mode) and file.tell() == 0
    except (OSError, ValueError):
        return False


def _guarded(parts: Iterator[Part], name: str) -> Iterator[Part]:
    """Failures to read become GemtoolErrors that name the input."""
    try:
        yield from parts
    except OSError as problem:
        raise _unreadable(name, problem) from None


def _owning(parts: Iterator[Part], owned: ExitStack) -> Iterator[Part]:
    with owned:
        yield from parts


def _within(parts: Iterator[Part], where: str) -> Iterator[Part]:
    """Failures say in which line of JSONL the file is named."""
    try:
        yield from parts
    except GemtoolError as problem:
        raise type(problem)(f"{where}: {problem}") from None


def _failing(problem: GemtoolError | OSError, name: str) -> Iterator[Part]:
    raise problem if isinstance(problem, GemtoolError) else _unreadable(name, problem)
    yield


def _unreadable(name: str, problem: OSError) -> GemtoolError:
    return GemtoolError(f"{name}: cannot be read: {reason(problem)}")
