"""Turns that are kept: decode --save and --chat."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemtool.checkpoint import open_checkpoint
from gemtool.control import END_TURN, MODEL, USER
from gemtool.data.vocab import Vocab
from gemtool.infer.chat import Conversation
from gemtool.infer.contexts import load_context, open_base
from gemtool.infer.engine import Engine
from gemtool.infer.prefill import write_context
from gemtool.infer.text import Prompt
from gemtool.stream.context import BLOCK, open_contexts
from tests.conftest import ROOT, command_environment
from tests.test_prefill_decode import make_engine, rows, text_document, text_tokens, tiny

Command = Callable[..., Any]
FIRST, SECOND = Prompt("What is it?", max_tokens=6), Prompt("And why so?", max_tokens=7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    vocab = Vocab.load()
    path = tmp_path_factory.mktemp("model") / "run"
    make_engine(path, tiny(vocab.size), vocab, 64)
    return path


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine(open_checkpoint(folder), 64)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Commands of this file share compiled programs."""
    return {"GEMTOOL_CACHE": str(tmp_path_factory.mktemp("cache"))}


def document(engine: Engine, path: Path, count: int = 300) -> np.ndarray:
    tokens = text_tokens(count)
    with path.open("wb") as sink:
        write_context(engine, "a", text_document("a", tokens)[:1], sink)
    return tokens


def turn(engine: Engine, prompt: Prompt, answer: list[int]) -> np.ndarray:
    text = engine.vocab.encode(prompt.text)
    return np.concatenate([[USER], text, [END_TURN, MODEL], answer, [END_TURN]]).astype(np.int32)


def by_hand(engine: Engine, before: np.ndarray) -> tuple[list[list[int]], np.ndarray]:
    """The answers to both prompts, each asked of all tokens before it; and all tokens in the end."""
    answers = []
    for prompt in (FIRST, SECOND):
        context = engine.prefill(before) if len(before) else None
        answers.append(engine.answer(context, prompt).tokens)
        before = np.concatenate([before, turn(engine, prompt, answers[-1])])
    return answers, before


@pytest.mark.parametrize("count", [0, 300, BLOCK - 10])
def test_each_turn_sees_those_before(engine: Engine, tmp_path: Path, count: int) -> None:
    base, tokens = None, np.empty(0, np.int32)
    if count:
        tokens = document(engine, tmp_path / "a.ctx", count)
        base = open_base(engine, str(tmp_path / "a.ctx"), str(tmp_path / "b.ctx"))
    talk = Conversation(engine, base)
    found = [answer.tokens for _, answer in talk.turns([FIRST, SECOND])]
    expected, whole = by_hand(engine, tokens)
    assert found == expected
    assert np.array_equal(talk.tokens, whole[count:])
    with (tmp_path / "b.ctx").open("wb") as sink:
        footer = talk.save(sink)
    assert footer["length"] == len(whole)
    assert footer["doc"] == ("a" if count else "conversation")
    with open_contexts(str(tmp_path / "b.ctx")) as contexts:
        saved = load_context(engine, next(contexts))
    assert np.array_equal(saved.tokens, whole)
    after = Prompt("So?", max_tokens=5)
    assert (
        engine.answer(saved.sequence, after).tokens
        == engine.answer(engine.prefill(whole), after).tokens
    )


def test_a_context_stays_as_it_is(engine: Engine, tmp_path: Path) -> None:
    document(engine, tmp_path / "a.ctx")
    base = open_base(engine, str(tmp_path / "a.ctx"), None)
    for _ in range(2):
        talk = Conversation(engine, base)
        first = [answer.tokens for _, answer in talk.turns([FIRST, SECOND])]
        assert base.sequence.length == 300
    assert first == [
        answer.tokens for _, answer in Conversation(engine, base).turns([FIRST, SECOND])
    ]


def test_save_from_turn_to_turn(
    gemtool: Command, compiled: dict[str, str], engine: Engine, folder: Path, tmp_path: Path
) -> None:
    """A file that names the context, one that names that, a pipe that names nothing, no context."""
    tokens = document(engine, tmp_path / "a.ctx")
    answers, _ = by_hand(engine, tokens)
    ask = ["decode", "--ckpt", folder, "--max-tokens"]
    one = [*ask, 6, "--prompt", FIRST.text, "--save", "b.ctx", "--cache"]
    two = [*ask, 7, "--prompt", SECOND.text, "--save", "c.ctx", "--cache", "b.ctx"]
    assert [row["tokens"] for row in rows(gemtool(*one, "a.ctx", env=compiled))] == answers[:1]
    (found,) = rows(gemtool(*two, env=compiled))
    assert (found["doc"], found["tokens"]) == ("a", answers[1])
    assert (tmp_path / "b.ctx").stat().st_size < (tmp_path / "a.ctx").stat().st_size * 1.5
    kept = (tmp_path / "c.ctx").read_bytes()
    done = gemtool(*two, env=compiled, check=False)
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"c.ctx: exists already; add -f" in done.stderr
    assert (tmp_path / "c.ctx").read_bytes() == kept

    data = (tmp_path / "a.ctx").read_bytes()
    gemtool(*one, "-", "-f", input=data, env=compiled)
    (tmp_path / "a.ctx").unlink()
    (found,) = rows(gemtool(*two, "-f", env=compiled))
    assert found["tokens"] == answers[1]

    alone, _ = by_hand(engine, np.empty(0, np.int32))
    (found,) = rows(gemtool(*one[:-1], "-f", env=compiled))
    assert found["tokens"] == alone[0]
    (found,) = rows(gemtool(*two, "-f", env=compiled))
    assert (found["doc"], found["tokens"]) == ("conversation", alone[1])


