"""decode --media: what a prompt shows is as if it had stood in the document."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemtool.checkpoint import open_checkpoint
from gemtool.control import END_TURN, IMAGE, MODEL, USER
from gemtool.data.vocab import Vocab
from gemtool.infer.contexts import load_context
from gemtool.infer.engine import Engine
from gemtool.infer.prefill import write_context
from gemtool.infer.text import Prompt
from gemtool.stream.context import open_contexts
from gemtool.stream.spans import Span, open_spans
from tests.conftest import Done, Verb
from tests.samples import sample
from tests.test_append import text, write
from tests.test_prefill_decode import make_engine, text_tokens, tiny

SHOWN = ("a.png", "b.wav", "c.mp4")
QUESTION = "What is on it?"


@pytest.fixture(scope="module")
def vocab() -> Vocab:
    return Vocab.load()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, vocab: Vocab) -> Path:
    path = tmp_path_factory.mktemp("model") / "run"
    config = replace(tiny(vocab.size, "LG", kv_dtype="float32"), moe=None)
    make_engine(path, config, vocab, 512)
    return path


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine(open_checkpoint(folder), 512)


@pytest.fixture(autouse=True)
def files(tmp_path: Path) -> None:
    for name in SHOWN:
        (tmp_path / name).write_bytes(sample(name[2:]))


def spans_of(path: str) -> list[Span]:
    """Those of one document, without its end."""
    with open_spans(path) as spans:
        return list(spans)[:-1]


def control(*tokens: int) -> Span:
    return Span("x", 0, "control", np.array(tokens, np.int32))


def asked(engine: Engine, shown: list[Span]) -> list[Span]:
    """A turn that shows something and then asks."""
    question = Span("x", 0, "text", engine.vocab.encode(QUESTION))
    return [control(USER), *shown, question, control(END_TURN, MODEL)]


def said(engine: Engine, document: list[Span], count: int = 6) -> list[int]:
    """What the model says after a document that was read as one."""
    steps = engine.generate(engine.prefill(document), np.empty(0, np.int32), max_tokens=count)
    return [step.token for step in steps]


def rows(done: Done) -> list[dict[str, Any]]:
    assert done.code == 0, done.err
    return [json.loads(line) for line in done.out.splitlines()]


@pytest.fixture
def shown(verb: Verb, folder: Path) -> list[Span]:
    """The spans of SHOWN, as `tokenize` makes them of all in one document, all.spans."""
    names = (*SHOWN, "-o", "all.spans")
    assert verb("tokenize", "--for", folder, "--one-document", *names).code == 0
    return spans_of("all.spans")


def test_equals_one_document(verb: Verb, engine: Engine, folder: Path, shown: list[Span]) -> None:
    """With a context and without, from files and from a span stream of them."""
    kinds = {span.kind for span in shown}
    assert {"image", "audio", "video"} <= kinds
    before = text("a", text_tokens(300))
    write(engine, Path("a.ctx"), before)
    ask = ["decode", "--ckpt", folder, "--max-tokens", 6, "--prompt", QUESTION]
    files = [word for name in SHOWN for word in ("--media", name)]
    turn = asked(engine, shown)
    for document, cache, media in (
        (before, ["--cache", "a.ctx"], files),
        ([], [], ["--media", "all.spans"]),
    ):
        (row,) = rows(verb(*ask, *cache, *media))
        assert row["tokens"] == said(engine, [*document, *turn])
        assert row["usage"]["prompt"] == sum(len(span.tokens) for span in turn)
    without = rows(verb(*ask, "--cache", "a.ctx"))[0]
    assert without["tokens"] == said(engine, [*before, *asked(engine, [])])


def test_raw_text_follows_what_is_shown(engine: Engine, verb: Verb, folder: Path) -> None:
    assert verb("tokenize", "--for", folder, "a.png", "-o", "a.spans").code == 0
    prompt = Prompt("It", raw=True, media=("a.png",), max_tokens=4, draft=True)
    go_on = Span("x", 0, "text", engine.vocab.encode("It"))
    assert engine.answer(None, prompt).tokens == said(engine, [*spans_of("a.spans"), go_on], 4)


def test_prompts_of_a_file(verb: Verb, engine: Engine, folder: Path, tmp_path: Path) -> None:
    """Names are relative to the file; what a line shows replaces --media."""
    (tmp_path / "asked").mkdir()
    lines: list[dict[str, Any]] = [
        {"prompt": QUESTION, "media": "../a.png"},
        {"prompt": QUESTION, "media": ["../b.wav", str(tmp_path / "a.png")]},
        {"prompt": QUESTION},
        {"prompt": QUESTION, "media": []},
    ]
    Path("asked/p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ask = ["decode", "--ckpt", folder, "--max-tokens", 3, "--prompts", "asked/p.jsonl"]
    found = rows(verb(*ask, "--media", "a.png"))
    plain = len(Prompt(QUESTION).tokens(engine.vocab))
    lengths = [row["usage"]["prompt"] - plain for row in found]
    assert lengths == [66, 66 + 50 + 2, 66, 0]
    assert found[0]["tokens"] == found[2]["tokens"]

    for media, code, says in (
        ("no.png", 1, "p.jsonl: line 5: asked/no.png: cannot be read: no such file"),
        ([3], 3, "p.jsonl: line 5: 'media' must be a string or a list of strings"),
        (3, 3, "p.jsonl: line 5: 'media' is 3; expected str or list"),
    ):
        more = json.dumps({"prompt": "x", "media": media})
        Path("asked/p.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + more)
        done = verb(*ask)
        assert (done.code, done.out) == (code, b"")  # nothing was answered before
        assert says in done.err


def test_what_was_shown_is_kept(verb: Verb, engine: Engine, folder: Path) -> None:
    """A saved conversation is the document of its turns: tokens, kinds and hashes of media."""
    write(engine, Path("a.ctx"), text("a", text_tokens(300)))
    say = ["decode", "--ckpt", folder, "--cache", "a.ctx", "--media", "a.png", "--max-tokens", 4]
    (row,) = rows(verb(*say, "--prompt", QUESTION, "--save", "b.ctx"))
    assert verb("tokenize", "--for", folder, "a.png", "-o", "a.spans").code == 0
    answer = control(*row["tokens"], END_TURN)
    whole = [*text("a", text_tokens(300)), *asked(engine, spans_of("a.spans")), answer]
    with Path("whole.ctx").open("wb") as sink:
        expected = write_context(engine, "a", whole, sink)
    with open_contexts("b.ctx") as contexts:
        saved = load_context(engine, next(contexts))
    assert np.array_equal(saved.tokens, np.concatenate([span.tokens for span in whole]))
    assert saved.footer["kinds"]["image"] == expected["kinds"]["image"] == 66
    assert saved.footer["media_sha256"] == expected["media_sha256"]
    again = Prompt("And?", max_tokens=5)
    live = engine.prefill(whole)
    assert engine.answer(saved.sequence, again).tokens == engine.answer(live, again).tokens

    # In a conversation the first turn shows it, and only that.
    spoken = verb(*say, "--chat", "--save", "c.ctx", stdin=f"{QUESTION}\nAnd?\n".encode())
    first, second = rows(spoken)
    assert first["tokens"] == row["tokens"]
    assert second["tokens"] == engine.answer(live, Prompt("And?", max_tokens=4)).tokens
    with open_contexts("c.ctx") as contexts:
        tokens = load_context(engine, next(contexts)).tokens
    assert np.count_nonzero(tokens == IMAGE) == 64


def test_what_cannot_be_shown(
    verb: Verb, vocab: Vocab, engine: Engine, folder: Path, tmp_path: Path
) -> None:
    write(engine, Path("a.ctx"), text("a", text_tokens(9)))
    Path("torn.png").write_bytes(sample("png")[:200])
    make_engine(tmp_path / "blind", replace(engine.config, encoders=()), vocab, 512)
    assert verb("tokenize", "a.png", "-o", "high.spans").code == 0
    assert verb("tokenize", "--for", folder, "a.png", "-o", "low.spans").code == 0
    blind = verb("prefill", "--ckpt", "blind", "low.spans", "-o", "x.ctx")
    assert "has no visual encoder: it cannot take visual input" in blind.err
    for ckpt, name, code, says in (
        (folder, "no.png", 1, "no.png: cannot be read: no such file or directory"),
        (folder, "torn.png", 3, "torn.png: damaged or truncated image"),
        (folder, "-", 2, "media cannot come from standard input"),
        (folder, "high.spans", 1, "high.spans: its image_tokens is 258, the checkpoint's 66"),
        (folder, "a.ctx", 3, "a.ctx: a context where a span stream is needed"),
        ("blind", "a.png", blind.code, blind.err.rpartition("error: ")[2].strip()),
    ):
        done = verb("decode", "--ckpt", ckpt, "--media", name, "--prompt", "x")
        assert (done.code, done.out) == (code, b""), done.err
        (line,) = done.err.splitlines()
        assert says in line
