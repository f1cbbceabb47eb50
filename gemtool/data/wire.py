"""What the tool and the worker that decodes for it say to each other.

A message is the length of a header and of a body (two little-endian uint32), the header as JSON,
and the body as raw bytes, over a Unix socket. Nothing of it is ever executed or unpickled: a
worker taken over by a hostile file can send wrong pieces, no more.
"""

from __future__ import annotations

import json
import math
import socket
import struct
import time
from typing import Any

import numpy as np

from gemtool.data.pieces import Piece

_LENGTHS = struct.Struct("<II")
_LARGEST_HEADER = 1 << 20
_LARGEST_BODY = 64 << 20

_TOGETHER = 128 << 10
"""Bytes of small messages that are sent, and received, together."""

_PATIENCE = 1.0
"""Seconds after which a message no longer waits for others."""

LARGEST_READ = 1 << 20
"""Bytes that a worker may ask for at a time."""

_PAYLOADS = {"image": "uint8", "video": "uint8", "audio": "float16"}

Header = dict[str, Any]


class WireError(Exception):
    """The other side closed the connection in a message, or sent what is no message."""


class Channel:
    """One end of the connection.

    Args:
        sock: a connected stream socket.
        ahead: receive what has come beyond a message along with it; not for messages with files.
    """

    def __init__(self, sock: socket.socket, *, ahead: bool = False) -> None:
        self.sock = sock
        self._waiting = bytearray()  # to be sent
        self._sent = time.monotonic()
        self._room = np.empty(_TOGETHER if ahead else 0, np.uint8)
        self._came = memoryview(b"")  # part of `room`: received, not given yet

    def send(self, header: Header, body: Any = b"", descriptor: int | None = None) -> None:
        """Sends a message; `body` is bytes or a C-contiguous array, `descriptor` an open file."""
        self._send(header, _bytes_of(body), descriptor)

    def post(self, header: Header, body: Any = b"") -> None:
        """The same for a message that may wait for others: small, and for a second at most.

        What waits goes before the next message that is sent.
        """
        body = _bytes_of(body)
        fits = len(self._waiting) + len(body) < _TOGETHER
        if not fits or time.monotonic() - self._sent > _PATIENCE:
            self._send(header, body)
            return
        self._wait(header, len(body))
        self._waiting += body

    def _wait(self, header: Header, length: int) -> None:
        encoded = json.dumps(header).encode()
        self._waiting += _LENGTHS.pack(len(encoded), length) + encoded

    def _send(self, header: Header, body: memoryview, descriptor: int | None = None) -> None:
        self._wait(header, len(body))
        start, self._waiting = self._waiting, bytearray()
        if descriptor is None:
            sent = self.sock.sendmsg([start, body])
        else:
            sent = socket.send_fds(self.sock, [start], [descriptor])
        if sent < len(start):
            self.sock.sendall(memoryview(start)[sent:])
        self.sock.sendall(body[max(0, sent - len(start)) :])
        self._sent = time.monotonic()

    def receive(self) -> tuple[Header, np.ndarray] | None:
        """The next message, its body uint8 [n]; None at the end of the connection.

        Raises:
            WireError: half a message, or none.
            TimeoutError: nothing came within the socket's timeout.
        """
        lengths = self._exactly(_LENGTHS.size, may_end=True)
        return None if lengths is None else self._rest(bytes(lengths))

    def receive_with_file(self) -> tuple[Header, np.ndarray, int | None] | None:
        """The same for a message that may have an open file with it: its descriptor."""
        lengths, descriptors, _, _ = socket.recv_fds(self.sock, _LENGTHS.size, 1)
        if not lengths:
            return None
        missing = self._exactly(_LENGTHS.size - len(lengths))
        header, body = self._rest(lengths + bytes(missing))  # type: ignore[arg-type]
        return header, body, descriptors[0] if descriptors else None

    def _rest(self, lengths: bytes) -> tuple[Header, np.ndarray]:
        header_size, body_size = _LENGTHS.unpack(lengths)
        if header_size > _LARGEST_HEADER or body_size > _LARGEST_BODY:
            raise WireError("a message is larger than any can be")
        try:
            header = json.loads(bytes(self._exactly(header_size)))  # type: ignore[arg-type]
        except ValueError:
            raise WireError("a message is not JSON") from None
        if not isinstance(header, dict):
            raise WireError("a message is no object")
        body = self._exactly(body_size)
        assert body is not None
        return header, body

    def _exactly(self, size: int, may_end: bool = False) -> np.ndarray | None:
        received = np.empty(size, np.uint8)
        rest = received.data
        while len(rest):
            count = self._receive_into(rest)
            if not count:
                if may_end and len(rest) == size:
                    return None
                raise WireError("the connection ended in a message")
            rest = rest[count:]
        return received

    def _receive_into(self, rest: memoryview) -> int:
        """Bytes put at the beginning of `rest`; 0 at the end of the connection."""
        if not self._came:
            if len(rest) >= len(self._room):
                return self.sock.recv_into(rest)
            self._came = self._room.data[: self.sock.recv_into(self._room.data)]
        count = min(len(rest), len(self._came))
        rest[:count], self._came = self._came[:count], self._came[count:]
        return count


def _bytes_of(body: Any) -> memoryview:
    return memoryview(body).cast("B") if len(body) else memoryview(b"")


def piece_message(piece: Piece) -> tuple[Header, Any]:
    """Header and body of a piece."""
    header: Header = {"type": "piece", "kind": piece.kind}
    if piece.text is not None:
        header["text"] = piece.text
    if piece.time is not None:
        header["time"] = piece.time
    if piece.meta is not None:
        header["meta"] = piece.meta
    if piece.payload is None:
        return header, b""
    header["shape"] = piece.payload.shape
    return header, np.ascontiguousarray(piece.payload)


def read_piece(header: Header, body: np.ndarray) -> Piece:
    """The inverse of `piece_message`.

    Raises:
        WireError: no piece.
    """
    try:
        kind, text, time, meta = (header.get(key) for key in ("kind", "text", "time", "meta"))
        payload = None
        if kind in _PAYLOADS:
            shape = [int(length) for length in header["shape"]]
            dtype = np.dtype(_PAYLOADS[kind])
            if min(shape) < 0 or math.prod(shape) * dtype.itemsize != len(body):
                raise ValueError("lengths differ")
            payload = body.view(dtype).reshape(shape)
        elif kind != "text" or not isinstance(text, str):
            raise ValueError("unknown kind")
        if time is not None:
            start, end = (int(at) for at in time)
            time = start, end
        if meta is not None and not isinstance(meta, dict):
            raise ValueError("meta is no object")
    except (KeyError, TypeError, ValueError) as problem:
        raise WireError(f"a piece is malformed: {problem}") from None
    return Piece(kind, payload, text, time, meta)
