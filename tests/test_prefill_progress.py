"""How far prefill is: tokens, what is left where the input tells, and what was there before."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gemtool import log
from gemtool.data.vocab import Vocab
from gemtool.infer.documents import expected
from gemtool.stream.context import BLOCK
from gemtool.stream.spans import create_spans, open_spans
from tests.conftest import Verb, command_environment
from tests.test_prefill_decode import make_engine, spans_file, text_document, text_tokens, tiny

LINE = re.compile(r"gemtool: prefill: [\d,]+ of 5,096, \d+:\d\d left, [\d,.]+ tokens/s")


@pytest.fixture(scope="module")
def vocab() -> Vocab:
    return Vocab.load()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, vocab: Vocab) -> Path:
    path = tmp_path_factory.mktemp("model") / "run"
    make_engine(path, replace(tiny(vocab.size, "LG"), moe=None, encoders=()), vocab, 512)
    return path


@pytest.fixture
def spans(tmp_path: Path, vocab: Vocab) -> Path:
    """Two documents, a.spans."""
    counts = {"a": 1000, "b": BLOCK}
    documents = [text_document(doc, text_tokens(count))[:1] for doc, count in counts.items()]
    return spans_file(tmp_path / "a.spans", documents, vocab.fingerprint)


class Watched(log.progress):
    """Says at each step how far it is, and keeps what was done and what was there."""

    done = there = 0.0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options, every=0)
        type(self).done = type(self).there = 0

    def update(self, amount: float = 1, note: str = "") -> None:
        type(self).done += amount
        super().update(amount, note)

    def skip(self, amount: float) -> None:
        type(self).there += amount
        super().skip(amount)


@pytest.fixture(autouse=True)
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "progress", Watched)


def test_what_is_left(verb: Verb, folder: Path, spans: Path) -> None:
    """Of a file, whatever its format, and not of a pipe, which tells no end."""
    with open_spans(str(spans)) as read:
        header = replace(read.header, pg=())
        with create_spans("a.jsonl", header, format="jsonl") as writer:
            for span in read:
                writer.append(span)
    rows = Path("a.jsonl").read_bytes().splitlines(True)
    Path("bare.jsonl").write_bytes(b"".join(rows[1:-1]))
    for name in ("a.spans", "a.jsonl"):
        done = verb("prefill", "--ckpt", folder, name, "-o", f"{name}.ctx")
        assert done.code == 0, done.err
        lines = done.err.splitlines()[1:-1]
        assert len(lines) > 4
        assert all(map(LINE.fullmatch, lines)), lines
    assert expected(["bare.jsonl"]) is None
    done = verb("prefill", "--ckpt", folder, stdin=spans.read_bytes())
    assert done.code == 0
    assert re.fullmatch(r"gemtool: prefill: 5,096, [\d,.]+ tokens/s", done.err.splitlines()[-2])


@pytest.mark.parametrize("redirected", [True, False])
def test_standard_input(spans: Path, redirected: bool) -> None:
    """A shell that redirects a file tells as much as its name."""
    code = "from gemtool.infer.documents import expected; print(expected(None))"
    with spans.open("rb") as file:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=command_environment(),
            stdout=subprocess.PIPE,
            check=True,
            **({"stdin": file} if redirected else {"input": spans.read_bytes()}),
        )
    assert done.stdout == (b"(2, 5096)\n" if redirected else b"None\n")


@pytest.mark.usefixtures("spans")
def test_what_was_there_is_not_work(verb: Verb, folder: Path) -> None:
    command = ["prefill", "--no-pg", "--ckpt", folder, "a.spans", "-o", "a.ctx"]
    assert verb(*command).code == 0
    assert (Watched.done, Watched.there) == (5096, 0)
    whole = Path("a.ctx").read_bytes()
    Path("a.ctx").rename("a.ctx.partial")
    Path("a.ctx.partial").write_bytes(whole[:-40_000])
    done = verb(*command, "--resume")
    assert done.code == 0, done.err
    assert "goes on after 1,000 tokens" in done.err
    assert (Watched.done, Watched.there) == (4096, 1000)
    assert Path("a.ctx").read_bytes() == whole


def test_a_state_on_the_way(
    verb: Verb, folder: Path, tmp_path: Path, vocab: Vocab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gemtool.infer.prefill.STATE_EVERY", BLOCK)
    document = text_document("a", text_tokens(BLOCK + 700))[:1]
    spans_file(tmp_path / "a.spans", [document], vocab.fingerprint)
    command = ["prefill", "--ckpt", folder, "a.spans", "-o", "a.ctx"]
    assert verb(*command).code == 0
    Path("a.ctx").rename("a.ctx.partial")
    with Path("a.ctx.partial").open("r+b") as file:
        file.truncate(file.seek(0, 2) - 9)
    assert verb(*command, "--resume").code == 0
    assert (Watched.done, Watched.there) == (700, BLOCK)


@pytest.mark.parametrize(
    "tokens", ["1.5", "900000000000", "-3", '"many"', "null", "[" * 100_000 + "]" * 100_000]
)
def test_footers_are_not_trusted(
    verb: Verb, folder: Path, tmp_path: Path, vocab: Vocab, tokens: str
) -> None:
    """Nobody has verified one before the document is read."""
    span = {"doc": "a", "span": 0, "kind": "text", "tokens": text_tokens(40).tolist(), "start": 0}
    line = json.dumps(span) + "\n"
    counts = (
        f'{{"documents": 1, "tokens": {tokens}, "rows": 1, "crc32": {zlib.crc32(line.encode())}}}'
    )
    (tmp_path / "a.jsonl").write_text(f'{line}{{"footer": {counts}}}\n')
    assert expected([str(tmp_path / "a.jsonl")]) is None
    done = verb("prefill", "--ckpt", folder, "a.jsonl", "-o", "a.ctx")
    assert done.code == (3 if tokens.startswith("[") else 0), done.err
    assert "Traceback" not in done.err
