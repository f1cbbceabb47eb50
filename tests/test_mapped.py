"""Contexts whose keys and values stay in their files: the same answers, in little memory."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemtool.checkpoint import open_checkpoint
from gemtool.data.vocab import Vocab
from gemtool.errors import CorruptInput
from gemtool.infer import engine as engines
from gemtool.infer.contexts import Base, Loaded, load_context, open_base
from gemtool.infer.engine import Engine
from gemtool.infer.prefill import write_context
from gemtool.infer.sequence import Sequence
from gemtool.infer.text import Prompt
from gemtool.model.buffers import buffer_capacity
from gemtool.model.cache import full_layers
from gemtool.model.config import ModelConfig
from gemtool.model.pages import paged_layers
from gemtool.stream.context import BLOCK, open_contexts
from tests.conftest import Command, Verb, command_environment
from tests.test_index_infer import (
    answer,
    indexed,
    quickly_compiled,  # noqa: F401 (a fixture)
    require_same,
    require_same_tokens,
    said,
)
from tests.test_prefill_decode import make_engine, spans_file, text_document, text_tokens

# Of three contexts, each of which continues the one before. The first has a page, the last another.
COUNTS = {"a": BLOCK + 1003, "b": BLOCK - 1503, "c": 1203}
ALL = sum(COUNTS.values())


def mixed(vocab_size: int) -> ModelConfig:
    """Indexed layers with keys of their own and of another, and a dense one, whose keys are loaded."""
    config = indexed(vocab_size)
    own = next(kind for kind in config.kinds if kind.letter == "G")
    shared = dataclasses.replace(own, letter="S", shares="G", key_shift=0)
    dense = dataclasses.replace(own, letter="F", attention="full", index=None)
    return dataclasses.replace(
        config, layers="GSF", kinds=(own, shared, dense), kv_dtype="float16", moe=None
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    vocab = Vocab.load()
    path = tmp_path_factory.mktemp("mapped") / "run"
    make_engine(path, mixed(vocab.size), vocab, 512)
    return path


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine(open_checkpoint(folder), 512)


def write(engine: Engine, path: Path, tokens: np.ndarray, base: Base | None = None) -> None:
    spans = text_document(path.stem, tokens)[:1]
    expected = ALL if base is None else len(tokens)
    with path.open("wb") as sink:
        write_context(engine, path.stem, spans, sink, base=base, expected=expected)


def load(engine: Engine, path: Path, mapped: bool = True) -> Loaded:
    with pytest.MonkeyPatch.context() as patch, open_contexts(str(path)) as opened:
        if not mapped:
            patch.setattr(engines, "mappable", lambda config, blocks: 0)
        return load_context(engine, next(opened))


@pytest.fixture(scope="module")
def chain(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last of the contexts."""
    folder = tmp_path_factory.mktemp("contexts")
    base = None
    for name, count in COUNTS.items():
        path = folder / f"{name}.ctx"
        if name != "a":
            base = open_base(engine, str(path.with_stem(chr(ord(name) - 1))), str(path))
        write(engine, path, text_tokens(count, ord(name)), base)
    return path


def damage(source: Path, target: Path, name: str, start: int = 0) -> int:
    """A copy with a bit flipped in one array of the block at a token; the byte at which it begins."""
    with open_contexts(str(source)) as opened:
        part = next(x for x in next(opened).parts() if x.part == "block" and x.start == start)
    data = bytearray(source.read_bytes())
    at = data.index(part.arrays[name].tobytes())
    data[at + 1000] ^= 16
    target.write_bytes(data)
    return at


