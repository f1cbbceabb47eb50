"""Every kind of stream, cut short or with a flipped bit: exit status 3, or the right result.

A thousand places of each in `make test-all`, fewer in `make test`; most inside this process, some
through the command.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from gemtool.data.packing import Packer
from gemtool.data.sharding import create_shards
from gemtool.data.shards import ShardFolder
from gemtool.errors import GemtoolError
from gemtool.stream.checked import Source
from gemtool.stream.context import open_contexts
from gemtool.stream.jsonl import JsonlSpanWriter
from gemtool.stream.spans import ArrowSpanWriter, Header, Span, read_spans
from tests import test_context
from tests.conftest import Command

LENGTH = 100
PLAIN = Header(
    vocab={"fingerprint": "0123456789abcdef", "size": 32768},
    settings={"image_tokens": 66, "fps": 1.0},
    pg=({"id": "tokenize", "command": "gemtool tokenize"},),
)
PACKED = Header(PLAIN.vocab, PLAIN.settings, PLAIN.pg, {"length": LENGTH})


def spans() -> Iterator[Span]:
    """All columns are used, by some rows at least."""
    rng = np.random.default_rng(0)
    for doc in range(8):
        ids = rng.integers(320, 999, int(rng.integers(20, 150))).astype(np.int32)
        loss = rng.random(len(ids)).astype(np.float32) if doc % 3 == 0 else None
        yield Span(f"d{doc}", 0, "text", ids, 0, loss, meta={"line": doc, "name": "déjà vu"})
        sound = rng.standard_normal((9, 2, 5)).astype(np.float16)
        soft = np.full(9, 13, np.int32)
        time = (doc * 1000, doc * 1000 + 40)
        yield Span(f"d{doc}", 1, "audio", soft, len(ids), payload=sound, time=time)
        yield Span(f"d{doc}", 2, "control", np.array([1], np.int32), len(ids) + 9)


def digest(*things: object) -> str:
    """Of anything that reading gives, to the last bit."""
    sink = hashlib.sha256()
    for thing in things:
        if isinstance(thing, np.ndarray):
            sink.update(repr((thing.dtype.str, thing.shape)).encode() + thing.tobytes())
        elif isinstance(thing, Span):
            fields = [getattr(thing, name) for name in Span.__slots__]
            sink.update(digest(*fields).encode())
        else:
            sink.update(repr(thing).encode())
    return sink.hexdigest()


def read_stream(path: Path) -> str:
    reader = read_spans(Source(io.BytesIO(path.read_bytes())), "x")
    found = list(reader)
    return digest(reader.header.to_dict(), *found)


def read_shards(folder: Path) -> str:
    shards = ShardFolder(folder)
    manifest = {key: value for key, value in shards.manifest.items() if key != "crc32"}
    return digest(manifest, *(span for sequence in shards for span in sequence))


def read_context(path: Path, lazy: bool = False) -> str:
    with open_contexts(str(path)) as contexts:
        things: list[object] = []
        for reader in contexts:
            for part in reader.parts(lazy):
                for name in part.arrays:
                    part.verify(name)
                things += [part.part, part.start, part.stop, *part.arrays, *part.arrays.values()]
            things += [reader.header.to_dict(), reader.footer]
        return digest(*things)


@dataclass(frozen=True)
class Kind:
    """Something that gemtool writes.

    Attributes:
        write: makes it at a path.
        read: a digest of all that it says.
        file: the file in a folder that is damaged.
        harmless: bytes at the end whose loss nothing is lost by, as Arrow's end marker.
        late: whether damage of a row may be noticed only at the end, as JSONL has one checksum.
    """

    write: Callable[[Path], object]
    read: Callable[[Path], str]
    file: str = ""
    harmless: int = 0
    late: bool = False


def write_stream(path: Path, header: Header, writer_of: Callable) -> None:
    with path.open("wb") as sink:
        writer = writer_of(sink, header)
        for span in Packer(LENGTH).pack(spans()) if header.packed else spans():
            writer.append(span)
        writer.close()


def write_shards(path: Path, part: tuple[int, int] | None = None) -> None:
    with create_shards(path, PACKED, chunk=30, shard_size=10_000, part=part) as writer:
        for span in Packer(LENGTH).pack(spans()):
            writer.append(span)


def write_parts(path: Path) -> None:
    for index in (1, 2):
        write_shards(path, (index, 2))


KINDS = {
    "spans": Kind(lambda p: write_stream(p, PLAIN, ArrowSpanWriter), read_stream, harmless=8),
    "jsonl": Kind(lambda p: write_stream(p, PLAIN, JsonlSpanWriter), read_stream, "", 1, late=True),
    "packed": Kind(lambda p: write_stream(p, PACKED, ArrowSpanWriter), read_stream, harmless=8),
    "packed-jsonl": Kind(
        lambda p: write_stream(p, PACKED, JsonlSpanWriter), read_stream, "", 1, late=True
    ),
    "shards": Kind(write_shards, read_shards, "part-00001.arrow"),
    "manifest": Kind(write_shards, read_shards, "manifest.json", harmless=1),
    "part": Kind(write_parts, read_shards, "part-00002-of-00002-00000.arrow"),
    "part-manifest": Kind(write_parts, read_shards, "manifest-00002-of-00002.json", harmless=1),
    "context": Kind(lambda p: p.write_bytes(test_context.write(300)[0]), read_context, harmless=8),
    "context-lazily": Kind(
        lambda p: p.write_bytes(test_context.write(300)[0]),
        lambda p: read_context(p, lazy=True),
        harmless=8,
    ),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def outcome(kind: Kind, path: Path) -> str:
    """What reading gives; "damaged" for an error of exit status 3, told in one line."""
    try:
        return kind.read(path)
    except GemtoolError as problem:
        assert problem.exit_code == 3, problem
        assert "\n" not in str(problem)
        return "damaged"


def cuts(size: int, count: int) -> list[int]:
    """Sizes to cut to: all over, and each of the last bytes."""
    return sorted({*np.linspace(0, size - 1, count).astype(int).tolist(), *range(size - 20, size)})


def flips(whole: bytes, count: int) -> Iterator[bytes]:
    rng = np.random.default_rng(0)
    for bit in rng.choice(8 * len(whole), count, replace=False):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << int(bit % 8)
        yield bytes(damaged)


def check_cuts(kind: Kind, path: Path, count: int) -> None:
    kind.write(path)
    right = kind.read(path)
    file = path / kind.file
    whole = file.read_bytes()
    for size in cuts(len(whole), count):
        file.write_bytes(whole[:size])
        found = outcome(kind, path)
        if size < len(whole) - kind.harmless:
            assert found == "damaged", f"cut to {size} of {len(whole)} bytes"
        else:
            assert found in ("damaged", right), f"cut to {size} of {len(whole)} bytes"


def check_flips(kind: Kind, path: Path, count: int) -> None:
    kind.write(path)
    right = kind.read(path)
    file = path / kind.file
    noticed = 0
    for damaged in flips(file.read_bytes(), count):
        file.write_bytes(damaged)
        found = outcome(kind, path)
        assert found in ("damaged", right)
        noticed += found == "damaged"
    assert noticed > 0.6 * count  # the rest is padding, or white space


def test_cut_anywhere(kind: Kind, tmp_path: Path) -> None:
    check_cuts(kind, tmp_path / "x", 60)


def test_any_bit_flipped(kind: Kind, tmp_path: Path) -> None:
    check_flips(kind, tmp_path / "x", 60)


@pytest.mark.slow
def test_cut_at_1000_places(kind: Kind, tmp_path: Path) -> None:
    check_cuts(kind, tmp_path / "x", 1000)


@pytest.mark.slow
def test_1000_bits_flipped(kind: Kind, tmp_path: Path) -> None:
    check_flips(kind, tmp_path / "x", 1000)


def check_command(gemtool: Command, kind: Kind, path: Path, count: int) -> None:
    """The exit status is 3 and the message one line, or what is printed is right."""
    kind.write(path)
    right = gemtool("view", "--jsonl", path).stdout
    file = path / kind.file
    whole = file.read_bytes()
    rng = np.random.default_rng(1)
    damaged = [whole[:size] for size in rng.integers(0, len(whole) - 8, count)]
    for bytes_ in (*damaged, *flips(whole, count)):
        file.write_bytes(bytes_)
        done = gemtool("view", "--jsonl", path, check=False)
        if done.returncode == 0:
            assert done.stdout == right
        else:
            assert done.returncode == 3
            (line,) = done.stderr.decode().splitlines()
            assert line.startswith("gemtool: error: ")
            if not kind.late:  # what was printed before the damage was met
                assert right.startswith(done.stdout)


def test_the_command_says_so(gemtool: Command, kind: Kind, tmp_path: Path) -> None:
    check_command(gemtool, kind, tmp_path / "x", 1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_command_says_so_often(gemtool: Command, kind: Kind, tmp_path: Path) -> None:
    check_command(gemtool, kind, tmp_path / "x", 15)
