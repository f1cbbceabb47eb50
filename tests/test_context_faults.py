"""What can be wrong with contexts: each is one line and the right exit code, and no answer comes of it.

Damage of the streams themselves is in `test_damage.py`, parents are in `test_append.py`.
"""

from __future__ import annotations

import errno
import io
import os
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemtool.checkpoint import open_checkpoint
from gemtool.data.vocab import Vocab
from gemtool.infer.contexts import open_base
from gemtool.infer.engine import Engine
from gemtool.stream.checked import Source
from gemtool.stream.context import (
    BLOCK,
    ContextHeader,
    ContextWriter,
    open_contexts,
    read_contexts,
)
from gemtool.stream.files import open_output, resumable_output
from tests.conftest import Done, Verb
from tests.test_append import text, write
from tests.test_prefill_decode import make_engine, spans_file, text_tokens, tiny


@pytest.fixture(scope="module")
def vocab() -> Vocab:
    return Vocab.load()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, vocab: Vocab) -> Path:
    path = tmp_path_factory.mktemp("model") / "run"
    make_engine(path, replace(tiny(vocab.size, "LG"), moe=None, encoders=()), vocab, 512)
    return path


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine(open_checkpoint(folder), 512)


@pytest.fixture(scope="module")
def context(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A context of two blocks."""
    path = tmp_path_factory.mktemp("context") / "a.ctx"
    write(engine, path, text("a", text_tokens(BLOCK + 40)))
    return path.read_bytes()


@pytest.fixture
def spans(tmp_path: Path, vocab: Vocab) -> Path:
    """A document of two blocks, b.spans."""
    document = text("b", text_tokens(BLOCK + 70, 3))
    return spans_file(tmp_path / "b.spans", [document], vocab.fingerprint)


def readers(folder: Path) -> list[list[object]]:
    """Commands that put a.ctx, or what an interruption left of c.ctx, into a model."""
    model = ["--ckpt", folder]
    decode = ["decode", *model, "--cache", "a.ctx", "--max-tokens", 2, "--prompt", "x"]
    return [
        decode,
        [*decode, "--save", "b.ctx"],
        ["prefill", *model, "--append", "a.ctx", "b.spans", "-o", "b.ctx"],
        ["prefill", *model, "--resume", "b.spans", "-o", "c.ctx"],
    ]


def readers_of_all(folder: Path) -> list[list[object]]:
    """Those, and the commands that read a.ctx with all that it continues and need no model."""
    flatten: list[object] = ["prefill", "--flatten", "a.ctx", "-o", "d.ctx"]
    return [*readers(folder), flatten, ["view", "--verify", "a.ctx"]]


def require_refused(done: Done, code: int, says: str) -> None:
    assert (done.code, done.out) == (code, b""), done.err
    (line,) = done.err.splitlines()
    assert line.startswith("gemtool: error: ")
    assert says in line


# Made by another model, vocabulary, version or layout


def rewritten(data: bytes, path: Path, change: Callable[[ContextHeader], ContextHeader]) -> None:
    """The same context with another header, every checksum right."""
    path.write_bytes(data)
    with open_contexts(str(path)) as contexts:
        reader = next(contexts)
        parts = list(reader.parts())
        footer, header = reader.footer, change(reader.header)
        sink = io.BytesIO()
        writer = ContextWriter(sink, header)
        for part in parts:
            arrays = dict(part.arrays)
            if part.part == "block":
                writer.block(arrays.pop("tokens"), arrays)
            elif part.part == "state":
                writer.state(arrays)
            else:
                writer.end(arrays["logits"])
        writer.close(footer["kinds"], footer["media_sha256"])
    path.write_bytes(sink.getvalue())


@pytest.mark.usefixtures("spans")
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "0123"}, "a.ctx: this context belongs to another model: its model is 0123"),
        ({"vocab": {"fingerprint": "0123"}}, "another model: its vocabulary is 0123"),
        ({"layout": ({"attention": "full"},)}, "another model: its layout is 1 layers (full)"),
        ({"kv_dtype": "float32"}, "another model: its key and value type is float32"),
        ({"block": 64}, "another model: its block size is 64"),
        ({"version": 9}, "a.ctx: context version 9; this gemtool reads up to 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_others_made_is_refused(
    verb: Verb, folder: Path, context: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any], says: str,
) -> None:  # fmt: skip
    change = dict(change)
    with monkeypatch.context() as patch:
        if version := change.pop("version", None):
            patch.setattr("gemtool.stream.context.VERSION", version)
        rewritten(context, tmp_path / "a.ctx", lambda header: replace(header, **change))
    (tmp_path / "c.ctx.partial").write_bytes((tmp_path / "a.ctx").read_bytes())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for command in readers(folder):
        told = says.replace("a.ctx", "c.ctx.partial") if "--resume" in command else says
        require_refused(verb(*command), 1, told)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# Damaged, or not whole yet


def answer(verb: Verb, folder: Path) -> Done:
    return verb("decode", "--ckpt", folder, "--cache", "a.ctx", "--raw", "--prompt", "x",
                "--max-tokens", 3, "--format", "text")  # fmt: skip


def test_no_flipped_bit_changes_an_answer(
    verb: Verb, folder: Path, context: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "a.ctx"
    path.write_bytes(context)
    right = answer(verb, folder)
    assert right.code == 0
    noticed = 0
    for bit in np.random.default_rng(0).choice(8 * len(context), 30, replace=False):
        damaged = bytearray(context)
        damaged[bit // 8] ^= 1 << int(bit % 8)
        path.write_bytes(damaged)
        found = answer(verb, folder)
        if found.code:
            require_refused(found, 3, "a.ctx: ")
        else:  # a bit that means nothing: padding
            assert found.out == right.out
        noticed += found.code == 3
    assert noticed > 20


def test_while_it_is_written(verb: Verb, folder: Path, context: bytes, tmp_path: Path) -> None:
    """`prefill > a.ctx`: a reader sees the beginning of it, and says so; the end of it is enough."""
    path = tmp_path / "a.ctx"
    for share in (0.001, 0.3, 0.9):
        path.write_bytes(context[: round(share * len(context))])
        for done in (answer(verb, folder), verb("view", "--verify", "a.ctx")):
            require_refused(done, 3, "truncated, or still being written")
    ends = context.rindex(b"gemtool.footer")
    path.write_bytes(context[: context.rindex(b"\xff\xff\xff\xff", 0, ends)])
    for done in (answer(verb, folder), verb("view", "--verify", "a.ctx")):
        require_refused(done, 3, "truncated, or still being written: the stream ends after")
    path.write_bytes(b"")
    require_refused(answer(verb, folder), 3, "a.ctx: empty input; expected a context")
    path.write_bytes(context)
    assert answer(verb, folder).code == 0


def test_before_it_has_its_name(verb: Verb, folder: Path, context: bytes, tmp_path: Path) -> None:
    """`prefill -o a.ctx`: there is nothing to read, and why is said."""
    require_refused(answer(verb, folder), 1, "a.ctx: cannot be read: no such file")
    (tmp_path / "a.ctx.partial").write_bytes(context)
    says = "a.ctx: cannot be read: it is not finished: a.ctx.partial is being written, or waits"
    require_refused(answer(verb, folder), 1, says)
    require_refused(verb("view", "a.ctx"), 1, says)


def flipped(context: bytes) -> dict[str, bytes]:
    """Copies with a bit flipped: in the header, in arrays of each part, and in the footer."""
    places = {
        "header": context.index(b'"model"') + 14,
        "footer": context.index(b'"tokens_sha256"') + 30,
    }
    reader = next(read_contexts(Source(io.BytesIO(context)), "a.ctx"))
    for part in reader.parts():
        for name, array in part.arrays.items():
            if array.nbytes > 100:
                at = context.index(array.tobytes()) + array.nbytes // 2
                places[f"{part.part} {part.start} {name}"] = at
    assert {name.partition(" ")[0] for name in places} == {
        "header", "footer", "block", "state", "end"
    }  # fmt: skip
    found = {}
    for name, at in places.items():
        data = bytearray(context)
        data[at] ^= 4
        found[name] = bytes(data)
    return found


@pytest.mark.usefixtures("spans")
@pytest.mark.parametrize("what", ["append", "flatten", "save"])
def test_nothing_is_made_of_a_damaged_context(
    verb: Verb, folder: Path, tmp_path: Path, context: bytes, what: str
) -> None:
    """Nor of one that is not whole: no file and no answer, and a file that is there stays."""
    shares = (0, 0.001, 0.3, 0.9)
    damaged = {str(share): context[: round(share * len(context))] for share in shares}
    damaged["no end"] = context[: context.rindex(b"gemtool.footer") - 300]
    for name, data in {**flipped(context), **damaged}.items():
        (tmp_path / "a.ctx").write_bytes(data)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        done = verb(*writers(folder)[what])
        require_refused(done, 3, "a.ctx: ")
        found = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        assert found == before, name
    for name in ("n.ctx", "answer"):
        (tmp_path / name).write_bytes(b"of before")
    require_refused(verb(*writers(folder)[what], "-f"), 3, "a.ctx: ")
    for name in ("n.ctx", "answer"):
        assert (tmp_path / name).read_bytes() == b"of before"
    (tmp_path / "a.ctx").write_bytes(context)
    assert verb(*writers(folder)[what], "-f").code == 0
    assert (tmp_path / "n.ctx").stat().st_size > 1000


# A full disk


@pytest.fixture(params=[errno.ENOSPC, errno.EDQUOT, errno.EFBIG], ids=errno.errorcode.get)
def full(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """What streams are told once 20,000 bytes of them are written."""
    from gemtool.stream.checked import _Gate

    written, write = 0, _Gate.write

    def refuse(self: _Gate, data: Any) -> int:
        nonlocal written
        written += memoryview(data).nbytes
        if written > 20_000:
            raise OSError(request.param, "no room")
        return write(self, data)

    monkeypatch.setattr(_Gate, "write", refuse)
    return request.param


def writers(folder: Path) -> dict[str, list[object]]:
    """Commands that write n.ctx."""
    model = ["--ckpt", folder]
    say = ["decode", *model, "--raw", "--prompt", "x", "--max-tokens", 1, "--save", "n.ctx"]
    return {
        "prefill": ["prefill", *model, "b.spans", "-o", "n.ctx"],
        "append": ["prefill", *model, "--append", "a.ctx", "b.spans", "-o", "n.ctx"],
        "flatten": ["prefill", "--flatten", "a.ctx", "-o", "n.ctx"],
        "save": [*say, "--cache", "a.ctx", "-o", "answer"],
    }


@pytest.mark.usefixtures("spans")
@pytest.mark.parametrize("what", ["prefill", "append", "flatten", "save"])
def test_a_full_disk(
    verb: Verb, folder: Path, engine: Engine, tmp_path: Path, context: bytes, what: str, full: int
) -> None:
    (tmp_path / "a.ctx").write_bytes(context)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    require_refused(verb(*writers(folder)[what]), 1, "n.ctx: cannot be written: no room")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_real_limit(
    verb: Verb, folder: Path, tmp_path: Path, context: bytes, spans: Path
) -> None:
    """The system's own, where a buffer is written late."""
    (tmp_path / "a.ctx").write_bytes(context)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for command in writers(folder).values():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            done = verb(*command)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        require_refused(done, 1, "n.ctx: cannot be written: file too large")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_full_standard_output_is_not_the_contexts(
    verb: Verb, folder: Path, tmp_path: Path, context: bytes
) -> None:
    (tmp_path / "a.ctx").write_bytes(context)

    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    done = verb(*writers(folder)["save"][:-2], stdout=Full())
    require_refused(done, 1, "<stdout>: no space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["a.ctx"]


def test_a_full_disk_behind_a_state(
    verb: Verb, folder: Path, tmp_path: Path, spans: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """What was kept goes on once there is room."""
    monkeypatch.setattr("gemtool.infer.prefill.STATE_EVERY", BLOCK)
    command = ["prefill", "--no-pg", "--ckpt", folder, "b.spans", "-o"]
    assert verb(*command, "whole.ctx").code == 0
    whole = (tmp_path / "whole.ctx").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) - 2000, hard))
    try:
        done = verb(*command, "n.ctx")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert done.code == 1
    assert "n.ctx.partial: kept; --resume goes on with it" in capfd.readouterr().err
    assert done.err == "gemtool: error: n.ctx: cannot be written: file too large\n"
    assert not (tmp_path / "n.ctx").exists()
    done = verb(*command, "n.ctx", "--resume")
    assert done.code == 0
    assert "goes on after 4,096 tokens" in done.err
    assert (tmp_path / "n.ctx").read_bytes() == whole