def test_answers_are_those_of_a_loaded_context(engine: Engine, chain: Path) -> None:
    """Of one that was made of mapped ones, as if all had been in memory."""
    mapped, loaded = load(engine, chain), load(engine, chain, mapped=False)
    whole = engine.prefill(
        np.concatenate([text_tokens(count, ord(name)) for name, count in COUNTS.items()])
    )
    assert np.array_equal(mapped.tokens, whole.tokens)
    np.testing.assert_allclose(mapped.sequence.logits, whole.logits, atol=2e-3)
    for seed in (1, 2, 1):
        wanted = said(engine, loaded.sequence, seed)
        require_same(said(engine, mapped.sequence, seed), wanted)
    for start in range(0, ALL, BLOCK):
        where = start, min(start + BLOCK, ALL)
        arrays = loaded.sequence.block(*where)
        for name, array in mapped.sequence.block(*where).items():
            assert np.array_equal(array, arrays[name]), name


def test_guesses(engine: Engine, chain: Path) -> None:
    """What was wrong leaves no trace."""
    sequence = load(engine, chain).sequence
    found, wanted = (
        engine.answer(sequence, Prompt("Who?", max_tokens=40, draft=draft))
        for draft in (True, False)
    )
    assert found.tokens == wanted.tokens
    assert found.drafted


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc what is mapped")
def test_keys_stay_in_the_files(engine: Engine, chain: Path) -> None:
    sequence = load(engine, chain).sequence
    assert paged_layers(engine.config) == {0}
    rooms = [buffer_capacity(own["k"]) for own in sequence._taken()]
    assert dict(zip(full_layers(engine.config), rooms, strict=True)) == {0: BLOCK, 2: 4 * BLOCK}
    pages = sequence._pages
    assert pages is not None
    assert pages.length == 2 * BLOCK
    # The memory that programs read is the mapping, of the first file here.
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    first = str(chain.with_stem("a"))
    begins = {int(line[0].split("-")[0], 16) for line in lines if line[-1] == first}
    assert pages.tables[0].memory.unsafe_buffer_pointer() in begins
    with open_contexts(str(chain)) as opened:
        assert next(opened).header.start == BLOCK


def test_a_context_without_a_name_is_copied(engine: Engine, chain: Path, tmp_path: Path) -> None:
    """As one that is redirected to standard input: what continues it has all blocks."""
    base = open_base(engine, str(chain), str(tmp_path / "x.ctx"))
    more = text_tokens(90, 3)
    write(engine, tmp_path / "x.ctx", more, base)
    write(engine, tmp_path / "y.ctx", more, dataclasses.replace(base, parent=None))
    found, wanted = (load(engine, tmp_path / name).sequence for name in ("y.ctx", "x.ctx"))
    require_same(said(engine, found, 4), said(engine, wanted, 4))


@pytest.mark.parametrize("name", ["layers/0/k", "layers/0/v"])
def test_damage_that_is_attended_to(engine: Engine, chain: Path, tmp_path: Path, name: str) -> None:
    at = damage(chain.with_stem("a"), tmp_path / "x.ctx", name)
    sequence = load(engine, tmp_path / "x.ctx").sequence
    says = f"x.ctx: near byte {at:,}: {name} of tokens 0 to 4,096 does not match its checksum"
    with pytest.raises(CorruptInput, match=says):
        said(engine, sequence, 1)
    with pytest.raises(CorruptInput, match=says):
        sequence.block(0, BLOCK)


@pytest.mark.parametrize(
    ("name", "start"),
    [("layers/0/landmarks", 0), ("tokens", 0), ("layers/2/k", 0), ("layers/0/k", BLOCK)],
)
def test_damage_of_what_is_read_when_it_is_opened(
    engine: Engine, chain: Path, tmp_path: Path, name: str, start: int
) -> None:
    damage(chain.with_stem("a"), tmp_path / "x.ctx", name, start)
    with pytest.raises(CorruptInput, match=rf"x\.ctx: near byte .*: {name} of tokens {start:,}"):
        load(engine, tmp_path / "x.ctx")


