"""Packing: properties of the packer, and the verb with real streams."""

from __future__ import annotations

import io
import itertools
import time
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemtool.data.packing import BestFit, Packer, WaitingRoom
from gemtool.errors import GemtoolError
from gemtool.stream.spans import ArrowSpanWriter, Header, Span, open_spans

VOCAB = {"fingerprint": "0123456789abcdef", "size": 32768}


def document(name: str, shape: list[tuple[str, int]], first: int = 0) -> list[Span]:
    """Spans of the given kinds and sizes, whose tokens count on from `first`."""
    spans, start = [], 0
    for index, (kind, size) in enumerate(shape):
        spans.append(
            Span(
                doc=name,
                span=index,
                kind=kind,
                tokens=np.arange(first + start, first + start + size, dtype=np.int32),
                start=start,
                loss=np.arange(start, start + size, dtype=np.float32) if index % 2 else None,
                payload=None if kind == "text" else np.full((size, 4), index, np.float16),
                time=(start, start + size),
                meta={"index": index},
            )
        )
        start += size
    return spans


SHAPES = st.lists(
    st.lists(
        st.one_of(
            st.tuples(st.just("text"), st.integers(0, 60)),
            st.tuples(st.sampled_from(["image", "audio"]), st.integers(1, 16)),
        ),
        min_size=1,
        max_size=6,
    ),
    max_size=30,
)


