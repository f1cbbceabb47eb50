"""The tokenize verb: real files and pipes, real media, through the real command."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import wave
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gemtool.control import (
    AUDIO,
    BEGIN_AUDIO,
    BEGIN_FRAME,
    BEGIN_IMAGE,
    END_AUDIO,
    END_FRAME,
    END_IMAGE,
    END_TURN,
    EOD,
    IMAGE,
    MODEL,
    SYSTEM,
    USER,
    VIDEO,
)
from gemtool.data.documents import (
    media_parts,
)
from gemtool.data.pieces import Piece
from gemtool.data.records import parse_record
from gemtool.data.settings import MediaSettings
from gemtool.data.text import CHUNK, text_chunks
from gemtool.data.vocab import Vocab, train_vocab
from gemtool.stream.spans import Span, open_spans
from tests.conftest import Command, command_environment

COUNTED = ("text", "image", "video", "audio", "control")


@pytest.fixture(scope="module")
def vocab() -> Vocab:
    return Vocab.load()


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an image of each budget, 10 s of sound, and 3 s of video with sound."""
    folder = tmp_path_factory.mktemp("media")
    noise = np.random.default_rng(0)
    for name, (width, height) in {"small": (300, 200), "large": (960, 540)}.items():
        pixels = noise.integers(0, 256, (height // 10, width // 10, 3), np.uint8)
        Image.fromarray(pixels).resize((width, height)).save(folder / f"{name}.png")
    tone = np.sin(np.arange(160_000) * 2 * np.pi * 440 / 16_000) * 9000
    with wave.open(str(folder / "ten.wav"), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(tone.astype(np.int16).tobytes())
    make_video(folder / "clip.mkv", 3)
    return folder


def make_video(path: Path, seconds: int) -> None:
    import av

    with av.open(str(path), "w") as container:
        picture = container.add_stream("mpeg4", rate=10, width=96, height=64, pix_fmt="yuv420p")
        sound = container.add_stream("pcm_s16le", rate=16_000, layout="mono")
        for second in range(seconds):
            for index in range(10):
                pixels = np.full((64, 96, 3), (10 * second + index) % 256, np.uint8)
                container.mux(picture.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
            samples = np.sin(np.arange(16_000)[None] / 9) * 9000
            frame = av.AudioFrame.from_ndarray(samples.astype(np.int16), "s16", "mono")
            frame.sample_rate = 16_000
            frame.pts = second * 16_000
            container.mux(sound.encode(frame))
        container.mux(picture.encode(None))
        container.mux(sound.encode(None))


def read(stream: bytes | Path, tmp_path: Path) -> list[Span]:
    path = stream
    if isinstance(stream, bytes):
        path = tmp_path / "read.spans"
        path.write_bytes(stream)
    with open_spans(str(path)) as reader:
        return list(reader)


def rows(stream: bytes, tmp_path: Path, *, doc: bool = True) -> list[tuple[Any, ...]]:
    """Spans as plain values that can be compared."""
    return [
        (
            span.doc if doc else "",
            span.span,
            span.kind,
            span.start,
            span.tokens.tolist(),
            None if span.loss is None else span.loss.tolist(),
            None if span.payload is None else (span.payload.shape, span.payload.tobytes()),
            span.time,
            span.meta if doc else None,
        )
        for span in read(stream, tmp_path)
    ]


def write_lines(path: Path, *documents: Any) -> Path:
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return path


def random_text(size: int, seed: int = 0) -> bytes:
    """Bytes of many kinds: prose, code, other scripts, control characters, ill-formed UTF-8."""
    pick = random.Random(seed)
    kinds = [
        lambda: b"the quick brown fox ",
        lambda: b"def f(x):\n\treturn x  # 1234\n",
        lambda: "漢字かな Ελληνικά 🦊 \u2581 ".encode(),
        lambda: pick.randbytes(7),
        lambda: b"\r\n\n  <eod> <image>",
        lambda: b"x" * pick.randrange(400),
    ]
    text = bytearray()
    while len(text) < size:
        text += pick.choice(kinds)()
    return bytes(text)


# Text


class Trickle:
    """A pipe that delivers a few bytes at a time."""

    def __init__(self, data: bytes, step: int) -> None:
        self._file, self._step = BytesIO(data), step

    def read(self, size: int) -> bytes:
        return self._file.read(min(size, self._step))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"short",
        b"a line of text\n" * 9000,
        b"words without lines " * 9000,
        "字".encode() * 40_000,
        b"x" * (2 * CHUNK),
        b"\x80" * (2 * CHUNK + 1),
        random_text(120_000),
    ],
    ids=["empty", "short", "lines", "words", "wide", "letters", "ill-formed", "random"],
)
def test_chunks_are_the_text_and_do_not_depend_on_delivery(text: bytes) -> None:
    chunks = list(text_chunks(BytesIO(text)))
    assert b"".join(chunks) == text
    assert all(0 < len(chunk) <= CHUNK for chunk in chunks)
    assert all(len(chunk) >= CHUNK // 2 for chunk in chunks[:-1])
    assert chunks == list(text_chunks(Trickle(text, 1013)))


def test_chunks_end_at_lines_then_words_then_characters() -> None:
    lines = list(text_chunks(BytesIO(b"one two\n" * 9000)))
    assert all(chunk.endswith(b"\n") for chunk in lines)
    words = list(text_chunks(BytesIO(b"one two " * 9000)))
    assert all(chunk.startswith(b" ") for chunk in words[1:])
    wide = list(text_chunks(BytesIO("字".encode() * 40_000)))
    assert all(chunk.decode() for chunk in wide)


def test_any_bytes_come_back(gemtool: Command, tmp_path: Path, vocab: Vocab) -> None:
    text = random_text(100_000, seed=3)
    (tmp_path / "any.bin").write_bytes(text)
    done = gemtool("tokenize", "--modality", "text", "any.bin", "--no-pg")
    spans = read(done.stdout, tmp_path)
    assert vocab.decode_bytes(np.concatenate([span.tokens for span in spans])) == text
    assert [span.span for span in spans] == list(range(len(spans)))
    starts = np.cumsum([0] + [len(span.tokens) for span in spans])[:-1]
    assert [span.start for span in spans] == starts.tolist()
    assert {span.doc for span in spans} == {"any.bin"}
    assert [span.kind for span in spans[:-1]] == ["text"] * (len(spans) - 1)
    assert spans[-1].kind == "control"
    assert spans[-1].tokens.tolist() == [EOD]
    assert all(span.loss is None for span in spans)
    text_tokens = np.concatenate([span.tokens for span in spans[:-1]])
    assert text_tokens.min() >= 64  # what the text spells is never a control token


def test_stdin_is_the_file_and_threads_change_nothing(gemtool: Command, tmp_path: Path) -> None:
    text = b"".join(b"%d bottles of beer on the wall\n" % i for i in range(9000))
    (tmp_path / "t.txt").write_bytes(text)
    file = gemtool("tokenize", "t.txt", "--no-pg").stdout
    pipe = gemtool("tokenize", "--no-pg", input=text).stdout
    assert rows(pipe, tmp_path, doc=False) == rows(file, tmp_path, doc=False)
    assert gemtool("tokenize", "-", "--no-pg", "-@", 3, input=text).stdout == pipe
    assert {span.doc for span in read(pipe, tmp_path)} == {"<stdin>"}


@pytest.mark.parametrize("source", ["file", "pipe"])
def test_empty_input_is_an_empty_document(gemtool: Command, tmp_path: Path, source: str) -> None:
    (tmp_path / "empty.txt").write_bytes(b"")
    arguments = ["empty.txt"] if source == "file" else []
    spans = read(gemtool("tokenize", *arguments).stdout, tmp_path)
    assert [(span.kind, span.tokens.tolist()) for span in spans] == [("control", [EOD])]


def test_jsonl_has_the_rows_of_arrow(gemtool: Command, tmp_path: Path, media: Path) -> None:
    (tmp_path / "a.txt").write_text("some text\n")
    inputs = ["a.txt", media / "small.png", media / "ten.wav"]
    arrow = gemtool("tokenize", *inputs).stdout
    jsonl = gemtool("tokenize", *inputs, "--format", "jsonl").stdout
    assert all(json.loads(line) for line in jsonl.splitlines())
    assert rows(jsonl, tmp_path) == rows(arrow, tmp_path)


# Media


@pytest.mark.parametrize(
    ("name", "options", "tiles", "budget", "side"),
    [
        ("small.png", [], 1, 258, 224),
        ("large.png", [], 6, 258, 224),
        ("large.png", ["--no-tiles"], 1, 258, 224),
        ("large.png", ["--image-tokens", "66"], 6, 66, 112),
    ],
)
def test_image_budget(
    gemtool: Command,
    tmp_path: Path,
    media: Path,
    name: str,
    options: list[str],
    tiles: int,
    budget: int,
    side: int,
) -> None:
    # From a pipe, so that the content alone tells what it is.
    done = gemtool("tokenize", *options, input=(media / name).read_bytes())
    *images, end = read(done.stdout, tmp_path)
    assert len(images) == tiles
    assert end.tokens.tolist() == [EOD]
    for span in images:
        assert span.kind == "image"
        assert span.payload is not None
        assert span.tokens.tolist() == [BEGIN_IMAGE, *[IMAGE] * (budget - 2), END_IMAGE]
        assert span.payload.shape == ((side // 14) ** 2, 14, 14, 3)
        assert span.payload.dtype == np.uint8
        assert span.loss is None
        assert not span.weights().any()


@pytest.mark.parametrize(("rate", "tokens"), [(25, 252), (32, 322)])
def test_audio_budget(
    gemtool: Command, tmp_path: Path, media: Path, rate: int, tokens: int
) -> None:
    done = gemtool("tokenize", media / "ten.wav", "--audio-rate", rate)
    *sound, end = read(done.stdout, tmp_path)
    assert [span.kind for span in sound] == ["audio"] * 10
    assert sum(len(span.tokens) for span in sound) == tokens
    whole = np.concatenate([span.tokens for span in sound]).tolist()
    assert whole == [BEGIN_AUDIO, *[AUDIO] * (tokens - 2), END_AUDIO]
    for second, span in enumerate(sound):
        assert span.payload is not None
        assert span.payload.dtype == np.float16
        assert span.payload.shape == (rate, 4, 80)
        assert span.time == (second * 1_000_000, (second + 1) * 1_000_000)
    assert end.start == tokens


def test_video_budget(gemtool: Command, tmp_path: Path, media: Path, vocab: Vocab) -> None:
    file = gemtool("tokenize", media / "clip.mkv", "--no-pg").stdout
    *spans, end = read(file, tmp_path)
    assert [span.kind for span in spans] == ["text", "video", "audio"] * 3
    for second in range(3):
        time, frame, sound = spans[3 * second : 3 * second + 3]
        assert vocab.decode(time.tokens) == f"00:0{second}"
        assert time.loss is not None
        assert not time.loss.any()
        assert frame.tokens.tolist() == [BEGIN_FRAME, *[VIDEO] * 256, END_FRAME]
        assert sound.tokens.tolist() == [BEGIN_AUDIO, *[AUDIO] * 25, END_AUDIO]
        assert frame.time == (second * 1_000_000, (second + 1) * 1_000_000)
        assert frame.payload is not None
        assert frame.payload.shape == (256, 14, 14, 3)
    assert end.tokens.tolist() == [EOD]
    pipe = gemtool("tokenize", "--no-pg", input=(media / "clip.mkv").read_bytes()).stdout
    assert rows(pipe, tmp_path, doc=False) == rows(file, tmp_path, doc=False)


def test_video_options(gemtool: Command, tmp_path: Path, media: Path) -> None:
    options = ["--no-audio", "--no-timestamps", "--fps", "2", "--image-tokens", "66"]
    *spans, _ = read(gemtool("tokenize", media / "clip.mkv", *options).stdout, tmp_path)
    assert [(span.kind, len(span.tokens)) for span in spans] == [("video", 66)] * 6
    with open_spans(str(tmp_path / "read.spans")) as reader:
        assert reader.header.settings["fps"] == 2
        assert reader.header.settings["image_tokens"] == 66


def test_sound_with_a_gap_is_two_runs() -> None:
    seconds = [(0, 1), (1, 2), (4, 5)]
    pieces = [Piece("audio", np.zeros((2, 4, 80), np.float16), time=time) for time in seconds]
    runs = [part.tokens.tolist() for part in media_parts(pieces, runs=True)]
    a, begin, end = AUDIO, BEGIN_AUDIO, END_AUDIO
    assert runs == [[begin, a, a], [a, a, end], [begin, a, a, end]]
    each = [part.tokens.tolist() for part in media_parts(pieces, runs=False)]
    assert each == [[begin, a, a, end]] * 3


# JSONL of documents


def test_parts_and_their_weights(
    gemtool: Command, tmp_path: Path, media: Path, vocab: Vocab
) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "p.png").write_bytes((media / "small.png").read_bytes())
    document = {
        "id": "mix",
        "meta": {"language": "en"},
        "parts": [
            {"text": "What is this? ", "loss": 0},
            {"image": "p.png"},
            {"audio": str(media / "ten.wav")},
            {"video": str(media / "clip.mkv"), "loss": 0.5},
            {"text": "A square.", "loss": 2},
            {"text": ""},
        ],
    }
    write_lines(tmp_path / "docs" / "d.jsonl", document)
    spans = read(gemtool("tokenize", "docs/d.jsonl").stdout, tmp_path)
    kinds = ["text", "image", *["audio"] * 10, *["text", "video", "audio"] * 3, "text", "control"]
    assert [span.kind for span in spans] == kinds
    assert {span.doc for span in spans} == {"mix"}
    assert spans[0].meta == {"document": {"language": "en"}}
    assert not spans[0].weights().any()
    assert not spans[1].weights().any()
    assert not spans[2].weights().any()
    frame = spans[13].weights()
    assert frame[0] == frame[-1] == 0.5
    assert not frame[1:-1].any()
    assert (spans[-2].weights() == 2).all()
    assert vocab.decode(spans[-2].tokens) == "A square."
    assert spans[-1].weights().tolist() == [1]


def test_chat(gemtool: Command, tmp_path: Path, media: Path, vocab: Vocab) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"image": str(media / "small.png")}, {"text": "What?"}]},
        {"role": "assistant", "content": "Noise."},
        {"role": "user", "content": "Sure?", "loss": 1},
        {"role": "model", "content": "Yes.", "loss": 0},
    ]
    lines = (json.dumps({"messages": messages}) + "\n").encode()
    spans = read(gemtool("tokenize", input=lines).stdout, tmp_path)  # JSONL known by its content
    shown = [
        (int(s.tokens[0]) if s.kind == "control" else s.kind, float(s.weights().mean()))
        for s in spans
    ]
    assert shown == [
        (SYSTEM, 0), ("text", 0), (END_TURN, 0),
        (USER, 0), ("image", 0), ("text", 0), (END_TURN, 0),
        (MODEL, 0), ("text", 1), (END_TURN, 1),
        (USER, 0), ("text", 1), (END_TURN, 1),
        (MODEL, 0), ("text", 0), (END_TURN, 0),
        (EOD, 1),
    ]  # fmt: skip
    assert vocab.decode(spans[8].tokens) == "Noise."
    assert {span.doc for span in spans} == {"<stdin>:1"}