@pytest.mark.parametrize("name", ["a", "c"])
def test_a_file_that_is_written_over(
    engine: Engine, chain: Path, tmp_path: Path, name: str
) -> None:
    """Even what was verified is compared again, before anything that came of it is given."""
    path = tmp_path / f"{name}.ctx"
    for each in COUNTS:
        shutil.copy(chain.with_stem(each), tmp_path)
    sequence = load(engine, tmp_path / "c.ctx").sequence
    wanted = said(engine, sequence, 1)
    same = path.read_bytes()
    path.write_bytes(same)
    require_same(said(engine, sequence, 1), wanted)
    with path.open("r+b") as file:  # in place, as cp does
        file.write(np.random.default_rng(0).bytes(len(same)))
    says = rf"{name}\.ctx: near byte .* does not match its checksum"
    with pytest.raises(CorruptInput, match=says):
        said(engine, sequence, 1)


@pytest.mark.parametrize("name", ["a", "c"])
@pytest.mark.parametrize("how", ["written over", "appended to"])
def test_a_file_that_is_written_to_while_it_is_opened(
    engine: Engine, chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str,
    how: str,
) -> None:  # fmt: skip
    for each in COUNTS:
        shutil.copy(chain.with_stem(each), tmp_path)
    path, real = tmp_path / f"{name}.ctx", Engine.restore

    def restore(*arguments: Any) -> Sequence:
        found = real(*arguments)  # so that it is of the right bytes
        with path.open("r+b") as file:
            file.seek(0, 2 if how == "appended to" else 0)
            file.write(np.random.default_rng(0).bytes(path.stat().st_size))
        return found

    monkeypatch.setattr(Engine, "restore", restore)
    if how == "appended to":
        found = load(engine, tmp_path / "c.ctx").sequence
        require_same(said(engine, found, 1), said(engine, load(engine, chain).sequence, 1))
        return
    with pytest.raises(CorruptInput, match=rf"{name}\.ctx: near byte .* does not match its checks"):
        load(engine, tmp_path / "c.ctx")


def lines_of(tool: subprocess.Popen[bytes], prompts: int) -> list[bytes]:
    """The answers to some prompts of a process that reads them from a pipe."""
    assert tool.stdin is not None
    assert tool.stdout is not None
    found = []
    for number in range(prompts):
        tool.stdin.write(json.dumps({"prompt": f"Which of {number}?"}).encode() + b"\n")
        tool.stdin.flush()
        found.append(tool.stdout.readline())
    return found


@pytest.mark.parametrize("how", ["cut", "written over", "moved", "other weights"])
def test_while_questions_are_asked(folder: Path, chain: Path, tmp_path: Path, how: str) -> None:
    """A context that is cut or written over in place, as a shell does it, gives no answer any more;
    nor do weights."""
    for each in COUNTS:
        shutil.copy(chain.with_stem(each), tmp_path)
    shutil.copytree(folder, tmp_path / "run")
    command = [sys.executable, "-m", "gemtool", "decode", "--ckpt", "run", "--cache", "c.ctx",
               "--prompts", "-", "--max-tokens", "4"]  # fmt: skip
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, cwd=tmp_path, env=command_environment(), **pipes) as tool:
        first = lines_of(tool, 1)
        assert json.loads(first[0])["tokens"]
        file = tmp_path / "a.ctx"
        if how == "cut":
            os.truncate(file, 1000)
        elif how == "written over":
            with file.open("r+b") as sink:
                sink.write(np.random.default_rng(0).bytes(file.stat().st_size))
        elif how == "other weights":
            with (tmp_path / "run" / "weights.safetensors").open("r+b") as sink:
                sink.seek(-100, os.SEEK_END)
                sink.write(bytes(50))
        else:
            file.rename(tmp_path / "x.ctx")
            file.write_bytes(b"another")
        (answer,) = lines_of(tool, 1)
        assert tool.stdin is not None
        tool.stdin.close()
        assert tool.stderr is not None
        said = tool.stderr.read().decode()
        assert tool.stdout is not None
        assert tool.stdout.read() == b""
    if how == "moved":
        assert json.loads(answer)["tokens"]
        assert (tool.returncode, said) == (0, "")
        return
    assert (tool.returncode, answer) == (3, b"")
    (line,) = said.splitlines()
    says = {
        "cut": "gemtool: error: a.ctx: was cut or written over while it was read",
        "written over": "layers/0/k of tokens 0 to 4,096 does not match its checksum",
        "other weights": "gemtool: error: run: damaged or edited: configuration, vocabulary and",
    }
    assert says[how] in line