@settings(max_examples=150, deadline=None)
@given(
    shapes=SHAPES,
    length=st.integers(16, 64),
    open_bins=st.integers(1, 8),
    memory=st.sampled_from([0, 300, 1 << 20]),
)
def test_packing_loses_nothing_and_mixes_nothing(shapes, length, open_bins, memory):
    source = [document(f"d{i % 7}", shape, 1000 * i) for i, shape in enumerate(shapes)]
    packer = Packer(length, open_bins, memory)
    packed = list(packer.pack(itertools.chain.from_iterable(source)))

    sequences: dict[int, list[Span]] = defaultdict(list)
    for span in packed:
        sequences[span.seq].append(span)
    assert list(sequences) == list(range(packer.sequences))  # ascending, none missing
    for spans in sequences.values():
        ends = np.cumsum([len(span.tokens) for span in spans])
        assert [span.offset for span in spans] == [0, *ends[:-1]]  # without gaps
        assert ends[-1] <= length
        segments = [span.segment for span in spans]
        assert segments == sorted(segments)
        assert set(segments) == set(range(1, max(segments) + 1))
        for _, group in itertools.groupby(spans, key=lambda span: span.segment):
            tokens = np.concatenate([span.tokens for span in group])
            assert len({int(token) // 1000 for token in tokens}) == 1  # of one document
            assert (np.diff(tokens) == 1).all()  # and without a hole

    pieces = sorted(packed, key=lambda span: int(span.tokens[0]))
    expected = [span for spans in source for span in spans if len(span.tokens)]
    for span in expected:
        count = 0
        while count < len(span.tokens):
            piece = pieces.pop(0)
            same = slice(count, count + len(piece.tokens))
            assert (piece.doc, piece.span, piece.kind) == (span.doc, span.span, span.kind)
            assert (piece.time, piece.meta) == (span.time, span.meta)
            assert piece.start == span.start + count
            np.testing.assert_array_equal(piece.tokens, span.tokens[same])
            assert piece.tokens.dtype == np.int32
            if span.loss is None:
                assert piece.loss is None
            else:
                np.testing.assert_array_equal(piece.loss, span.loss[same])
            if span.payload is None:
                assert piece.payload is None
            else:
                assert len(piece.tokens) == len(span.tokens)  # media are never cut
                np.testing.assert_array_equal(piece.payload, span.payload)
                assert piece.payload.dtype == span.payload.dtype
            count += len(piece.tokens)
    assert not pieces
    assert packer.tokens == sum(len(span.tokens) for span in expected)


def test_a_document_begins_where_its_span_index_starts_again():
    twice = document("a", [("text", 3), ("text", 2)]) * 2
    packed = list(Packer(16).pack(twice))
    assert [(span.segment, span.offset) for span in packed] == [(1, 0), (1, 3), (2, 5), (2, 8)]


def test_media_longer_than_a_sequence_are_refused_by_name():
    spans = document("clip.mp4", [("text", 1), ("video", 258)])
    with pytest.raises(GemtoolError, match=r"clip\.mp4: span 1 is video of 258 tokens.*--length"):
        list(Packer(256).pack(spans))


def test_long_documents_stream_through():
    """Of a document without end, no more than a sequence is held."""
    read = 0

    def endless():
        nonlocal read
        for index in itertools.count():
            read += 1
            yield Span("a", index, "text", np.zeros(100, np.int32), start=100 * index)

    packed = Packer(1000).pack(endless())
    assert [span.seq for span in itertools.islice(packed, 1000)][-1] == 99
    assert read <= 1010


def test_waiting_spans_reuse_their_space_on_disk():
    span = Span("a", 0, "image", np.arange(258, dtype=np.int32), payload=np.ones(1000, np.uint8))
    with WaitingRoom(memory=0) as room:
        for _ in range(50):
            held = [room.put(span, 0, 258) for _ in range(3)]
            for part, slot in held:
                np.testing.assert_array_equal(room.take(part, slot).tokens, span.tokens)
        assert room.spilled == 3 * 2048  # slots are powers of two


def web_pages(count: int) -> np.ndarray:
    """int64 [count]: sizes of documents, log-normal like those of web pages."""
    return np.random.default_rng(0).lognormal(6.5, 1.4, count).astype(np.int64) + 1


def waste_of(sizes: np.ndarray, length: int, open_bins: int) -> float:
    """Share of positions that stay empty."""
    bins: BestFit[int] = BestFit(length, open_bins)
    closed = [bins.place(int(size % length) or length, int(size)) for size in sizes]
    sequences = sum(piece is not None for piece in closed) + len(list(bins.close()))
    sequences += int(((sizes - 1) // length).sum())
    return 1 - sizes.sum() / (sequences * length)


def test_little_is_wasted():
    """Text at 8k: under 0.5% with 16 open bins; one wastes ten times that. At 128k: under 0.05%."""
    sizes = web_pages(60_000)
    assert waste_of(sizes, 8192, 16) < 0.005 < 0.05 < waste_of(sizes, 8192, 1)
    assert waste_of(web_pages(300_000), 131_072, 16) < 0.0005


@pytest.mark.slow
def test_a_million_documents_take_less_than_a_second():
    items = (web_pages(1_000_000) % 8191 + 1).tolist()
    bins: BestFit[int] = BestFit(8192, 16)
    start = time.process_time()
    for item in items:
        bins.place(item, item)
    assert time.process_time() - start < 1


# The verb


def stream(*documents: list[Span], header: Header | None = None) -> bytes:
    sink = io.BytesIO()
    writer = ArrowSpanWriter(sink, header or Header(vocab=VOCAB))
    for spans in documents:
        for span in spans:
            writer.append(span)
    writer.close()
    return sink.getvalue()


@pytest.fixture
def two_streams(tmp_path):
    rng = np.random.default_rng(1)
    for name in "ab":
        documents = [
            document(f"{name}{i}", [("text", int(n)), ("image", 20), ("text", 5)])
            for i, n in enumerate(rng.integers(1, 900, 40))
        ]
        (tmp_path / f"{name}.spans").write_bytes(stream(*documents))
    return tmp_path


def test_files_stdin_and_concatenated_streams_pack_alike(gemtool, two_streams):
    both = [(two_streams / f"{name}.spans").read_bytes() for name in "ab"]
    files = gemtool("pack", "a.spans", "b.spans", "--length", 512, "--no-pg")
    piped = gemtool("pack", "--length", 512, "--no-pg", input=b"".join(both))
    mixed = gemtool("pack", "a.spans", "-", "--length", 512, "--no-pg", input=both[1])
    assert files.stdout == piped.stdout == mixed.stdout
    assert b"80 documents" in files.stderr
    assert b"of positions empty" in files.stderr

    (two_streams / "packed").write_bytes(files.stdout)
    with open_spans(str(two_streams / "packed")) as reader:
        assert reader.header.packed == {"length": 512}
        assert reader.header.vocab == VOCAB
        spans = list(reader)
    assert reader.footer["documents"] == 80
    assert [span.seq for span in spans] == sorted(span.seq for span in spans)


def test_jsonl_out_and_in_say_the_same(gemtool, two_streams):
    gemtool("pack", "a.spans", "--length", 300, "--no-pg", "-o", "p.arrow")
    gemtool("pack", "a.spans", "--length", 300, "--no-pg", "--format", "jsonl", "-o", "p.jsonl")
    read = []
    for name in ("p.arrow", "p.jsonl"):
        with open_spans(str(two_streams / name)) as reader:
            read.append([(s.doc, s.span, s.seq, s.offset, s.tokens.tolist()) for s in reader])
    assert read[0] == read[1]


def test_provenance_grows(gemtool, two_streams):
    gemtool("pack", "a.spans", "-o", "p")
    with open_spans(str(two_streams / "p")) as reader:
        assert [entry["id"] for entry in reader.header.pg] == ["pack"]
        assert "--length" not in reader.header.pg[0]["command"]


def test_packed_input_is_refused(gemtool, two_streams):
    packed = gemtool("pack", "a.spans", "--length", 512).stdout
    again = gemtool("pack", "--length", 64, input=packed, check=False)
    assert again.returncode == 3
    assert again.stdout == b""
    assert b"<stdin>: packed already (length 512)" in again.stderr


def test_streams_that_do_not_match_are_refused(gemtool, two_streams):
    other = Header(vocab={"fingerprint": "f" * 16, "size": 9})
    (two_streams / "c.spans").write_bytes(stream(document("c", [("text", 3)]), header=other))
    done = gemtool("pack", "a.spans", "c.spans", "-o", "out", check=False)
    assert done.returncode == 1
    assert b"c.spans: its vocabulary is" in done.stderr
    assert not (two_streams / "out").exists()


def test_damage_leaves_no_output(gemtool, two_streams):
    whole = (two_streams / "a.spans").read_bytes()
    for cut in (len(whole) // 3, len(whole) - 40):
        done = gemtool("pack", "-o", "out", input=whole[:cut], check=False)
        assert done.returncode == 3
        assert not (two_streams / "out").exists()
    missing = gemtool("pack", "a.spans", "nowhere.spans", "-o", "out", check=False)
    assert missing.returncode == 1
    assert b"nowhere.spans: no such file" in missing.stderr


def test_an_empty_stream_packs_to_an_empty_stream(gemtool):
    done = gemtool("pack", input=stream())
    assert b"0 sequences" in done.stderr
    with_nothing = gemtool("pack", "--format", "jsonl", input=stream()).stdout
    assert len(with_nothing.splitlines()) == 2  # header and footer


def test_a_length_beyond_reason_is_a_mistake(gemtool) -> None:
    done = gemtool("pack", "--length", "99999999999", check=False)
    assert done.returncode == 2
    assert b"--length" in done.stderr
