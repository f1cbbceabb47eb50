"""Progress on stderr: rates and what is left, as a log of a job without a terminal shows them."""

from __future__ import annotations

import time

import pytest

from gemtool import log


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def test_what_is_left_does_not_count_the_first_steps_compilation(clock: Clock, capsys) -> None:
    with log.progress("train", total=200, unit="steps", every=30) as bar:
        clock.now += 40  # loading and compiling
        bar.update(1)
        for _ in range(10):
            clock.now += 3
            bar.update(1)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "gemtool: train: 1 of 200"
    assert second == "gemtool: train: 11 of 200, 9:27 left, 0.33 steps/s"


def test_a_single_long_unit_has_a_rate_of_its_own(clock: Clock, capsys) -> None:
    with log.progress("pack", unit="tokens", every=30) as bar:
        clock.now += 60
        bar.update(6000)
        clock.now += 60
        bar.update(6000, note="documents")
    assert capsys.readouterr().err.splitlines() == [
        "gemtool: pack: 6,000",
        "gemtool: pack: 12,000, 100 tokens/s documents",
    ]


def test_what_was_done_before_is_no_work_of_now(clock: Clock, capsys) -> None:
    with log.progress("prefill", total=10_000, unit="tokens", every=30) as bar:
        bar.skip(1000)
        clock.now += 30
        bar.update(1000)
        bar.skip(6000)
        clock.now += 60
        bar.update(600)
    assert capsys.readouterr().err.splitlines() == [
        "gemtool: prefill: 2,000 of 10,000",
        "gemtool: prefill: 8,600 of 10,000, 2:20 left, 10 tokens/s",
    ]
