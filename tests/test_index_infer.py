"""Contexts of a model with indexed attention: prefilled, grown, saved, restored and asked."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gemtool.data.vocab import Vocab
from gemtool.errors import GemtoolError
from gemtool.infer.contexts import load_context
from gemtool.infer.engine import Engine
from gemtool.infer.generate import Step
from gemtool.infer.prefill import Planner, write_context
from gemtool.infer.sequence import Sequence
from gemtool.model.config import ModelConfig
from gemtool.model.kinds import IndexConfig
from gemtool.stream.context import BLOCK, open_contexts
from tests.conftest import Command, Verb, quickly_compiled
from tests.test_compile_once import programs
from tests.test_prefill_decode import make_engine, spans_file, text_document, text_tokens, tiny

INDEX = IndexConfig(
    block=16, landmarks=2, dim=8, hidden=16, local=1, select=3, floor=1024, sticky=4
)  # fmt: skip
# Two blocks of a context file, the second of which ends within a block of the index.
LENGTH = BLOCK + 1003


def indexed(vocab_size: int, **changes: int) -> ModelConfig:
    config = tiny(vocab_size, "LGL", "float32")
    index = dataclasses.replace(INDEX, **changes)
    kinds = tuple(
        dataclasses.replace(kind, attention="indexed", index=index, length_scale=0.3)
        if kind.letter == "G"
        else kind
        for kind in config.kinds
    )
    return dataclasses.replace(config, kinds=kinds)


@pytest.fixture(scope="module", autouse=True)
def hardly_optimised() -> Iterator[None]:
    with quickly_compiled():
        yield


@pytest.fixture(scope="module")
def vocab() -> Vocab:
    return Vocab.load()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, vocab: Vocab) -> Path:
    path = tmp_path_factory.mktemp("indexed") / "run"
    make_engine(path, indexed(vocab.size), vocab, 512)
    return path


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    from gemtool.checkpoint import open_checkpoint

    return Engine(open_checkpoint(folder), 512)


@pytest.fixture(scope="module")
def context(engine: Engine) -> Sequence:
    return engine.prefill(text_tokens(LENGTH))


def said(engine: Engine, context: Sequence, seed: int) -> list[np.ndarray]:
    steps = engine.generate(context, text_tokens(9, seed), max_tokens=3)
    return [step.logits for step in steps]


def require_same(found: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def answer(engine: Engine, context: Sequence, seed: int, asked: int = 9) -> list[Step]:
    """The greedy one to so many tokens."""
    return list(engine.generate(context, text_tokens(asked, seed), max_tokens=24))


def require_same_tokens(found: list[Step], wanted: list[Step]) -> None:
    """Greedy answers are equal, unless two tokens are nearly as good: they may go on differently."""
    for mine, other in zip(found, wanted, strict=False):
        if mine.token != other.token:
            second, first = np.sort(other.logits)[-2:]
            assert first - second <= 1e-4
            return
    assert len(found) == len(wanted)


@pytest.mark.parametrize("chunk", [64, 700])
def test_any_chunk_gives_the_same(
    folder: Path, engine: Engine, context: Sequence, chunk: int
) -> None:
    from gemtool.checkpoint import open_checkpoint

    other = Engine(open_checkpoint(folder), chunk)
    found = other.prefill(text_tokens(LENGTH))
    np.testing.assert_allclose(found.logits, context.logits, atol=1e-4)
    require_same(said(other, found, 5), said(engine, context, 5))
    for seed in (5, 6, 7):
        require_same_tokens(answer(other, found, seed), answer(engine, context, seed))


def test_one_token_after_the_other_gives_the_same(engine: Engine, context: Sequence) -> None:
    """The last block of the context's index is summarised by prefill here, by decoding there."""
    tokens = text_tokens(LENGTH)
    found = engine.prefill(tokens[:-40])
    with found.fork() as live:
        for token in tokens[-40:]:
            live.extend(np.array([token], np.int32))
        np.testing.assert_allclose(live.logits, context.logits, atol=1e-4)


def test_a_context_is_as_before_after_it_was_asked(engine: Engine, context: Sequence) -> None:
    """Though what was asked completed blocks of the index, with other keys each time."""
    wanted = [said(engine, context, seed) for seed in (1, 2)]
    long = list(engine.generate(context, text_tokens(150, 9), max_tokens=2))
    assert len(long) == 2
    for seed, expected in zip((1, 2), wanted, strict=True):
        require_same(said(engine, context, seed), expected)


