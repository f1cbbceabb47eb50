"""Files as memory: read by looking at them, each by itself, or several as one array."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import stat
import weakref
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np

from gemtool import signals
from gemtool.stream.checked import Source
from gemtool.stream.files import printable

_MAP_FIXED = 0x10  # of Linux, macOS and the BSDs; Python does not name it


class MappedSource(Source):
    """A memory-mapped file: what is read are views of it, not copies.

    Looking at what was cut off of the file meanwhile ends the process, with a line that says so.

    Args:
        file: at the byte from which on it is read.
        grows: whether this process writes behind what is mapped.

    Attributes:
        descriptor: of the file, open as long as this is there.
        size: of the file.
        name: of the file, in messages.
    """

    def __init__(self, file: BinaryIO, *, grows: bool = False) -> None:
        super().__init__(file)
        self.name = printable(str(file.name))
        self.descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self.descriptor)
        self._grows = grows
        self._opened = self.stamp()
        self._view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        self.size = len(self._view)
        self._address = np.frombuffer(self._view, np.uint8).ctypes.data
        self._from = self._at = file.tell()
        _sources.add(self)
        signals.explain_bus_errors(_who_was_cut)

    def stamp(self) -> tuple[int, int]:
        """Changes when another process writes to the file."""
        status = os.fstat(self.descriptor)
        return (0, 0) if self._grows else (status.st_size, status.st_mtime_ns)

    def is_as_opened(self) -> bool:
        """Whether no other process wrote to the file."""
        return self.stamp() == self._opened and not self.is_cut()

    def is_cut(self) -> bool:
        """Whether the end of what is mapped is not there any more."""
        return os.fstat(self.descriptor).st_size < self.size

    def read(self, size: int | None = -1) -> Any:
        stop = len(self._view) if size is None or size < 0 else self._at + size
        data = self._view[self._at : stop]
        self._at += len(data)
        self.is_short |= self._at < stop
        self.position = self._at - self._from
        return data

    def peek(self, size: int) -> bytes:
        return bytes(self._view[self._at : self._at + size])

    def offset(self, view: np.ndarray) -> int:
        """The byte of the file at which an array begins that was read from it."""
        return view.ctypes.data - self._address


def source_of(file: BinaryIO, *, grows: bool = False) -> Source:
    """A mapped source of a regular file (also one redirected to stdin), else one that reads; `grows` as
    of `MappedSource`."""
    with contextlib.suppress(OSError, ValueError):
        status = os.fstat(file.fileno())
        if stat.S_ISREG(status.st_mode) and status.st_size:
            return MappedSource(file, grows=grows)
    return Source(file)


_sources: weakref.WeakSet[MappedSource] = weakref.WeakSet()


def _who_was_cut() -> str | None:
    """What to say where memory that is a file cannot be read; None: it is none of these files."""
    for source in [s for s in _sources if s.is_cut()] or _sources:
        if not source.is_as_opened():
            return (
                f"{source.name}: was cut or written over while it was read; begin again when it is "
                "whole (what -o writes can be read meanwhile: it is another file until then)"
            )
    return None


def map_together(descriptors: Sequence[int], areas: Sequence[int]) -> tuple[np.ndarray, list[int]]:
    """Open files as one read-only array, uint8 [the least of `areas` with room], and where in it each
    begins.

    What lies between and behind them reads as zero and takes no memory. The array outlives the
    descriptors.

    Raises:
        OSError: the system maps no more.
    """
    sizes = [os.fstat(descriptor).st_size for descriptor in descriptors]
    places, size = [], 0
    for own in sizes:
        places.append(size)
        size += -(-own // mmap.PAGESIZE) * mmap.PAGESIZE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    room = min((area for area in areas if area >= size), default=size)
    area = mmap.mmap(-1, room, flags=flags, prot=mmap.PROT_READ)
    memory = np.frombuffer(area, np.uint8)
    system = ctypes.CDLL(None, use_errno=True).mmap
    system.restype = ctypes.c_void_p
    system.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
    for descriptor, own, place in zip(descriptors, sizes, places, strict=True):
        wanted, flags = memory.ctypes.data + place, mmap.MAP_SHARED | _MAP_FIXED
        if system(wanted, own, mmap.PROT_READ, flags, descriptor, 0) != wanted:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return memory, places
