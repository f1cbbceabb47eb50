"""Opening sound and video with libav, such that a file can reach nothing but itself.

libav reads through a Python file object, knows only the demuxers named here (no playlists, no
`concat`, no text) and is refused every further file or address that a container asks for.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from gemtool import log
from gemtool.errors import CorruptInput, GemtoolError

if TYPE_CHECKING:
    from av import Packet
    from av.audio.stream import AudioStream
    from av.container import InputContainer
    from av.subtitles.stream import SubtitleStream
    from av.video.stream import VideoStream

Source = str | Path | bytes | BinaryIO

_DEMUXERS = (
    "aac,ac3,aiff,amr,ape,asf,au,av1,avi,caf,dts,dv,eac3,flac,flv,h264,hevc,ivf,m4v,matroska,"
    "mov,mp3,mpeg,mpegts,mpegvideo,mxf,nut,obu,ogg,rm,tta,vc1,voc,w64,wav,wv,yuv4mpegpipe"
)

# Formats whose header states the length of each stream, or of all together, exactly.
_LENGTH_OF_STREAMS = {"mov,mp4,m4a,3gp,3g2,mj2", "wav", "flac"}
_LENGTH_OF_WHOLE = {"matroska,webm"}

TEXT_CODECS = frozenset({"ass", "mov_text", "srt", "ssa", "subrip", "text", "webvtt"})
"""Subtitles of other codecs are pictures of text."""

MAX_PIXELS = 40_000_000
"""Pixels of a video's picture, at most: 8K has 35 million."""

SCALE_DOWN = "ffmpeg -i IN -vf scale=1920:-2 OUT.mkv"
"""What makes a video smaller."""

_TS_DISCONT = 0x0200
"""libav's flag of formats in which timestamps may start anew, such as MPEG-TS."""

_RIFF_SLACK = 4096
"""Bytes by which headers of whole files have been seen to be wrong."""

_WAV_PACKET = "65536"
"""Bytes of a packet of a WAV, whose own choice of 4,096 makes many of it."""

_HEAD = 65536
_REMUX = "ffmpeg -i IN.mp4 -c copy -movflags +faststart OUT.mp4"


class MediaFile:
    """An open container.

    Attributes:
        container: libav's.
        name: of the source, for messages.
        longest_gap: seconds; timestamps that jump ahead by more are an error of the file, not
            time that passed.
    """

    def __init__(self, container: InputContainer, name: str, pipe: _Pipe | None = None) -> None:
        self.container = container
        self.name = name
        self._pipe = pipe
        self.longest_gap = 10 if int(container.format.flags) & _TS_DISCONT else 3600

    def video_stream(self) -> VideoStream | None:
        """The first moving picture, cover art left aside."""
        from av.stream import Disposition

        for stream in self.container.streams.video:
            if not stream.disposition & Disposition.attached_pic:
                return self._of_bearable_size(self._decodable(stream))
        return None

    def _of_bearable_size(self, stream: Any) -> Any:
        context = stream.codec_context
        if context.width * context.height > MAX_PIXELS:
            raise GemtoolError(
                f"{self.name}: its picture of {context.width} x {context.height} has more than "
                f"{MAX_PIXELS:,} pixels; scale it down: {SCALE_DOWN}"
            )
        context.options = {"max_pixels": str(MAX_PIXELS)}  # if it grows later
        return stream

    def audio_stream(self) -> AudioStream | None:
        """The sound that libav thinks best, or else, as none of it came at first, the first."""
        streams = self.container.streams
        stream: Any = streams.best("audio") or next(iter(streams.audio), None)
        return None if stream is None else self._decodable(stream)

    def subtitle_stream(self) -> SubtitleStream | None:
        """The first subtitles that are text, those marked as default before others."""
        from av.stream import Disposition

        known = [s for s in self.container.streams.subtitles if s.codec_context is not None]
        texts = [s for s in known if s.codec_context.name in TEXT_CODECS]
        chosen = [s for s in texts if s.disposition & Disposition.default] or texts
        return chosen[0] if chosen else None

    def _decodable(self, stream: Any) -> Any:
        if stream.codec_context is None:
            raise GemtoolError(f"{self.name}: its {stream.type} codec is not supported")
        return stream

    def packets(self, *streams: Any) -> Iterator[Packet]:
        """Yields the packets of `streams` in file order, in one pass.

        Raises:
            CorruptInput: damaged, or it ends a second or more before its header says.
        """
        ends = {stream.index: 0.0 for stream in streams}
        ticks = {stream.index: float(stream.time_base) for stream in streams}
        with media_errors(self.name):
            for packet in self.container.demux(*streams):
                if packet.size == 0:
                    continue  # marks the end of a stream
                at = packet.pts if packet.pts is not None else packet.dts
                if at is not None:
                    index = packet.stream_index
                    ends[index] = max(ends[index], (at + (packet.duration or 0)) * ticks[index])
                yield packet
        if self._pipe is not None:
            _check_riff(self._pipe.head, self._pipe.exhaust(), self.name)
        kind, whole = self.container.format.name, self.container.duration
        if kind in _LENGTH_OF_STREAMS:
            for stream in streams:
                if stream.duration is not None:
                    start = stream.start_time or 0
                    self._expect(ends[stream.index], (start + stream.duration) * stream.time_base)
        elif (
            kind in _LENGTH_OF_WHOLE
            and whole is not None
            and len(streams) == len(self.container.streams)
        ):
            self._expect(max(ends.values()), Fraction(whole, 1_000_000))

    def _expect(self, reached: float, declared: Fraction) -> None:
        # Streams of unknown length are given the largest one that fits the header's field.
        if reached + 1 < declared < 1000 * 3600:
            raise CorruptInput(
                f"{self.name}: ends at {reached:.1f} s, its header says {float(declared):.1f} s: "
                "truncated"
            )


