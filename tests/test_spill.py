"""Prefill lets go of what is written: the same context, in bounded memory."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from gemtool.checkpoint import open_checkpoint
from gemtool.data.vocab import Vocab
from gemtool.errors import CorruptInput
from gemtool.infer import spill
from gemtool.infer.contexts import load_context, open_base
from gemtool.infer.engine import Engine
from gemtool.infer.prefill import Planner, write_context
from gemtool.infer.resume import read_left
from gemtool.infer.sequence import Sequence
from gemtool.model.buffers import buffer_capacity
from gemtool.stream.context import BLOCK, Part, open_contexts
from gemtool.stream.spans import Span
from tests.test_index_infer import answer, require_same_tokens
from tests.test_mapped import damage, mixed, quickly_compiled  # noqa: F401 (a fixture)
from tests.test_prefill_decode import make_engine, text_document, text_tokens


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    vocab = Vocab.load()
    path = tmp_path_factory.mktemp("spill") / "run"
    make_engine(path, mixed(vocab.size), vocab, 512)
    return Engine(open_checkpoint(path), 512)


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state after each block; two blocks are let go at a time."""
    monkeypatch.setattr("gemtool.infer.prefill.STATE_EVERY", BLOCK)
    monkeypatch.setattr(spill, "STATE_EVERY", BLOCK)
    monkeypatch.setattr(spill, "LEAST", 2 * BLOCK)


@pytest.fixture
def let_go(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Sequence]]:
    """The sequences that let go of blocks, each time, and how many are in the file."""
    found: list[tuple[int, Sequence]] = []
    real = Sequence.go_on_with

    def watched(sequence: Sequence, parts: list[Part]) -> None:
        assert len(parts) * BLOCK == sequence.length
        real(sequence, parts)
        found.append((len(parts), sequence))

    monkeypatch.setattr(Sequence, "go_on_with", watched)
    return found


def documents() -> list[list[Span]]:
    return [
        text_document("a", text_tokens(BLOCK + 70, 1))[:1],
        text_document("b", text_tokens(5 * BLOCK + 700, 2))[:1],
    ]


def write(engine: Engine, path: Path, mode: str) -> list[dict[str, object]]:
    with path.open(mode) as sink:
        return [
            write_context(engine, spans[0].doc, spans, sink, pg=None)  # type: ignore[arg-type]
            for spans in documents()
        ]


def second(engine: Engine, path: Path) -> Sequence:
    """The context of the second document of a file."""
    with open_contexts(str(path)) as contexts:
        next(contexts)
        return load_context(engine, next(contexts)).sequence


def require_like(found: Path, wanted: Path) -> None:
    """The same contexts, but for the last bits of what was computed by attention to pages."""
    with open_contexts(str(found)) as ours, open_contexts(str(wanted)) as theirs:
        for mine, other in zip(ours, theirs, strict=True):
            for a, b in zip(mine.parts(), other.parts(), strict=True):
                assert (a.part, a.start, a.stop) == (b.part, b.start, b.stop)
                assert list(a.arrays) == list(b.arrays)
                for path, array in a.arrays.items():
                    np.testing.assert_allclose(array, b.arrays[path], atol=5e-3, err_msg=path)
            assert mine.footer["tokens_sha256"] == other.footer["tokens_sha256"]