# Two writers


@pytest.mark.usefixtures("spans")
@pytest.mark.parametrize("what", ["prefill", "logprobs", "append", "flatten", "save"])
@pytest.mark.parametrize("options", [[], ["-f"], ["--resume"]], ids=["", "force", "resume"])
def test_a_second_writer_is_refused(
    verb: Verb, folder: Path, tmp_path: Path, context: bytes, what: str, options: list[str]
) -> None:
    """And the first is not disturbed."""
    if what not in ("prefill", "append") and "--resume" in options:
        pytest.skip("goes without --resume")
    (tmp_path / "a.ctx").write_bytes(context)
    commands = writers(folder)
    commands["logprobs"] = [*commands["prefill"], "--logprobs", 0]
    with resumable_output(str(tmp_path / "n.ctx"), force=False, resume=False) as first:
        first.file.write(context[:9000])
        first.keep()
        done = verb(*commands[what], *options)
        require_refused(done, 1, "n.ctx.partial: another process is writing it")
        first.file.write(context[9000:])
    assert (tmp_path / "n.ctx").read_bytes() == context
    assert {path.name for path in tmp_path.iterdir()} == {"a.ctx", "b.spans", "n.ctx"}


@pytest.mark.usefixtures("spans")
@pytest.mark.parametrize("what", ["prefill", "append", "flatten", "save"])
@pytest.mark.parametrize("options", [[], ["-f"]], ids=["", "force"])
def test_a_second_writer_is_refused_by_one_that_cannot_be_resumed(
    verb: Verb, folder: Path, tmp_path: Path, context: bytes, what: str, options: list[str]
) -> None:
    """What another run left to be resumed stays as it is."""
    (tmp_path / "a.ctx").write_bytes(context)
    (tmp_path / "n.ctx.partial").write_bytes(b"left")
    with open_output(str(tmp_path / "n.ctx")) as first:
        first.write(context[:9000])
        done = verb(*writers(folder)[what], *options)
        require_refused(done, 1, "n.ctx: another process is writing it")
        first.write(context[9000:])
    assert (tmp_path / "n.ctx").read_bytes() == context
    assert (tmp_path / "n.ctx.partial").read_bytes() == b"left"
    assert {path.name for path in tmp_path.iterdir()} == {
        "a.ctx", "b.spans", "n.ctx", "n.ctx.partial"
    }  # fmt: skip


