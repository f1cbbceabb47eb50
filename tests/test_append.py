"""Contexts that continue others: what they answer, what they hold, and what is wrong with them."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemtool.data.vocab import Vocab
from gemtool.errors import CorruptInput, GemtoolError
from gemtool.infer.contexts import Base, Loaded, load_context, open_base
from gemtool.infer.engine import Engine
from gemtool.infer.prefill import write_context
from gemtool.infer.text import Prompt
from gemtool.stream.context import BLOCK, ContextWriter, Parent, open_contexts
from gemtool.stream.lineage import flatten
from gemtool.stream.spans import Span
from tests.test_prefill_decode import (
    make_engine,
    media_document,
    rows,
    spans_file,
    text_tokens,
    tiny,
)

Command = Callable[..., Any]


@pytest.fixture(scope="module")
def vocab() -> Vocab:
    return Vocab.load()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, vocab: Vocab) -> Path:
    path = tmp_path_factory.mktemp("model") / "run"
    make_engine(path, tiny(vocab.size), vocab, 512)
    return path


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Commands of this file share compiled programs."""
    return {"GEMTOOL_CACHE": str(tmp_path_factory.mktemp("cache"))}


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    from gemtool.checkpoint import open_checkpoint

    return Engine(open_checkpoint(folder), 512)


def text(doc: str, tokens: np.ndarray) -> list[Span]:
    return [Span(doc, 0, "text", tokens)]


def write(
    engine: Engine, path: Path, spans: list[Span], base: Base | None = None
) -> dict[str, Any]:
    with path.open("wb") as sink:
        return write_context(engine, spans[0].doc, spans, sink, base=base)


def load(engine: Engine, path: Path) -> Loaded:
    with open_contexts(str(path)) as contexts:
        return load_context(engine, next(contexts))


def stats(path: Path) -> list[tuple[str, int, int]]:
    with open_contexts(str(path)) as contexts:
        return [(part.part, part.start, part.stop) for part in next(contexts).parts()]


def require_same(engine: Engine, found: Loaded, whole: Loaded) -> None:
    """The same to the rounding of float16: tiles were cut elsewhere."""
    assert found.sequence.length == whole.sequence.length
    assert np.array_equal(found.tail, whole.tail)
    assert found.footer["kinds"] == whole.footer["kinds"]
    np.testing.assert_allclose(found.sequence.logits, whole.sequence.logits, atol=1e-3)
    length = whole.sequence.length
    for name, array in whole.sequence.block(0, min(length, BLOCK)).items():
        other = found.sequence.block(0, min(length, BLOCK))[name]
        np.testing.assert_allclose(other, array, atol=4e-3, rtol=4e-3, err_msg=name)
    question = Prompt("And then?", max_tokens=12)
    assert (
        engine.answer(found.sequence, question).tokens
        == engine.answer(whole.sequence, question).tokens
    )


@pytest.mark.parametrize(
    "first",
    [
        BLOCK + 5,
        *(pytest.param(x, marks=pytest.mark.slow) for x in (3, 700, BLOCK, 2 * BLOCK + 900)),
    ],
)
def test_continues_as_if_it_were_one_document(engine: Engine, tmp_path: Path, first: int) -> None:
    tokens = text_tokens(2 * BLOCK + 1500)
    write(engine, tmp_path / "whole.ctx", text("all", tokens))
    write(engine, tmp_path / "a.ctx", text("a", tokens[:first]))
    base = open_base(engine, str(tmp_path / "a.ctx"), str(tmp_path / "b.ctx"))
    write(engine, tmp_path / "b.ctx", text("b", tokens[first:]), base)
    found, whole = load(engine, tmp_path / "b.ctx"), load(engine, tmp_path / "whole.ctx")
    require_same(engine, found, whole)
    # What the parent has in whole blocks is not written again.
    kept = first // BLOCK * BLOCK
    assert stats(tmp_path / "b.ctx")[0] == ("block", kept, min(kept + BLOCK, len(tokens)))


