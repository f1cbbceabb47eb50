"""The table of budgets in the manual is what the code counts."""

from __future__ import annotations

import io
import re

import pytest
from PIL import Image

from gemtool.data.audio import audio_pieces
from gemtool.data.documents import Document, media_parts, spans_of_documents
from gemtool.data.image import count_image, image_pieces
from gemtool.data.pieces import Piece
from gemtool.data.settings import MediaSettings
from gemtool.data.video import video_pieces
from gemtool.data.vocab import Vocab
from gemtool.stream.spans import Span
from tests.conftest import ROOT
from tests.test_audio import chirp, wav
from tests.test_video import GOP, film

LOW = MediaSettings(image_tokens=66)


@pytest.fixture(scope="module")
def vocab() -> Vocab:
    return Vocab.load()


def spans(pieces: list[Piece], vocab: Vocab, *, runs: bool = False) -> list[Span]:
    parts = media_parts(pieces, runs=runs)
    return list(spans_of_documents([Document("x", parts)], vocab))[:-1]  # but <eod>


def tokens(pieces: list[Piece], vocab: Vocab, *, runs: bool = False) -> int:
    return sum(len(span.tokens) for span in spans(pieces, vocab, runs=runs))


def photo(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


def rows(vocab: Vocab) -> dict[str, tuple[int, int]]:
    """Input, then tokens by default and with --image-tokens 66 --audio-rate 32."""
    clip = film("matroska", options=GOP, seconds=10, sound=10)
    mute = film("matroska", options=GOP, seconds=10)

    def both(make, *, runs: bool = False) -> tuple[int, int]:
        low = MediaSettings(image_tokens=66, audio_rate=32)
        first, second = (tokens(list(make(s)), vocab, runs=runs) for s in (MediaSettings(), low))
        return first, second

    table = {}
    for width, height in ((384, 384), (960, 540), (1920, 1080), (4000, 3000)):
        data = photo(width, height)
        name = f"image, {width} x {height}"
        table[name] = both(lambda s, data=data: image_pieces(data, s, "x"))
        sizes = (count_image(width, height, MediaSettings()), count_image(width, height, LOW))
        assert table[name] == sizes
    sound = wav(chirp(10))
    table["sound, 10 s"] = both(lambda s: audio_pieces(sound, s, "x"), runs=True)
    table["video, 10 s, no sound"] = both(lambda s: video_pieces(mute, s, "x"))
    table["video with sound, 10 s"] = both(lambda s: video_pieces(clip, s, "x"))
    return table


def test_the_table_in_the_manual(vocab: Vocab) -> None:
    page = (ROOT / "man" / "gemtool-tokenize.1.in").read_text()
    printed = {
        name: (int(default.replace(",", "")), int(small.replace(",", "")))
        for name, default, small in re.findall(r"^([a-z].*)\t([\d,]+)\t([\d,]+)$", page, re.M)
    }
    computed = rows(vocab)
    assert printed == computed, "\n".join(f"{k}\t{a:,}\t{b:,}" for k, (a, b) in computed.items())


def test_the_figures_of_the_report(vocab: Vocab) -> None:
    table = rows(vocab)
    assert table["image, 384 x 384"] == (258, 66)
    assert table["image, 960 x 540"] == (1548, 396)
    assert table["sound, 10 s"] == (252, 322)
    per_second = table["video with sound, 10 s"][0] / 10
    assert 285 <= per_second <= 300
    assert 100 <= table["video with sound, 10 s"][1] / 10 <= 110
    # 37,994 frames (10 h 33 min) are 9.9M tokens, and so are 107 h of sound.
    assert pytest.approx(9.9e6, rel=0.02) == 37_994 * 258
    assert pytest.approx(9.7e6, rel=0.02) == 107 * 3600 * 25


def test_each_row_knows_its_place(vocab: Vocab) -> None:
    clip = film("matroska", options=GOP, seconds=3, sound=3)
    video = spans(list(video_pieces(clip, MediaSettings(fps=2), "clip.mkv")), vocab)
    for span in video:
        assert span.time is not None
        if span.kind == "video":
            assert span.meta == {"source": "clip.mkv", "sample": span.time[0] // 500_000}
        if span.kind == "audio":
            assert span.meta == {"source": "clip.mkv"}
    assert [span.time[0] for span in video if span.kind == "video"] == [
        500_000 * sample for sample in range(6)
    ]
    tiles = spans(list(image_pieces(photo(960, 540), MediaSettings(), "a.png")), vocab)
    boxes = [span.meta["box"] for span in tiles if span.meta]
    assert len(boxes) == 6
    assert boxes[0] == [0, 0, 360, 360]
    assert boxes[-1] == [720, 360, 960, 540]
    assert all(span.meta and span.meta["source"] == "a.png" for span in tiles)