def test_what_is_in_the_way_of_a_partial_file(verb: Verb, folder: Path, spans: Path) -> None:
    """Nothing is written through a link, which in a folder of all users may be another one's."""
    theirs = spans.parent / "theirs"
    theirs.write_text("theirs")
    partial = spans.parent / "n.ctx.partial"
    partial.symlink_to("theirs")
    require_refused(verb(*writers(folder)["prefill"]), 1, "n.ctx: cannot be written: too many")
    assert theirs.read_text() == "theirs"
    partial.unlink()
    os.mkfifo(partial)
    require_refused(verb(*writers(folder)["prefill"]), 1, "n.ctx.partial: is no file, and in the")
    done = verb("decode", "--ckpt", folder, "--prompt", "x", "--save", "n.ctx", "-o", "./n.ctx")
    require_refused(done, 2, "--save and -o are the same file")


@pytest.mark.parametrize("resumable", [False, True])
def test_who_is_second_replaces_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verb: Verb, resumable: bool
) -> None:
    """Without -f, a file that appears while another is written stays."""
    from gemtool.errors import UsageError

    def writing() -> Any:
        if resumable:
            return resumable_output("n.ctx", force=False, resume=False)
        return open_output("n.ctx")

    with pytest.raises(UsageError, match=r"n\.ctx: exists already"), writing() as sink:
        (sink.file if resumable else sink).write(b"second")
        Path("n.ctx").write_bytes(b"first")
    assert [path.name for path in tmp_path.iterdir()] == ["n.ctx"]
    assert Path("n.ctx").read_bytes() == b"first"


