"""Contexts shown and asked by commands: sizes, prompts from files, where answers end, and seeds."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemtool.checkpoint import open_checkpoint
from gemtool.data.vocab import Vocab
from gemtool.infer.contexts import open_base
from gemtool.infer.engine import Engine
from gemtool.stream.context import BLOCK, open_contexts
from tests.conftest import Command, Done, Verb
from tests.test_append import text, write
from tests.test_mapped import quickly_compiled  # noqa: F401 (a fixture)
from tests.test_prefill_decode import make_engine, text_tokens, tiny
from tests.test_resume import long_document
from tests.test_together import watch_forks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    vocab = Vocab.load()
    path = tmp_path_factory.mktemp("model") / "run"
    make_engine(path, replace(tiny(vocab.size, "LG"), moe=None), vocab, 512)
    return path


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine(open_checkpoint(folder), 512)


@pytest.fixture
def context(engine: Engine, tmp_path: Path) -> Path:
    write(engine, tmp_path / "a.ctx", text("a", text_tokens(90)))
    return tmp_path / "a.ctx"


def rows(done: Done) -> list[dict[str, Any]]:
    assert done.code == 0, done.err
    return [json.loads(line) for line in done.out.splitlines()]


def said(row: dict[str, Any]) -> dict[str, Any]:
    """What an answer says, whatever it is called and however long it took."""
    return {key: row[key] for key in ("text", "tokens", "finish")}


# What `view` tells


def test_view_tells_kinds_sizes_and_parents(verb: Verb, engine: Engine, tmp_path: Path) -> None:
    """Those of the footer and of the arrays; what continues another has sizes of its own alone."""
    film, more = long_document(), text("more", text_tokens(50))
    write(engine, tmp_path / "a.ctx", film)
    (tmp_path / "below").mkdir()
    base = open_base(engine, str(tmp_path / "a.ctx"), str(tmp_path / "below" / "b.ctx"))
    write(engine, tmp_path / "below" / "b.ctx", more, base)
    counts: Counter[str] = Counter()
    for span in film:
        counts[span.kind] += len(span.tokens)
    length = counts.total()
    assert {kind for kind, count in counts.items() if count} == {"text", "video", "audio"}
    assert 2 * BLOCK < length < 3 * BLOCK

    (first,) = rows(verb("view", "--stats", "a.ctx"))
    (second,) = rows(verb("view", "--stats", "below/b.ctx"))
    for path, row, own in (("a.ctx", first, length), ("below/b.ctx", second, length % BLOCK + 50)):
        sizes: Counter[str] = Counter()
        with open_contexts(str(tmp_path / path)) as contexts:
            reader = next(contexts)
            for part in reader.parts():
                for name, array in part.arrays.items():
                    sizes[f"{part.part}/{name.rpartition('/')[2]}"] += array.nbytes
        assert row["kinds"] == reader.footer["kinds"]
        assert (row["id"], row["length"]) == (reader.id, reader.footer["length"])
        assert row["bytes"] == sizes
        # A key and a value of 8 float16 a token, of the one layer that keeps all.
        assert sizes["block/k"] == sizes["block/v"] == 16 * own
        assert sizes["block/tokens"] == 4 * own
        assert sizes["end/logits"] == 4 * engine.vocab.size
        state = sum(size for name, size in sizes.items() if name.startswith("state/"))
        assert 0 < state <= engine.state_bytes()
        rest = (tmp_path / path).stat().st_size - sizes.total()
        assert 0 < rest < 10_000
        listed: Counter[str] = Counter()
        for entry in rows(verb("view", "--jsonl", path)):
            size = math.prod(entry["shape"]) * np.dtype(entry["dtype"]).itemsize
            listed[f"{entry['part']}/{entry['name']}"] += size
        assert listed == sizes
        # For a person the same, a line each.
        lines = [line.split("\t") for line in verb("view", path).out.decode().splitlines()]
        shown = {
            key: value if isinstance(row[key], str) else json.loads(value) for key, value in lines
        }
        assert shown == row
        (header,) = rows(verb("view", "--header", path))
        assert (header["parent"], header["start"]) == (row["parent"], row["start"])
    assert first["kinds"] == dict(counts)
    assert (first["parent"], first["start"]) == (None, 0)
    assert second["kinds"] == {**counts, "text": counts["text"] + 50}
    assert second["parent"] == {"id": first["id"], "path": "../a.ctx", "index": 0}
    assert (second["length"], second["start"]) == (length + 50, 2 * BLOCK)


# Prompts from files


def test_a_prompt_may_be_in_a_file(verb: Verb, folder: Path, context: Path, tmp_path: Path) -> None:
    """With lines of its own; the end of the last one is no part of it, and nothing else is left out."""
    question = "  What is it?\n\nAnd why – so? "
    for more in ([], ["--cache", context], ["--cache", context, "--raw"]):
        ask = ["decode", "--ckpt", folder, "--max-tokens", 6, *more]
        (wanted,) = rows(verb(*ask, "--prompt", question))
        (longer,) = rows(verb(*ask, "--prompt", question + "\n"))
        assert wanted["tokens"] != longer["tokens"]
        for ending, expected in (("", wanted), ("\n", wanted), ("\n\n", longer)):
            data = (question + ending).encode()
            (tmp_path / "question").write_bytes(data)
            found = [
                rows(verb(*ask, "--prompt-file", "question")),
                rows(verb(*ask, "--prompt-file", "-", stdin=data)),
                rows(verb(*ask, stdin=data)),
            ]
            for (row,) in found:
                assert said(row) == said(expected)
                assert row["usage"]["prompt"] == expected["usage"]["prompt"]


@pytest.mark.parametrize(
    ("content", "code", "says"),
    [
        (None, 1, "question: cannot be read: no such file or directory"),
        (b"", 3, "question: empty; expected a question"),
        (b"What\xff?", 3, "question: not UTF-8 text, at byte 4"),
    ],
)
def test_a_file_that_asks_nothing(
    verb: Verb, folder: Path, tmp_path: Path, content: bytes | None, code: int, says: str
) -> None:
    if content is not None:
        (tmp_path / "question").write_bytes(content)
    done = verb("decode", "--ckpt", folder, "--prompt-file", "question")
    assert (done.code, done.out) == (code, b"")
    (line,) = done.err.splitlines()
    assert says in line


# Where an answer ends


def stretch(engine: Engine, row: dict[str, Any], after: int) -> str:
    """A part of an answer, after so many characters, that no two of its tokens hold; what it begins
    with comes nowhere before."""
    pieces = [engine.vocab.decode([token]) for token in row["tokens"]]
    for begin in range(after, len(row["text"])):
        for end in range(begin + 3, len(row["text"]) - 3):
            found = row["text"][begin:end]
            if not any(found in a + b for a, b in itertools.pairwise(pieces)):
                if row["text"].index(found) == begin:
                    return found
                break
    raise AssertionError(f"the answer repeats itself: {row['text']!r}")


def require_cut(engine: Engine, found: dict[str, Any], whole: dict[str, Any], stop: str) -> None:
    """An answer ends before a text, with the token that completes it."""
    assert found["text"] == whole["text"].partition(stop)[0] != whole["text"]
    assert found["finish"] == "stop"
    count = len(found["tokens"])
    assert found["tokens"] == whole["tokens"][:count]
    assert stop in engine.vocab.decode(found["tokens"])
    assert stop not in engine.vocab.decode(found["tokens"][:-1])


def test_stop(verb: Verb, engine: Engine, folder: Path, context: Path) -> None:
    """Of several texts the one that comes first, in whatever order they are given."""
    ask = [
        "decode",
        "--ckpt",
        folder,
        "--cache",
        context,
        "--prompt",
        "Say so.",
        "--max-tokens",
        24,
    ]
    (whole,) = rows(verb(*ask))
    early, late = stretch(engine, whole, 5), stretch(engine, whole, 40)
    never = "This is not said."
    for stops, first in (
        ([early], early),
        ([late], late),
        ([late, early], early),
        ([early, late], early),
        ([never, late], late),
        ([early[1:], early], early),
    ):
        given = [option for stop in stops for option in ("--stop", stop)]
        (found,) = rows(verb(*ask, *given))
        require_cut(engine, found, whole, first)
        shown = verb(*ask, *given, "--format", "text").out.decode()
        assert shown == found["text"] + "\n"
    (found,) = rows(verb(*ask, "--stop", never))
    assert said(found) == said(whole)


@pytest.mark.parametrize("cached", [False, True])
def test_each_prompt_has_its_own_stop(
    verb: Verb, engine: Engine, folder: Path, context: Path, tmp_path: Path, cached: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of a file, whose prompts are answered together; the command's is for those that have none."""
    begun = watch_forks(monkeypatch)
    asked = [
        {"prompt": prompt, "max_tokens": 20 + i}
        for i, prompt in enumerate(("What?", "Who speaks?", "Say so.", "Go on", "Why?"))
    ]
    command = ["decode", "--ckpt", folder, *(["--cache", context] if cached else []), "--prompts"]

    def answered(stops: list[Any], *more: object) -> list[dict[str, Any]]:
        lines = [
            row if stop is None else {**row, "stop": stop}
            for row, stop in zip(asked, stops, strict=True)
        ]
        (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        begun.clear()
        found = rows(verb(*command, "q.jsonl", *more))
        assert len(begun) == len(asked)
        assert len(set(begun)) > 1
        assert [row["id"] for row in found] == ["0", "1", "2", "3", "4"]
        return found

    whole = answered([None] * 5)
    early, late = ([stretch(engine, row, after) for row in whole] for after in (5, 30))
    found = answered(
        [early[0], [late[1], early[1]], None, late[3], []], "--stop", early[2], "--stop", late[2]
    )
    for at, stop in enumerate([early[0], early[1], early[2], late[3]]):
        require_cut(engine, found[at], whole[at], stop)
    assert said(found[4]) == said(whole[4])
    # One whose stop another one says goes on.
    found = answered(early[1:] + early[:1])
    for row, stop, expected in zip(found, early[1:] + early[:1], whole, strict=True):
        assert stop not in expected["text"]
        assert said(row) == said(expected)


# Seeds


def test_a_seed_repeats_an_answer(
    verb: Verb, gemtool: Command, folder: Path, context: Path, tmp_path: Path
) -> None:
    """In another process too; another seed, and another prompt of a file, draw otherwise."""
    draw = ["decode", "--ckpt", folder, "--cache", context, "--temperature", 1, "--max-tokens", 12]
    ask = [*draw, "--prompt", "What?"]
    for options in (["--seed", 7], []):
        (first,), (again,) = rows(verb(*ask, *options)), rows(verb(*ask, *options))
        assert said(again) == said(first)
    # Of few tokens, whose order no rounding turns.
    draw += ["--top-k", 8]
    ask += ["--top-k", 8]
    found = {seed: rows(verb(*ask, "--seed", seed))[0] for seed in (0, 1, 7)}
    assert len({tuple(row["tokens"]) for row in found.values()}) == 3
    assert said(rows(verb(*ask))[0]) == said(found[0])
    env = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # as here: it is quicker
    assert said(json.loads(gemtool(*ask, "--seed", 7, env=env).stdout)) == said(found[7])

    lines = [{"prompt": "What?"}, {"prompt": "What?"}, {"prompt": "What?", "seed": 1}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    both = [rows(verb(*draw, "--prompts", "q.jsonl", "--seed", 7)) for _ in range(2)]
    assert [said(row) for row in both[0]] == [said(row) for row in both[1]]
    assert said(both[0][0]) == said(found[7])
    assert len({tuple(row["tokens"]) for row in both[0]}) == 3
    (tmp_path / "q.jsonl").write_text(json.dumps(lines[2]) + "\n")
    (alone,) = rows(verb(*draw, "--prompts", "q.jsonl", "--seed", 7))
    assert said(alone) == said(found[1])