def test_a_context_can_be_continued_by_many_and_stays(engine: Engine, tmp_path: Path) -> None:
    """Forks of forks, of media too; each as if it were whole."""
    film, more = media_document(seconds=2)[:-1], text_tokens(40, 3)
    write(engine, tmp_path / "film.ctx", film)
    before = (tmp_path / "film.ctx").read_bytes()
    base = open_base(engine, str(tmp_path / "film.ctx"), str(tmp_path / "x.ctx"))
    for name, tokens in (("x", more), ("y", more[:7])):
        write(engine, tmp_path / f"{name}.ctx", text(name, tokens), base)
    again = open_base(engine, str(tmp_path / "x.ctx"), str(tmp_path / "z.ctx"))
    write(engine, tmp_path / "z.ctx", media_document("again", 1, seed=5)[:-1], again)
    assert (tmp_path / "film.ctx").read_bytes() == before

    def joined(*documents: list[Span]) -> list[Span]:
        return [replace(s, doc="whole", span=i) for i, s in enumerate(itertools.chain(*documents))]

    cases = {
        "x": joined(film, text("x", more)),
        "y": joined(film, text("y", more[:7])),
        "z": joined(film, text("x", more), media_document("again", 1, seed=5)[:-1]),
    }
    for name, spans in cases.items():
        write(engine, tmp_path / "whole.ctx", spans)
        require_same(
            engine, load(engine, tmp_path / f"{name}.ctx"), load(engine, tmp_path / "whole.ctx")
        )
    # What it says of media depends on all of them, in order.
    hashes = [load(engine, tmp_path / f"{name}.ctx").footer["media_sha256"] for name in "xz"]
    assert hashes[0].keys() == hashes[1].keys()
    assert hashes[0] != hashes[1]


def test_flat_is_the_same_without_its_parents(engine: Engine, tmp_path: Path) -> None:
    tokens = text_tokens(BLOCK + 300)
    write(engine, tmp_path / "a.ctx", text("a", tokens[:100]))
    for name, part in (("b", tokens[100:BLOCK]), ("c", tokens[BLOCK:])):
        previous = chr(ord(name) - 1)
        base = open_base(engine, str(tmp_path / f"{previous}.ctx"), str(tmp_path / f"{name}.ctx"))
        write(engine, tmp_path / f"{name}.ctx", text(name, part), base)
    continued = load(engine, tmp_path / "c.ctx")
    (tmp_path / "elsewhere").mkdir()
    flat = tmp_path / "elsewhere" / "flat.ctx"
    with open_contexts(str(tmp_path / "c.ctx")) as contexts, flat.open("wb") as sink:
        footer = flatten(next(contexts), sink, ())
    for name in "abc":
        (tmp_path / f"{name}.ctx").unlink()
    found = load(engine, flat)
    assert footer["length"] == BLOCK + 300
    assert footer["kinds"] == {"text": BLOCK + 300}
    assert np.array_equal(found.sequence.logits, continued.sequence.logits)
    for name, array in continued.sequence.state().items():
        assert np.array_equal(found.sequence.state()[name], array), name
    for start in (0, BLOCK):
        stop = min(start + BLOCK, BLOCK + 300)
        for name, array in continued.sequence.block(start, stop).items():
            assert np.array_equal(found.sequence.block(start, stop)[name], array), name


# What can be wrong


@pytest.fixture
def chain(engine: Engine, tmp_path: Path) -> Path:
    """A folder with b.ctx, which continues a.ctx."""
    write(engine, tmp_path / "a.ctx", text("a", text_tokens(50)))
    base = open_base(engine, str(tmp_path / "a.ctx"), str(tmp_path / "b.ctx"))
    write(engine, tmp_path / "b.ctx", text("b", text_tokens(30, 1)), base)
    return tmp_path


