"""Prompts that are answered together get the answers that they get alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemtool.checkpoint import open_checkpoint
from gemtool.data.vocab import Vocab
from gemtool.errors import GemtoolError
from gemtool.infer import forks
from gemtool.infer.answer import Answer
from gemtool.infer.contexts import load_context
from gemtool.infer.engine import Engine
from gemtool.infer.forks import Forked, forks_at_once, rows_for
from gemtool.infer.grammar import Grammar
from gemtool.infer.prefill import write_context
from gemtool.infer.sampling import Sampling
from gemtool.infer.sequence import Sequence
from gemtool.infer.text import Prompt
from gemtool.infer.together import answer_together
from gemtool.stream.context import BLOCK, open_contexts
from tests.conftest import Command, Verb
from tests.test_mapped import mixed, quickly_compiled  # noqa: F401 (a fixture)
from tests.test_prefill_decode import make_engine, text_document, text_tokens, tiny

CLOSE = 2e-3
"""Of scores: sums of float32 come in another order, so that now and then a key is another float16."""


@pytest.fixture(scope="module", params=["indexed", "dense"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Indexed layers, one of which shares keys, and a dense one; windows and a dense one between."""
    vocab = Vocab.load()
    path = tmp_path_factory.mktemp("together") / "run"
    config = mixed(vocab.size) if request.param == "indexed" else tiny(vocab.size, "LGL")
    make_engine(path, config, vocab, 512)
    return path


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine(open_checkpoint(folder), 512)


