"""Sound as audio tokens: any container and codec, 16 kHz mono, log-mel, a second a piece."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from gemtool.data.avfile import Decoder, Source, media_errors, open_media
from gemtool.data.logmel import SAMPLE_RATE, LogMel
from gemtool.data.pieces import Piece
from gemtool.data.settings import MediaSettings
from gemtool.errors import CorruptInput

if TYPE_CHECKING:
    from av import Packet

_DRIFT = SAMPLE_RATE // 10
"""Samples by which timestamps may differ from the count of samples before they are believed."""

_GATHERED = 48_000
"""Samples resampled at a time, at most, and no more than a second: frames of a codec are small."""


@dataclass(frozen=True, slots=True)
class Second:
    """The sound of one second of the source's time.

    Attributes:
        index: seconds since the beginning.
        samples: at 16 kHz; fewer than 16,000 where the sound stops.
        features: float16 [n, 4, 80].
    """

    index: int
    samples: int
    features: np.ndarray

    def piece(self, name: str) -> Piece:
        start = self.index * 1_000_000
        end = start + self.samples * 1_000_000 // SAMPLE_RATE
        return Piece("audio", self.features, time=(start, end), meta={"source": name})


def audio_pieces(source: Source, settings: MediaSettings, name: str) -> Iterator[Piece]:
    """Yields a piece for each second of sound: `settings.audio_rate` tokens, the last one fewer.

    Memory does not grow with length. Where the timestamps leave out a whole second or more, so do
    the pieces (`Piece.time` shows it); shorter gaps are filled with silence.

    Args:
        source: a path, the file's bytes, or a binary file (a pipe will do).
        settings: the token budget.
        name: of the source, for `meta` and messages.

    Raises:
        CorruptInput: no sound in it, truncated or damaged.
        GemtoolError: a codec that is not supported, or a file that a pipe cannot serve.
    """
    with open_media(source, name) as media:
        stream = media.audio_stream()
        if stream is None:
            raise CorruptInput(f"{name}: holds no sound")
        sound = SoundTrack(stream, settings.audio_rate, media.longest_gap, name)
        for packet in media.packets(stream):
            for second in sound.push(packet):
                yield second.piece(name)
        for second in sound.finish():
            yield second.piece(name)


class SoundTrack:
    """Decodes one stream of sound into seconds that begin at whole seconds after `origin`.

    Args:
        stream: libav's, of an open container.
        rate: tokens a second.
        longest_gap: seconds; a longer gap in the timestamps is ignored, as is a jump back.
        name: of the source, for messages.
        origin: time of second 0 in the stream's own time; None is where the stream begins.
    """

    def __init__(
        self, stream: Any, rate: int, longest_gap: int, name: str, origin: Fraction | None = None
    ) -> None:
        time_base = Fraction(stream.time_base)
        if origin is None and stream.start_time is not None:
            origin = stream.start_time * time_base
        self._tick = float(time_base * SAMPLE_RATE)  # samples
        self._origin = None if origin is None else float(origin * SAMPLE_RATE)
        self._decoder = Decoder(stream, name)
        self._longest_gap = longest_gap * SAMPLE_RATE
        self._mel = LogMel(rate)
        self._name = name
        self._setup: tuple[str, str, int] | None = None
        self._resampler: Any = None
        self._gathered: Any = None  # frames that wait to be resampled together
        self._second = 0  # being filled
        # Sample index at which the next frame should be. Exact to a millionth after days.
        self._expected: float | None = None
        self._shift = 0.0  # what jumps in the timestamps amounted to
        self._afresh = False  # the next frame begins a run
        self._drop = 0  # samples before second 0
        self._heard = False

    @property
    def position(self) -> int:
        """The second being filled: all before it are complete."""
        return self._second

    def push(self, packet: Packet) -> Iterator[Second]:
        """Yields the seconds that `packet` completes, or a later one: see `catch_up`."""
        for frame in self._decoder.decode(packet):
            yield from self._place(frame)

    def finish(self) -> Iterator[Second]:
        """Yields what is left at the end of the file."""
        for frame in self._decoder.decode(None):
            yield from self._place(frame)
        yield from self.cut()
        self._decoder.report(self._heard)

    def catch_up(self) -> Iterator[Second]:
        """Yields the seconds that packets so far complete: up to a second waits to be resampled."""
        if self._gathered is not None and self._gathered.samples:
            frame = self._gathered.read()
            frame.pts = None  # placed already
            with media_errors(self._name):
                frames = self._resampler.resample(frame)
            yield from self._take(frames)

    def cut(self) -> Iterator[Second]:
        """Yields the second being filled as far as it is; sound that follows begins a new run."""
        yield from self._end_run()
        samples = self._mel.pending
        features = self._mel.finish()
        if features is not None:
            yield Second(self._second, samples, features)
            self._second += 1
        self._afresh = True

    def _place(self, frame: Any) -> Iterator[Second]:
        """Puts a frame where its timestamp says, unless it merely jitters or jumps."""
        rate = frame.sample_rate
        if not rate:
            return
        at = self._expected
        if frame.pts is not None:
            time = frame.pts * self._tick
            if self._origin is None:
                self._origin = time
            at = time - self._origin + self._shift
        if at is None:
            at = 0.0
        if self._expected is None:
            if abs(at) > self._longest_gap:
                self._shift, at = -at, 0.0
            yield from self._begin(at)
        elif self._afresh:
            yield from self._begin(at)
        else:
            gap = at - self._expected
            if _DRIFT < gap <= self._longest_gap:
                yield from self._begin(at)
            elif abs(gap) > _DRIFT:
                self._shift -= gap
        assert self._expected is not None
        self._expected += frame.samples * SAMPLE_RATE / rate
        setup = frame.format.name, frame.layout.name, rate
        if setup != self._setup:
            yield from self._end_run()
            self._start_run(setup)
        frame.pts = None  # placed already
        self._gathered.write(frame)
        if self._gathered.samples >= min(rate, _GATHERED):
            yield from self.catch_up()

    def _begin(self, at: float) -> Iterator[Second]:
        """Continues at sample `at`, over silence if that is within the second being filled."""
        self._expected = at
        start = round(at)
        self._drop = max(0, -start)
        second, within = divmod(max(0, start), SAMPLE_RATE)
        yield from self._end_run()
        if second != self._second:
            yield from self.cut()
            self._second = second
        self._afresh = False
        missing = within - self._mel.pending
        if missing > 0:
            yield from self._fill(np.zeros(missing, np.float32))

    def _start_run(self, setup: tuple[str, str, int]) -> None:
        """Makes ready for frames of a format, layout and rate."""
        from av import AudioFifo, AudioResampler

        self._setup = setup
        self._resampler = AudioResampler("flt", "mono", SAMPLE_RATE)
        self._gathered = AudioFifo()

    def _end_run(self) -> Iterator[Second]:
        """Fills seconds with all that was decoded; the next frame needs a new resampler."""
        if self._resampler is None:
            return
        yield from self.catch_up()
        with media_errors(self._name):
            rest = self._resampler.resample(None)
        self._setup = self._resampler = self._gathered = None
        yield from self._take(rest)

    def _take(self, frames: list[Any]) -> Iterator[Second]:
        for frame in frames:
            samples = frame.to_ndarray().reshape(-1)
            self._heard = True
            dropped = min(self._drop, len(samples))
            self._drop -= dropped
            samples = samples[dropped:]
            if not np.abs(samples).max(initial=0) <= 100:  # files of floats can hold anything
                samples = np.clip(np.nan_to_num(samples), -100, 100)
            yield from self._fill(samples)

    def _fill(self, samples: np.ndarray) -> Iterator[Second]:
        for features in self._mel.push(samples):
            yield Second(self._second, SAMPLE_RATE, features)
            self._second += 1
