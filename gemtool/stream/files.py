"""Inputs and outputs of every verb: pipes, terminals, files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from gemtool import log
from gemtool.errors import GemtoolError, NoInput, UsageError, no_room, reason
from gemtool.signals import removed_on_signal

LOCK = ".gemtool-lock"
"""File in a folder that one process at a time may write."""


def guard_standard_streams() -> None:
    """Puts /dev/null in place of a stdin, stdout or stderr that is closed (`>&-`).

    Else the next file that is opened would get the number, and what is meant for the stream.
    Messages then vanish; writing to stdout fails, as it should.
    """
    for number, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, flags), True)  # takes the lowest number
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False, errors="backslashreplace")  # noqa: SIM115


def is_stdin(path: str | None) -> bool:
    return path is None or path == "-"


def printable(path: str | Path) -> str:
    """A file name as text that can be written as UTF-8: bytes that are none are spelled out."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def display_name(path: str | None) -> str:
    """How messages call an input."""
    return "<stdin>" if is_stdin(path) else printable(str(path))


@contextlib.contextmanager
def open_input(path: str | None) -> Iterator[BinaryIO]:
    """Opens a file, or stdin for None and `-`, for buffered binary reading.

    Raises:
        NoInput: stdin is a terminal.
        GemtoolError: the file cannot be read, or is not finished.
    """
    if is_stdin(path):
        if sys.stdin is None or sys.stdin.closed:
            raise GemtoolError("standard input is closed; name an input file")
        if sys.stdin.isatty():
            raise NoInput("standard input is a terminal; name an input file or pipe one in")
        yield sys.stdin.buffer
        return
    assert path is not None
    try:
        file = Path(path).open("rb")  # noqa: SIM115 (closed below)
    except OSError as problem:
        raise GemtoolError(f"{path}: cannot be read: {_why_not(path, problem)}") from None
    with file:
        yield file


def _why_not(path: str, problem: OSError) -> str:
    """Why a file cannot be opened; of one that is not there yet, that it is not finished."""
    if isinstance(problem, FileNotFoundError) and (partial := partial_name(Path(path))).exists():
        return f"it is not finished: {partial} is being written, or waits for --resume"
    return reason(problem)


@contextlib.contextmanager
def open_output(
    path: str | None, *, force: bool = False, binary: bool = True
) -> Iterator[BinaryIO]:
    """Opens the output of a verb for binary writing.

    None is stdout, where binary data is refused if it is a terminal; `-` is stdout even then. A
    file is written under a temporary name beside the final one, which it gets when the block ends
    without an exception; otherwise nothing is left.

    Raises:
        UsageError: binary data for a terminal, or the file exists and `force` is false.
        GemtoolError: the file cannot be written (permissions, full disk), or another process is
            writing it.
    """
    if path is None or path == "-":
        if binary and path is None and sys.stdout.isatty():
            raise UsageError(
                "binary output for a terminal; pipe it on, use -o FILE, or look at it with "
                "`gemtool view` (-o - forces it)"
            )
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    target = Path(path)
    if target.exists() and not target.is_file() and not target.is_dir():
        with _failures(path), target.open("wb") as file:  # /dev/null, a FIFO: nothing to rename
            yield file
        return
    if target.is_dir():
        raise UsageError(f"{path}: is a folder; name a file")
    if not force:
        _require_new(target, path)
    with _failures(path), atomic_file(target) as file:
        _require_no_other(target, path, but=Path(file.name))
        yield file
        if not force:
            _require_new(target, path)  # another process may have been faster


@contextlib.contextmanager
def _failures(path: str) -> Iterator[None]:
    """Says of `path` why it cannot be written. What the block itself reads, or writes elsewhere, is no
    failure of this output."""
    try:
        yield
    except OSError as problem:
        target, named = Path(path).resolve(), problem.filename
        own = named is not None and target.name in Path(os.fsdecode(named)).name
        if not own and (named or not no_room(problem)):
            raise
        raise GemtoolError(f"{path}: cannot be written: {reason(problem)}") from None


def _require_no_other(target: Path, path: str, but: Path) -> None:
    """Raises GemtoolError if another process writes this file, resumably or not; `but` is what this one
    writes.

    Who asks has the file there already that tells others: of two that begin at once, one notices.
    """
    for other in (partial_name(target), *_temporaries(target.resolve())):
        if other.name != but.name and _is_locked(other):
            name = other if other == partial_name(target) else path
            raise GemtoolError(f"{name}: another process is writing it")


def _is_locked(path: Path) -> bool:
    try:
        with open(path, "rb", opener=_no_link) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def _require_new(target: Path, path: str) -> None:
    if target.exists():
        raise UsageError(f"{path}: exists already; add -f to replace it")


@contextlib.contextmanager
def atomic_file(target: Path, *, through_link: bool = True) -> Iterator[BinaryIO]:
    """A file that appears under its name, synced to disk, only if the block succeeds.

    What a symbolic link names is replaced, not the link, unless `through_link` is false.
    """
    target = target.resolve() if through_link else target
    _remove_abandoned(target)
    temporary = target.with_name(f".{target.name}.{os.urandom(4).hex()}")
    with removed_on_signal(lambda: temporary.unlink(missing_ok=True)):
        try:
            with temporary.open("xb") as file:
                _hold(file)
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    sync_folder(target.parent)


