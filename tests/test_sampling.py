"""Sampling against distributions written out the slow way; text that streams."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemtool.errors import GemtoolError, UsageError
from gemtool.infer.sampling import Sampling, best, distribution, log_softmax, sample
from gemtool.infer.text import TextStream

logit_lists = st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=30)


def reference(logits: list[float], s: Sampling) -> dict[int, float]:
    """Token -> probability, by the definitions."""
    weights = {i: float(np.exp(np.float64(x) / s.temperature)) for i, x in enumerate(logits)}
    order = sorted(weights, key=lambda i: (-weights[i], i))
    if s.top_k:
        order = order[: s.top_k]
    total = sum(weights[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        if mass >= s.top_p:
            break
        kept.append(i)
        mass += weights[i] / total
    kept = [i for i in kept if weights[i] >= s.min_p * weights[kept[0]]]
    total = sum(weights[i] for i in kept)
    return {i: weights[i] / total for i in kept}


@pytest.mark.parametrize("case", range(200))
def test_distribution_is_the_reference(case: int) -> None:
    rng = np.random.default_rng(case)
    logits = rng.normal(0, 3, rng.integers(1, 40)).astype(np.float32)
    s = Sampling(rng.uniform(0.25, 4), int(rng.integers(0, 12)), rng.uniform(0.05, 1), rng.random())
    ids, probabilities = distribution(logits, s)
    expected = reference(logits.tolist(), s)
    assert ids.tolist() == list(expected)
    np.testing.assert_allclose(probabilities, list(expected.values()), rtol=1e-3)


def test_equal_scores_keep_the_lower_ids() -> None:
    ids, probabilities = distribution(np.zeros(6, np.float32), Sampling(1.0, top_k=2))
    assert ids.tolist() == [0, 1]
    np.testing.assert_allclose(probabilities, [0.5, 0.5])


@given(logit_lists)
def test_greedy_is_argmax(logits: list[float]) -> None:
    array = np.array(logits, np.float32)
    assert sample(array, Sampling(), (0, 0, 0)) == int(np.argmax(array))


def test_draws_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    draws = [sample(logits, Sampling(1.0), (7, 0, step)) for step in range(4000)]
    shares = np.bincount(draws, minlength=4) / len(draws)
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.15, 0.05], atol=0.03)


def test_draws_depend_on_seed_prompt_and_step_only() -> None:
    logits = np.zeros(1000, np.float32)
    draw = [sample(logits, Sampling(1.0), seed) for seed in ((1, 2, 3), (1, 2, 3))]
    assert draw[0] == draw[1]
    others = {sample(logits, Sampling(1.0), seed) for seed in ((2, 2, 3), (1, 3, 3), (1, 2, 4))}
    assert draw[0] not in others


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}, {"min_p": 2}]
)
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="expected"):
        Sampling(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_no_numbers_are_refused(bad: float) -> None:
    with pytest.raises(GemtoolError, match="not finite"):
        sample(np.array([0, bad, 1], np.float32), Sampling(), (0, 0, 0))
    with pytest.raises(GemtoolError, match="not finite"):
        sample(np.array([0, bad, 1], np.float32), Sampling(1.0), (0, 0, 0))


def test_log_probabilities() -> None:
    logits = np.log(np.array([0.2, 0.5, 0.3], np.float32))
    values = log_softmax(logits)
    np.testing.assert_allclose(np.exp(values), [0.2, 0.5, 0.3], rtol=1e-6)
    assert [token for token, _ in best(values, 2)] == [1, 2]


@given(st.text(max_size=40), st.lists(st.integers(1, 4), max_size=60))
def test_text_streams_whole_characters(text: str, cuts: list[int]) -> None:
    data, stream, parts = text.encode("utf-8", "surrogatepass"), TextStream(), []
    for size in cuts:
        parts.append(stream.push(data[:size]))
        data = data[size:]
    parts.append(stream.push(data))
    parts.append(stream.finish())
    assert "".join(parts) == text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def test_an_unfinished_character_waits_and_is_replaced_at_the_end() -> None:
    stream = TextStream()
    assert stream.push(b"a\xe2\x82") == "a"
    assert stream.push(b"\xac") == "€"
    assert stream.push(b"\xf0\x9f") == ""
    assert stream.finish() == "\ufffd"


def test_stop_strings_over_token_boundaries() -> None:
    stream = TextStream(("\n\nQ:", "STOP"))
    assert stream.push(b"yes\n") == "yes"
    assert stream.push(b"\n") == ""
    assert stream.push(b"no\n\nQ") == "\n\nno"
    assert not stream.stopped
    assert stream.push(b": more") == ""
    assert stream.stopped
    assert stream.push(b"never") == ""
    assert stream.finish() == ""


def test_the_first_stop_string_wins_and_a_held_beginning_is_given_at_the_end() -> None:
    stream = TextStream(("bc", "abc"))
    assert stream.push(b"xabcd") == "x"
    stream = TextStream(("halt",))
    assert stream.push(b"ha") == ""
    assert stream.finish() == "ha"


@settings(deadline=None)
@given(st.text("ab", max_size=30), st.text("ab", min_size=1, max_size=3), st.integers(1, 5))
def test_stopping_does_not_depend_on_the_tokens(text: str, stop: str, size: int) -> None:
    stream = TextStream((stop,))
    pieces = [text[i : i + size].encode() for i in range(0, len(text), size)]
    out = "".join([stream.push(piece) for piece in pieces] + [stream.finish()])
    assert out == text.split(stop)[0]
    assert stream.stopped == (stop in text)


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-9])
def test_a_tiny_temperature_is_greedy(temperature):
    logits = np.array([1.0, 1e30, -3e38, 9e29], np.float32)
    ids, probabilities = distribution(logits, Sampling(temperature=temperature))
    assert (ids[0], probabilities[0]) == (1, 1.0)
    assert sample(logits, Sampling(temperature=temperature), (0, 0, 0)) == 1


@pytest.mark.parametrize("temperature", [1e12, 1e40, 1e308])
def test_a_huge_temperature_is_uniform(temperature):
    logits = np.array([1.0, 5.0, -300.0, 2.0], np.float32)
    _, probabilities = distribution(logits, Sampling(temperature=temperature))
    np.testing.assert_allclose(probabilities, 0.25, rtol=1e-6)


def test_last_bits_decide_as_rarely_as_in_greedy_decoding() -> None:
    """Scores differ in them by what was computed together."""
    rng = np.random.default_rng(0)
    changed = 0
    for step in range(1000):
        logits = rng.normal(size=500).astype(np.float32)
        noisy = logits + 1e-4 * rng.normal(size=500).astype(np.float32)
        draws = {sample(x, Sampling(temperature=1.0), (1, 0, step)) for x in (logits, noisy)}
        changed += len(draws) > 1
    assert changed <= 2


def test_what_is_not_allowed_changes_no_other_draw() -> None:
    rng = np.random.default_rng(0)
    drawn = Sampling(temperature=1.0)
    kept = 0
    for step in range(100):
        logits, mask = rng.normal(size=50).astype(np.float32), rng.random(50) < 0.9
        free = sample(logits, drawn, (1, 0, step))
        if mask[free]:
            kept += 1
            assert sample(logits, drawn, (1, 0, step), mask) == free
    assert kept > 80
