"""Span streams: round trips, concatenation, and damage at every place."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from gemtool.control import BEGIN_FRAME, END_FRAME, EOD, VIDEO
from gemtool.errors import CorruptInput, GemtoolError, UsageError
from gemtool.stream.spans import (
    BATCH_ROWS,
    SPAN_SCHEMA,
    Header,
    Span,
    create_spans,
    open_spans,
)
from tests.conftest import Command

HEADER = Header(vocab={"fingerprint": "f" * 16, "size": 320}, settings={"image_tokens": 66})


def some_spans(documents: int = 3) -> list[Span]:
    """Documents of a text, a frame with pixels, an explicit weight, and their end."""
    rng = np.random.default_rng(0)
    frame = np.array([BEGIN_FRAME, *[VIDEO] * 64, END_FRAME], np.int32)
    spans = []
    for d in range(documents):
        pixels = rng.integers(0, 256, (64, 14, 14, 3), np.uint8)
        text = rng.integers(64, 320, 20 + d).astype(np.int32)
        meta = {"path": f"ü{d}.mp4", "frame": d}
        spans += [
            Span(f"doc {d}", 0, "text", text, loss=np.linspace(0, 1, 20 + d, dtype=np.float32)),
            Span(f"doc {d}", 1, "video", frame, 20 + d, None, pixels, (0, 10**6), meta),
            Span(f"doc {d}", 2, "control", np.array([EOD], np.int32), 86 + d, seq=d, offset=7),
        ]
    return spans


def write(
    path: Path, spans: list[Span], *, format: str = "arrow", header: Header = HEADER
) -> bytes:
    with create_spans(str(path), header, format=format, force=True) as writer:
        for span in spans:
            writer.append(span)
    return path.read_bytes()


def read(path: Path, *, recover: bool = False) -> list[Span]:
    with open_spans(str(path), recover=recover) as reader:
        return list(reader)


def assert_same(one: list[Span], other: list[Span]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        for name in Span.__slots__:
            x, y = getattr(a, name), getattr(b, name)
            if isinstance(x, np.ndarray):
                assert x.dtype == y.dtype
                np.testing.assert_array_equal(x, y)
            else:
                assert x == y, name


@pytest.mark.parametrize("format", ["arrow", "jsonl"])
@pytest.mark.parametrize("count", [0, 1, 3, BATCH_ROWS])
def test_round_trip(tmp_path: Path, format: str, count: int) -> None:
    spans = some_spans(3) * (count // 3) if count > 3 else some_spans(count)
    write(tmp_path / "s", spans, format=format)
    with open_spans(str(tmp_path / "s")) as reader:
        assert_same(list(reader), spans)
        assert reader.header == HEADER
        assert reader.footer["rows"] == len(spans)
        assert reader.footer["tokens"] == sum(len(span.tokens) for span in spans)


def test_default_weights() -> None:
    text, frame, end = some_spans(1)
    assert text.weights() is text.loss
    assert frame.weights().sum() == 0
    assert end.weights().tolist() == [1.0]


@pytest.mark.parametrize("format", ["arrow", "jsonl"])
def test_concatenated_streams_are_one(tmp_path: Path, format: str) -> None:
    data = write(tmp_path / "a", some_spans(), format=format)
    (tmp_path / "aa").write_bytes(data + data)
    assert_same(read(tmp_path / "aa"), some_spans() * 2)


def test_concatenated_streams_must_agree(tmp_path: Path) -> None:
    one = write(tmp_path / "a", some_spans())
    other = write(tmp_path / "b", some_spans(), header=Header(vocab={"fingerprint": "0"}))
    (tmp_path / "ab").write_bytes(one + other)
    with pytest.raises(GemtoolError, match="vocabulary"):
        read(tmp_path / "ab")


@pytest.mark.parametrize("format", ["arrow", "jsonl"])
def test_truncated_anywhere(tmp_path: Path, format: str) -> None:
    """Cut at many offsets, the last ones too: always refused, naming the file."""
    spans = some_spans()
    data = write(tmp_path / "s", spans, format=format)
    # The last byte of JSONL is the end of its footer's line, which is whole without it.
    last = len(data) - (format == "jsonl")
    for cut in {*np.linspace(0, last - 1, 300).astype(int), *range(last - 20, last)}:
        (tmp_path / "cut").write_bytes(data[:cut])
        with pytest.raises(CorruptInput, match="cut"):
            read(tmp_path / "cut")


def test_flipped_bits_are_never_believed(tmp_path: Path) -> None:
    spans = some_spans()
    data = bytearray(write(tmp_path / "s", spans))
    rng = np.random.default_rng(1)
    noticed = 0
    for _ in range(300):
        byte, bit = int(rng.integers(len(data))), int(rng.integers(8))
        data[byte] ^= 1 << bit
        (tmp_path / "flip").write_bytes(data)
        data[byte] ^= 1 << bit
        try:
            assert_same(read(tmp_path / "flip"), spans)  # padding, say
        except GemtoolError as problem:
            noticed += 1
            assert problem.exit_code in (1, 3)
    assert noticed > 200


def test_the_names_of_kinds_are_checked_too(tmp_path: Path) -> None:
    """Arrow sends them once, apart from the batches and their checksums: flip every bit of them."""
    spans = some_spans(1)
    data = bytearray(write(tmp_path / "s", spans))
    end = data.index(b"textimagevideoaudiocontrol") + 26
    for byte in range(end - 64, end):  # offsets, then letters
        for bit in range(8):
            data[byte] ^= 1 << bit
            (tmp_path / "flip").write_bytes(data)
            data[byte] ^= 1 << bit
            try:
                assert_same(read(tmp_path / "flip"), spans)
            except CorruptInput:
                continue
            assert byte < end - 26, "a damaged name was believed"


def test_recover_keeps_what_was_whole(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spans = some_spans(3) * (BATCH_ROWS // 3)  # 3 batches of 1,000 rows or 16 MiB
    data = write(tmp_path / "s", spans)
    (tmp_path / "cut").write_bytes(data[: len(data) * 3 // 4])
    kept = read(tmp_path / "cut", recover=True)
    assert 0 < len(kept) < len(spans)
    assert_same(kept, spans[: len(kept)])
    said = capfd.readouterr().err
    assert f"near byte {len(data) * 3 // 4:,}: " in said
    assert f"kept the {len(kept):,} spans before it" in said

    single = write(tmp_path / "s", some_spans(3))
    (tmp_path / "cut").write_bytes(single[: len(single) * 3 // 4])
    assert read(tmp_path / "cut", recover=True) == []
    assert "nothing before it is whole (a batch" in capfd.readouterr().err


def test_recovering_is_no_verification(gemtool: Command, tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(write(tmp_path / "whole", some_spans(3))[:-9])
    done = gemtool("view", "--verify", "--recover", "s", check=False)
    assert (done.returncode, done.stdout) == (2, b"")
    assert gemtool("view", "--verify", "s", check=False).returncode == 3


def test_readable_with_arrow_alone(tmp_path: Path) -> None:
    write(tmp_path / "s", some_spans())
    with pa.OSFile(str(tmp_path / "s")) as file:
        table = pa.ipc.open_stream(file).read_all()
    assert table.num_rows == 9
    assert table.schema.names == SPAN_SCHEMA.names
    assert json.loads(table.schema.metadata[b"gemtool"])["stream"] == "spans"


def test_hand_written_jsonl(tmp_path: Path) -> None:
    (tmp_path / "s").write_text('{"doc":"d","span":0,"kind":"text","tokens":[70,71]}\n\n')
    (span,) = read(tmp_path / "s")
    assert span.tokens.tolist() == [70, 71]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"doc":"d","span":0,"kind":"text"}', "'tokens'"),
        ('{"doc":"d","span":0,"kind":"txt","tokens":[]}', "kind 'txt'"),
        ('{"doc":"d","span":0,"kind":"text","tokens":[1],"losss":[1]}', "did you mean 'loss'"),
        ('{"doc":"d","span":0,"kind":"text","tokens":[1],"loss":[1,2]}', "2 values for 1"),
        ('{"doc":"d","span":0,"kind":"text","tokens":[-1]}', "negative"),
        ('{"doc":"d","span":0,"kind":"text","tokens":[99999999999]}', "numbers"),
        ('{"doc":"d","span":0,"kind":"text","tokens":[1.5]}', "whole numbers"),
        ('{"doc":"d","span":0,"kind":"text","tokens":[[1]]}', "whole numbers"),
        ('{"doc":"d","span":0,"kind":"text","tokens":[1],"start":1e999}', "'start' is inf"),
        ('{"doc":"d","span":0,"kind":"text","tokens":[1],"segment":4294967296}', "'segment'"),
        ('{"doc":"d","span":0,"kind":"text","tokens":[1],"meta":"m"}', "'meta'"),
        ('{"doc":"\\ud800","span":0,"kind":"text","tokens":[1]}', "surrogates"),
        ("[" * 100_000, "not JSON"),
        ('{"doc":"d","span":0,"kind":"image","tokens":[7],"payload":"!"}', "payload_shape"),
        ("[1]", "not a JSON object"),
        ("nonsense", "begins with"),
    ],
)
def test_bad_jsonl_names_the_line(tmp_path: Path, line: str, message: str) -> None:
    good = "" if message == "begins with" else '{"doc":"d","span":0,"kind":"text","tokens":[1]}\n'
    (tmp_path / "s").write_text(good + line + "\n")
    with pytest.raises(CorruptInput, match=message) as caught:
        read(tmp_path / "s")
    assert not good or "line 2" in str(caught.value)


def test_newer_version_and_other_streams_are_refused(tmp_path: Path) -> None:
    from gemtool.stream.checked import CheckedWriter

    for header, message in (
        ({"stream": "spans", "version": 99}, "upgrade"),
        (
            {"stream": "context", "version": 1},
            "a context where a span stream is needed; make one with `gemtool tok",
        ),
    ):
        sink = io.BytesIO()
        CheckedWriter(sink, SPAN_SCHEMA, header).close({})
        (tmp_path / "s").write_bytes(sink.getvalue())
        with pytest.raises(GemtoolError, match=message):
            read(tmp_path / "s")


def test_a_failure_leaves_no_file(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError),
        create_spans(str(tmp_path / "s"), HEADER) as writer,
    ):
        writer.append(some_spans()[0])
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_kept(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("precious")
    with pytest.raises(UsageError, match="-f"), create_spans(str(tmp_path / "s"), HEADER):
        pass
    assert (tmp_path / "s").read_text() == "precious"


def test_provenance_grows() -> None:
    header = HEADER.derive("tokenize").derive("pack", seed=3).derive("pack")
    assert [entry["id"] for entry in header.pg] == ["tokenize", "pack", "pack.2"]
    assert [entry["previous"] for entry in header.pg] == [None, "tokenize", "pack"]
    assert header.derive("shard", pg=False).pg == ()
