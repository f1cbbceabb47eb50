"""Every format, from a file and from a pipe, and what is odd about files of the world."""

from __future__ import annotations

import gzip
import io
import subprocess
import sys
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from gemtool.data import avfile
from gemtool.data.compressed import decompressed
from gemtool.data.image import unpatchify
from gemtool.data.pieces import Piece
from gemtool.data.settings import MediaSettings
from gemtool.data.sniff import extension_kind
from gemtool.data.video import video_pieces
from gemtool.errors import CorruptInput, GemtoolError
from gemtool.stream.checked import Source
from tests.conftest import Command, command_environment
from tests.samples import NAMES, RECORDS, TEXT, kind_of, sample
from tests.test_audio import chirp
from tests.test_image import only_piece
from tests.test_tokenize import read, rows
from tests.test_video import GOP, ffmpeg, film, frames_of, outline, picture


def made(name: str) -> bytes:
    try:
        return sample(name)
    except LookupError as problem:
        pytest.skip(str(problem))


def test_every_format_in_a_folder_and_each_from_a_pipe(gemtool: Command, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    expected = {}
    for name in NAMES:
        try:
            (folder / f"a.{name}").write_bytes(sample(name))
        except LookupError:
            continue
        expected[f"in/a.{name}"] = kind_of(name)
    spans = read(gemtool("tokenize", "in", "-@", 2).stdout, tmp_path)
    kinds: dict[str, set[str]] = {}
    for span in spans:
        kinds.setdefault(span.doc.split(":")[0], set()).add(span.kind)
    assert kinds.keys() == expected.keys()
    for doc, kind in expected.items():
        assert kind in kinds[doc]
        assert kinds[doc] <= (
            {"text", "video", "audio", "control"} if kind == "video" else {kind, "control"}
        )


@pytest.mark.parametrize("name", ["avif", "opus", "mp4", "mov", "ts", "jsonl.zst", "txt.gz"])
def test_a_pipe_is_the_file(gemtool: Command, tmp_path: Path, name: str) -> None:
    data = made(name)
    (tmp_path / f"a.{name}").write_bytes(data)
    file = rows(gemtool("tokenize", f"a.{name}", "--no-pg").stdout, tmp_path, doc=False)
    pipe = rows(gemtool("tokenize", "--no-pg", input=data).stdout, tmp_path, doc=False)
    assert file == pipe


def test_redirected_file_may_have_its_index_at_the_end(gemtool: Command, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(film("mp4", "mpeg4", seconds=2))
    named = rows(gemtool("tokenize", "a.mp4").stdout, tmp_path, doc=False)
    with path.open("rb") as file:
        done = subprocess.run(
            [sys.executable, "-m", "gemtool", "tokenize"],
            stdin=file, capture_output=True, check=True, env=command_environment(),
        )  # fmt: skip
    assert rows(done.stdout, tmp_path, doc=False) == named
    done = gemtool("tokenize", input=path.read_bytes(), check=False)
    assert done.returncode == 1
    assert b"-movflags +faststart" in done.stderr


# Compressed text


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_members_one_after_the_other(kind: str) -> None:
    def pack(data: bytes) -> bytes:
        return gzip.compress(data) if kind == "gzip" else pa.compress(data, "zstd", asbytes=True)

    data = pack(TEXT) + pack(RECORDS)
    assert decompressed(Source(io.BytesIO(data)), kind, "x").read() == TEXT + RECORDS
    whole = pack(TEXT)
    for cut in (1, 5, len(whole) // 2, len(whole) - 4, len(whole) - 1):
        with pytest.raises(CorruptInput, match=rf"^x: damaged or truncated {kind}: "):
            decompressed(Source(io.BytesIO(whole[:cut])), kind, "x").read()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 255
    try:  # zstd frames need not carry a checksum
        decompressed(Source(io.BytesIO(bytes(damaged))), kind, "x").read()
    except CorruptInput as problem:
        assert str(problem).startswith("x: ")


def test_compressed_text_through_the_command(gemtool: Command, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(TEXT)
    (tmp_path / "d.jsonl").write_bytes(RECORDS)
    for name, plain in (("a.txt.gz", "a.txt"), ("d.jsonl.zst", "d.jsonl")):
        (tmp_path / name).write_bytes(sample(name.partition(".")[2]))
        got = rows(gemtool("tokenize", name).stdout, tmp_path, doc=False)
        assert got == rows(gemtool("tokenize", plain).stdout, tmp_path, doc=False)
    (tmp_path / "cut.txt.gz").write_bytes(sample("txt.gz")[:-9])
    done = gemtool("tokenize", "cut.txt.gz", "-o", "out", check=False)
    assert done.returncode == 3
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("gemtool: error: cut.txt.gz: damaged or truncated gzip")
    (tmp_path / "p.gz").write_bytes(gzip.compress(sample("png")))
    done = gemtool("tokenize", "p.gz", check=False)
    assert done.returncode == 3
    assert b"p.gz: of compressed files only text is read; unpack it first" in done.stderr


def test_a_text_bomb_streams(tmp_path: Path) -> None:
    (tmp_path / "bomb.txt.gz").write_bytes(gzip.compress(b"0 " * (100 << 20), 9))
    script = (
        "import sys\n"
        "from gemtool.data.inputs import read_documents\n"
        "from gemtool.data.settings import MediaSettings\n"
        "from gemtool.data.worker import peak_memory\n"
        "(document,) = read_documents(sys.argv[1:], MediaSettings())\n"
        "assert sum(len(part.text) for part in document.parts) == 200 << 20\n"
        "assert peak_memory() < 150 << 20, peak_memory()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "bomb.txt.gz")]
    subprocess.run(command, env=command_environment(), check=True)


def test_names_of_compressed_files() -> None:
    names = {"a.md.gz": "text", "a.jsonl.zst": "records", "a.gz": None, "a.png.gz": None}
    assert {name: extension_kind(name) for name in names} == names


# Links


def test_links_in_folders_are_followed_on_request(gemtool: Command, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "b.txt").write_text("b")
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "sub").symlink_to(tmp_path / "other")
    (folder / "up").symlink_to(folder)
    (folder / "z.txt").symlink_to("gone")

    def documents(*options: str) -> set[str]:
        return {span.doc for span in read(gemtool("tokenize", *options).stdout, tmp_path)}

    assert documents("f") == {"f/a.txt"}
    followed = {"f/a.txt", "f/link.txt", "f/sub/b.txt"}
    assert documents("f", "--follow-symlinks") == followed
    assert documents("f/link.txt") == {"f/link.txt"}  # named: meant


# Odd pictures


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (401, 1), (3, 2)])
def test_tiny_and_thin_pictures(size: tuple[int, int]) -> None:
    file = io.BytesIO()
    Image.new("RGB", size, (9, 99, 199)).save(file, "PNG")
    assert np.all(only_piece(file.getvalue()) == (9, 99, 199))


@pytest.mark.parametrize("kind", ["WEBP", "PNG", "TIFF", "AVIF"])
def test_first_picture_of_several(kind: str) -> None:
    Image.init()
    if kind not in Image.SAVE_ALL:
        pytest.skip(f"Pillow cannot write several pictures as {kind}")
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "lime", "blue")]
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    assert np.allclose(only_piece(file.getvalue()), (255, 0, 0), atol=4)