def test_a_chat_about_a_text(gemtool: Command, tmp_path: Path, vocab: Vocab) -> None:
    chat = [{"role": "user", "content": "Who?"}, {"role": "model", "content": "Me."}]
    lines = (json.dumps({"text": "A text.", "messages": chat}) + "\n").encode()
    spans = read(gemtool("tokenize", input=lines).stdout, tmp_path)
    assert [(s.kind, float(s.weights().mean())) for s in spans] == [
        ("text", 1), ("control", 0), ("text", 0), ("control", 0),
        ("control", 0), ("text", 1), ("control", 1), ("control", 1),
    ]  # fmt: skip
    assert vocab.decode(spans[0].tokens) == "A text."


def test_a_long_line_is_cut_as_a_file_is(gemtool: Command, tmp_path: Path) -> None:
    text = "A line of a long document, number 123.\n" * 40_000
    write_lines(tmp_path / "long.jsonl", {"text": text}, {"text": "short"})
    (tmp_path / "long.txt").write_text(text)
    whole = rows(gemtool("tokenize", "long.txt").stdout, tmp_path, doc=False)
    lines = rows(gemtool("tokenize", "long.jsonl").stdout, tmp_path, doc=False)
    assert lines[: len(whole)] == whole
    spans = read(gemtool("tokenize", "long.jsonl").stdout, tmp_path)
    assert list(dict.fromkeys(span.doc for span in spans)) == ["long.jsonl:1", "long.jsonl:2"]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{broken", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"txt": "a"}', "unknown key 'txt'; did you mean 'text'?"),
        ('{"text": "a", "parts": []}', "'text' and 'parts' exclude each other"),
        ('{"id": "x"}', "found none of them"),
        ('{"text": 1}', "'text' is not a string"),
        ('{"text": "a", "id": [1]}', "'id' is not a string"),
        ('{"text": "a", "meta": "m"}', "'meta' is not an object"),
        ('{"text": "a", "meta": {"x": NaN}}', "NaN"),
        ('{"parts": [{"text": "a", "wieght": 1}]}', "part 1 has an unknown key 'wieght'"),
        ('{"parts": [{"image": "a", "text": "b"}]}', "part 1: expected one of"),
        ('{"parts": [{"text": "a", "loss": true}]}', "'loss' is True"),
        ('{"parts": [{"image": ""}]}', "no path of a file"),
        ('{"messages": [{"role": "usr", "content": "a"}]}', "role is 'usr'"),
        ('{"messages": [{"role": "user"}]}', "'content' of message 1 is not a list"),
        ('{"text": ' + "[" * 100_000, "nested too deeply"),
    ],
)
def test_bad_records_say_what_is_wrong(line: str, complaint: str) -> None:
    with pytest.raises(ValueError) as problem:
        parse_record(line.encode())
    assert complaint in str(problem.value)


