"""Video as frames of patches beside its sound, read in one forward pass.

The time of a video begins with its picture. Sample k of the picture is the last frame shown at or
before k / fps seconds, so 10 seconds at 1 fps give 10 samples. Pieces come a second at a time: the
timestamp, the samples taken in that second, subtitles that begin in it if they are wanted, then
the second's sound. A second without a sample (fps below 1, or sound that outlasts the picture) has
no timestamp.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from gemtool.data.audio import Second, SoundTrack
from gemtool.data.avfile import Decoder, Source, media_errors, open_media
from gemtool.data.clock import Clock
from gemtool.data.image import patchify
from gemtool.data.pieces import Piece
from gemtool.data.settings import MediaSettings
from gemtool.data.subtitles import Subtitles
from gemtool.data.upright import Upright
from gemtool.errors import CorruptInput, GemtoolError

if TYPE_CHECKING:
    from av import Packet, VideoFrame

_PICTURE_LEAD = 30
_SAMPLES_WAITING = 600
"""The picture waits for the sound of its time for so many seconds, and samples, at most."""

_SOUND_LEAD = 3600
"""Seconds that sound waits for the picture: it is small, and slides change seldom."""

_PADDING = 1600
"""Sound after the picture's last second, if shorter than these samples, is a codec's padding."""

_TEXTS_WAITING = 100_000
"""Subtitles that come before their time, at most."""

_GOP_PACKETS = 600
_GOP_BYTES = 64 << 20
"""A group of pictures is held back to this size; of longer ones everything is decoded."""

_CLEAN_STARTS = 3
"""Key frames that must be seen to start a clean GOP before any packet is left out."""

_Sample = tuple[int, np.ndarray]


def video_pieces(source: Source, settings: MediaSettings, name: str) -> Iterator[Piece]:
    """Yields, for each second: a timestamp (text), frames (video), and sound (audio).

    Memory does not grow with length, whatever the order of picture and sound in the file: samples
    wait for their sound while the picture is at most 30 seconds (600 samples) ahead of it, and go
    on without it then; sound waits for the picture for an hour. A file that delivers what was no
    longer waited for is refused.

    Args:
        source: a path, the file's bytes, or a binary file (a pipe will do).
        settings: frames a second, token budgets, and whether there are timestamps and sound.
        name: of the source, for `meta` and messages.

    Raises:
        CorruptInput: no moving picture in it, truncated or damaged.
        GemtoolError: a codec that is not supported, a file that a pipe cannot serve, or one whose
            picture and sound lie too far apart.
    """
    with open_media(source, name) as media:
        stream = media.video_stream()
        if stream is None:
            raise CorruptInput(f"{name}: holds no moving picture")
        picture = _Picture(stream, settings, media.longest_gap, name)
        sound = None
        streams: list[Any] = [stream]
        sound_stream = media.audio_stream() if settings.audio else None
        if sound_stream is not None:
            sound = SoundTrack(
                sound_stream, settings.audio_rate, media.longest_gap, name, picture.origin
            )
            streams.append(sound_stream)
        text_stream = media.subtitle_stream() if settings.subtitles else None
        texts = None
        if text_stream is not None:
            texts = Subtitles(text_stream, picture.origin or Fraction(0), name)
            streams.append(text_stream)
        seconds = _Seconds(picture, sound, settings, name)
        for packet in media.packets(*streams):
            if packet.stream_index == stream.index:
                seconds.add_picture(picture.push(packet))
            elif text_stream is not None and packet.stream_index == text_stream.index:
                assert texts is not None
                seconds.add_texts(texts.push(packet))
            elif sound is not None:
                seconds.add_sound(sound.push(packet))
            yield from seconds.complete()
        seconds.add_picture(picture.finish())
        if sound is not None:
            seconds.add_sound(sound.finish())
        yield from seconds.rest()


def timestamp(second: int) -> str:
    """`MM:SS`, or `H:MM:SS` from an hour on."""
    minutes, seconds = divmod(second, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}"


class _Seconds:
    """Puts samples and sound in order; each is added as the file delivers it."""

    def __init__(
        self, picture: _Picture, sound: SoundTrack | None, settings: MediaSettings, name: str
    ) -> None:
        self._picture = picture
        self._sound = sound
        self._settings = settings
        self._fps = picture.fps
        self._name = name
        self._samples: deque[_Sample] = deque()
        self._heard: deque[Second] = deque()
        self._titled = settings.subtitles
        self._texts: list[Piece] = []  # subtitles
        self._next = 0  # the second to come out

    def add_picture(self, samples: Iterator[_Sample]) -> None:
        for index, patches in samples:
            if index / self._fps < self._next:
                raise self._apart()
            self._samples.append((index, patches))

    def add_sound(self, seconds: Iterator[Second]) -> None:
        for second in seconds:
            if second.index < self._next:
                raise self._apart()
            self._heard.append(second)

    def add_texts(self, texts: Iterator[Piece]) -> None:
        """Subtitles; one that comes too late for its second goes into the next."""
        for text in texts:
            insort(self._texts, text, key=_begin)
            if len(self._texts) > _TEXTS_WAITING:
                raise self._apart()

    def _apart(self) -> GemtoolError:
        return GemtoolError(
            f"{self._name}: picture and sound of {timestamp(self._next)} lie too far apart in the "
            "file; remux it: ffmpeg -i IN -c copy OUT.mkv"
        )

    def complete(self) -> Iterator[Piece]:
        """Yields the seconds for which nothing more is to come, or is waited for."""
        picture, sound = self._picture, self._sound
        if sound is not None and sound.position - picture.position > _SOUND_LEAD:
            self.add_picture(picture.finish())
        while picture.finished or picture.settled >= self._next + 1:
            if sound is not None and sound.position <= self._next:
                ahead = picture.shown - self._next > _PICTURE_LEAD
                if not (ahead or len(self._samples) > _SAMPLES_WAITING):
                    break
                self.add_sound(sound.catch_up())
                if sound.position <= self._next:
                    self.add_sound(sound.cut())
            elif sound is None and not self._samples and not self._titled:
                self._next = max(self._next, int(picture.settled))  # nothing comes until then
                break
            if self._titled and not picture.finished and picture.position < self._next + 1:
                break  # its subtitles lie before the picture of the next second
            yield from self._emit()

    def rest(self) -> Iterator[Piece]:
        """Yields everything that is left."""
        while self._samples or self._heard:
            yield from self._emit()
        yield from self._texts

    def _emit(self) -> Iterator[Piece]:
        now = self._next
        self._next += 1
        # Shown, at fps below 1, in the second in which its instant falls.
        sampled = False
        while self._samples and self._samples[0][0] / self._fps < now + 1:
            index, patches = self._samples.popleft()
            if self._settings.timestamps and not sampled:
                span = (now * 1_000_000, (now + 1) * 1_000_000)
                yield Piece("text", text=timestamp(now), time=span)
            sampled = True
            start, end = (int(i * 1_000_000 / self._fps) for i in (index, index + 1))
            meta = {"source": self._name, "sample": index}
            yield Piece("video", patches, time=(start, end), meta=meta)
        begun = bisect_left(self._texts, self._next * 1_000_000, key=_begin)
        yield from self._texts[:begun]
        del self._texts[:begun]
        if self._heard and self._heard[0].index == now:
            second = self._heard.popleft()
            after = self._picture.finished and now >= self._picture.end
            if not (after and second.samples < _PADDING):
                yield second.piece(self._name)


def _begin(piece: Piece) -> int:
    return piece.time[0] if piece.time else 0


class _Picture:
    """Samples a stream of video, decoding no more of it than is needed.

    Packets are decoded as they come until the stream has shown that its key frames start clean
    groups of pictures (GOPs): intra frames, with no later packet shown before them. From then on
    a GOP's packets are held until the next key frame says where it ends; a GOP in which no sample
    falls is dropped, another decoded up to its last sample, but for frames that neither a sample
    nor another frame needs. Whatever breaks that rule brings back plain decoding for good, so
    samples are always those of a full decode.
    """

    def __init__(self, stream: Any, settings: MediaSettings, longest_gap: int, name: str) -> None:
        self._time_base = Fraction(stream.time_base)
        self.fps = Fraction(str(settings.fps))
        self.origin: Fraction | None = None
        self.finished = False
        """Whether no more samples are to come."""
        self.settled = Fraction(0)
        """Seconds before which all samples are out."""
        self.end = 0.0
        """Seconds of picture, once it is finished."""
        self._decoder = Decoder(stream, name)
        self._name = name
        self._size = settings.image_size
        self._clock = Clock(stream, longest_gap)
        if self._clock.origin is not None:
            self.origin = self._clock.origin * self._time_base
        self._step = self._clock.step

        self._next = 0  # the next sample
        self._due = 0  # the last tick at which a frame is in time for it
        self._shown: tuple[int, VideoFrame] | None = None  # the last frame and its tick
        self._end: float = 0  # tick at which the last frame ends
        self._patches: tuple[VideoFrame, np.ndarray] | None = None
        self._reformatter: Any = None
        self._upright = Upright()

        self._latest: int | None = None  # pts of the packets so far
        self._key: int | None = None  # pts of the current GOP's key frame
        self._keys: set[int] = set()  # those of which the frame has not come out yet
        self._clean = 0  # key frames found to start cleanly
        self._regular = True  # nothing has broken the rule
        self._holding = False
        self._held: list[Packet] = []
        self._held_bytes = 0
        self._cut = 0  # where in `held` the next GOP begins, once it has

    @property
    def shown(self) -> float:
        """Seconds to which frames were decoded, or left out as not needed."""
        return self._clock.now * float(self._time_base)

    @property
    def position(self) -> float:
        """Seconds to which packets have come."""
        if self._holding and self._latest is not None:
            return float(self._tick(self._latest) * self._time_base)
        return self.shown

    def push(self, packet: Packet) -> Iterator[_Sample]:
        """Yields the samples that `packet` settles: their number and uint8 [n, 14, 14, 3]."""
        if self.finished:
            raise GemtoolError(
                f"{self._name}: picture comes an hour after the sound of its time in the file; "
                "remux it: ffmpeg -i IN -c copy OUT.mkv"
            )
        self._inspect(packet)
        if (
            not self._holding
            and packet.is_keyframe
            and self._regular
            and self._clean >= _CLEAN_STARTS
        ):
            yield from self._show(self._decoder.decode(None))
            self._decoder.restart()
            self._keys &= {packet.pts}
            self._holding = True
        if not self._holding:
            yield from self._show(self._decoder.decode(packet))
            return
        # The packet after a key frame tells whether it starts a clean GOP: only then is the one
        # before it decided on.
        decidable = self._cut > 0
        self._held.append(packet)
        self._held_bytes += packet.size
        if not self._regular or len(self._held) > _GOP_PACKETS or self._held_bytes > _GOP_BYTES:
            yield from self._decode_held()
            return
        if decidable:
            yield from self._decode_needed()
        if packet.is_keyframe:
            self._cut = len(self._held) - 1

    def finish(self) -> Iterator[_Sample]:
        """Yields the last samples."""
        if self.finished:
            return
        yield from self._decode_held()
        yield from self._show(self._decoder.decode(None))
        self._decoder.report(self._shown is not None)
        # Rounded timestamps can make a stream longer by a tick, which is no further sample.
        end = self._end - min(1, self._step / 2)
        yield from self._settle(end)
        self.end = end * float(self._time_base)
        self.finished = True

    def _inspect(self, packet: Packet) -> None:
        """Notes whether this packet keeps to the order in which GOPs can be told apart."""
        pts, latest = packet.pts, self._latest
        if pts is None or packet.is_discard:
            self._regular = False
            return
        if packet.is_keyframe:
            self._regular &= latest is None or 0 < pts - latest <= self._clock.longest_gap
            self._key = pts
            self._keys.add(pts)
        else:
            self._regular &= self._key is not None and pts > self._key
        self._latest = pts if latest is None else max(latest, pts)

    def _tick(self, pts: int) -> int:
        return pts - (self._clock.origin or 0)

    def _limit(self, sample: int) -> int:
        """The last tick at which a frame is in time for `sample`."""
        return int(sample / self.fps / self._time_base)

    def _decode_needed(self) -> Iterator[_Sample]:
        """Of the first GOP held, decodes what the samples in its time need."""
        gop, rest = self._held[: self._cut], self._held[self._cut :]
        self._held, self._cut = rest, 0
        self._held_bytes = sum(packet.size for packet in rest)
        # Irregular streams are not held: every packet here has a pts.
        ticks = [self._tick(packet.pts or 0) for packet in gop]
        end = self._tick(rest[0].pts or 0)
        order = sorted(range(len(gop)), key=ticks.__getitem__)
        shown = [ticks[i] for i in order]
        sample, needed = self._next, set()
        while (limit := self._limit(sample)) < end:
            needed.add(order[max(bisect_right(shown, limit) - 1, 0)])
            sample += 1
        if needed:
            self._clock.pass_to(ticks[0] - 1)
            for i in range(max(needed) + 1):
                yield from self._show(self._decoder.decode(gop[i], shown=i in needed))
            yield from self._show(self._decoder.decode(None))
            self._decoder.restart()
            yield from self._settle(end)
        self._keys.discard(gop[0].pts)
        self._clock.pass_to(end - 1)

    def _decode_held(self) -> Iterator[_Sample]:
        """Decodes everything held and leaves off holding."""
        held = self._held
        self._held, self._held_bytes, self._cut = [], 0, 0
        self._holding = False
        self._clean = 0
        for packet in held:
            yield from self._show(self._decoder.decode(packet))

    def _show(self, frames: list[VideoFrame]) -> Iterator[_Sample]:
        """Takes frames in the order they are shown; yields the samples that are now settled."""
        from av.video.frame import PictureType

        for frame in frames:
            if frame.pts in self._keys:
                self._keys.discard(frame.pts)
                self._clean += 1
                self._regular &= frame.pict_type == PictureType.I
            tick, steady = self._clock.place(frame)
            self._regular &= steady
            if self._shown is None:
                self._shown = tick, frame
            yield from self._settle(tick)
            self._shown = tick, frame
            self._end = tick + (frame.duration or self._step)

    def _settle(self, tick: float) -> Iterator[_Sample]:
        """Yields the samples before `tick`, which show the frame shown until then."""
        while self._shown is not None and self._due < tick:
            yield self._next, self._scale(self._shown[1])
            self._next += 1
            self.settled = self._next / self.fps
            self._due = self._limit(self._next)

    def _scale(self, frame: VideoFrame) -> np.ndarray:
        if self._patches is None or self._patches[0] is not frame:
            from av.video.reformatter import Interpolation, VideoReformatter

            if self._reformatter is None:
                self._reformatter = VideoReformatter()
            with media_errors(self._name):
                scaled = self._reformatter.reformat(
                    frame, self._size, self._size, "rgb24", interpolation=Interpolation.AREA
                )
            pixels = scaled.to_ndarray()
            self._patches = frame, patchify(self._upright.apply(pixels, frame))
        return self._patches[1]
