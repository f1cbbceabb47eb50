"""prefill --logprobs: how likely every token was, as the full forward pass says, however it is cut."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gemtool.checkpoint import open_checkpoint
from gemtool.control import UNTRAINED_TARGETS, VIDEO
from gemtool.data.vocab import Vocab
from gemtool.errors import GemtoolError
from gemtool.infer.engine import Engine
from gemtool.infer.logprobs import Entries
from gemtool.infer.pieces import Piece, pieces_of, tiles_of
from gemtool.infer.prefill import Planner, write_context
from gemtool.infer.sampling import log_softmax
from gemtool.infer.steps import Scores
from gemtool.infer.text import Prompt
from gemtool.stream.context import open_contexts
from gemtool.stream.spans import Span
from tests.conftest import Command, command_environment
from tests.test_compile_once import Watch, watch
from tests.test_index_infer import indexed
from tests.test_prefill_decode import (
    full_logits,
    make_engine,
    media_document,
    spans_file,
    text_document,
    text_tokens,
    tiny,
)

__all__ = ["watch"]  # a fixture

LENGTH = 1150
Rows = list[dict[str, Any]]
CONFIGS = {"full": tiny, "indexed": indexed}


@pytest.fixture(scope="module")
def vocab() -> Vocab:
    return Vocab.load()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, vocab: Vocab) -> dict[str, Path]:
    """Checkpoints whose keys are float32, so that no rounding hides or makes a difference."""
    folder = tmp_path_factory.mktemp("models")
    make_engine(folder / "full", tiny(vocab.size, kv_dtype="float32"), vocab, 64)
    make_engine(folder / "indexed", indexed(vocab.size), vocab, 64)
    return {name: folder / name for name in CONFIGS}


def documents() -> dict[str, list[Span]]:
    return {
        "text": text_document("text", text_tokens(LENGTH))[:1],
        "film": media_document("film")[:-1],
        "one": text_document("one", text_tokens(1))[:1],
    }


def scored(engine: Engine, spans: list[Span], path: str | Path, top: int) -> Rows:
    """The rows of a document, whose context goes to a file."""
    rows: Rows = []
    with Path(path).open("wb") as sink:
        write_context(engine, spans[0].doc, spans, sink, pg=None, logprobs=top, on_rows=rows.extend)
    return rows


def one_by_one(engine: Engine, spans: list[Span]) -> np.ndarray:
    """Scores [T, V] after each position, by steps of one that score the next token."""
    sequence, found = engine.begin(), []
    for tile in tiles_of(pieces_of(spans, engine.config, engine.encode), 1, reach=0):
        sequence.run(replace(tile, scored=True), 1)
        found.append(sequence.logits)
    return np.stack(found)


@pytest.fixture(scope="module")
def wanted(folders: dict[str, Path]) -> dict[tuple[str, str], np.ndarray]:
    """By model and document: log-probabilities float64 [T, V] after each position. The forward pass
    of training attends to all, not to what an index chooses."""
    found = {}
    for model, scores in (("full", full_logits), ("indexed", one_by_one)):
        engine = Engine(open_checkpoint(folders[model]))
        for doc, spans in documents().items():
            found[model, doc] = np.stack([log_softmax(x) for x in scores(engine, spans)])
    return found


# Of 600 positions two halves are scored one after the other, of 1,025 three parts and one more row.
@pytest.mark.parametrize(
    ("model", "chunk"),
    [("full", 1), ("full", 7), ("full", 600), ("indexed", 64), ("indexed", 1025)],
)
def test_any_chunk_gives_the_same(
    model: str, chunk: int, folders: dict[str, Path], wanted: dict[tuple[str, str], np.ndarray]
) -> None:
    engine = Engine(open_checkpoint(folders[model]), chunk)
    for doc, spans in documents().items():
        if chunk == 1 and doc == "text":
            spans[0].tokens = spans[0].tokens[:40]
        tokens = np.concatenate([span.tokens for span in spans])
        rows = scored(engine, spans, "/dev/null", 3)
        assert [row["token"] for row in rows] == tokens.tolist()
        assert [row["position"] for row in rows] == list(range(len(tokens)))
        assert {row["doc"] for row in rows} == {doc}
        assert (rows[0]["logprob"], rows[0]["top"]) == (None, None)
        for row, after in zip(rows[1:], wanted[model, doc], strict=False):
            if row["token"] in UNTRAINED_TARGETS:
                assert (row["logprob"], row["top"]) == (None, None)
                continue
            assert row["logprob"] == pytest.approx(after[row["token"]], abs=1e-4)
            found = [entry["logprob"] for entry in row["top"]]
            np.testing.assert_allclose(found, np.sort(after)[:-4:-1], atol=1e-4)
            ids = [entry["token"] for entry in row["top"]]
            np.testing.assert_allclose(found, after[ids], atol=1e-4)


def test_what_is_never_text_has_no_log_probability(folders: dict[str, Path]) -> None:
    engine = Engine(open_checkpoint(folders["full"]), 64)
    rows = scored(engine, media_document()[:-1], "/dev/null", 0)
    assert sum(row["token"] == VIDEO for row in rows) == 3 * 64
    without = [row for row in rows if row["logprob"] is None]
    assert len(without) == 1 + 198 + 78
    assert all(row["token"] in UNTRAINED_TARGETS for row in without[1:])
    assert not any("top" in row for row in rows)
    assert all(
        row["logprob"] < 0
        for row in rows
        if row["token"] not in UNTRAINED_TARGETS and row["position"]
    )


def test_decode_says_the_same(folders: dict[str, Path], vocab: Vocab) -> None:
    """Of what it chose, in the same words."""
    engine = Engine(open_checkpoint(folders["full"]), 64)
    prompt = Prompt("Once upon a time", raw=True, max_tokens=5, logprobs=3)
    answer = engine.answer(None, prompt)
    assert len(answer.logprobs) == 5
    tokens = np.concatenate([prompt.tokens(vocab), np.array(answer.tokens, np.int32)])
    rows = scored(engine, text_document("a", tokens)[:1], "/dev/null", 3)
    for row, entry in zip(rows[-5:], answer.logprobs, strict=True):
        assert row.keys() == {"doc", "position", *entry}
        assert (row["token"], row["text"]) == (entry["token"], entry["text"])
        for a, b in zip([row, *row["top"]], [entry, *entry["top"]], strict=True):
            assert a["logprob"] == pytest.approx(b["logprob"], abs=1e-4)
        assert [e["token"] for e in row["top"]] == [e["token"] for e in entry["top"]]


@pytest.mark.parametrize("model", CONFIGS)
def test_the_context_is_that_without(model: str, folders: dict[str, Path], tmp_path: Path) -> None:
    engine = Engine(open_checkpoint(folders[model]), 64)
    kept = ["text", "film"] if model == "full" else ["text"]
    for doc, spans in ((doc, documents()[doc]) for doc in kept):
        with (tmp_path / "plain.ctx").open("wb") as sink:
            write_context(engine, doc, spans, sink, pg=None)
        scored(engine, spans, tmp_path / "scored.ctx", 2)
        parts, footers = [], []
        for name in ("plain", "scored"):
            with open_contexts(str(tmp_path / f"{name}.ctx")) as contexts:
                reader = next(contexts)
                parts.append([(row.describe(), row.data.copy()) for row in reader.rows()])
                footers.append(reader.footer)
        assert footers[0].keys() == footers[1].keys()
        for (about, plain), (same, found) in zip(*parts, strict=True):
            assert about == same
            np.testing.assert_allclose(found, plain, atol=1e-4)


def test_more_than_the_vocabulary_has(folders: dict[str, Path], vocab: Vocab) -> None:
    engine = Engine(open_checkpoint(folders["full"]), 64)
    rows = scored(engine, text_document("a", text_tokens(2))[:1], "/dev/null", 10**9)
    assert len(rows[1]["top"]) == vocab.size
    assert sum(np.exp(entry["logprob"]) for entry in rows[1]["top"]) == pytest.approx(1, abs=1e-3)


def test_scores_that_are_no_numbers_are_told(vocab: Vocab) -> None:
    own = np.array([np.nan, -1, np.nan, -1], np.float32)
    empty = np.empty((4, 0), np.float32)
    scores: Any = Scores(own, empty.astype(np.int32), empty)  # type: ignore[arg-type]
    entries = Entries(vocab)
    assert len(list(entries.rows("a", 0, text_tokens(2), scores))) == 2  # what is behind is filling
    with pytest.raises(GemtoolError, match=r"document 'a': .* not finite"):
        list(entries.rows("a", 0, text_tokens(3), scores))
    with pytest.raises(GemtoolError, match="not finite"):
        list(entries.rows("a", 9, text_tokens(1), scores))


def test_a_sequence_that_was_not_scored_cannot_go_on(folders: dict[str, Path]) -> None:
    engine = Engine(open_checkpoint(folders["full"]), 64)
    tiles = list(engine.tiles([Piece(text_tokens(150))]))
    assert not tiles[0].scored
    sequence = engine.begin()
    sequence.run(tiles[0], 64)
    with pytest.raises(AssertionError, match="not scored"):
        sequence.score(tiles[1], 64, 0)


def test_tiles_share_a_program(tmp_path: Path, vocab: Vocab, watch: Watch) -> None:
    engine = make_engine(tmp_path / "run", tiny(vocab.size, layers="LG"), vocab, 512)
    watch.forget()
    scored(engine, text_document("a", text_tokens(1300))[:1], "/dev/null", 2)
    assert watch.counts("logprobs_step") == {"logprobs_step": (1, 1)}
    watch.forget()
    scored(engine, text_document("a", text_tokens(700))[:1], "/dev/null", 2)
    assert not watch.seen


def test_no_more_scores_than_a_chunks(folders: dict[str, Path], vocab: Vocab) -> None:
    """Of a tile of 2,048 positions, the scores of a quarter at a time."""
    from gemtool.infer.steps import abstract_sequence, logprobs_step
    from gemtool.model.params import abstract_params

    config = tiny(vocab.size)
    arguments = (
        abstract_params(config), config, jax.ShapeDtypeStruct((2048,), np.int32), None,
        jax.ShapeDtypeStruct((), np.int32), *abstract_sequence(config, 4096), {},
        jax.ShapeDtypeStruct((vocab.size,), np.float32), 4,
    )  # fmt: skip
    memory = logprobs_step.lower(*arguments).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2.5 * 4 * 512 * vocab.size


# The command


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, vocab: Vocab) -> Path:
    folder = tmp_path_factory.mktemp("spans")
    both = [media_document(), text_document('the "b"', text_tokens(50, 5))]
    return spans_file(folder / "two.arrow", both, vocab.fingerprint)


def rows_of(done: Any) -> Rows:
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_command(gemtool: Command, folders: dict[str, Path], two: Path, tmp_path: Path) -> None:
    score = ("prefill", "--ckpt", folders["full"], "--no-pg", "--chunk", 64)
    plain = gemtool(*score, two).stdout
    done = gemtool(*score, two, "--logprobs", 2, "-o", "two.ctx")
    rows = rows_of(done)
    assert [(row["doc"], row["position"]) for row in rows] == [
        *(("film", i) for i in range(317)), *(('the "b"', i) for i in range(50))
    ]  # fmt: skip
    assert [row["logprob"] for row in rows if not row["position"]] == [None, None]
    assert b"prefilled 2 documents, 367 tokens" in done.stderr
    assert (tmp_path / "two.ctx").stat().st_size == len(plain)
    engine = Engine(open_checkpoint(folders["full"]), 64)
    expected = scored(engine, media_document()[:-1], "/dev/null", 2)
    for row, same in zip(rows, expected, strict=False):
        assert row["text"] == same["text"]
        assert row["logprob"] == pytest.approx(same["logprob"], abs=1e-5)
    alone = rows_of(gemtool(*score, "--logprobs", 0, "-o", "/dev/null", input=two.read_bytes()))
    assert [{k: v for k, v in row.items() if k not in ("top", "logprob")} for row in rows] == [
        {k: v for k, v in row.items() if k != "logprob"} for row in alone
    ]
    for row, same in zip(rows, alone, strict=True):
        assert row["logprob"] == pytest.approx(same["logprob"], abs=1e-5)
    assert {path.name for path in tmp_path.iterdir()} == {"two.ctx"}


def test_refusals(gemtool: Command, folders: dict[str, Path], two: Path, tmp_path: Path) -> None:
    score = ("prefill", two, "--ckpt", folders["full"], "--logprobs")
    for arguments, message in (
        ((1,), "-o /dev/null"),
        ((1, "-o", "-"), "-o /dev/null"),
        ((-1, "-o", "x"), "--logprobs"),
        ((1, "--compile-only"), "--logprobs goes without --compile-only"),
        ((1, "--dry-run", "-o", "x"), "leave out -o"),
    ):
        done = gemtool(*score, *arguments, check=False)
        assert (done.returncode, done.stdout) == (2, b"")
        (line,) = done.stderr.decode().splitlines()
        assert message in line
    assert list(tmp_path.iterdir()) == []


def test_the_plan_counts_scoring(
    gemtool: Command, folders: dict[str, Path], two: Path, vocab: Vocab
) -> None:
    plan, _ = rows_of(
        gemtool("prefill", two, "--ckpt", folders["full"], "--logprobs", 1, "--dry-run")
    )
    assert (plan["doc"], plan["tokens"]) == ("film", 317)
    engine, spans = Engine(open_checkpoint(folders["full"]), 512), documents()["text"]
    plain, more = (Planner(engine, top).plan(spans) for top in (None, 5))
    assert (plain.tokens, plain.memory, plain.disk) == (more.tokens, more.memory, more.disk)
    assert more.seconds > 2 * plain.seconds


@pytest.mark.parametrize(
    ("shell", "code", "message"),
    [("| head -n1", 141, ""), ("> /dev/full", 1, "<stdout>: no space left on device"),
     (">&-", 1, "<stdout>: ")],
)  # fmt: skip
def test_when_nobody_reads(
    folders: dict[str, Path], tmp_path: Path, vocab: Vocab, shell: str, code: int, message: str
) -> None:
    many = [text_document(str(i), text_tokens(500)) for i in range(9)]
    spans_file(tmp_path / "many.spans", many, vocab.fingerprint)
    command = f"{sys.executable} -m gemtool prefill -q --ckpt {folders['full']} many.spans"
    done = subprocess.run(
        ["bash", "-c", f"{command} --logprobs 0 -o many.ctx {shell}; exit ${{PIPESTATUS[0]}}"],
        cwd=tmp_path, env=command_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == (message != "")
    assert {path.name for path in tmp_path.iterdir()} == {"many.spans"}
