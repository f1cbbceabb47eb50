"""Compressed text as a stream: gzip and zstd, in bounded memory however much comes out."""

from __future__ import annotations

import gzip
import io
import zlib
from typing import Any, BinaryIO

from gemtool.errors import CorruptInput

COMPRESSED = ("gzip", "zstd")
EXTENSIONS = {".gz": "gzip", ".zst": "zstd"}


def decompressed(source: Any, kind: str, name: str) -> BinaryIO:
    """A file with what `source` holds compressed, one member after the other.

    Reading raises CorruptInput where the data is damaged or ends too soon.
    """
    if kind == "gzip":
        inner: Any = gzip.GzipFile(fileobj=source)
    else:
        import pyarrow as pa

        inner = pa.CompressedInputStream(pa.PythonFile(source, "r"), "zstd")
    return io.BufferedReader(_Reader(inner, kind, name), 1 << 20)


class _Reader(io.RawIOBase):
    def __init__(self, inner: Any, kind: str, name: str) -> None:
        self._inner = inner
        self._kind = kind
        self._name = name

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._inner.read(len(buffer))
        except (EOFError, OSError, zlib.error) as problem:
            what = " ".join(str(problem).split())
            raise CorruptInput(f"{self._name}: damaged or truncated {self._kind}: {what}") from None
        buffer[: len(data)] = data
        return len(data)