def test_command(gemtool: Command, folder: Path, chain: Path, tmp_path: Path) -> None:
    for name in "bc":
        shutil.copy(chain.with_stem(name), tmp_path)
    damage(chain.with_stem("a"), tmp_path / "a.ctx", "layers/0/v")
    asked = "--cache", "c.ctx", "--prompt", "Which?", "--max-tokens", "8"
    done = gemtool("decode", "--ckpt", folder, *asked, check=False)
    assert done.returncode == 3
    assert done.stdout == b""
    (line,) = done.stderr.decode().splitlines()
    assert "a.ctx: near byte" in line
    assert "layers/0/v of tokens 0 to 4,096 does not match its checksum" in line


def test_flattened(verb: Verb, engine: Engine, folder: Path, chain: Path, tmp_path: Path) -> None:
    """A file that needs no other says what the chain says, landmarks and all."""
    done = verb("prefill", "--flatten", chain, "-o", "flat.ctx")
    assert done.code == 0, done.err
    with open_contexts(str(tmp_path / "flat.ctx")) as opened, open_contexts(str(chain)) as last:
        flat, whole = next(opened), next(last)
        blocks = [part for part in flat.parts() if part.part == "block"]
        assert [(part.start, part.stop) for part in blocks] == [
            (start, min(start + BLOCK, ALL)) for start in range(0, ALL, BLOCK)
        ]
        for _ in whole.parts():
            pass
        assert (flat.header.parent, flat.header.start) == (None, 0)
        assert flat.header.layout == whole.header.layout
        assert flat.footer["kinds"] == whole.footer["kinds"] == {"text": ALL}
    found, wanted = load(engine, tmp_path / "flat.ctx"), load(engine, chain)
    assert np.array_equal(found.tokens, wanted.tokens)
    scores, expected = (np.asarray(context.sequence.logits) for context in (found, wanted))
    assert np.array_equal(scores, expected)
    for seed in (1, 2):
        require_same_tokens(
            answer(engine, found.sequence, seed), answer(engine, wanted.sequence, seed)
        )
    asked = "decode", "--ckpt", folder, "--prompt", "Which?", "--max-tokens", 8, "--format", "text"
    texts = [verb(*asked, "--cache", path).out for path in ("flat.ctx", chain)]
    assert texts[0] == texts[1] != b""


def test_damage_that_commands_come_upon(
    verb: Verb, folder: Path, chain: Path, tmp_path: Path
) -> None:
    """However late they do, no file comes of it."""
    for name in "bc":
        shutil.copy(chain.with_stem(name), tmp_path)
    damage(chain.with_stem("a"), tmp_path / "a.ctx", "layers/0/v")
    document = text_document("d", text_tokens(60, 5))
    spans_file(tmp_path / "d.spans", [document], Vocab.load().fingerprint)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model = "--ckpt", folder
    for command in (
        ["decode", *model, "--cache", "c.ctx", "--prompt", "Which?", "--save", "x.ctx"],
        ["prefill", *model, "--append", "c.ctx", "d.spans", "-o", "x.ctx"],
        ["prefill", "--flatten", "c.ctx", "-o", "x.ctx"],
        ["view", "--verify", "c.ctx"],
    ):
        done = verb(*command)
        assert (done.code, done.out) == (3, b""), done.err
        (line,) = done.err.splitlines()
        assert line.startswith("gemtool: error: a.ctx: near byte")
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