@pytest.mark.parametrize("mode", ["w+b", "wb"])
def test_the_context_is_the_same(
    engine: Engine, tmp_path: Path, let_go: list[tuple[int, Sequence]], mode: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Also of the second document of a file, and where a shell opened it to be written only; where the
    file cannot be read, all stays in memory."""
    with monkeypatch.context() as patch:
        patch.setattr(spill, "Path", lambda name: tmp_path / "none")
        write(engine, tmp_path / "all.ctx", "wb")
    assert not let_go
    write(engine, tmp_path / "some.ctx", mode)
    assert [count for count, _ in let_go] == [2, 4]
    require_like(tmp_path / "some.ctx", tmp_path / "all.ctx")
    # Whoever asks gets the same answer; of one token, for which nothing else is compiled.
    found, wanted = (second(engine, tmp_path / name) for name in ("some.ctx", "all.ctx"))
    for seed in (1, 2, 3):
        require_same_tokens(*(answer(engine, context, seed, 1) for context in (found, wanted)))
    # Of the layer that is paged there was never room for more than two blocks.
    rooms = [buffer_capacity(own["k"]) for own in let_go[-1][1]._taken()]
    assert rooms == [2 * BLOCK, 8 * BLOCK]


def test_a_shell_appends(
    engine: Engine, tmp_path: Path, let_go: list[tuple[int, Sequence]]
) -> None:
    """Where a file ends that was there (>>), not where this process thinks that it is."""
    write(engine, tmp_path / "all.ctx", "w+b")
    whole = (tmp_path / "all.ctx").read_bytes()
    let_go.clear()
    for spans in documents():
        descriptor = os.open(tmp_path / "x.ctx", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "wb") as sink:
            assert sink.tell() == 0
            write_context(engine, spans[0].doc, spans, sink, pg=None)
    assert [count for count, _ in let_go] == [2, 4]
    assert (tmp_path / "x.ctx").read_bytes() == whole


def test_goes_on_to_the_bit(
    engine: Engine, tmp_path: Path, let_go: list[tuple[int, Sequence]]
) -> None:
    """After an interruption what had been let go is mapped at once, and the rest is loaded."""
    write(engine, tmp_path / "all.ctx", "w+b")
    whole = (tmp_path / "all.ctx").read_bytes()
    path = tmp_path / "x.ctx"
    path.write_bytes(whole[: round(0.85 * len(whole))])
    let_go.clear()
    left = read_left(engine, path)
    assert left.begun is not None
    assert left.begun.sequence.length == 3 * BLOCK
    assert left.begun.sequence.first == 2 * BLOCK
    os.truncate(path, left.end)
    with path.open("a+b") as sink:
        write_context(engine, "b", documents()[1], sink, pg=None, begun=left.begun)
    assert [count for count, _ in let_go] == [4]
    assert path.read_bytes() == whole


@pytest.mark.parametrize("start", [2 * BLOCK, 3 * BLOCK])
def test_goes_on_before_a_damaged_block(engine: Engine, tmp_path: Path, start: int) -> None:
    """Whether it would have been mapped or loaded."""
    whole, path = tmp_path / "all.ctx", tmp_path / "x.ctx"
    with whole.open("w+b") as sink:
        write_context(engine, "b", documents()[1], sink)
    damage(whole, path, "layers/0/v", start)
    path.write_bytes(path.read_bytes()[: round(0.8 * whole.stat().st_size)])
    left = read_left(engine, path)
    assert left.begun is not None
    assert left.begun.sequence.length == start - BLOCK


def test_when() -> None:
    """Of a long context, an eighth at a time."""
    lengths = range(0, 40 * BLOCK, BLOCK)
    found = sorted({spill.gone(length) // BLOCK for length in lengths})
    assert found == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 21, 24, 27, 31, 35]
    for length in lengths:
        assert length - spill.gone(length) <= spill.kept(length)


def test_what_continues_another_stays(
    engine: Engine, tmp_path: Path, let_go: list[tuple[int, Sequence]]
) -> None:
    """It writes in the buffers of the context that the next one may continue, too."""
    first, second = tmp_path / "a.ctx", tmp_path / "b.ctx"
    with first.open("w+b") as sink:
        write_context(engine, "a", documents()[0], sink)
    base = open_base(engine, str(first), str(second))
    with second.open("w+b") as sink:
        write_context(engine, "b", documents()[1], sink, base=base)
    assert not let_go


def test_a_file_that_lost_what_was_written(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = tmp_path / "a.ctx", spill.MappedSource

    def damaged(sink: object, grows: bool) -> object:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        return real(sink, grows=grows)  # type: ignore[arg-type]

    monkeypatch.setattr(spill, "MappedSource", damaged)
    with pytest.raises(CorruptInput, match=r"a\.ctx: near byte"), path.open("w+b") as sink:
        write_context(engine, "b", documents()[1], sink)


def test_plan(engine: Engine) -> None:
    """What is said of memory before is what stays in it."""
    far = 1 << 20
    plan = Planner(engine).plan([Span("a", 0, "text", text_tokens(far))])
    assert plan.memory == engine.bytes_for(far, spill.kept(far))
    assert plan.memory < engine.bytes_for(far)
    assert Planner(engine).plan(documents()[0], start=BLOCK).memory == engine.bytes_for(3 * BLOCK)
