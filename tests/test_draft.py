"""Guesses by n-grams: answers are those of greedy decoding, and what was wrong leaves no trace."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemtool.checkpoint import open_checkpoint
from gemtool.control import CONTROL_COUNT
from gemtool.data.vocab import Vocab
from gemtool.errors import CorruptInput, UsageError
from gemtool.infer.chat import Conversation
from gemtool.infer.contexts import load_context
from gemtool.infer.decode import read_requests
from gemtool.infer.draft import GUESSES, LONGEST, NgramDraft
from gemtool.infer.engine import Engine
from gemtool.infer.generate import TILE, Step
from gemtool.infer.grammar import Grammar
from gemtool.infer.prefill import write_context
from gemtool.infer.sampling import Sampling
from gemtool.infer.sequence import Sequence
from gemtool.infer.text import Prompt
from gemtool.model.mesh import open_mesh
from gemtool.stream.context import open_contexts
from tests.conftest import Command
from tests.test_index_infer import indexed
from tests.test_prefill_decode import make_engine, media_document, text_tokens, tiny

VOCAB = Vocab.load()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "run"
    make_engine(path, tiny(VOCAB.size, kv_dtype="float32"), VOCAB, 64)
    return path


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine(open_checkpoint(folder), 64)


@pytest.fixture(scope="module")
def index_engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    path = tmp_path_factory.mktemp("indexed") / "run"
    return make_engine(path, indexed(VOCAB.size), VOCAB, 64)


# Guesses


def slow_guess(tokens: list[int], most: int) -> list[int]:
    """By the definition."""
    for size in range(LONGEST, 0, -1):
        last = tokens[-size:]
        for start in range(len(tokens) - size - 1, -1, -1):
            if len(last) == size and tokens[start : start + size] == last:
                longer = list(tokens)
                found: list[int] = []
                at = start + size
                while len(found) < min(most, GUESSES) and longer[at] >= CONTROL_COUNT:
                    found.append(longer[at])
                    longer.append(longer[at])
                    at += 1
                return found
    return []


few = st.integers(CONTROL_COUNT - 1, CONTROL_COUNT + 3)


@given(st.lists(few, max_size=60), st.lists(few, max_size=30), st.integers(0, 12))
def test_guesses_are_what_followed(before: list[int], said: list[int], most: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gemtool.infer.draft._CHUNK", 7)
        draft = NgramDraft(np.array(before, np.int32))
        for count, token in enumerate(said, 1):
            draft.push(token)
            assert draft.guess(most) == slow_guess(before + said[:count], most)


def test_what_repeats_goes_on() -> None:
    draft = NgramDraft(np.array([100, 101, 102, 101, 102], np.int32))
    assert draft.guess(20) == [101, 102] * 4
    assert draft.guess(0) == []
    for token in range(1000, 2000):
        draft.push(token)
    assert draft.guess(8) == []
    draft.push(1500)
    assert draft.guess(3) == [1501, 1502, 1503]


def test_guesses_rest_while_they_are_wrong() -> None:
    draft, rests = NgramDraft(np.arange(100, 120)), []
    draft.push(100)
    for right in [0, 1, 0, 0, 0, 0, 2, 0, 8]:
        rest = 0
        while not draft.guess(8):
            rest += 1
        rests.append(rest)
        draft.learn(8, right)
    assert rests == [0, 1, 2, 4, 8, 8, 8, 0, 1]
    assert draft.guess(8)
    draft.learn(1, 1)  # all there was
    assert draft.guess(8)


# The same answers


class Given(NgramDraft):
    """Guesses of a plain answer that is known, of which some are wrong."""

    def __init__(self, answer: list[int], seed: int, wrong: float) -> None:
        super().__init__(np.empty(0, np.int32))
        self._answer, self._at, self._wrong = answer, 0, wrong
        self._rng = np.random.default_rng(seed)

    def push(self, token: int) -> None:
        self._at += 1

    def guess(self, most: int) -> list[int]:
        size = int(self._rng.integers(0, GUESSES + 1))
        guesses = np.array(self._answer[self._at : self._at + min(size, most)], np.int64)
        wrong = self._rng.random(len(guesses)) < self._wrong
        return np.where(wrong, self._rng.integers(320, 16000, len(guesses)), guesses).tolist()


def require_same(found: list[Step], plain: list[Step]) -> None:
    """The same tokens from the same scores, to rounding, which may decide where two are alike."""
    for a, b in zip(found, plain, strict=True):
        np.testing.assert_allclose(a.logits, b.logits, atol=1e-4)
        if a.token != b.token:
            second, first = np.sort(b.logits)[-2:]
            assert first - second < 1e-4
            return


def steps(
    engine: Engine, context: Sequence | None, prompt: np.ndarray, **options: Any
) -> list[Step]:
    return list(engine.generate(context, prompt, **options))


@pytest.mark.parametrize("kind", ["window", "indexed"])
@pytest.mark.parametrize("wrong", [0.0, 0.15, 1.0])
def test_answers_do_not_depend_on_guesses(
    engine: Engine, index_engine: Engine, kind: str, wrong: float
) -> None:
    """Whatever was guessed: over the end of windows, of blocks of an index and of buffers."""
    model = engine if kind == "window" else index_engine
    context = model.prefill(text_tokens(4040))
    plain = steps(model, context, text_tokens(9, 1), max_tokens=90)
    tokens = [step.token for step in plain]
    for seed in range(3):
        draft = Given(tokens, seed, wrong)
        found = steps(model, context, text_tokens(9, 1), max_tokens=90, draft=draft)
        require_same(found, plain)
        assert 0 <= draft.accepted <= draft.drafted
        if wrong == 0:
            assert draft.accepted == draft.drafted > 30
        if wrong == 1:
            assert draft.accepted < 5 < draft.drafted
    require_same(steps(model, context, text_tokens(9, 1), max_tokens=90), plain)


def test_long_repetitive_answers(engine: Engine) -> None:
    accepted = 0
    context = engine.prefill(np.tile(text_tokens(12, 3), 20))
    for seed in range(5):
        for before in (None, context):
            prompt = np.tile(text_tokens(5, seed), 3)
            history = prompt if before is None else np.concatenate([before.tokens, prompt])
            draft = NgramDraft(history)
            plain = steps(engine, before, prompt, max_tokens=120)
            require_same(steps(engine, before, prompt, max_tokens=120, draft=draft), plain)
            accepted += draft.accepted
    assert accepted > 100


def test_what_was_wrong_leaves_no_trace(index_engine: Engine) -> None:
    """To the bit: windows, tails, what an index has pending, keys, values, landmarks."""
    tokens = text_tokens(4 * TILE, 5)
    arrays = []
    for wrong in (False, True):
        with index_engine.prefill(text_tokens(123)).fork() as live:
            for start in range(0, len(tokens), TILE):
                if wrong:
                    mark = live.mark()
                    scores = live.extend_scored(text_tokens(TILE - 3, start), TILE, 4)
                    assert scores.shape == (4, VOCAB.size)
                    assert np.array_equal(live.logits, scores[-1])
                    live.back_to(mark)
                live.extend_scored(tokens[start : start + TILE], TILE, 1)
            arrays.append({**live.state(), **live.block(0, live.length), "logits": live.logits})
    assert arrays[0].keys() == arrays[1].keys()
    for name, array in arrays[0].items():
        assert np.array_equal(array, arrays[1][name]), name


@pytest.mark.parametrize("count", [1, 9, 11, TILE])
def test_scores_after_each_token(engine: Engine, count: int) -> None:
    tokens = text_tokens(11, 4)
    with engine.prefill(text_tokens(50)).fork() as live:
        scores = live.extend_scored(tokens, TILE, count)
    assert len(scores) == min(count, len(tokens))
    with engine.prefill(text_tokens(50)).fork() as live:
        live.extend(tokens[: -len(scores)])
        for token, row in zip(tokens[-len(scores) :], scores, strict=True):
            live.extend(np.array([token], np.int32))
            np.testing.assert_allclose(row, live.logits, atol=1e-4)


@pytest.mark.slow
def test_on_a_mesh(folder: Path, engine: Engine) -> None:
    mesh = open_mesh("expert=2,context=2,tensor=2", engine.config)
    spread = Engine(open_checkpoint(folder), 64, mesh=mesh)
    plain = steps(engine, engine.prefill(text_tokens(100)), text_tokens(9, 1), max_tokens=30)
    draft = Given([step.token for step in plain], 0, 0.2)
    context = spread.prefill(text_tokens(100))
    require_same(steps(spread, context, text_tokens(9, 1), max_tokens=30, draft=draft), plain)
    assert draft.accepted


@pytest.mark.parametrize("pattern", ["(abc ){30}", "[0-9]{50}", "(yes|no)( (yes|no)){9}"])
def test_with_a_grammar(engine: Engine, pattern: str) -> None:
    prompt = Prompt("Say abc abc abc", grammar=Grammar.parse("regex", pattern), max_tokens=100)
    plain = engine.answer(None, prompt)
    drafted = engine.answer(None, replace(prompt, draft=True))
    assert (drafted.text, drafted.tokens) == (plain.text, plain.tokens)
    assert drafted.finish == plain.finish == "stop"
    assert drafted.accepted > 0
    assert (plain.drafted, plain.accepted) == (0, 0)


@pytest.mark.parametrize("most", [1, 2, 9, 40])
def test_answers_end_where_they_did(engine: Engine, most: int) -> None:
    prompt = Prompt("One one one one one", max_tokens=most, logprobs=2)
    plain = engine.answer(None, prompt)
    drafted = engine.answer(None, replace(prompt, draft=True))
    assert len(plain.tokens) == most
    assert (drafted.tokens, drafted.finish) == (plain.tokens, plain.finish)
    for a, b in zip(drafted.logprobs, plain.logprobs, strict=True):
        assert a["logprob"] == pytest.approx(b["logprob"], abs=1e-4)
    stop = plain.text[-3:]
    if most == 40 and stop:
        cut = engine.answer(None, replace(prompt, stop=(stop,)))
        assert engine.answer(None, replace(prompt, stop=(stop,), draft=True)).text == cut.text


# Contexts and the command


def test_contexts_tell_their_tokens(engine: Engine, tmp_path: Path) -> None:
    spans = media_document()[:-1]
    tokens = np.concatenate([span.tokens for span in spans])
    live = engine.prefill(spans)
    assert np.array_equal(live.tokens, tokens)
    with (tmp_path / "film.ctx").open("wb") as sink:
        write_context(engine, "film", spans, sink)
    with open_contexts(str(tmp_path / "film.ctx")) as contexts:
        assert np.array_equal(load_context(engine, next(contexts)).sequence.tokens, tokens)
    # Media are nothing to repeat.
    draft = NgramDraft(tokens)
    for token in tokens[-100:-90]:
        draft.push(int(token))
        assert all(guess >= CONTROL_COUNT for guess in draft.guess(8))


def test_turns_of_a_conversation_are_repeated_too(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    histories: list[np.ndarray] = []

    class Watched(NgramDraft):
        def __init__(self, tokens: np.ndarray) -> None:
            histories.append(tokens)
            super().__init__(tokens)

    monkeypatch.setattr("gemtool.infer.engine.NgramDraft", Watched)
    prompts = [Prompt(text, max_tokens=9, draft=True) for text in ("One two.", "And?")]
    talk = Conversation(engine)
    drafted = [answer.tokens for _, answer in talk.turns(prompts)]
    first, second = histories
    assert np.array_equal(second[: -len(prompts[1].tokens(VOCAB))], talk.tokens[: len(first) + 10])
    plain = Conversation(engine).turns([replace(prompt, draft=False) for prompt in prompts])
    assert drafted == [answer.tokens for _, answer in plain]


def test_only_greedy_decoding_is_guessed(engine: Engine) -> None:
    with pytest.raises(UsageError, match=r"temperature is 0.5; with --draft it must be 0"):
        Prompt("?", draft=True, sampling=Sampling(0.5))
    line = b'{"prompt": "a", "temperature": 2}'
    with pytest.raises(CorruptInput, match=r"p.jsonl: line 1: temperature is 2; with --draft"):
        list(read_requests(io.BytesIO(line), "p.jsonl", Prompt("", draft=True)))


def test_command(gemtool: Command, folder: Path, tmp_path: Path) -> None:
    ask = ("decode", "--ckpt", folder, "--prompt", "One two. One two.", "--max-tokens", 40)
    plain = json.loads(gemtool(*ask).stdout)
    drafted = json.loads(gemtool(*ask, "--draft", "ngram").stdout)
    usage = drafted.pop("usage")
    assert plain.pop("usage").keys() == usage.keys() - {"drafted", "accepted"}
    assert drafted == plain
    assert usage["drafted"] >= usage["accepted"] > 0
    for options, message in (
        (("ngram", "--temperature", 1), "temperature is 1.0; with --draft it must be 0"),
        (("tea",), "'tea' is not"),
    ):
        done = gemtool(*ask, "--draft", *options, check=False)
        assert (done.returncode, done.stdout) == (2, b"")
        assert message in done.stderr.decode()
