"""One file of a shard folder as it is written; a file that is there and the same is kept.

Two kinds: Arrow IPC files, which gemtool trains from, and ArrayRecord files for other trainers.
"""

from __future__ import annotations

import contextlib
import filecmp
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import pyarrow as pa

from gemtool.data.shards import INDEX, encode_index
from gemtool.errors import GemtoolError, UsageError
from gemtool.signals import removed_on_signal
from gemtool.stream.files import atomic_file, sync_folder
from gemtool.stream.spans import SPAN_SCHEMA, batch_of

_BUFFER = 1 << 20


class ShardFile(Protocol):
    """A file that takes record batches.

    Attributes:
        bytes: of the file so far.
        kept: once it is finished, whether it was there already.
    """

    bytes: int
    kept: bool

    def write(self, batch: pa.RecordBatch) -> None: ...

    def finish(self) -> dict[str, Any]:
        """Ends the file, which then has its name; returns its size and checksums."""

    def abandon(self, *failure: Any) -> None:
        """Leaves what was there as it was; takes what `__exit__` takes."""


OpenFile = Callable[[Path, bool], ShardFile]
"""Makes a ShardFile of its path, and whether a file that is there must be the same."""


def other_content(folder: Path, what: str) -> UsageError:
    return UsageError(
        f"{folder}: is complete and holds other sequences than these ({what}); add -f to replace it"
    )


class ArrowFile:
    """An Arrow IPC file with an index of its batches; see `gemtool.data.shards`."""

    def __init__(self, target: Path, frozen: bool) -> None:
        self._compared = _Compared(target, frozen)
        self._sink = pa.BufferedOutputStream(pa.PythonFile(self._compared, mode="w"), _BUFFER)
        self._writer = pa.ipc.new_file(self._sink, SPAN_SCHEMA)
        self._cuts: list[tuple[int, int]] = []
        self.kept = False
        self.bytes = 0

    def write(self, batch: pa.RecordBatch) -> None:
        self._writer.write_batch(batch)
        self._sink.flush()
        self._cuts.append(self._compared.cut())
        self.bytes = self._compared.bytes

    def finish(self) -> dict[str, Any]:
        index = {INDEX: encode_index(self._cuts)}
        self._writer.write_batch(batch_of([]), custom_metadata=index)
        self._writer.close()
        self._sink.close()
        self.bytes, crc = self._compared.cut()
        self.kept = self._compared.finish()
        return {
            "bytes": self.bytes,
            "crc32": self._compared.crc32,
            "tail": {"bytes": self.bytes - self._cuts[-1][0], "crc32": crc},
        }

    def abandon(self, *failure: Any) -> None:
        self._compared.abandon(*failure)


class _Compared:
    """A sink that counts and sums, and compares with the file that is there.

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
            what = f"{self._target.name} differs near byte {self.bytes:,}"
            raise other_content(self._target.parent, what)
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


def require_array_record() -> None:
    """Raises UsageError if the library that writes ArrayRecord files is not installed."""
    try:
        import array_record.python.array_record_module  # noqa: F401
    except ImportError:
        raise UsageError(
            "--to array_record needs the array_record library, which is not installed here; "
            "run: pip install 'gemtool[array_record]'"
        ) from None


class ArrayRecordFile:
    """An ArrayRecord file: each record batch is a record, an Arrow IPC stream of its own.

    The library writes to a path, and only it knows in which steps. So it gets a temporary one, and
    what is there is compared when the file is whole.
    """

    def __init__(self, target: Path, frozen: bool) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        self._target, self._frozen = target, frozen
        self._temporary = target.with_name(f".{target.name}.{os.urandom(4).hex()}")
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(removed_on_signal(self._remove))
        self._stack.callback(self._remove)
        # One record a group, so that each can be read alone.
        self._writer = ArrayRecordWriter(os.fsdecode(self._temporary), "group_size:1,uncompressed")
        self.kept = False
        self.bytes = 0

    def _remove(self) -> None:
        self._temporary.unlink(missing_ok=True)

    def write(self, batch: pa.RecordBatch) -> None:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, SPAN_SCHEMA) as stream:
            stream.write_batch(batch)
        record = sink.getvalue().to_pybytes()
        self._attempt(self._writer.write, record)
        self.bytes += len(record)

    def finish(self) -> dict[str, Any]:
        self._attempt(self._writer.close)
        self.bytes, crc32 = _summed(self._temporary)
        self.kept = self._target.exists() and filecmp.cmp(self._temporary, self._target, False)
        if not self.kept:
            if self._frozen:
                raise other_content(self._target.parent, f"{self._target.name} differs")
            with self._temporary.open("rb") as file:
                os.fsync(file.fileno())
            self._temporary.replace(self._target)
            sync_folder(self._target.parent)
        self._stack.close()
        return {"bytes": self.bytes, "crc32": crc32}

    def _attempt(self, action: Callable[..., Any], *arguments: Any) -> None:
        try:
            action(*arguments)
        except RuntimeError as problem:  # all that the library raises, a full disk included
            said = str(problem).split(";")[0]
            raise GemtoolError(f"{self._target.parent}: cannot be written: {said}") from None

    def abandon(self, *failure: Any) -> None:
        with contextlib.suppress(RuntimeError):
            self._writer.close()
        self._stack.__exit__(*failure)


def _summed(path: Path) -> tuple[int, int]:
    """Bytes and CRC-32 of a file."""
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(_BUFFER):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc


FILES: dict[str, OpenFile] = {"arrow": ArrowFile, "array_record": ArrayRecordFile}
"""By file format."""
