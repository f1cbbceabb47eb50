"""The process in which images, sound and video are decoded, for the tool that started it.

libav and Pillow read hostile files here: within limits of memory, unable to open anything beside
the file handed over, and gone when the tool is. `gemtool.data.decoders` is the other side.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import os
import pkgutil
import resource
import signal
import socket
import sys
import time
import traceback
from typing import Any

from gemtool import log
from gemtool.data.settings import MediaSettings
from gemtool.data.wire import LARGEST_READ, Channel, piece_message
from gemtool.errors import GemtoolError

MEMORY = 768 << 20
"""Bytes of memory that a worker may ask the system for."""

_RETIRED = MEMORY // 2
"""A worker that has had so much in use is replaced before the next file."""

_LARGEST_ENCODED = 512 << 20
"""Bytes of an image file that comes through a pipe."""

_BLOCKS = 1 << 16
_BEAT = 1.0
"""Seconds between signs of life, at least."""


def main() -> None:
    """Serves jobs from the socket that is standard input until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the tool decides what Ctrl-C means
    die_with_parent()
    channel = Channel(socket.socket(fileno=0))
    sys.stderr = _Messages(channel)
    log.configure(verbose=1, as_json=True)
    for kind in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(kind, (0, 0))
    with contextlib.suppress(ValueError, OSError):  # macOS has it in name only
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    with contextlib.suppress(BrokenPipeError, ConnectionError):
        while (received := channel.receive_with_file()) is not None:
            job, _, descriptor = received
            serve(channel, job, descriptor)


def serve(channel: Channel, job: dict[str, Any], descriptor: int | None) -> None:
    """Sends the pieces of one file, or why there are none, and then `end`."""
    usable = True
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        front_end = _front_end(job["kind"], channel)
        name = job["name"]
        settings = MediaSettings.from_dict(job["settings"])
        with contextlib.ExitStack() as stack:
            if descriptor is None:
                source: Any = _Pipe(channel)
            else:
                source = stack.enter_context(os.fdopen(descriptor, "rb"))
            close_the_door()
            if job["kind"] == "image":
                source = io.BytesIO(_read_all(source, name)) if descriptor is None else source
            elif descriptor is not None:
                source = _Watched(source, channel)
            for piece in front_end(source, settings, name):
                channel.post(*piece_message(piece))
    except (BrokenPipeError, ConnectionError):
        raise
    except GemtoolError as problem:
        end = {"type": "error", "error": type(problem).__name__, "message": str(problem)}
        channel.send(end)
    except MemoryError:
        usable = False
        channel.send({"type": "error", "error": "memory"})
    except Exception as problem:
        # A hostile file may lead the libraries, and us, anywhere.
        usable = False
        log.debug(traceback.format_exc())
        what = f"{type(problem).__name__}: {problem}".rstrip(": ")
        channel.send({"type": "error", "error": "unexpected", "message": what})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    channel.send({"type": "end", "usable": usable and peak_memory() < _RETIRED})


def peak_memory() -> int:
    """The most bytes that this process had resident."""
    unit = 1 if sys.platform == "darwin" else 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    # Linux's ru_maxrss begins with the peak of the process that forked.
    with contextlib.suppress(OSError), open("/proc/self/status") as file:  # noqa: PTH123
        return next((int(s.split()[1]) << 10 for s in file if s.startswith("VmHWM:")), used)
    return used


@functools.cache
def _front_end(kind: str, channel: Channel) -> Any:
    """The function that makes pieces of a file; all it needs is loaded, as no file opens later."""
    front_end = _load(kind)
    channel.send({"type": "ready"})
    return front_end


def _load(kind: str) -> Any:
    if kind == "image":
        from PIL import Image, ImageOps  # noqa: F401

        from gemtool.data.image import image_pieces

        Image.init()
        for name in ("ascii", "latin-1", "utf-8", "utf-16-le", "utf-16-be"):
            b"".decode(name)
        return image_pieces
    import av
    import numpy.fft  # noqa: F401

    # Both load modules only when something needs them.
    for module in pkgutil.walk_packages(av.__path__, "av."):
        if not module.name.endswith(("__main__", "datasets")):
            importlib.import_module(module.name)

    if kind == "audio":
        from gemtool.data.audio import audio_pieces

        return audio_pieces
    from gemtool.data.video import video_pieces

    return video_pieces


def close_the_door() -> None:
    """From here on no file and no socket can be opened: every free descriptor is out of bounds."""
    free = os.dup(0)
    os.close(free)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))


def die_with_parent() -> None:
    """Asks Linux to kill this process when the one that started it ends, however it does."""
    if sys.platform != "linux":
        return  # it ends at its next message: the other end of its socket is closed then
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() == 1:
        sys.exit(0)


class _Pipe:
    """What the tool reads for us from a pipe, in order, without a way back."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def seekable(self) -> bool:
        return False

    def read(self, size: int) -> bytes:
        """Fewer bytes than `size` may come before the end, too, but at least one."""
        if size <= 0:
            return b""
        self._channel.send({"type": "read", "size": min(size, LARGEST_READ)})
        answer = self._channel.receive()
        if answer is None:
            raise BrokenPipeError
        return answer[1].tobytes()


def _read_all(pipe: _Pipe, name: str) -> bytes:
    data = bytearray()
    while block := pipe.read(LARGEST_READ):
        data += block
        if len(data) > _LARGEST_ENCODED:
            raise GemtoolError(f"{name}: has more than {_LARGEST_ENCODED >> 20} MiB, for an image")
    return bytes(data)


class _Watched:
    """A file that tells the tool when a part of it is read that was not read before."""

    def __init__(self, file: io.BufferedReader, channel: Channel) -> None:
        self._file = file
        self._channel = channel
        self._block = max(4096, os.fstat(file.fileno()).st_size // _BLOCKS)
        self._seen: set[int] = set()
        self._last = time.monotonic()
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        block = self._file.tell() // self._block
        if block not in self._seen:
            self._seen.add(block)
            now = time.monotonic()
            if now - self._last > _BEAT:
                self._last = now
                self._channel.send({"type": "beat"})
        return data


class _Messages(io.TextIOBase):
    """Standard error: what is logged goes to the tool, which knows whether to show it."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._line = ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            try:
                record = json.loads(line)
                message = {"level": record["level"], "message": record["message"]}
            except (ValueError, TypeError, KeyError):
                message = {"level": "debug", "message": line}  # from a library
            self._channel.send({"type": "log", **message})
        return len(text)
