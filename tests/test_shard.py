"""Shard folders: layout, random access, interruption, damage."""

from __future__ import annotations

import fcntl
import io
import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest

from gemtool.cmd.shard import parse_size
from gemtool.data.image import patchify
from gemtool.data.manifest import encode_manifest
from gemtool.data.packing import Packer
from gemtool.data.pixels import PixelFormat, decode_pixels
from gemtool.data.sharding import create_shards
from gemtool.data.shards import ShardFolder
from gemtool.errors import CorruptInput, GemtoolError, UsageError
from gemtool.stream.checked import batch_crc32
from gemtool.stream.files import LOCK
from gemtool.stream.spans import (
    KINDS,
    SPAN_SCHEMA,
    ArrowSpanWriter,
    Header,
    Span,
    batch_of,
)

LENGTH = 300
HEADER = Header(
    vocab={"fingerprint": "0123456789abcdef", "size": 32768},
    settings={"image_tokens": 66},
    packed={"length": LENGTH},
)


def packed_spans(documents: int = 60, seed: int = 0) -> list[Span]:
    rng = np.random.default_rng(seed)

    def spans():
        for i in range(documents):
            size = int(rng.integers(1, 500))
            yield Span(f"d{i}", 0, "text", np.arange(size, dtype=np.int32), meta={"i": i})
            pixels = rng.integers(0, 256, (64, 14, 14, 3), np.uint8)
            yield Span(f"d{i}", 1, "image", np.full(66, 7, np.int32), size, payload=pixels)

    return list(Packer(LENGTH).pack(spans()))


def stream(spans: list[Span], header: Header = HEADER) -> bytes:
    sink = io.BytesIO()
    writer = ArrowSpanWriter(sink, header)
    for span in spans:
        writer.append(span)
    writer.close()
    return sink.getvalue()


