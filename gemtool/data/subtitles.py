"""The text of a video's subtitles, each line with its time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from gemtool.data.avfile import Decoder
from gemtool.data.pieces import Piece

if TYPE_CHECKING:
    from av import Packet

_FIELDS = 8
"""Fields before the text in a line of ASS, to which libav turns every kind of subtitle."""

_LONGEST = 64 << 10


class Subtitles:
    """Decodes one stream of subtitles.

    Args:
        stream: libav's, of an open container.
        origin: when the video begins, in seconds of the stream's own time.
        name: of the source, for `meta` and messages.
    """

    def __init__(self, stream: Any, origin: Fraction, name: str) -> None:
        self._time_base = Fraction(stream.time_base)
        self._origin = origin
        self._decoder = Decoder(stream, name)
        self._meta = {"source": name, "subtitles": stream.language or "und"}

    def push(self, packet: Packet) -> Iterator[Piece]:
        """Yields a piece for each text that begins with `packet`, its `time` where it is shown."""
        if packet.pts is None:
            return
        start = packet.pts * self._time_base - self._origin
        end = start + (packet.duration or 0) * self._time_base
        time = (max(0, int(start * 1_000_000)), max(0, int(end * 1_000_000)))
        for subtitle in self._decoder.decode(packet):
            line = getattr(subtitle, "ass", b"")[:_LONGEST].decode("utf-8", "replace")
            text = plain_text(line)
            if text:
                yield Piece("text", text=text, time=time, meta=self._meta)


def plain_text(line: str) -> str:
    r"""The text of a line of ASS: without tags, `\N` a line break.

    >>> plain_text(r"0,0,Default,,0,0,0,,{\i1}Who,{\i0} me?\NYes.")
    'Who, me?\nYes.'
    """
    text = line.split(",", _FIELDS)[-1]
    text = re.sub(r"\{\\[^}]*\}|\{\}", "", text)
    text = re.sub(r"\\[Nn]", "\n", text).replace(r"\h", " ")
    return re.sub(r"\\([{}])", r"\1", text).strip()
