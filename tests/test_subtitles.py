"""Subtitles: text in the second in which it begins, from every container that holds text."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemtool.data.settings import MediaSettings
from gemtool.data.subtitles import plain_text
from gemtool.data.video import video_pieces
from tests.conftest import Command
from tests.test_tokenize import read
from tests.test_video import ffmpeg, film, outline

SRT = """1
00:00:00,500 --> 00:00:01,500
Hello <i>there</i>, {world}

2
00:00:02,000 --> 00:00:03,000
Second line
and more

3
00:00:02,700 --> 00:00:09,000
Überlappung

4
00:00:30,000 --> 00:00:31,000
After the end
"""
LINES = ["Hello there, {world}", "Second line\nand more", "Überlappung", "After the end"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("subtitles")


def titled(folder: Path, container: str, codec: str) -> Path:
    (folder / "s.srt").write_text(SRT)
    video = {"webm": ("webm", "libvpx-vp9")}.get(container, ("matroska", "libx264"))
    options = {"deadline": "realtime", "cpu-used": "8"} if container == "webm" else {}
    (folder / "plain").write_bytes(film(*video, seconds=4, options=options))
    path = folder / f"{codec}.{container}"
    ffmpeg(
        "-i", folder / "plain", "-i", folder / "s.srt", "-map", "0:v", "-map", "1:s",
        "-c:v", "copy", "-c:s", codec, "-metadata:s:s:0", "language=deu", path,
    )  # fmt: skip
    return path


@pytest.mark.parametrize(
    ("container", "codec"),
    [("mp4", "mov_text"), ("mkv", "srt"), ("mkv", "ass"), ("webm", "webvtt")],
)
def test_subtitles_beside_their_second(folder: Path, container: str, codec: str) -> None:
    path = titled(folder, container, codec)
    pieces = list(video_pieces(path, MediaSettings(subtitles=True, audio=False), "x"))
    assert outline(pieces) == "tvttvtvtttvt"
    said = [piece for piece in pieces if piece.meta and "subtitles" in piece.meta]
    assert [piece.text for piece in said] == LINES
    assert [piece.time[0] for piece in said] == [500_000, 2_000_000, 2_700_000, 30_000_000]
    assert all(piece.meta == {"source": "x", "subtitles": "deu"} for piece in said)
    assert outline(list(video_pieces(path, MediaSettings(audio=False), "x"))) == "tv" * 4


def test_the_option(gemtool: Command, folder: Path, tmp_path: Path) -> None:
    path = titled(folder, "mkv", "srt")
    plain = gemtool("tokenize", path, "--no-pg")
    spans = read(gemtool("tokenize", path, "--subtitles").stdout, tmp_path)
    told = [span for span in spans if span.meta and "subtitles" in span.meta]
    assert len(told) == 4
    assert not any(span.weights().any() for span in told)  # shown to the model, not asked of it
    assert len(read(plain.stdout, tmp_path)) == len(spans) - 4


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (r"0,0,Default,,0,0,0,,{\i1}Who,{\i0} me?\NYes.", "Who, me?\nYes."),
        (r"0,0,Default,,0,0,0,,a\hb \{{}x\} {note}", "a b {x} {note}"),
        ("0,0,Default,,0,0,0,,", ""),
        ("nonsense", "nonsense"),
    ],
)
def test_plain_text(line: str, text: str) -> None:
    assert plain_text(line) == text