def test_rotation_in_avif_and_webp() -> None:
    pixels = np.zeros((100, 200, 3), np.uint8)
    pixels[:, :100] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("WEBP", "AVIF"):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, kind, exif=exif, quality=95)
        upright = only_piece(file.getvalue()).astype(int)
        assert upright[:100].min() > 240
        assert upright[124:].max() < 15


def test_a_header_of_absurd_size_takes_no_memory(gemtool: Command, tmp_path: Path) -> None:
    head = bytearray(sample("png"))
    head[16:24] = (50_000).to_bytes(4, "big") * 2
    head[29:33] = zlib.crc32(head[12:29]).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(bytes(head))
    done = gemtool("tokenize", "bomb.png", check=False)
    assert done.returncode == 1
    assert b"bomb.png: the image has more than 100,000,000 pixels" in done.stderr


# Odd films


def test_a_picture_beyond_8k_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert avfile.MAX_PIXELS >= 8192 * 4320
    monkeypatch.setattr(avfile, "MAX_PIXELS", 96 * 64 - 1)
    with pytest.raises(GemtoolError, match=r"^big: its picture of 96 x 64 has more than 6,143 pix"):
        list(video_pieces(film(seconds=1), MediaSettings(), "big"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("codec", "options", "code"),
    # Ten bits: 100 MB a picture. HEVC holds nine of them.
    [("libx264", ["-preset", "ultrafast"], 0), ("libx265", ["-preset", "ultrafast"], 3)],
)
def test_8k_of_ten_bits(
    gemtool: Command, tmp_path: Path, codec: str, options: list[str], code: int
) -> None:
    ffmpeg(
        "-f", "lavfi", "-i", "testsrc=size=7680x4320:rate=10", "-frames:v", 8,
        "-pix_fmt", "yuv420p10le", "-c:v", codec, *options, tmp_path / "a.mkv",
    )  # fmt: skip
    done = gemtool("tokenize", "a.mkv", "--fps", 10, "--count", "--no-timestamps", check=False)
    assert done.returncode == code
    if code:
        (line,) = done.stderr.decode().splitlines()
        assert line == (
            "gemtool: error: a.mkv: needs more than the 768 MiB of memory that decoding may take; "
            "scale it down: ffmpeg -i IN -vf scale=1920:-2 OUT.mkv"
        )
    else:
        assert b'"video": 2064' in done.stdout  # all eight


def test_variable_frame_rate() -> None:
    # Frames at 0, 0.04, ... for 2 s, then one every second, then dense again.
    times = [*range(50), 75, 100, 125, *range(150, 200)]
    data = film("matroska", "libx264", seconds=len(times) / 25, pts=times.__getitem__, options=GOP)
    got = frames_of(data)
    shown = [max(i for i, t in enumerate(times) if t <= 25 * k) for k in range(8)]
    with av.open(io.BytesIO(data)) as container:
        frames = list(container.decode(video=0))
    for ours, number in zip(got, shown, strict=True):
        scaled = frames[number].reformat(224, 224, "rgb24", interpolation="AREA")
        assert np.array_equal(ours, scaled.to_ndarray())


def test_negative_timestamps() -> None:
    data = film("matroska", "mpeg4", seconds=3, pts=lambda number: number - 10)
    assert len(frames_of(data)) == 3


def mux(container: str, *tracks: tuple[str, np.ndarray | None]) -> bytes:
    """Three seconds of video, or of each sound given."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        streams: list[Any] = []
        for codec, samples in tracks:
            if samples is None:
                stream: Any = output.add_stream(codec, rate=10)
                stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
            else:
                stream = output.add_stream(codec, rate=16_000, layout="mono")
            streams.append(stream)
        for second in range(3):
            for stream, (_, samples) in zip(streams, tracks, strict=True):
                if samples is None:
                    for index in range(10):
                        frame: Any = av.VideoFrame.from_ndarray(
                            picture(10 * second + index), "rgb24"
                        )
                        frame.pts, frame.time_base = 10 * second + index, Fraction(1, 10)
                        output.mux(stream.encode(frame))
                else:
                    part = samples[np.newaxis, second * 16_000 : (second + 1) * 16_000]
                    frame = av.AudioFrame.from_ndarray(
                        (part * 9999).astype(np.int16), "s16", "mono"
                    )
                    frame.sample_rate, frame.pts = 16_000, second * 16_000
                    frame.time_base = Fraction(1, 16_000)
                    output.mux(stream.encode(frame))
        for stream in streams:
            output.mux(stream.encode(None))
    return file.getvalue()


def sound_of(pieces: list[Piece]) -> np.ndarray:
    return np.concatenate(
        [p.payload for p in pieces if p.kind == "audio" and p.payload is not None]
    )


def test_of_several_sound_tracks_one_is_taken() -> None:
    loud, silent = chirp(3), np.zeros(48_000, np.float32)
    one = mux("matroska", ("mpeg4", None), ("pcm_s16le", loud))
    several = mux("matroska", ("mpeg4", None), ("pcm_s16le", loud), ("pcm_s16le", silent))
    expected = list(video_pieces(one, MediaSettings(), "x"))
    got = list(video_pieces(several, MediaSettings(), "x"))
    assert outline(got) == outline(expected) == "tva" * 3
    assert np.array_equal(sound_of(got), sound_of(expected))


def test_no_sound_at_all() -> None:
    data = mux("matroska", ("mpeg4", None))
    assert outline(list(video_pieces(data, MediaSettings(), "x"))) == "tv" * 3


@pytest.mark.parametrize("size", [(33, 7), (1, 1), (3, 1)])
def test_odd_sizes_of_video(size: tuple[int, int]) -> None:
    width, height = size
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as output:
        stream = output.add_stream("ffv1", rate=5)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv444p"
        for _ in range(5):
            pixels = np.full((height, width, 3), (200, 100, 50), np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        output.mux(stream.encode(None))
    (piece,) = video_pieces(file.getvalue(), MediaSettings(timestamps=False), "x")
    assert piece.payload is not None
    assert np.allclose(unpatchify(piece.payload), (200, 100, 50), atol=3)


@pytest.mark.parametrize("format", ["rgb48be", "rgba64be", "gray16be"])
def test_sixteen_bits_a_sample(format: str) -> None:
    colour = np.array([0x8080, 0x4040, 0xC0C0, 0xFFFF])
    channels = {"rgb48be": 3, "rgba64be": 4, "gray16be": 1}[format]
    pixels = np.broadcast_to(colour[:channels], (20, 30, channels)).astype(np.uint16)
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels).squeeze(), format)
    encoder: Any = av.CodecContext.create("png", "w")
    encoder.width, encoder.height, encoder.pix_fmt = 30, 20, format
    encoder.time_base = Fraction(1, 1)
    data = b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])
    expected = (0x80, 0x80, 0x80) if channels == 1 else (0x80, 0x40, 0xC0)
    assert np.allclose(only_piece(data), expected, atol=1)
