"""What goes wrong while documents are tokenized: one line, and nothing lost before it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemtool.data import documents
from gemtool.data.documents import (
    HELD,
    Document,
    Part,
    skip_bad,
    spans_of_documents,
    text_parts,
)
from gemtool.data.vocab import Vocab
from gemtool.errors import CorruptInput
from gemtool.stream.spans import Span
from tests.conftest import Command, command_environment
from tests.test_tokenize import write_lines


@pytest.fixture(scope="module")
def vocab() -> Vocab:
    return Vocab.load()


def test_missing_media_names_the_line(gemtool: Command, tmp_path: Path) -> None:
    write_lines(tmp_path / "d.jsonl", {"text": "a"}, {"parts": [{"image": "gone.png"}]})
    done = gemtool("tokenize", "d.jsonl", check=False)
    assert done.returncode == 1
    assert b"d.jsonl: line 2: gone.png: cannot be read: no such file or directory" in done.stderr


def test_a_long_document_ends_where_it_is_damaged() -> None:
    def parts(count: int) -> Any:
        for _ in range(count):
            yield Part("image", tokens=np.array([1], np.int32), payload=np.zeros(HELD // 4, "u1"))
        raise CorruptInput("damaged")

    reports: list[bool] = []
    documents = [Document("short", parts(2)), Document("long", parts(6))]
    kept = [
        (document.id, len(list(document.parts)))
        for document in skip_bad(documents, lambda problem, kept: reports.append(kept))
    ]
    assert kept == [("long", 6)]
    assert reports == [False, True]


@pytest.mark.parametrize("ahead", [1, 100, documents.AHEAD])
@pytest.mark.parametrize("before", [0, 1, 2, 7])
@pytest.mark.parametrize("problem", [CorruptInput("damaged"), OSError("unplugged")])
def test_what_goes_wrong_loses_nothing_before_it(
    monkeypatch: pytest.MonkeyPatch, vocab: Vocab, ahead: int, before: int, problem: Exception
) -> None:
    monkeypatch.setattr(documents, "AHEAD", ahead)

    def source(fails: bool) -> Any:
        for number in range(before):
            yield Document(str(number), text_parts([b"one %d, " % number * 9, b"two"]))
        yield Document("last", parts(fails))

    def parts(fails: bool) -> Any:
        yield Part("text", text=b"half of it")
        if fails:
            raise problem

    def outline(span: Span) -> Any:
        return span.doc, span.span, span.start, span.tokens.tolist()

    whole = list(map(outline, spans_of_documents(source(False), vocab)))
    got = []
    with pytest.raises(type(problem)) as raised:
        for span in spans_of_documents(source(True), vocab, threads=2):
            got.append(outline(span))
    assert raised.value is problem
    assert got == whole[:-1]  # but the last document's end


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["-", "-"], "only once"),
        (["-", "--files-from", "-"], "only once"),
        (["--part", "3/2"], "--part 3/2"),
        (["--part", "1/2", "--one-document"], "choose one"),
        (["--image-tokens", "100"], "--image-tokens is 100"),
        (["--fps", "0"], "--fps is 0"),
    ],
)
def test_usage(gemtool: Command, arguments: list[str], complaint: str) -> None:
    done = gemtool("tokenize", *arguments, input=b"text", check=False)
    assert done.returncode == 2
    assert complaint in done.stderr.decode()
    assert not done.stdout


def test_a_closed_pipe_is_silent_and_a_full_disk_is_not(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"many words\n" * 500_000)
    tokenize = f"{sys.executable} -m gemtool tokenize t.txt"

    def shell(script: str) -> subprocess.CompletedProcess[bytes]:
        command = ["bash", "-c", script]
        environment = command_environment()
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, check=False, timeout=60
        )

    done = shell(f"{tokenize} | head -c1 >/dev/null; exit ${{PIPESTATUS[0]}}")
    assert (done.returncode, done.stderr) == (141, b"")
    done = shell(f"{tokenize} > /dev/full")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert b"no space" in done.stderr
