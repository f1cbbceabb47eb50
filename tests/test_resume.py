"""Prefill that was interrupted goes on, and writes what it would have written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemtool.checkpoint import open_checkpoint
from gemtool.data.vocab import Vocab
from gemtool.errors import GemtoolError
from gemtool.infer.contexts import Base, open_base
from gemtool.infer.engine import Engine
from gemtool.infer.prefill import write_context
from gemtool.infer.resume import read_left, skip_whole
from gemtool.stream.context import BLOCK, STATE_EVERY, open_contexts
from gemtool.stream.spans import Span
from tests.conftest import ROOT, command_environment
from tests.test_prefill_decode import (
    make_engine,
    media_document,
    spans_file,
    text_document,
    text_tokens,
    tiny,
)

Command = Callable[..., Any]
LAYERS = "LGLL"
"""With layers above the last that keeps all: their windows of an early state are stale."""


@pytest.fixture(scope="module")
def vocab() -> Vocab:
    return Vocab.load()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, vocab: Vocab) -> Path:
    path = tmp_path_factory.mktemp("model") / "run"
    make_engine(path, tiny(vocab.size, LAYERS), vocab, 512)
    return path


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine(open_checkpoint(folder), 512)


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state after each block."""
    monkeypatch.setattr("gemtool.infer.prefill.STATE_EVERY", BLOCK)


def long_document(doc: str = "film") -> list[Span]:
    """Text, a frame over the end of the first block, and text to the third."""
    film = media_document(doc, seconds=2)[:-1]
    before = sum(len(span.tokens) for span in film[:2])
    head = Span(doc, 0, "text", text_tokens(BLOCK - before - 30, 1))
    spans = [head, *film, Span(doc, 0, "text", text_tokens(BLOCK + 700, 2))]
    for number, span in enumerate(spans):
        span.span = number
    return spans


def write(
    engine: Engine, path: Path, documents: list[list[Span]], base: Base | None = None
) -> bytes:
    with path.open("wb") as sink:
        for spans in documents:
            write_context(engine, spans[0].doc, spans, sink, base=base)
    return path.read_bytes()


def go_on(
    engine: Engine, path: Path, documents: list[list[Span]], base: Base | None = None
) -> bytes:
    """What the verb does with a partial file."""
    left = read_left(engine, path)
    os.truncate(path, left.end)
    with path.open("ab") as sink:
        for number, spans in enumerate(documents):
            if number < len(left.whole):
                skip_whole(left.whole[number], spans[0].doc, spans, base)
                continue
            begun = left.begun if number == len(left.whole) else None
            write_context(engine, spans[0].doc, spans, sink, base=base, begun=begun)
    return path.read_bytes()


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize(
    "share",
    [0.001, 0.55, 0.93, *(pytest.param(x, marks=pytest.mark.slow) for x in (0, 0.2, 0.34, 0.7, 1))],
)
def test_goes_on_to_the_bit(engine: Engine, tmp_path: Path, share: float) -> None:
    """Wherever the file was cut: in a header, a block, a state, between contexts or in the second."""
    documents = [long_document(), text_document("b", text_tokens(BLOCK + 900, 5))[:1]]
    whole = write(engine, tmp_path / "whole.ctx", documents)
    (tmp_path / "part.ctx").write_bytes(whole[: round(share * len(whole))])
    assert go_on(engine, tmp_path / "part.ctx", documents) == whole


@pytest.mark.usefixtures("often")
def test_goes_on_from_the_last_state_not_from_the_beginning(engine: Engine, tmp_path: Path) -> None:
    documents = [long_document()]
    whole = write(engine, tmp_path / "whole.ctx", documents)
    (tmp_path / "part.ctx").write_bytes(whole[:-9])
    left = read_left(engine, tmp_path / "part.ctx")
    assert left.begun is not None
    length = sum(len(span.tokens) for span in documents[0])
    assert left.begun.sequence.length == length // BLOCK * BLOCK == 2 * BLOCK