def assert_same(found: list[Span], expected: list[Span]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for field in ("doc", "span", "kind", "start", "time", "meta", "seq", "offset", "segment"):
            assert getattr(one, field) == getattr(other, field)
        np.testing.assert_array_equal(one.tokens, other.tokens)
        assert (one.payload is None) == (other.payload is None)
        if one.payload is not None:
            np.testing.assert_array_equal(one.payload, other.payload)


@pytest.mark.parametrize("chunk", [7, 64, LENGTH, 4096])
def test_every_sequence_comes_back(tmp_path, chunk):
    spans = packed_spans()
    with create_shards(tmp_path / "s", HEADER, chunk=chunk, shard_size=200_000) as writer:
        for span in spans:
            writer.append(span)
    folder = ShardFolder(tmp_path / "s")
    folder.verify()
    assert len(folder) == spans[-1].seq + 1
    assert len(folder.manifest["files"]) > 2
    assert folder.kinds == {"text", "image"}
    assert sum(folder.manifest["tokens"].values()) == sum(len(span.tokens) for span in spans)
    for index in np.random.default_rng(0).permutation(len(folder)):
        assert_same(folder[int(index)], [span for span in spans if span.seq == index])
    with pytest.raises(IndexError):
        folder[len(folder)]

    # The promise of the layout: chunk c of a sequence is batch i * chunks + c, and holds the spans
    # that start there.
    chunk = min(chunk, LENGTH)
    chunks = -(-LENGTH // chunk)
    with pa.ipc.open_file(str(tmp_path / "s" / "part-00000.arrow")) as reader:
        batches = folder.manifest["files"][0]["sequences"] * chunks
        assert reader.num_record_batches == batches + 1  # the last one has the index
        assert reader.get_batch(batches).num_rows == 0
        for i in range(batches):
            batch = reader.get_batch(i)
            assert {seq.as_py() for seq in batch["seq"]} <= {i // chunks}
            assert {at.as_py() // chunk for at in batch["offset"]} <= {i % chunks}
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == sorted(
        ["manifest.json"] + [part["name"] for part in folder.manifest["files"]]
    )


def test_the_verb_from_pipe_files_and_concatenation(gemtool, tmp_path):
    one, two = stream(packed_spans(20, 1)), stream(packed_spans(20, 2))
    (tmp_path / "one").write_bytes(one)
    (tmp_path / "two").write_bytes(two)
    gemtool("shard", "one", "two", "-o", "files", "--no-pg", "--shard-size", "100kB")
    done = gemtool("shard", "-o", "pipe", "--no-pg", "--shard-size", "100kB", input=one + two)
    assert b"sequences" in done.stderr
    for file in (tmp_path / "files").iterdir():
        assert file.read_bytes() == (tmp_path / "pipe" / file.name).read_bytes()
    folder = ShardFolder(tmp_path / "files")
    assert [folder[i][0].seq for i in range(len(folder))] == list(range(len(folder)))
    assert folder.vocab == HEADER.vocab
    assert folder.settings == HEADER.settings


def test_pack_and_shard_in_a_pipe(gemtool, tmp_path):
    rng = np.random.default_rng(0)
    lines = [
        json.dumps({"doc": f"{i}", "span": 0, "kind": "text", "tokens": [1] * int(n)})
        for i, n in enumerate(rng.integers(1, 100, 50))
    ]
    packed = gemtool("pack", "--length", 128, input="\n".join(lines).encode()).stdout
    gemtool("shard", "-o", "s", input=packed)
    folder = ShardFolder(tmp_path / "s")
    assert [entry["id"] for entry in folder.manifest["pg"]] == ["pack", "shard"]
    assert folder.length == 128
    assert folder.manifest["chunk"] == 128


def test_unpacked_input_is_refused(gemtool, tmp_path):
    span = Span("a", 0, "text", np.ones(3, np.int32))
    done = gemtool("shard", "-o", "s", input=stream([span], Header()), check=False)
    assert done.returncode == 3
    assert b"gemtool pack" in done.stderr
    done = gemtool("shard", "-o", "s", input=stream([span]), check=False)  # claims to be packed
    assert done.returncode == 3
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(("offset", "segment"), [(9, 1), (10, 0), (8, 2), (299, 2)])
def test_sequences_with_gaps_are_refused(tmp_path, offset, segment):
    first = Span("a", 0, "text", np.ones(10, np.int32), seq=0, offset=0, segment=1)
    wrong = Span("b", 0, "text", np.ones(2, np.int32), seq=0, offset=offset, segment=segment)
    with (
        pytest.raises(CorruptInput, match="b: span 0 is at"),
        create_shards(tmp_path / "s", HEADER) as writer,
    ):
        writer.append(first)
        writer.append(wrong)
    assert not (tmp_path / "s").exists()


def test_other_peoples_folders_are_left_alone(gemtool, tmp_path):
    (tmp_path / "s").mkdir()
    for name in ("part-00000.arrow", "thesis.tex"):
        (tmp_path / "s" / name).write_bytes(b"precious")
    for arguments in ([], ["-f"]):
        done = gemtool("shard", "-o", "s", *arguments, input=stream([]), check=False)
        assert done.returncode == 2
        assert (tmp_path / "s" / "part-00000.arrow").read_bytes() == b"precious"


def test_parts_without_a_manifest_are_unfinished_and_started_afresh(gemtool, tmp_path):
    """With or without the lock of the process that was killed."""
    (tmp_path / "s").mkdir()
    for name in ("part-00000.arrow", "part-00007.arrow"):
        (tmp_path / "s" / name).write_bytes(b"half")
    gemtool("shard", "-o", "s", input=stream(packed_spans(5)))
    ShardFolder(tmp_path / "s").verify()
    assert {p.name for p in (tmp_path / "s").iterdir()} == {"manifest.json", "part-00000.arrow"}


def test_a_training_run_is_no_unfinished_shard_folder(gemtool, tmp_path):
    """Its lock has the same name."""
    (tmp_path / "run").mkdir()
    for name in (LOCK, "config.toml"):
        (tmp_path / "run" / name).touch()
    done = gemtool("shard", "-o", "run", input=stream([]), check=False)
    assert done.returncode == 2
    assert b"holds other files" in done.stderr


def test_joined_packed_streams_are_counted_as_such(gemtool):
    """Each numbers its sequences from 0."""
    one = stream(packed_spans(20))
    stats = [json.loads(gemtool("view", "--stats", input=one * n).stdout) for n in (1, 2)]
    assert stats[1]["packed"]["sequences"] == 2 * stats[0]["packed"]["sequences"]
    assert stats[1]["packed"]["waste"] == stats[0]["packed"]["waste"]


def test_a_second_writer_is_kept_out(gemtool, tmp_path):
    (tmp_path / "s").mkdir()
    with (tmp_path / "s" / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = gemtool("shard", "-o", "s", input=stream([]), check=False)
    assert done.returncode == 1
    assert b"another process is writing it" in done.stderr


# Damage


@pytest.fixture
def folder(tmp_path):
    with create_shards(tmp_path / "s", HEADER, shard_size=100_000) as writer:
        for span in packed_spans(20):
            writer.append(span)
    return tmp_path / "s"


def test_truncated_files_are_noticed(folder):
    file = folder / "part-00001.arrow"
    whole = file.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        os.truncate(file, size)
        with pytest.raises(CorruptInput, match=r"part-00001\.arrow: has"):
            ShardFolder(folder)
        file.write_bytes(whole)
    file.unlink()
    with pytest.raises(CorruptInput, match=r"part-00001\.arrow: is missing"):
        ShardFolder(folder)


def test_flipped_bytes_are_found_by_verify(folder):
    file = folder / "part-00000.arrow"
    whole = file.read_bytes()
    for at in (3, len(whole) // 2, len(whole) - 3):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :])
        with pytest.raises(CorruptInput, match=r"part-00000\.arrow: damaged"):
            ShardFolder(folder).verify()
    file.write_bytes(bytes(len(whole)))  # of the right size, but no Arrow file
    with pytest.raises(CorruptInput, match=r"part-00000\.arrow: damaged"):
        ShardFolder(folder)[0]


def test_a_flipped_byte_never_gives_a_wrong_sequence(folder):
    file = folder / "part-00000.arrow"
    whole = file.read_bytes()
    good = ShardFolder(folder)
    expected = [[span.tokens.copy() for span in good[i]] for i in range(len(good))]
    noticed = 0
    rng = np.random.default_rng(0)
    for at in rng.integers(0, len(whole), 100):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << rng.integers(8))]) + whole[at + 1 :])
        try:
            damaged = ShardFolder(folder)
            for index, tokens in enumerate(expected):
                for span, one in zip(damaged[index], tokens, strict=True):
                    np.testing.assert_array_equal(span.tokens, one)
        except CorruptInput as problem:
            assert "part-00000.arrow: damaged" in str(problem)
            noticed += 1
    assert noticed > 90  # the others are in padding between buffers


def write_version_1(folder, spans: list[Span], chunk: int = 64) -> None:
    """As this format was written first: no index, each batch with its own checksum."""
    folder.mkdir()
    file = folder / "part-00000.arrow"
    with file.open("wb") as sink, pa.ipc.new_file(sink, SPAN_SCHEMA) as writer:
        for seq in range(spans[-1].seq + 1):
            here = [span for span in spans if span.seq == seq]
            for at in range(0, LENGTH, chunk):
                batch = batch_of([span for span in here if at <= span.offset < at + chunk])
                writer.write_batch(batch, custom_metadata={"crc32": str(batch_crc32(batch))})
    entry = {
        "name": file.name,
        "sequences": spans[-1].seq + 1,
        "bytes": file.stat().st_size,
        "crc32": zlib.crc32(file.read_bytes()),
    }
    tokens = {kind: sum(len(s.tokens) for s in spans if s.kind == kind) for kind in KINDS}
    manifest = {
        "format": "gemtool shards",
        "version": 1,
        "complete": True,
        "length": LENGTH,
        "chunk": chunk,
        "sequences": spans[-1].seq + 1,
        "tokens": tokens,
        "files": [entry],
        "vocab": HEADER.vocab,
        "settings": HEADER.settings,
        "pg": [],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_version_1_is_read_and_checked(gemtool, tmp_path):
    spans = packed_spans(10)
    write_version_1(tmp_path / "s", spans)
    folder = ShardFolder(tmp_path / "s")
    folder.verify()
    for index in range(len(folder)):
        assert_same(folder[index], [span for span in spans if span.seq == index])
    done = gemtool("shard", "-o", "s", input=stream(spans), check=False)
    assert done.returncode == 2
    assert b"another version (1, not 2); add -f" in done.stderr
    file = tmp_path / "s" / "part-00000.arrow"
    whole = file.read_bytes()
    file.write_bytes(whole[:9000] + bytes([whole[9000] ^ 1]) + whole[9001:])
    with pytest.raises(CorruptInput, match=r"part-00000\.arrow: damaged"):
        [folder[i] for folder in [ShardFolder(tmp_path / "s")] for i in range(len(folder))]


def test_threads_read_the_same(folder):
    shards = ShardFolder(folder)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: shards[i % len(shards)].tokens, range(4 * len(shards))))
    for index, tokens in enumerate(found):
        expected = np.concatenate(
            [span.tokens for span in ShardFolder(folder)[index % len(shards)]]
        )
        np.testing.assert_array_equal(tokens, expected)


# Pictures


def smooth_spans(count: int = 6) -> list[Span]:
    """A gradient with a disc and some noise each; and a sound."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:224, :224] / 224
    tokens = np.array([8, *[7] * 256, 9], np.int32)

    def spans():
        for i in range(count):
            disc = (np.hypot(x - 0.5, y - 0.1 * i) < 0.2) * 80
            pixels = np.stack([x * 160 + disc, y * 160, (x + y) * 60 + disc], axis=2)
            payload = patchify((pixels + rng.integers(0, 6, pixels.shape)).astype(np.uint8))
            yield Span(f"d{i}", 0, "image", tokens, payload=payload)
            sound = np.full((25, 4, 80), i, np.float16)
            yield Span(f"d{i}", 1, "audio", np.full(25, 13, np.int32), 258, payload=sound)

    return list(Packer(LENGTH).pack(spans()))


def test_pixels_may_be_stored_as_pictures(gemtool, tmp_path):
    spans = smooth_spans()
    sizes = {}
    for media in ("raw", "png", "jpeg:90", "jpeg:30"):
        gemtool("shard", "-o", media, "--media", media, input=stream(spans))
        folder = ShardFolder(tmp_path / media)
        folder.verify()
        assert folder.manifest["media"] == media
        sizes[media] = sum(entry["bytes"] for entry in folder.manifest["files"])
        found = [span for sequence in folder for span in sequence]
        if not media.startswith("jpeg"):
            assert_same(found, spans)
            continue
        for span, original in zip(found, spans, strict=True):
            np.testing.assert_array_equal(span.tokens, original.tokens)
            if span.kind == "audio":
                np.testing.assert_array_equal(span.payload, original.payload)
                continue
            assert span.payload.shape == original.payload.shape
            error = np.mean((span.payload.astype(float) - original.payload) ** 2)
            assert 10 * np.log10(255**2 / error) > (35 if media == "jpeg:90" else 30)  # PSNR in dB
    assert sizes["jpeg:30"] < sizes["jpeg:90"] < sizes["png"] < sizes["raw"] / 2
    stats = [json.loads(gemtool("view", "--stats", media).stdout) for media in ("raw", "jpeg:90")]
    assert stats[0] == stats[1]
    again = gemtool("shard", "-o", "jpeg:90", "--media", "jpeg:90", input=stream(spans))
    assert b"complete already" in again.stderr


@pytest.mark.parametrize("media", ["jpg", "jpeg", "jpeg:0", "jpeg:101", "jpeg:9.5", "PNG"])
def test_other_forms_of_media_are_refused(gemtool, media):
    done = gemtool("shard", "-o", "s", "--media", media, input=stream([]), check=False)
    assert done.returncode == 2
    assert b"expected raw, png, or jpeg:Q" in done.stderr


def test_pictures_that_are_not_what_is_said_are_refused():
    picture, dtype, shape = PixelFormat.parse("png").encode(smooth_spans(1)[0])
    assert decode_pixels(picture, "uint8", shape) is None
    for raw, said in ((picture[:-30], shape), (picture, [64, 14, 14, 3]), (picture[9:], shape)):
        with pytest.raises(ValueError, match="a damaged png picture"):
            decode_pixels(raw, dtype, said)
    odd = Span("a", 0, "image", np.full(3, 7, np.int32), payload=np.zeros((3, 14, 14, 3), np.uint8))
    assert PixelFormat.parse("png").encode(odd)[1] == "uint8"  # no square: kept as it is


def test_bad_manifests_are_explained(folder):
    file = folder / "manifest.json"
    good = json.loads(file.read_bytes())
    for change, error in (
        ({"version": 3}, "version 3; this gemtool reads up to 2"),
        ({"format": "x"}, "not the manifest"),
        ({"files": None}, "malformed"),
        ({"chunk": 0}, "malformed"),
        ({"sequences": 3}, "says 3 sequences"),
        ({"files": [{**good["files"][0], "name": "../x"}]}, "expected 'part-00000.arrow'"),
    ):
        file.write_bytes(encode_manifest({**good, **change}))
        with pytest.raises(GemtoolError, match=error):
            ShardFolder(folder)
        if "files" not in change:
            file.write_text(
                json.dumps({**good, **change})
            )  # without the checksum that belongs to it
            with pytest.raises(GemtoolError):
                ShardFolder(folder)
    file.write_text(json.dumps({**good, "settings": {}}))
    with pytest.raises(CorruptInput, match="does not match its own checksum"):
        ShardFolder(folder)
    file.write_text("{")
    with pytest.raises(CorruptInput, match="not JSON"):
        ShardFolder(folder)
    for path in (folder / "nowhere", file):
        with pytest.raises(GemtoolError, match="expected one of `gemtool shard`"):
            ShardFolder(path)


def test_sizes():
    assert [parse_size(text) for text in ("1GiB", "2 GB", "512mib", "1.5kB", "77")] == [
        1 << 30,
        2 * 10**9,
        512 << 20,
        1500,
        77,
    ]
    for text in ("", "GB", "0", "-1", "5 apples"):
        with pytest.raises(UsageError):
            parse_size(text)