def test_bad_lines_are_named(gemtool: Command, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n\n{"txt": "b"}\n{"text": "c"}\n')
    done = gemtool("tokenize", "d.jsonl", "-o", "out", check=False)
    assert done.returncode == 3
    assert b"d.jsonl: line 3: the document has an unknown key 'txt'; did you mean" in done.stderr
    assert not (tmp_path / "out").exists()
    done = gemtool("tokenize", "d.jsonl", "--keep-going", check=False)
    assert done.returncode == 1
    assert b"d.jsonl: line 3" in done.stderr
    spans = read(done.stdout, tmp_path)
    assert list(dict.fromkeys(span.doc for span in spans)) == ["d.jsonl:1", "d.jsonl:4"]


# Many inputs


def test_folders_parts_and_lists(gemtool: Command, tmp_path: Path) -> None:
    folder = tmp_path / "f"
    (folder / "b" / ".hidden").mkdir(parents=True)
    names = ["a.txt", "b/1.md", "b/2.py", "c.txt"]
    for name in [*names, "b/.hidden/x.txt", ".x.txt", "unknown.xyz"]:
        (folder / name).write_text(f"This is {name}.\n")
    (folder / "link").symlink_to(folder / "b")
    expected = [f"f/{name}" for name in names]

    whole = rows(gemtool("tokenize", "f").stdout, tmp_path)
    assert list(dict.fromkeys(row[0] for row in whole)) == expected
    parts = [rows(gemtool("tokenize", "f", "--part", f"{i}/3").stdout, tmp_path) for i in (1, 2, 3)]
    assert [row for part in parts for row in part] == whole
    assert all(parts)
    listed = gemtool("tokenize", "--files-from", "-", input="\n".join(expected).encode() + b"\n")
    assert rows(listed.stdout, tmp_path) == whole
    listed = gemtool("tokenize", "--files-from", "-", input="\0".join(expected).encode() + b"\0")
    assert rows(listed.stdout, tmp_path) == whole
    joined = read(gemtool("tokenize", "f", "--one-document").stdout, tmp_path)
    assert {span.doc for span in joined} == {"f/a.txt"}
    assert [span.kind for span in joined] == ["text"] * 4 + ["control"]
    assert [span.span for span in joined] == list(range(5))
    nothing = gemtool("tokenize", "--files-from", "-", input=b"")
    assert read(nothing.stdout, tmp_path) == []


def test_counts_are_those_of_the_stream(gemtool: Command, tmp_path: Path, media: Path) -> None:
    write_lines(
        tmp_path / "d.jsonl",
        {"parts": [{"video": str(media / "clip.mkv")}, {"audio": str(media / "ten.wav")}]},
        {"messages": [{"role": "user", "content": "hello"}]},
    )
    inputs = ["d.jsonl", *sorted(media.iterdir())]
    *documents, total = map(json.loads, gemtool("tokenize", "--count", *inputs).stdout.splitlines())
    counts: dict[str, dict[str, int]] = {}
    for span in read(gemtool("tokenize", *inputs).stdout, tmp_path):
        counts.setdefault(span.doc, dict.fromkeys(COUNTED, 0))[span.kind] += len(span.tokens)
    assert [document["doc"] for document in documents] == list(counts)
    for document, kinds in zip(documents, counts.values(), strict=True):
        assert {kind: document[kind] for kind in COUNTED} == kinds
        assert document["tokens"] == sum(kinds.values())
    assert [document["seconds"] for document in documents] == [13, 0, 3, 0, 0, 10]
    for key in (*COUNTED, "tokens", "seconds"):
        assert total[key] == sum(document[key] for document in documents)
    assert total["total"] is True
    assert set(total) - {"total"} == set(documents[0]) - {"doc"}


# Failures


def test_missing_and_damaged_inputs(gemtool: Command, tmp_path: Path, media: Path) -> None:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "bad.png").write_bytes((media / "small.png").read_bytes()[:900])
    (tmp_path / "zeros.dat").write_bytes(bytes(100))
    for bad, code in (("gone.txt", 1), ("bad.png", 3), ("zeros.dat", 3)):
        done = gemtool("tokenize", "good.txt", bad, "-o", "out", check=False)
        assert done.returncode == code
        (line,) = done.stderr.decode().splitlines()
        assert line.startswith(f"gemtool: error: {bad}: ")
        assert not (tmp_path / "out").exists()
    inputs = ["bad.png", "gone.txt", "good.txt", "zeros.dat"]
    done = gemtool("tokenize", *inputs, "--keep-going", "-o", "out", check=False)
    assert done.returncode == 1
    assert {span.doc for span in read(tmp_path / "out", tmp_path)} == {"good.txt"}
    assert all(name in done.stderr.decode() for name in ("bad.png", "gone.txt", "zeros.dat"))
    joined = ["tokenize", *inputs, "--keep-going", "--one-document"]
    spans = read(gemtool(*joined, check=False).stdout, tmp_path)
    assert [(span.doc, span.kind) for span in spans] == [
        ("good.txt", k) for k in ("text", "control")
    ]