@contextmanager
def open_media(source: Source, name: str) -> Iterator[MediaFile]:
    """Opens sound or video from a path, bytes, or a binary file, which need not be seekable.

    Raises:
        CorruptInput: not media, or its header is damaged.
        GemtoolError: it cannot be read in one pass (an MP4 whose index is at the end, on a pipe).
    """
    import av

    with ExitStack() as stack:
        file: Any = source
        pipe = None
        if isinstance(source, (str, Path)):
            file = stack.enter_context(Path(source).open("rb"))
        elif isinstance(source, bytes):
            file = io.BytesIO(source)
        elif not source.seekable():
            head = source.read(_HEAD)
            if _index_at_end(head):
                raise GemtoolError(
                    f"{name}: the index of this MP4 is at its end, where a pipe cannot reach it; "
                    f"name the file, or remux it: {_REMUX}"
                )
            file = pipe = _Pipe(head, source)
        if pipe is None:
            start = file.tell()
            head = file.read(8)
            _check_riff(head, file.seek(0, io.SEEK_END) - start, name)
            file.seek(start)
        try:
            # No shared setting is changed: libav's messages are off unless someone asks for them.
            container = av.open(
                file,
                container_options={"format_whitelist": _DEMUXERS, "max_size": _WAV_PACKET},
                io_open=_refuse,
                metadata_errors="replace",
            )
        except MemoryError:
            raise
        except (av.FFmpegError, ValueError) as error:
            raise CorruptInput(
                f"{name}: no sound or video in a known format, or its header is damaged "
                f"({_reason(error)})"
            ) from None
        stack.enter_context(container)
        yield MediaFile(container, name, pipe)


@contextmanager
def media_errors(name: str) -> Iterator[None]:
    """Turns libav's errors into ours."""
    import av

    try:
        yield
    except MemoryError:
        raise
    except av.FFmpegError as error:
        raise CorruptInput(f"{name}: damaged or truncated ({_reason(error)})") from None


class Decoder:
    """Decodes a stream's packets, in one thread; damaged ones are left out and counted.

    Args:
        stream: of an open container.
        name: of the source, for messages.
    """

    def __init__(self, stream: Any, name: str) -> None:
        self._context = stream.codec_context
        self._context.thread_count = 1  # files are decoded side by side, not parts of a picture
        self._marked = self._context.name == "h264"
        self._skips = False
        self._kind = stream.type
        self._name = name
        self._damaged = 0

    def decode(self, packet: Packet | None, shown: bool = True) -> list[Any]:
        """Frames that `packet` completes; None asks for those still inside the decoder.

        The frame of a packet that is not `shown` may be left out, if no other is made from it:
        pictures of H.264 say so of themselves.
        """
        import av

        if self._marked and shown == self._skips:
            self._skips = not shown
            self._context.skip_frame = "NONREF" if self._skips else "DEFAULT"
        try:
            return self._context.decode(packet)
        except MemoryError:
            raise
        except av.FFmpegError:
            self._damaged += 1
            return []

    def restart(self) -> None:
        """Forgets everything: the next packet must be a key frame's."""
        self._context.flush_buffers()

    def report(self, decoded: bool) -> None:
        """Warns of damage at the end; CorruptInput if nothing at all could be decoded."""
        if not decoded:
            raise CorruptInput(f"{self._name}: its {self._kind} could not be decoded")
        if self._damaged:
            log.warning(f"{self._name}: left out {self._damaged} damaged packets of {self._kind}")


class _Pipe:
    """A stream of bytes whose beginning, `head`, was read already.

    Having no `seek`, it is read once, from beginning to end.
    """

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self.head = head
        self._rest = rest
        self._count = 0

    def read(self, size: int) -> bytes:
        if self._count < len(self.head):
            part = self.head[self._count : self._count + size]
        else:
            part = self._rest.read(size)
        self._count += len(part)
        return part

    def exhaust(self) -> int:
        """Reads what is left; returns the length of all."""
        while self.read(_HEAD):
            pass
        return self._count


def _index_at_end(head: bytes) -> bool:
    """Whether an MP4 has its samples (`mdat`) before their index (`moov`)."""
    at = 0
    while at + 16 <= len(head):
        size, kind = int.from_bytes(head[at : at + 4], "big"), head[at + 4 : at + 8]
        if kind == b"mdat":
            return True
        if kind not in (b"ftyp", b"free", b"skip", b"wide", b"uuid", b"pdin", b"styp"):
            return False
        if size == 1:
            size = int.from_bytes(head[at + 8 : at + 16], "big")
        at += max(size, 8)
    return False


def _check_riff(head: bytes, length: int, name: str) -> None:
    """Finds a truncated WAV or AVI, of which libav would only see that it is short."""
    declared = 8 + int.from_bytes(head[4:8], "little")
    unknown = 0xFFFFFF00  # or more: written to a pipe
    if head[:4] == b"RIFF" and length + _RIFF_SLACK < declared < unknown:
        raise CorruptInput(f"{name}: has {length:,} bytes, its header says {declared:,}: truncated")


def _refuse(url: str, flags: int, options: dict[str, Any]) -> NoReturn:
    raise PermissionError(f"the file asks for {url!r}: other files are never opened")


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