def test_chat_through_a_pipe(
    gemtool: Command, compiled: dict[str, str], engine: Engine, folder: Path, tmp_path: Path
) -> None:
    tokens = document(engine, tmp_path / "a.ctx")
    answers, whole = by_hand(engine, tokens)
    command = ["decode", "--ckpt", folder, "--cache", "a.ctx", "--chat", "--max-tokens", 7]
    said = f"{FIRST.text}\n\n{SECOND.text}".encode()
    found = rows(gemtool(*command, "--format", "jsonl", input=said, env=compiled))
    assert [row["id"] for row in found] == ["0", "1"]
    assert found[0]["tokens"][:6] == answers[0]
    done = gemtool(
        *command[:-1], 6, "--save", "b.ctx", "--format", "text", input=said, env=compiled
    )
    assert len(done.stdout.splitlines()) >= 2
    shown = json.loads(gemtool("view", "--stats", "b.ctx").stdout)
    assert len(tokens) < shown["length"] <= len(whole) + 1
    nothing = gemtool(*command, "--save", "d.ctx", input=b"\n", env=compiled, check=False)
    assert nothing.returncode == 1
    assert b"--save: nothing was said" in nothing.stderr
    assert not (tmp_path / "d.ctx").exists()


def test_chat_in_a_terminal(compiled: dict[str, str], folder: Path, tmp_path: Path) -> None:
    """Asks for a line, answers, asks again, ends with the end of input."""
    ours, theirs = pty.openpty()
    command = ["decode", "--ckpt", str(folder), "--chat", "--max-tokens", "3"]
    process = subprocess.Popen(
        [sys.executable, "-m", "gemtool", *command],
        stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL, cwd=tmp_path,
        env={**command_environment(), "PYTHONPATH": str(ROOT), **compiled},
    )  # fmt: skip
    os.close(theirs)
    seen = b""
    for said in (b"Hello\n", b"\x04"):
        before = seen.count(b"> ")
        while seen.count(b"> ") <= before:
            seen += os.read(ours, 1000)
        os.write(ours, said)
    assert process.wait(timeout=120) == 0
    os.close(ours)
    assert seen.count(b"> ") == 2


def test_answers_in_a_pipe_are_answers_alone(
    compiled: dict[str, str], folder: Path, tmp_path: Path
) -> None:
    """What is said comes from a terminal, and nothing is asked for among the answers."""
    ours, theirs = pty.openpty()
    os.write(ours, b"Hello\n\x04")
    command = ["decode", "--ckpt", str(folder), "--chat", "--max-tokens", "3"]
    done = subprocess.run(
        [sys.executable, "-m", "gemtool", *command],
        stdin=theirs, capture_output=True, cwd=tmp_path, timeout=120,
        env={**command_environment(), "PYTHONPATH": str(ROOT), **compiled},
    )  # fmt: skip
    os.close(theirs)
    os.close(ours)
    assert done.returncode == 0
    assert [row["id"] for row in rows(done)] == ["0"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--chat", "--prompt", "x"], b"--chat asks for what to say; leave out --prompt"),
        (["--chat", "--cache", "-"], b"--chat: standard input cannot be the context"),
        (["--save", "b.ctx", "--prompts", "q.jsonl"], b"--save keeps one conversation"),
        (["--save", "a.ctx", "-f", "--cache", "a.ctx", "--prompt", "x"], b"is the context that is"),
        (["--save", "b.ctx", "--cache", "two.ctx", "--prompt", "x"], b"holds several contexts"),
    ],
)
def test_what_cannot_be_kept(
    gemtool: Command,
    compiled: dict[str, str],
    engine: Engine,
    folder: Path,
    tmp_path: Path,
    options: list[str],
    says: bytes,
) -> None:
    document(engine, tmp_path / "a.ctx", 20)
    data = (tmp_path / "a.ctx").read_bytes()
    (tmp_path / "two.ctx").write_bytes(2 * data)
    done = gemtool("decode", "--ckpt", folder, *options, check=False, env=compiled, input=b"x")
    assert done.returncode in (1, 2)
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == b""
    assert (tmp_path / "a.ctx").read_bytes() == data
    assert not (tmp_path / "b.ctx").exists()