def test_a_saved_context_answers_as_the_one_in_memory(
    engine: Engine, context: Sequence, tmp_path: Path
) -> None:
    spans = text_document("a", text_tokens(LENGTH))[:1]
    with (tmp_path / "a.ctx").open("wb") as sink:
        write_context(engine, "a", spans, sink)
    with open_contexts(str(tmp_path / "a.ctx")) as contexts:
        reader = next(contexts)
        layout = reader.header.layout
        loaded = load_context(engine, reader).sequence
    assert layout[1]["index"]["block"] == 16
    np.testing.assert_allclose(loaded.logits, context.logits, atol=1e-4)
    for seed in (1, 2):
        require_same(said(engine, loaded, seed), said(engine, context, seed))
    with open_contexts(str(tmp_path / "a.ctx")) as contexts:
        shapes = {
            (row.part, row.start, row.name): row.data.shape
            for reader in contexts
            for row in reader.rows()
        }
    assert shapes["block", 0, "landmarks"] == (1, 2, 8, BLOCK // 16)
    assert shapes["block", BLOCK, "landmarks"] == (1, 2, 8, 1003 // 16)
    assert shapes["state", LENGTH, "pending"] == (1, 16, 8 + 2)
    assert shapes["state", LENGTH, "queries"] == (1, 3, 8)


def test_a_context_in_the_buffers_of_another(engine: Engine, context: Sequence) -> None:
    """Longer or shorter than the one before, it is as if it were the first."""
    long, short = text_tokens(LENGTH), text_tokens(900, 4)
    wanted = said(engine, engine.prefill(short), 7)
    other = engine.prefill(text_tokens(BLOCK + 300, 11))
    first = engine.prefill(short, reuse=other)
    require_same(said(engine, first, 7), wanted)
    with pytest.raises(RuntimeError):
        said(engine, other, 7)
    again = engine.prefill(long, reuse=first)
    require_same(said(engine, again, 7), said(engine, context, 7))
    grown = engine.prefill(text_tokens(3 * BLOCK), reuse=again)
    assert grown.length == 3 * BLOCK


def test_buffers_grow(engine: Engine, context: Sequence) -> None:
    sequence = engine.prefill(text_tokens(LENGTH))
    sequence.reserve(5 * BLOCK)
    require_same(said(engine, sequence, 3), said(engine, context, 3))


def test_the_plan_counts_landmarks(engine: Engine) -> None:
    assert engine.row_bytes() == 2 * 8 * 4 + 2 * 8 * 4 // 16
    spans = text_document("a", text_tokens(3 * BLOCK))[:1]
    plan = Planner(engine).plan(spans)
    assert plan.disk > 3 * BLOCK * engine.row_bytes()


def test_commands(gemtool: Command, folder: Path, vocab: Vocab, tmp_path: Path) -> None:
    spans_file(tmp_path / "a.spans", [text_document("a", text_tokens(LENGTH))], vocab.fingerprint)
    run = functools.partial(gemtool, env={"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"})  # it is quicker
    piped = run("prefill", "--ckpt", folder, "a.spans").stdout
    run("prefill", "--ckpt", folder, "--chunk", "333", "a.spans", "-o", "a.ctx")
    asked = "--prompt", "Which?", "--max-tokens", "8", "--format", "jsonl"
    first = run("decode", "--ckpt", folder, "--cache", "a.ctx", *asked)
    again = run("decode", "--ckpt", folder, "--cache", "-", *asked, input=piped)
    texts = [json.loads(done.stdout)["tokens"] for done in (first, again)]
    assert texts[0] == texts[1]
    gemtool("view", "--verify", "a.ctx")


def test_another_index_is_another_model(
    gemtool: Command, folder: Path, engine: Engine, vocab: Vocab, tmp_path: Path
) -> None:
    spans = text_document("a", text_tokens(100))[:1]
    with (tmp_path / "a.ctx").open("wb") as sink:
        write_context(engine, "a", spans, sink)
    make_engine(tmp_path / "other", indexed(vocab.size, select=4), vocab, 64)
    asked = "--prompt", "Which?", "--max-tokens", "8"
    done = gemtool("decode", "--ckpt", tmp_path / "other", "--cache", "a.ctx", *asked, check=False)
    assert done.returncode == 1
    assert b"this context belongs to another model" in done.stderr


def test_kernels_are_those_that_an_option_names(folder: Path, gemtool: Command) -> None:
    ask = ("decode", "--ckpt", folder, "--prompt", "A question", "--max-tokens", 2, "-v")
    usual, same, other = (
        gemtool(*ask, *given) for given in ((), ("--kernels", "xla"), ("--kernels", "reference"))
    )
    texts = {json.loads(done.stdout)["text"] for done in (usual, same, other)}
    assert len(texts) == 1
    assert not programs(same.stderr)[0]  # that CPUs have them anyway: nothing new to compile
    assert "scored_step" in programs(other.stderr)[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--data", "nowhere", "--ckpt", "run"),
        ("train", "--compile-only", "--topology", "v5e:2x2"),
        ("prefill", "--ckpt", "CKPT", "SPANS"),
        ("prefill", "--compile-only", "--topology", "v5e:2x2"),
        ("decode", "--ckpt", "CKPT", "--prompt", "A question"),
        ("decode", "--compile-only", "--topology", "v5e:2x2"),
        ("probe", "needle", "--ckpt", "CKPT", "--lengths", "1k"),
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_verbs_pass_the_name_of_kernels_on(
    arguments: tuple[str, ...],
    folder: Path,
    vocab: Vocab,
    verb: Verb,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def set_up(*, kernels: str | None, **_: object) -> None:
        raise GemtoolError(f"kernels: {kernels}")

    for module in ("runtime", "train.loop", "aot.run"):
        monkeypatch.setattr(f"gemtool.{module}.setup_jax", set_up)
    monkeypatch.setattr("gemtool.aot.run.prepare_process", lambda: None)
    spans = spans_file(
        tmp_path / "s.spans", [text_document("a", text_tokens(9))], vocab.fingerprint
    )
    named = {"CKPT": folder, "SPANS": spans}
    done = verb(*(named.get(word, word) for word in arguments), "--kernels", "reference")
    assert (done.code, done.out) == (1, b"")
    assert "kernels: reference" in done.err