def test_for_adopts_a_checkpoint(gemtool: Command, tmp_path: Path, media: Path) -> None:
    import tomli_w

    from gemtool.model.config import load_preset

    model = train_vocab([f"line {i} of a small text" for i in range(2000)], size=346)
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "vocab.model").write_bytes(model)
    own = Vocab.load(tmp_path / "ckpt" / "vocab.model")
    tables = {
        "version": 1,
        "vocab": {"fingerprint": own.fingerprint, "size": own.size},
        "media": MediaSettings(image_tokens=66, fps=0.5).to_dict(),
        "model": load_preset("nano").to_dict(),
    }
    (tmp_path / "ckpt" / "config.toml").write_text(tomli_w.dumps(tables))

    # What a model does not depend on may be chosen; saying again what it has is no conflict.
    options = ["--for", "ckpt", "--no-audio", "--image-tokens", "66"]
    spans = read(gemtool("tokenize", *options, media / "clip.mkv").stdout, tmp_path)
    assert [span.kind for span in spans] == ["text", "video", "text", "video", "control"]
    assert len(spans[1].tokens) == 66
    with open_spans(str(tmp_path / "read.spans")) as reader:
        assert reader.header.vocab == {"fingerprint": own.fingerprint, "size": own.size}
        assert reader.header.settings == {**tables["media"], "audio": False}
    for conflict, word in ((["--image-tokens", "258"], "66"), (["--vocab", "x"], "--vocab")):
        done = gemtool("tokenize", "--for", "ckpt", *conflict, input=b"text", check=False)
        assert done.returncode == 2
        assert word in done.stderr.decode()


def test_nothing_of_the_model_is_loaded(tmp_path: Path, media: Path) -> None:
    script = (
        "import sys; sys.argv = ['gemtool', 'tokenize', '-o', 'out', *sys.argv[1:]]\n"
        "from gemtool.__main__ import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert not {'jax', 'grain', 'orbax', 'matplotlib'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", script, *map(str, sorted(media.iterdir()))]
    subprocess.run(command, cwd=tmp_path, env=command_environment(), check=True, timeout=60)