@pytest.fixture(scope="module")
def file(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("contexts") / "a.ctx"
    with path.open("wb") as sink:
        write_context(engine, "a", text_document("a", text_tokens(BLOCK + 237, 1))[:1], sink)
    return path


@pytest.fixture(scope="module")
def context(engine: Engine, file: Path) -> Sequence:
    """From a file, so that some of its positions are in pages where that can be."""
    with open_contexts(str(file)) as contexts:
        return load_context(engine, next(contexts)).sequence


def prompts() -> list[Prompt]:
    """Of many lengths, one of more than a tile; more than are answered at a time."""
    words = "Which number did the old captain of the second ship say, and to whom?".split()
    texts = [" ".join(words[:count]) for count in (1, 13, 4, 9, 2, 7)]
    found = [Prompt(text, max_tokens=5 + 3 * i, index=i) for i, text in enumerate(texts)]
    long = Prompt(" ".join(words * 6), max_tokens=30, index=len(found))
    warm = Prompt("Who?", sampling=Sampling(1.0, top_k=5), max_tokens=9, index=7, seed=3)
    exact = Prompt("Say so.", grammar=Grammar.parse("regex", "[a-c]{4}"), index=8)
    raw = Prompt("and then", raw=True, max_tokens=70, logprobs=2, index=9)
    return [*found, long, warm, exact, raw]


def require_same(found: Answer, wanted: Answer, engine: Engine) -> None:
    assert found.finish == wanted.finish
    assert (found.prompt, found.cached) == (wanted.prompt, wanted.cached)
    assert found.tokens == wanted.tokens
    assert found.text == wanted.text
    for mine, other in zip(found.logprobs, wanted.logprobs, strict=True):
        assert mine["token"] == other["token"]
        assert mine["logprob"] == pytest.approx(other["logprob"], abs=CLOSE)


def watch_forks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """In which forks prompts are begun, from now on."""
    begun: list[int] = []
    real = Forked.begin

    def begin(forked: Forked, fork: int, prompt: np.ndarray) -> np.ndarray:
        begun.append(fork)
        return real(forked, fork, prompt)

    monkeypatch.setattr(Forked, "begin", begin)
    return begun


def test_scores(engine: Engine, context: Sequence) -> None:
    """Of forks that begin at different times and are of different lengths, token by token; one ends and
    another one takes its place."""
    asked = [text_tokens(count, count) for count in (3, 70, 20)]
    said = text_tokens(160, 9)
    room, work = rows_for(engine, 70, 160)

    def alone(prompt: np.ndarray, count: int) -> list[np.ndarray]:
        with context.fork() as live:
            live.extend(prompt)
            found = [live.logits]
            for token in said[:count]:
                live.extend(np.array([token], np.int32))
                found.append(live.logits)
        return found  # type: ignore[return-value]

    with context.fork() as live:
        forked = Forked(live, engine, 2, room, work)
        first = [forked.begin(0, asked[0])]
        second: list[np.ndarray] = []
        for at in range(140):
            if at == 5:
                second.append(forked.begin(1, asked[1]))
            running = np.array([True, at >= 5])
            scores = forked.step(np.array([said[at], said[max(at - 5, 0)]]), running)
            first.append(scores[0])
            if at >= 5:
                second.append(scores[1])
        third = [forked.begin(0, asked[2])]
        running = np.array([True, False])
        third.append(forked.step(np.array([said[0], 0]), running)[0])
    for found, prompt in ((first, asked[0]), (second, asked[1]), (third, asked[2])):
        wanted = alone(prompt, len(found) - 1)
        np.testing.assert_allclose(found, wanted, atol=CLOSE, rtol=0)


def test_answers(engine: Engine, context: Sequence, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, with their text piece by piece; nothing is left behind."""
    monkeypatch.setattr(forks, "MOST", 4)
    asked, told = prompts(), list[str]()
    wanted = [engine.answer(context, prompt) for prompt in asked]
    found = []
    for answer in answer_together(engine, context, asked, told.append):
        assert "".join(told) == answer.text
        told.clear()
        found.append(answer)
    for mine, other in zip(found, wanted, strict=True):
        require_same(mine, other, engine)
    require_same(engine.answer(context, asked[1]), wanted[1], engine)


def test_one_is_left_early(engine: Engine, context: Sequence) -> None:
    asked = prompts()[:3]
    answers = answer_together(engine, context, asked)
    first = next(answers)
    answers.close()  # type: ignore[attr-defined]
    require_same(first, engine.answer(context, asked[0]), engine)


def test_what_cannot_be_answered(engine: Engine, context: Sequence) -> None:
    """The answers before it come first, and it says what alone it would."""
    bad = Prompt("Say so.", grammar=Grammar.parse("grammar", "start: <[6]>"), index=1)
    asked = [*prompts()[:2], bad, prompts()[2]]
    with pytest.raises(GemtoolError) as alone:
        engine.answer(context, bad)
    answers, found = answer_together(engine, context, asked), list[Answer]()
    with pytest.raises(GemtoolError) as together:
        for answer in answers:
            found.append(answer)
    assert len(found) == 2
    assert str(together.value) == str(alone.value)
    require_same(engine.answer(context, asked[0]), found[0], engine)


def test_too_much_for_two(
    engine: Engine, context: Sequence, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What asks for more is answered alone, and its neighbours together."""
    seen = []
    real = Engine.answer
    monkeypatch.setattr(Engine, "answer", lambda *given: seen.append(given[2]) or real(*given))
    few = [dataclasses.replace(prompt, max_tokens=2) for prompt in prompts()[:4]]
    far = dataclasses.replace(few[2], max_tokens=1 << 40, grammar=prompts()[-2].grammar)
    found = list(answer_together(engine, context, [*few[:2], far, few[3]]))
    assert [len(answer.tokens) for answer in found] == [2, 2, len(found[2].tokens), 2]
    assert seen == [far, few[3]]


def test_nothing_but_the_context(engine: Engine, context: Sequence) -> None:
    """A raw prompt may be empty; without a context none may."""
    asked = [Prompt("", raw=True, max_tokens=4), *prompts()[:2]]
    wanted = [engine.answer(context, prompt).tokens for prompt in asked]
    assert [answer.tokens for answer in answer_together(engine, context, asked)] == wanted
    with pytest.raises(GemtoolError, match="nothing to continue"):
        list(answer_together(engine, None, asked))


def test_how_many_at_a_time() -> None:
    assert [forks_at_once(512, count) for count in (1, 2, 3, 8, 100)] == [1, 2, 4, 8, 8]
    assert forks_at_once(forks.ROWS // 3, 8) == 2
    assert forks_at_once(forks.ROWS * 2, 8) == 1


def test_command(gemtool: Command, folder: Path, tmp_path: Path) -> None:
    """Of a file together, of a pipe one by one; without a context."""
    rows = [{"id": f"q{i}", "prompt": "Who " * (i + 1), "max_tokens": 6} for i in range(3)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "questions.jsonl").write_bytes(lines)
    command = "decode", "--ckpt", folder, "--prompts"
    together = gemtool(*command, "questions.jsonl").stdout.splitlines()
    piped = gemtool(*command, "-", input=lines).stdout.splitlines()
    for mine, other in zip(map(json.loads, together), map(json.loads, piped), strict=True):
        assert {**mine, "usage": 0} == {**other, "usage": 0}
    assert [json.loads(line)["id"] for line in together] == ["q0", "q1", "q2"]


def test_command_with_a_context(
    verb: Verb, folder: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a file together, of a pipe one by one, and each by a command of its own."""
    begun = watch_forks(monkeypatch)
    prompts = ["Who speaks?", "What did the captain say, and to whom?", "Why?", "Go on"]
    rows: list[dict[str, Any]] = [
        {"prompt": text, "max_tokens": 12 - 2 * i} for i, text in enumerate(prompts)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "questions.jsonl").write_bytes(lines)
    command = "decode", "--ckpt", folder, "--cache", file

    def answered(*more: object, stdin: bytes = b"") -> list[dict]:
        done = verb(*command, *more, stdin=stdin)
        assert done.code == 0, done.err
        found = [json.loads(line) for line in done.out.splitlines()]
        assert {row["doc"] for row in found} == {"a"}
        assert {row["usage"].pop("seconds") > 0 for row in found} == {True}
        assert {row["usage"]["cached"] for row in found} == {BLOCK + 237}
        return found

    together = answered("--prompts", "questions.jsonl")
    assert len(set(begun)) == len(prompts)  # each in a fork of its own
    begun.clear()
    piped = answered("--prompts", "-", stdin=lines)
    alone = [
        answered("--prompt", row["prompt"], "--max-tokens", row["max_tokens"])[0] for row in rows
    ]
    assert not begun
    assert together == piped
    assert [row["id"] for row in together] == ["0", "1", "2", "3"]
    assert [{**row, "id": "0"} for row in together] == alone
    assert len({tuple(row["tokens"][:6]) for row in together}) == len(prompts)
