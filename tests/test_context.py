"""Context streams: what is written comes back bit for bit, or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from gemtool.errors import CorruptInput, GemtoolError
from gemtool.stream.context import (
    BLOCK,
    ContextHeader,
    ContextReader,
    ContextWriter,
    Part,
    open_contexts,
    require_match,
)
from gemtool.stream.mapped import map_together

HEADER = ContextHeader(
    doc="talk.mp4",
    model="0123456789abcdef",
    vocab={"fingerprint": "fedcba9876543210", "size": 300},
    layout=({"attention": "window", "window": 8}, {"attention": "full", "window": 0}),
    kv_dtype="float16",
    pg=({"id": "tokenize"},),
)


def write(length: int, seed: int = 0, header: ContextHeader = HEADER) -> tuple[bytes, list[Part]]:
    """A context of random arrays, and the parts it should hold."""
    rng = np.random.default_rng(seed)
    sink, parts = io.BytesIO(), []
    writer = ContextWriter(sink, header)

    def rows(count: int) -> np.ndarray:
        return rng.normal(size=(1, count, 2, 3)).astype(np.float16)

    for start in range(0, length, BLOCK):
        count = min(BLOCK, length - start)
        tokens = rng.integers(0, 300, count).astype(np.int32)
        arrays = {"layers/1/k": rows(count), "layers/1/v": rows(count)}
        writer.block(tokens, arrays)
        parts.append(Part("block", start, start + count, {"tokens": tokens, **arrays}))
    state = {"layers/0/k": rows(8), "layers/0/tail": np.ones((1, 3, 4), np.float32)}
    writer.state(state)
    parts.append(Part("state", length, length, state))
    logits = rng.normal(size=300).astype(np.float32)
    writer.end(logits)
    parts.append(Part("end", length, length, {"logits": logits}))
    writer.close({"text": length}, {"video": "00"})
    return sink.getvalue(), parts


def read(path: Path) -> list[tuple[ContextReader, list[Part]]]:
    with open_contexts(str(path)) as contexts:
        return [(reader, list(reader.parts())) for reader in contexts]


def require_equal(found: list[Part], expected: list[Part]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a.part, a.start, a.stop) == (b.part, b.start, b.stop)
        assert a.arrays.keys() == b.arrays.keys()
        for name, array in a.arrays.items():
            assert array.dtype == b.arrays[name].dtype
            np.testing.assert_array_equal(array, b.arrays[name])


@pytest.mark.parametrize("length", [1, 100, BLOCK, 2 * BLOCK + 1])
def test_round_trip(tmp_path: Path, length: int) -> None:
    data, parts = write(length)
    (tmp_path / "a.ctx").write_bytes(data)
    ((reader, found),) = read(tmp_path / "a.ctx")
    require_equal(found, parts)
    assert reader.header == HEADER
    assert reader.footer["length"] == length
    assert reader.footer["kinds"] == {"text": length}
    tokens = np.concatenate([p.arrays["tokens"] for p in parts if p.part == "block"])
    assert reader.footer["tokens_sha256"] == hashlib.sha256(tokens.tobytes()).hexdigest()


def test_writing_twice_gives_equal_bytes() -> None:
    assert write(5000)[0] == write(5000)[0]


def test_several_contexts_and_parts_that_nobody_read(tmp_path: Path) -> None:
    first, second = write(10)[0], write(20, 1, replace(HEADER, doc="b"))[0]
    path = tmp_path / "ab.ctx"
    path.write_bytes(first + second)
    with open_contexts(str(path)) as contexts:
        docs = [reader.header.doc for reader in contexts]
    assert docs == ["talk.mp4", "b"]
    assert [reader.footer["length"] for reader, _ in read(path)] == [10, 20]


def test_a_file_is_mapped_not_copied(tmp_path: Path) -> None:
    (tmp_path / "a.ctx").write_bytes(write(BLOCK)[0])
    ((_, parts),) = read(tmp_path / "a.ctx")
    array = parts[0].arrays["layers/1/k"]
    assert not array.flags.writeable
    maps = Path("/proc/self/maps")
    if maps.exists():
        address = array.__array_interface__["data"][0]
        mapped = [line for line in maps.read_text().splitlines() if line.endswith("a.ctx")]
        edges = [[int(edge, 16) for edge in line.split()[0].split("-")] for line in mapped]
        assert any(low <= address < high for low, high in edges)


def test_keys_and_values_are_verified_when_they_are_used(tmp_path: Path) -> None:
    data, parts = write(600)
    path = tmp_path / "a.ctx"
    keys = data.index(parts[0].arrays["layers/1/k"].tobytes())
    path.write_bytes(data[: keys + 7] + bytes([data[keys + 7] ^ 4]) + data[keys + 8 :])
    with open_contexts(str(path)) as contexts:
        reader = next(contexts)
        found = list(reader.parts(lazy=True))
        assert reader.footer["length"] == 600
    found[0].verify("layers/1/v")
    with pytest.raises(
        CorruptInput, match=f"a.ctx: near byte {keys:,}: layers/1/k of tokens 0 to 600"
    ):
        found[0].verify("layers/1/k")
    tokens = data.index(parts[0].arrays["tokens"].tobytes())
    path.write_bytes(data[:tokens] + bytes([data[tokens] ^ 4]) + data[tokens + 1 :])
    with (
        open_contexts(str(path)) as contexts,
        pytest.raises(CorruptInput, match="tokens of tokens 0"),
    ):
        next(next(contexts).parts(lazy=True))


def test_files_as_one_array(tmp_path: Path) -> None:
    contents = [bytes(range(256)) * 30, b"x", bytes(5000)]
    files = [tmp_path / str(number) for number in range(len(contents))]
    with contextlib.ExitStack() as stack:
        descriptors = []
        for file, content in zip(files, contents, strict=True):
            file.write_bytes(content)
            descriptors.append(stack.enter_context(file.open("rb")).fileno())
        memory, places = map_together(descriptors, [1 << 14, 1 << 20])
    for place, content in zip(places, contents, strict=True):
        assert memory[place : place + len(content) + 9].tobytes() == content + bytes(9)
    assert not memory.flags.writeable
    assert len(memory).bit_count() == 1


def test_stdin_piped_or_redirected(tmp_path: Path) -> None:
    path = tmp_path / "a.ctx"
    path.write_bytes(write(5000)[0])
    code = (
        "from gemtool.stream.context import open_contexts\n"
        "with open_contexts('-') as contexts:\n"
        "    for reader in contexts:\n"
        "        print(sum(p.arrays['tokens'].sum() for p in reader.parts() if p.part == 'block'))\n"
        "        print(reader.id)\n"
    )
    command = [sys.executable, "-c", code]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    with path.open("rb") as file:
        redirected = subprocess.run(command, stdin=file, capture_output=True, check=True, env=env)
    piped = subprocess.run(
        command, input=path.read_bytes(), capture_output=True, check=True, env=env
    )
    assert redirected.stdout == piped.stdout != b""


def test_pyarrow_alone_reads_it(tmp_path: Path) -> None:
    data, parts = write(300)
    reader = pa.ipc.open_stream(io.BytesIO(data))
    header = json.loads(reader.schema.metadata[b"gemtool"])
    assert (header["stream"], header["doc"]) == ("context", "talk.mp4")
    rows, footer = [], b""
    for batch, metadata in reader.iter_batches_with_custom_metadata():
        rows += batch.to_pylist()
        footer = dict(metadata).get(b"gemtool.footer", footer)
    row = next(r for r in rows if r["part"] == "block" and (r["layer"], r["name"]) == (1, "k"))
    array = np.frombuffer(row["data"], row["dtype"]).reshape(row["shape"])
    np.testing.assert_array_equal(array, parts[0].arrays["layers/1/k"])
    assert json.loads(footer)["length"] == 300
    (tmp_path / "a.ctx").write_bytes(data)
    ((context, _),) = read(tmp_path / "a.ctx")
    assert context.id == hashlib.sha256(footer).hexdigest()


def test_truncation_anywhere_is_noticed(tmp_path: Path) -> None:
    data, _ = write(600)
    path = tmp_path / "cut.ctx"
    offsets = {*range(0, len(data), max(len(data) // 150, 1)), *range(len(data) - 40, len(data))}
    for offset in sorted(offsets):
        path.write_bytes(data[:offset])
        with pytest.raises(CorruptInput):
            read(path)
    path.write_bytes(data + data[: len(data) // 2])
    with pytest.raises(CorruptInput):
        read(path)


def test_flipped_bits_never_change_what_is_read(tmp_path: Path) -> None:
    data, parts = write(600)
    path = tmp_path / "flipped.ctx"
    rng = np.random.default_rng(0)
    noticed = 0
    places = rng.integers(0, len(data), 300)
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            ((reader, found),) = read(path)
        except (CorruptInput, GemtoolError):
            noticed += 1
        else:  # a bit that means nothing: padding between buffers
            require_equal(found, parts)
            assert reader.header == HEADER
    assert noticed > 0.8 * len(places)


def test_a_missing_or_doubled_part_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.ctx"
    sink = io.BytesIO()
    writer = ContextWriter(sink, HEADER)
    writer.block(np.arange(5, dtype=np.int32), {})
    writer.close({}, {})
    path.write_bytes(sink.getvalue())
    with pytest.raises(CorruptInput, match="no end part"):
        read(path)
    sink = io.BytesIO()
    writer = ContextWriter(sink, HEADER)
    writer.end(np.zeros(3, np.float32))
    writer.block(np.arange(5, dtype=np.int32), {})
    writer.close({}, {})
    path.write_bytes(sink.getvalue())
    with pytest.raises(CorruptInput, match="follows token 0"):
        read(path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": "x"}, "its model is x, the checkpoint's 0123456789abcdef"),
        ({"vocab": {"fingerprint": "y"}}, "its vocabulary is y, the checkpoint's fedcba98"),
        ({"layout": ({"attention": "full"},)}, r"its layout is 1 layers \(full\)"),
        ({"kv_dtype": "float32"}, "its key and value type is float32"),
        ({"block": 64}, "its block size is 64"),
    ],
)
def test_a_mismatch_is_named(change: dict[str, object], named: str) -> None:
    found = replace(HEADER, doc="other", pg=(), **change)  # type: ignore[arg-type]
    with pytest.raises(GemtoolError, match=named) as problem:
        require_match(found, HEADER, "talk.ctx")
    assert problem.value.exit_code == 1
    assert str(problem.value).startswith("talk.ctx: ")
    require_match(replace(HEADER, doc="other", parent="p"), HEADER, "talk.ctx")


def test_a_newer_version_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemtool.stream.context.VERSION", 9)
    data, _ = write(3)
    monkeypatch.undo()
    (tmp_path / "a.ctx").write_bytes(data)
    with pytest.raises(GemtoolError, match="version 9; this gemtool reads up to 1"):
        read(tmp_path / "a.ctx")


def test_what_is_no_context_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.ctx"
    path.write_bytes(b"hello, this is text")
    with pytest.raises(CorruptInput, match="gemtool prefill"):
        read(path)
    path.write_bytes(b"")
    with pytest.raises(CorruptInput, match="empty input"):
        read(path)


def test_a_documents_name_commands_no_terminal(gemtool, tmp_path: Path) -> None:
    name = "a\nb\x1b[2J"
    with (tmp_path / "c").open("wb") as sink:
        writer = ContextWriter(sink, replace(HEADER, doc=name))
        writer.block(np.array([70], np.int32), {})
        writer.state({"layers/0/tail": np.zeros(1, np.float32)})
        writer.end(np.zeros(3, np.float32))
        writer.close({"text": 1}, {})
    for mode in ((), ("--verify",)):
        shown = gemtool("view", *mode, "c").stdout.decode()
        assert "a\\nb\\u001b[2J" in shown
        assert "\x1b" not in shown
    refused = gemtool("view", "--frames", "d", "c", check=False)
    assert refused.returncode == 2
    assert b"c: a context holds no pictures" in refused.stderr
