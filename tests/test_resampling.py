"""Resampling to 16 kHz, checked on sweeps whose samples at 16 kHz are known."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from gemtool.data import audio
from gemtool.data.logmel import SAMPLE_RATE, LogMel
from gemtool.data.settings import MediaSettings
from tests.test_audio import encoded


@pytest.fixture
def samples(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """What reaches the log-mel transform."""
    taken: list[np.ndarray] = []

    class Kept(LogMel):
        def push(self, samples: np.ndarray) -> Iterator[np.ndarray]:
            taken.append(samples.copy())
            return super().push(samples)

    monkeypatch.setattr(audio, "LogMel", Kept)
    return taken


def sweep(low: float, high: float, rate: int, seconds: int = 4) -> np.ndarray:
    time = np.arange(seconds * rate) / rate
    phase = 2 * np.pi * (low * time + (high - low) / (2 * seconds) * time**2)
    return (0.5 * np.sin(phase)).astype(np.float32)


def resample(samples: list[np.ndarray], sound: np.ndarray, rate: int) -> np.ndarray:
    data = encoded(sound, rate, "wav", "pcm_f32le")
    list(audio.audio_pieces(data, MediaSettings(), "x"))
    return np.concatenate(samples)


@pytest.mark.parametrize("rate", [8000, 11_025, 16_000, 22_050, 32_000, 44_100, 48_000, 96_000])
def test_a_sweep_stays_itself(samples: list[np.ndarray], rate: int) -> None:
    high = min(7000, 0.44 * rate)
    got = resample(samples, sweep(50, high, rate), rate)
    expected = sweep(50, high, SAMPLE_RATE)
    assert len(got) == len(expected)
    error = (got - expected)[200:-200]  # no later, no earlier, no louder
    assert np.abs(error).max() < 0.03
    assert np.sqrt(np.mean(error**2)) < 0.003  # of an amplitude of 0.5: 41 dB below it


@pytest.mark.parametrize("rate", [22_050, 32_000, 44_100, 48_000, 96_000])
def test_what_16_khz_cannot_hold_is_gone(samples: list[np.ndarray], rate: int) -> None:
    got = resample(samples, sweep(9500, 0.47 * rate, rate), rate)
    assert np.abs(got[200:-200]).max() < 1e-3