@pytest.mark.usefixtures("often")
def test_goes_on_with_what_continues_another(engine: Engine, tmp_path: Path) -> None:
    write(engine, tmp_path / "a.ctx", [text_document("a", text_tokens(BLOCK + 77, 3))[:1]])
    base = open_base(engine, str(tmp_path / "a.ctx"), str(tmp_path / "whole.ctx"))
    documents = [long_document("x"), long_document("y")]
    whole = write(engine, tmp_path / "whole.ctx", documents, base)
    with open_contexts(str(tmp_path / "whole.ctx")) as contexts:
        first = next(contexts)
        for _ in first.parts():
            pass
        second = first.position
    # In the first block of one of them, too: what it continues is not what is damaged.
    shares = [round(share * len(whole)) for share in (0.3, 0.7, 0.95)]
    for size in (*shares, 700, 3000, second, second + 8, second + 1500, second + 50_000):
        (tmp_path / "part.ctx").write_bytes(whole[:size])
        assert go_on(engine, tmp_path / "part.ctx", documents, base) == whole
    (tmp_path / "part.ctx").write_bytes(whole[: len(whole) // 3])
    (tmp_path / "a.ctx").unlink()
    with pytest.raises(GemtoolError, match="which is not there"):
        read_left(engine, tmp_path / "part.ctx")


@pytest.mark.usefixtures("often")
def test_another_input_or_model_is_refused(engine: Engine, vocab: Vocab, tmp_path: Path) -> None:
    documents = [long_document(), text_document("b", text_tokens(BLOCK + 900, 5))[:1]]
    whole = write(engine, tmp_path / "part.ctx", documents)
    for share in (0.55, 0.97):
        other = [text_document("film", text_tokens(3 * BLOCK, 8))[:1], documents[1]]
        (tmp_path / "part.ctx").write_bytes(whole[: round(share * len(whole))])
        with pytest.raises(GemtoolError, match="another"):
            go_on(engine, tmp_path / "part.ctx", other)
        (tmp_path / "part.ctx").write_bytes(whole[: round(share * len(whole))])
        with pytest.raises(GemtoolError, match="another"):
            go_on(engine, tmp_path / "part.ctx", documents[::-1])
    short = [[Span("film", 0, "text", documents[0][0].tokens)]]
    (tmp_path / "part.ctx").write_bytes(whole[: round(0.55 * len(whole))])
    with pytest.raises(GemtoolError, match=r"document 'film' is another .* from token"):
        go_on(engine, tmp_path / "part.ctx", short)
    stranger = make_engine(tmp_path / "other", tiny(vocab.size, LAYERS), vocab, 512, seed=2)
    (tmp_path / "part.ctx").write_bytes(whole[:-9])
    with pytest.raises(GemtoolError, match="belongs to another model"):
        read_left(stranger, tmp_path / "part.ctx")


# The command


def long_input(path: Path, vocab: Vocab) -> Path:
    """A context and a half of states: two documents, of which the first has two states on the way."""
    document = [[Span("long", 0, "text", text_tokens(2 * STATE_EVERY + 5000))]]
    return spans_file(path, document, vocab.fingerprint)


@pytest.mark.parametrize(
    "number",
    [signal.SIGKILL, signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)],
)
def test_killed_and_resumed(
    gemtool: Command, folder: Path, vocab: Vocab, tmp_path: Path, number: signal.Signals,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    env = {"GEMTOOL_CACHE": str(tmp_path_factory.getbasetemp() / "resume-cache")}
    long_input(tmp_path / "long.spans", vocab)
    command = ["prefill", "--no-pg", "--ckpt", folder, "long.spans", "-o"]
    if number is signal.SIGKILL:
        assert gemtool(*command, "whole.ctx", env=env).returncode == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "gemtool", *map(str, command), "part.ctx"], cwd=tmp_path,
        env={**command_environment(), "PYTHONPATH": str(ROOT), **env}, stderr=subprocess.PIPE,
    )  # fmt: skip
    partial = tmp_path / "part.ctx.partial"
    deadline = time.monotonic() + 300
    row = 2 * 8 * 2 + 4
    enough = (STATE_EVERY + 2 * BLOCK) * row
    while not partial.exists() or partial.stat().st_size < enough:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    error = process.communicate()[1]
    assert process.returncode == (-9 if number is signal.SIGKILL else 128 + number)
    assert not (tmp_path / "part.ctx").exists()
    assert partial.stat().st_size >= enough
    if number is not signal.SIGKILL:
        assert b"part.ctx.partial: kept; --resume goes on with it" in error
        return
    refused = gemtool("prefill", "--resume", "--ckpt", folder, "long.spans", check=False, env=env)
    assert (refused.returncode, b"--resume needs -o FILE" in refused.stderr) == (2, True)
    done = gemtool(*command, "part.ctx", "--resume", env=env)
    assert b"goes on after 65,536 tokens" in done.stderr or b"goes on after 131,072" in done.stderr
    assert (tmp_path / "part.ctx").read_bytes() == (tmp_path / "whole.ctx").read_bytes()
    assert not partial.exists()


def test_what_is_short_leaves_nothing(
    gemtool: Command, folder: Path, vocab: Vocab, tmp_path: Path
) -> None:
    """Of a damaged input, whose contexts have no state on the way."""
    path = spans_file(
        tmp_path / "a.spans", [text_document("a", text_tokens(90))], vocab.fingerprint
    )
    path.write_bytes(path.read_bytes()[:-40])
    done = gemtool("prefill", "--ckpt", folder, path, "-o", "a.ctx", check=False)
    assert done.returncode != 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.spans"]


def test_one_writes_at_a_time(gemtool: Command, folder: Path, vocab: Vocab, tmp_path: Path) -> None:
    import fcntl

    path = spans_file(
        tmp_path / "a.spans", [text_document("a", text_tokens(90))], vocab.fingerprint
    )
    with (tmp_path / "a.ctx.partial").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = gemtool("prefill", "--ckpt", folder, path, "-o", "a.ctx", check=False)
    assert done.returncode == 1
    assert b"a.ctx.partial: another process is writing it" in done.stderr