def test_they_move_together(engine: Engine, chain: Path) -> None:
    (chain / "far").mkdir()
    shutil.move(chain / "a.ctx", chain / "far" / "a.ctx")
    shutil.move(chain / "b.ctx", chain / "far" / "b.ctx")
    assert load(engine, chain / "far" / "b.ctx").sequence.length == 80


def test_a_missing_parent_is_named(engine: Engine, chain: Path) -> None:
    (chain / "a.ctx").unlink()
    with pytest.raises(GemtoolError, match=r"b\.ctx: continues .*a\.ctx, which is not there"):
        load(engine, chain / "b.ctx")


def test_another_parent_is_refused(engine: Engine, chain: Path) -> None:
    write(engine, chain / "a.ctx", text("a", text_tokens(50, 9)))
    with pytest.raises(GemtoolError, match=r"continues another .*a\.ctx than this one: its id is"):
        load(engine, chain / "b.ctx")


def test_a_parent_of_another_model_is_refused(engine: Engine, vocab: Vocab, chain: Path) -> None:
    other = make_engine(chain / "other", tiny(vocab.size), vocab, 512, seed=2)
    write(other, chain / "a.ctx", text("a", text_tokens(50)))
    with pytest.raises(GemtoolError, match="belongs to another model"):
        load(engine, chain / "b.ctx")