def _hold(file: BinaryIO) -> None:
    """Raises BlockingIOError if another process holds it. Some file systems have no locks; there,
    nobody is kept out."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        pass


def _temporaries(target: Path) -> list[Path]:
    """What `atomic_file` writes to, of any process, or wrote."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}")
    try:
        return [path for path in target.parent.iterdir() if pattern.fullmatch(path.name)]
    except OSError:
        return []


def _remove_abandoned(target: Path) -> None:
    """Removes what earlier processes left of this file when they were killed: nobody locks it."""
    for path in _temporaries(target):
        with contextlib.suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def open_locked(path: Path) -> BinaryIO:
    """Opens a file for reading and appending, which is made if it is not there, and which no other
    process that opens it so holds.

    Raises:
        GemtoolError: another process holds it.
        OSError: it cannot be opened.
    """
    if path.exists() and not path.is_file():
        raise GemtoolError(f"{path}: is no file, and in the way; remove it")
    while True:
        file = open(path, "a+b", opener=_no_link)  # noqa: SIM115
        try:
            _hold(file)
            # The holder before us may have renamed it meanwhile.
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except BlockingIOError:
            file.close()
            raise GemtoolError(f"{path}: another process is writing it") from None
        except FileNotFoundError:
            pass
        file.close()


def _no_link(path: str, flags: int) -> int:
    """Opens no symbolic link: in a folder of all users, it might be another one's."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def is_resumable(path: str | None) -> bool:
    """Whether an output is a file: not standard output, a device or a FIFO."""
    return path not in (None, "-") and (Path(str(path)).is_file() or not Path(str(path)).exists())


def partial_name(target: Path) -> Path:
    """The file that `resumable_output` writes before it is whole."""
    target = target.resolve() if target.is_symlink() else target
    return target.with_name(target.name + ".partial")


def named_by(partial: Path) -> Path:
    """The file that a partial one becomes."""
    return partial.with_name(partial.name.removesuffix(".partial"))


@contextlib.contextmanager
def resumable_output(path: str, *, force: bool, resume: bool) -> Iterator[PartialOutput]:
    """Opens an output file that an interruption may leave to be resumed, as FILE.partial: if the block
    has said `keep`, else nothing is left. It gets its name when the block ends without an exception.
    What a symbolic link names is replaced, not the link.

    Args:
        path: the file.
        force: whether to replace it.
        resume: whether to go on with what is left of an earlier run.

    Raises:
        UsageError, GemtoolError: as `open_output`, and if another process is writing it.
    """
    target = Path(path)
    if target.is_dir():
        raise UsageError(f"{path}: is a folder; name a file")
    if not force:
        _require_new(target, path)
    partial = partial_name(target)

    def left() -> None:
        if output.has_name:
            return
        if not output.is_kept:
            partial.unlink(missing_ok=True)
        elif partial.exists():
            log.last_words(f"{partial}: kept; --resume goes on with it")

    with _failures(path):
        with open_locked(partial) as file:
            try:
                _require_no_other(target, path, but=partial)
            except GemtoolError:
                if not file.tell():
                    partial.unlink(missing_ok=True)
                raise
            if not resume:
                file.truncate(0)
            output = PartialOutput(file, partial)
            output.is_kept = resume and file.tell() > 0
            with removed_on_signal(left):
                try:
                    yield output
                    if not force:
                        _require_new(target, path)  # whoever made it did not lock the partial file
                    file.flush()
                    os.fsync(file.fileno())
                    partial.replace(named_by(partial))
                    output.has_name = True
                except BaseException:
                    left()
                    raise
        sync_folder(partial.parent)


class PartialOutput:
    """A file that is being written."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.is_kept = self.has_name = False

    def keep(self) -> None:
        """From now on an interruption leaves what is there."""
        self.file.flush()
        self.is_kept = True

    def cut(self, position: int) -> None:
        """Forgets what is behind a position."""
        self.file.truncate(position)
        self.file.seek(0, os.SEEK_END)


def atomic_write(target: Path, content: bytes) -> None:
    """Replaces a file's content in one step."""
    with atomic_file(target) as file:
        file.write(content)


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path, name: str = LOCK) -> Iterator[None]:
    """Keeps other processes that ask for the same lock out of an existing folder.

    Raises:
        GemtoolError: another process holds the lock.
    """
    lock = folder / name
    descriptor = _lock(lock)
    try:
        with removed_on_signal(lambda: lock.unlink(missing_ok=True)):
            yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _lock(lock: Path) -> int:
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before us removes the file as it leaves: what we locked may be gone.
            if os.path.samestat(os.fstat(descriptor), lock.stat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise GemtoolError(f"{lock.parent}: another process is writing it") from None
        except FileNotFoundError:
            pass
        os.close(descriptor)
