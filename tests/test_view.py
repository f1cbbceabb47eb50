"""What `view` shows a person: tables, statistics, and pictures of what a model sees and hears."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gemtool.data.frames import BAND_HEIGHT, LIST, LONGEST, write_frames
from gemtool.data.image import patchify
from gemtool.errors import UsageError
from gemtool.stream.spans import ArrowSpanWriter, Header, Span
from tests.conftest import Command, command_environment

SECOND = 1_000_000


def picture(seed: int) -> np.ndarray:
    """uint8 [224, 224, 3]: a gradient and a square whose place depends on the seed."""
    y, x = np.mgrid[:224, :224]
    pixels = np.stack([x, y, (x + y) // 2], axis=2).astype(np.uint8)
    pixels[20:80, 30 * seed : 30 * seed + 40] = 255
    return pixels


def film(doc: str = "a/film.mp4", seconds: int = 4) -> list[Span]:
    """Each second a time stamp, a frame, and the sound of a tone that rises from band to band."""
    spans, start = [], 0

    def add(kind: str, tokens: int, at: int, payload: np.ndarray | None = None) -> None:
        nonlocal start
        time = (at * SECOND, (at + 1) * SECOND)
        ids = np.full(tokens, 7 if payload is not None else 400, np.int32)
        spans.append(Span(doc, len(spans), kind, ids, start, payload=payload, time=time))
        start += tokens

    for at in range(seconds):
        add("text", 5, at)
        add("video", 258, at, patchify(picture(at)))
        sound = np.full((25, 4, 80), -1.5, np.float16)
        sound[..., 10 * at] = 1.5
        add("audio", 27, at, sound)
    return spans


def stream(spans: list[Span], header: Header | None = None) -> bytes:
    sink = io.BytesIO()
    writer = ArrowSpanWriter(sink, header or Header(vocab={"fingerprint": "0" * 16, "size": 32768}))
    for span in spans:
        writer.append(span)
    writer.close()
    return sink.getvalue()


def listed(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / LIST).read_text().splitlines()]


def test_frames_are_the_pixels_and_the_sound_of_the_spans(gemtool: Command, tmp_path: Path) -> None:
    done = gemtool("view", "--frames", "seen", input=stream(film()))
    assert b"seen: 5 pictures" in done.stderr
    assert done.stdout == b""
    rows = listed(tmp_path / "seen")
    assert [row["kind"] for row in rows] == ["video", "video", "video", "video", "audio"]
    assert all(row["doc"] == "a/film.mp4" for row in rows)
    for at, row in enumerate(rows[:4]):
        assert row["time"] == {"start": at * SECOND, "end": (at + 1) * SECOND}
        with Image.open(tmp_path / "seen" / row["file"]) as image:
            np.testing.assert_array_equal(np.asarray(image), picture(at))
    sound = rows[4]
    assert sound["time"] == {"start": 0, "end": 4 * SECOND}
    assert sound["spans"] == 4
    mel = np.load(tmp_path / "seen" / sound["log_mel"])
    assert (mel.shape, mel.dtype) == ((400, 80), np.float16)
    with Image.open(tmp_path / "seen" / sound["file"]) as image:
        grey = np.asarray(image)
    assert grey.shape == (80 * BAND_HEIGHT, 400)
    for at in range(4):  # the tone rises: each second its band is white, the rest black
        white = np.flatnonzero(grey[:, 100 * at + 50] == 255)
        bottom = 80 * BAND_HEIGHT - 1 - white
        assert sorted(bottom // BAND_HEIGHT) == [10 * at] * BAND_HEIGHT
        assert (np.delete(grey[:, 100 * at + 50], white) == 0).all()


def test_shards_show_what_is_stored(gemtool: Command, tmp_path: Path) -> None:
    packed = gemtool("pack", "--length", 600, input=stream(film())).stdout
    gemtool("shard", "-o", "s", "--media", "jpeg:90", input=packed)
    gemtool("view", "s", "--frames", "stored")
    rows = listed(tmp_path / "stored")
    assert {row["seq"] for row in rows} == {0, 1}
    frames = [row for row in rows if row["kind"] == "video"]
    assert len(frames) == 4
    for row in frames:
        with Image.open(tmp_path / "stored" / row["file"]) as image:
            shown = np.asarray(image).astype(int)
        error = np.abs(shown - picture(row["time"]["start"] // SECOND)).mean()
        assert 0 < error < 5
    stats = json.loads(gemtool("view", "--stats", "s").stdout)
    assert stats["documents"] == 1
    assert stats["tokens"]["video"] == 4 * 258
    assert stats["seconds"] == {"audio": 4.0, "video": 4.0}
    assert stats["packed"]["sequences"] == 2
    assert stats["packed"]["waste"] == round(1 - 4 * 290 / 1200, 6)


def test_documents_of_one_name_and_names_of_folders_keep_apart(tmp_path: Path) -> None:
    spans = film("../../evil", 1) + film("../../evil", 1) + film(".", 1) + film("x" * 300, 1)
    count = write_frames(spans, tmp_path / "seen")
    assert count == 8
    assert len(listed(tmp_path / "seen")) == 8
    assert len([*(tmp_path / "seen").iterdir()]) == 5
    assert {path.name for path in tmp_path.iterdir()} == {"seen"}


def test_long_sound_and_gaps_begin_a_new_picture(tmp_path: Path) -> None:
    sound: list[Span] = []
    for index in range(LONGEST + 5):
        at = index + (index > LONGEST + 2)  # a second is missing
        payload = np.zeros((25, 4, 80), np.float16)
        time = (at * SECOND, (at + 1) * SECOND)
        ids = np.full(27, 7, np.int32)
        sound.append(Span("s", index, "audio", ids, 27 * index, payload=payload, time=time))
    write_frames(sound, tmp_path / "heard")
    assert [row["spans"] for row in listed(tmp_path / "heard")] == [LONGEST, 3, 2]


def test_folders_are_replaced_only_on_request_and_only_ours(
    gemtool: Command, tmp_path: Path
) -> None:
    one, two = stream(film("a", 1)), stream(film("b", 1))
    gemtool("view", "--frames", "seen", input=one)
    refused = gemtool("view", "--frames", "seen", input=two, check=False)
    assert refused.returncode == 2
    assert b"add -f" in refused.stderr
    assert {row["doc"] for row in listed(tmp_path / "seen")} == {"a"}
    gemtool("view", "--frames", "seen", "-f", input=two)
    assert {row["doc"] for row in listed(tmp_path / "seen")} == {"b"}
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    with pytest.raises(UsageError, match="holds other files"):
        write_frames(film(), tmp_path / "home", force=True)
    damaged = gemtool("view", "--frames", "half", input=one[:-10], check=False)
    assert damaged.returncode == 3
    assert {path.name for path in tmp_path.iterdir()} == {"seen", "home"}


def test_modes_exclude_each_other(gemtool: Command, tmp_path: Path) -> None:
    done = gemtool("view", "--stats", "--frames", "d", input=stream(film()), check=False)
    assert done.returncode == 2
    assert b"--stats and --frames exclude each other" in done.stderr
    assert not (tmp_path / "d").exists()


def test_a_terminal_gets_aligned_columns_a_pipe_gets_tabs(gemtool: Command, tmp_path: Path) -> None:
    (tmp_path / "film.spans").write_bytes(stream(film()))
    piped = gemtool("view", "film.spans").stdout.decode().splitlines()
    assert all(line.count("\t") == 7 for line in piped)
    ours, theirs = pty.openpty()
    environment = {**command_environment(), "COLUMNS": "60"}
    with subprocess.Popen(
        [sys.executable, "-m", "gemtool", "view", "film.spans"],
        stdout=theirs,
        stdin=subprocess.DEVNULL,
        cwd=tmp_path,
        env=environment,
    ) as running:
        os.close(theirs)
        shown = b""
        while block := read_terminal(ours):
            shown += block
        assert running.wait(30) == 0
    os.close(ours)
    lines = shown.decode().replace("\r\n", "\n").splitlines()
    assert len(lines) == len(piped)
    assert all(len(line) <= 60 and "\t" not in line for line in lines)
    place = lines[0].index("kind")
    assert {line[place:].split()[0] for line in lines[1:]} == {"text", "video", "audio"}


def read_terminal(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:  # the other side is closed
        return b""


def test_what_is_no_stream_says_what_to_name(gemtool: Command, tmp_path: Path) -> None:
    gemtool("shard", "-o", "s", input=gemtool("pack", input=stream(film())).stdout)
    done = gemtool("view", "s/part-00000.arrow", check=False)
    assert done.returncode == 3
    assert b"name the folder" in done.stderr
    (tmp_path / "s" / "manifest.json").unlink()
    done = gemtool("view", "s", check=False)
    assert done.returncode == 1
    assert b"did not finish it" in done.stderr