# Parents


def test_a_parent_that_was_made_again(
    verb: Verb, folder: Path, engine: Engine, tmp_path: Path, spans: Path
) -> None:
    """Every command that reads a child notices that its parent is another one."""
    write(engine, tmp_path / "p.ctx", text("a", text_tokens(BLOCK + 9)))
    base = open_base(engine, str(tmp_path / "p.ctx"), str(tmp_path / "a.ctx"))
    write(engine, tmp_path / "a.ctx", text("a", text_tokens(30, 1)), base)
    (tmp_path / "c.ctx.partial").write_bytes((tmp_path / "a.ctx").read_bytes()[:-9])
    write(engine, tmp_path / "p.ctx", text("a", text_tokens(BLOCK + 9, 8)))
    for command in readers_of_all(folder):
        require_refused(verb(*command), 1, "p.ctx than this one: its id is")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"b.spans", "a.ctx", "p.ctx", "c.ctx.partial"}


@pytest.mark.usefixtures("spans")
@pytest.mark.parametrize(("missing", "child"), [("p.ctx", "a.ctx"), ("g.ctx", "p.ctx")])
def test_a_parent_that_is_not_there(
    verb: Verb, folder: Path, engine: Engine, tmp_path: Path, missing: str, child: str
) -> None:
    """Nor that of a parent: every command that reads a child says which one, and leaves no file."""
    previous, tokens = tmp_path / "g.ctx", text_tokens(BLOCK + 9)
    write(engine, previous, text("g", tokens))
    for name in ("p.ctx", "a.ctx"):
        base = open_base(engine, str(previous), str(tmp_path / name))
        previous = tmp_path / name
        write(engine, previous, text(name, text_tokens(30, 1)), base)
    (tmp_path / "c.ctx.partial").write_bytes((tmp_path / "a.ctx").read_bytes()[:-9])
    assert answer(verb, folder).code == 0
    (tmp_path / missing).unlink()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for command in readers_of_all(folder):
        named = child
        if child == "a.ctx" and "--resume" in command:
            named = "c.ctx.partial"
        require_refused(verb(*command), 1, f"{named}: continues {missing}, which is not there")
        found = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        assert found == before
