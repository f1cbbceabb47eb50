"""Log-mel spectra of speech and sound, as a stream.

The front end of Whisper (arXiv 2212.04356): 16 kHz, Hann windows of 25 ms, an FFT of 400 points,
80 mel bands on Slaney's scale, log10, scaled by (x + 4) / 4. It differs where Whisper cannot
stream: no maximum over the whole recording is taken, and the window of a frame ends with the
frame's own hop (zeros stand before the first sample), so that a second of sound needs nothing of
the next one.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gemtool.data.settings import FRAMES_PER_AUDIO_TOKEN, MELS

SAMPLE_RATE = 16000
WINDOW = 400
"""Samples under a frame's window, 25 ms; also the length of the FFT."""

_GROUP = 10
"""Neighbouring mel bands that are summed together: most bins are none of theirs."""


def mel_filters(bands: int = MELS, points: int = WINDOW, rate: int = SAMPLE_RATE) -> np.ndarray:
    """Triangular filters on Slaney's mel scale, each of unit area: float32 [bands, points/2 + 1].

    The scale is linear (200/3 Hz a mel) to 1 kHz and logarithmic (27 steps for a factor of 6.4)
    above: Slaney, Auditory Toolbox, 1998; the usual `htk=False, norm="slaney"`.
    """
    knee, hz_per_mel, log_step = 15.0, 200.0 / 3, np.log(6.4) / 27
    top = knee + np.log(rate / 2 / 1000) / log_step
    mels = np.linspace(0, top, bands + 2)
    edges = np.where(mels < knee, mels * hz_per_mel, 1000 * np.exp((mels - knee) * log_step))
    bins = np.arange(points // 2 + 1) * (rate / points)
    low, middle, high = (edges[i : i + bands, np.newaxis] for i in range(3))
    rising = (bins - low) / (middle - low)
    falling = (high - bins) / (high - middle)
    triangles = np.maximum(0, np.minimum(rising, falling))
    return (triangles * (2 / (high - low))).astype(np.float32)


def _narrowed(filters: np.ndarray) -> list[tuple[slice, np.ndarray]]:
    """Filters [bands, bins] in groups of neighbours: a group's bins, and its part [bins, bands]."""
    groups = []
    for start in range(0, len(filters), _GROUP):
        group = filters[start : start + _GROUP]
        used = np.flatnonzero(group.any(axis=0))
        bins = slice(int(used[0]), int(used[-1]) + 1)
        groups.append((bins, np.ascontiguousarray(group[:, bins].T)))
    return groups


class LogMel:
    """Turns mono sound at 16 kHz into audio tokens' features, a second at a time.

    Sound is transformed in whole seconds that start where the recording does, always in arrays of
    one shape, so the features do not depend on how the samples were cut into chunks, bit for bit.

    Args:
        rate: tokens a second: 25 (frames of 10 ms) or 32 (frames of 125 samples).
    """

    def __init__(self, rate: int) -> None:
        self._hop = SAMPLE_RATE // (rate * FRAMES_PER_AUDIO_TOKEN)
        self._token = self._hop * FRAMES_PER_AUDIO_TOKEN
        self._history = WINDOW - self._hop
        # numpy.hanning is symmetric; the periodic window is the one for spectra.
        self._hann = np.hanning(WINDOW + 1)[:-1]
        self._filters = _narrowed(mel_filters())
        # The end of the previous second, then the second being filled.
        self._samples = np.zeros(self._history + SAMPLE_RATE, np.float32)
        windows = np.lib.stride_tricks.sliding_window_view(self._samples, WINDOW)
        self._windows = windows[:: self._hop]
        self._filled = 0

    @property
    def pending(self) -> int:
        """Samples that wait for the rest of their second."""
        return self._filled

    def push(self, samples: np.ndarray) -> Iterator[np.ndarray]:
        """Yields float16 [rate, 4, 80] for each second that `samples` (float32 [n]) complete."""
        while len(samples):
            taken = samples[: SAMPLE_RATE - self._filled]
            start = self._history + self._filled
            self._samples[start : start + len(taken)] = taken
            self._filled += len(taken)
            samples = samples[len(taken) :]
            if self._filled == SAMPLE_RATE:
                yield self._transform()
                self._samples[: self._history] = self._samples[SAMPLE_RATE:]
                self._filled = 0

    def finish(self) -> np.ndarray | None:
        """The last, shorter second, float16 [n, 4, 80]; None if no sample is left over.

        Silence fills its last token. The next sample pushed begins a new recording.
        """
        tokens = -(-self._filled // self._token)
        self._samples[self._history + self._filled :] = 0
        last = self._transform()[:tokens] if tokens else None
        self._samples[:] = 0
        self._filled = 0
        return last

    def _transform(self) -> np.ndarray:
        # In float64: numpy's FFT of float32 takes four times as long.
        spectrum = np.fft.rfft(self._windows * self._hann)
        power = (spectrum.real**2 + spectrum.imag**2).astype(np.float32)
        # Products too small for BLAS to use threads, which would cost more than they bring.
        parts = [power[:, bins] @ part for bins, part in self._filters]
        mel = np.concatenate(parts, axis=1)
        scaled = (np.log10(np.maximum(mel, 1e-10)) + 4) / 4
        return scaled.astype(np.float16).reshape(-1, FRAMES_PER_AUDIO_TOKEN, MELS)