def test_a_damaged_parent_is_refused(engine: Engine, chain: Path) -> None:
    data = bytearray((chain / "a.ctx").read_bytes())
    data[len(data) // 2] ^= 1
    (chain / "a.ctx").write_bytes(data)
    with pytest.raises(CorruptInput, match=r"a\.ctx: near byte"):
        load(engine, chain / "b.ctx")


def test_a_circle_ends(engine: Engine, chain: Path) -> None:
    """Only a forged file can be its own ancestor: ids are hashes."""
    base = open_base(engine, str(chain / "a.ctx"), str(chain / "c.ctx"))
    forged = replace(base, parent=Parent("0" * 64, "c.ctx"))
    write(engine, chain / "c.ctx", text("c", text_tokens(3)), forged)
    with pytest.raises(CorruptInput, match=r"c\.ctx: continues .*c\.ctx, which continues it"):
        load(engine, chain / "c.ctx")


def test_a_beginning_that_no_parent_ends_with(engine: Engine, chain: Path) -> None:
    """Forged too: a parent that is shorter, and a start without one."""
    tokens = text_tokens(BLOCK + 9)
    write(engine, chain / "long.ctx", text("a", tokens))
    base = open_base(engine, str(chain / "long.ctx"), str(chain / "c.ctx"))
    short = open_base(engine, str(chain / "a.ctx"), str(chain / "c.ctx")).parent
    write(engine, chain / "c.ctx", text("c", text_tokens(3)), replace(base, parent=short))
    with pytest.raises(CorruptInput, match=r"begins at token 4,096, its parent .* to 50"):
        load(engine, chain / "c.ctx")
    with (chain / "c.ctx").open("wb") as sink:
        ContextWriter(sink, replace(engine.header("c"), start=BLOCK)).close({}, {})
    with pytest.raises(CorruptInput, match="begins at token 4,096, which no parent ends with"):
        load(engine, chain / "c.ctx")


# The commands


def test_append_flatten_and_view(
    gemtool: Command, compiled: dict[str, str], folder: Path, vocab: Vocab, tmp_path: Path
) -> None:
    def make(name: str, *documents: list[Span]) -> Path:
        return spans_file(tmp_path / name, list(documents), vocab.fingerprint)

    tokens = text_tokens(90)
    make("a.spans", text("a", tokens[:60]))
    make("more.spans", text("b", tokens[60:]), text("c", tokens[60:70]))
    make("whole.spans", text("whole", tokens))
    (tmp_path / "kept").mkdir()
    gemtool("prefill", "--ckpt", folder, "a.spans", "-o", "kept/a.ctx", env=compiled)
    command = ["prefill", "--no-pg", "--ckpt", folder, "--append", "kept/a.ctx", "more.spans"]
    done = gemtool(*command, "-o", "bc.ctx", env=compiled)
    assert b"prefilled 2 documents, 40 tokens" in done.stderr
    piped = gemtool(*command, env=compiled).stdout
    assert piped == (tmp_path / "bc.ctx").read_bytes()
    plans = rows(gemtool(*command, "--dry-run", env=compiled))
    assert [plan["tokens"] for plan in plans] == [30, 10]

    gemtool("prefill", "--ckpt", folder, "whole.spans", "-o", "whole.ctx", env=compiled)
    gemtool("prefill", "--no-pg", "--flatten", "bc.ctx", "-o", "flat.ctx")
    flat = gemtool("prefill", "--no-pg", "--flatten", input=piped).stdout
    assert flat == (tmp_path / "flat.ctx").read_bytes()
    answers = {}
    for name in ("bc", "flat", "whole"):
        asked = ["decode", "--ckpt", folder, "--cache", f"{name}.ctx", "--prompt", "So?"]
        answers[name] = rows(gemtool(*asked, "--max-tokens", 8, env=compiled))
    assert [row["doc"] for row in answers["bc"]] == ["b", "c"]
    assert (
        answers["bc"][0]["tokens"] == answers["flat"][0]["tokens"] == answers["whole"][0]["tokens"]
    )
    assert [row["usage"]["cached"] for row in answers["flat"]] == [90, 70]

    shown = rows(gemtool("view", "--stats", "bc.ctx"))
    parent = json.loads(gemtool("view", "--stats", "kept/a.ctx").stdout)["id"]
    assert [row["parent"] for row in shown] == [
        {"id": parent, "path": "kept/a.ctx", "index": 0}
    ] * 2
    assert [row["length"] for row in shown] == [90, 70]
    assert rows(gemtool("view", "--stats", "flat.ctx"))[0]["parent"] is None
    assert b"ok, 90 tokens" in gemtool("view", "--verify", "bc.ctx").stdout
    (tmp_path / "kept" / "a.ctx").rename(tmp_path / "kept" / "z.ctx")
    for command in (
        ["view", "--verify", "bc.ctx"],
        ["prefill", "--flatten", "bc.ctx", "-o", "x.ctx"],
        ["decode", "--ckpt", folder, "--cache", "bc.ctx", "--prompt", "So?"],
    ):
        done = gemtool(*command, check=False, env=compiled)
        assert done.returncode == 1
        assert b"bc.ctx: continues kept/a.ctx, which is not there" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "x.ctx").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--append", "-"], b"standard input has no name"),
        (["--append", "a.ctx", "-f", "-o", "a.ctx"], b"a.ctx: is the context that is continued"),
        (["--append", "two.ctx", "-o", "x.ctx"], b"two.ctx: holds several contexts"),
        (["--append", "none.ctx", "-o", "x.ctx"], b"none.ctx: cannot be read"),
        (["--append", "a.ctx", "--flatten"], b"--flatten goes without --ckpt"),
    ],
)
def test_what_cannot_be_appended(
    gemtool: Command,
    compiled: dict[str, str],
    engine: Engine,
    folder: Path,
    vocab: Vocab,
    tmp_path: Path,
    options: list[str],
    says: bytes,
) -> None:
    spans_file(tmp_path / "b.spans", [text("b", text_tokens(5))], vocab.fingerprint)
    write(engine, tmp_path / "a.ctx", text("a", text_tokens(9)))
    (tmp_path / "two.ctx").write_bytes((tmp_path / "a.ctx").read_bytes() * 2)
    command = ["prefill", "--ckpt", folder, "b.spans", *options]
    done = gemtool(*command, check=False, env=compiled)
    assert done.returncode in (1, 2)
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "x.ctx").exists()
