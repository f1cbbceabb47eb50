"""Video: which frames, in what order, beside which sound; compared with plain full decoding."""

from __future__ import annotations

import io
import shutil
import struct
import subprocess
import sys
import tempfile
from bisect import bisect_right
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from gemtool.data import avfile, video
from gemtool.data.image import unpatchify
from gemtool.data.pieces import Piece
from gemtool.data.settings import MediaSettings
from gemtool.data.video import timestamp, video_pieces
from gemtool.errors import CorruptInput, GemtoolError
from tests.conftest import command_environment

SILENT = MediaSettings(audio=False, timestamps=False)


class Pipe(io.BytesIO):
    def seekable(self) -> bool:
        return False

    def seek(self, *_: object) -> int:
        raise AssertionError("a pipe cannot seek")


def picture(number: int, width: int = 96, height: int = 64) -> np.ndarray:
    """A frame that tells its number: a moving block on a texture that changes slowly."""
    y, x = np.mgrid[:height, :width]
    base = 96 + 60 * np.sin((x + 2 * number) / 9) * np.cos((y - number) / 7)
    pixels = np.repeat(base[..., np.newaxis], 3, 2).astype(np.uint8)
    left = number * 5 % (width - 16)
    pixels[20:36, left : left + 16] = (number * 37 % 256, number * 11 % 256, 255)
    return pixels


def film(
    container: str = "matroska",
    codec: str = "libx264",
    *,
    seconds: float = 10,
    rate: int = 25,
    options: dict[str, str] | None = None,
    sound: float | None = None,
    container_options: dict[str, str] | None = None,
    pts: Any = lambda number: number,
    apart: bool = False,
) -> bytes:
    """Encodes `picture(n)`, and a tone of `sound` seconds; `apart` puts all sound last."""
    try:
        av.Codec(codec, "w")
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"this build of libav has no encoder {codec}")
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "film"
    with folder, av.open(path, "w", format=container, options=container_options or {}) as output:
        stream = output.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height = 96, 64
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        packets = []
        tone = output.add_stream("mp2", rate=48000, layout="mono") if sound else None
        for number in range(round(seconds * rate)):
            frame = av.VideoFrame.from_ndarray(picture(number), "rgb24")
            frame.pts, frame.time_base = pts(number), Fraction(1, rate)
            packets += stream.encode(frame)
        packets += stream.encode(None)
        if tone is not None:
            samples = np.sin(np.arange(int(sound * 48000)) * 0.05) * 8000  # type: ignore[operator]
            for start in range(0, len(samples), 1152):
                part = samples[np.newaxis, start : start + 1152].astype(np.int16)
                frame = av.AudioFrame.from_ndarray(part, "s16", "mono")
                frame.sample_rate, frame.pts, frame.time_base = 48000, start, Fraction(1, 48000)
                packets += tone.encode(frame)
            packets += tone.encode(None)
        if not apart:
            packets.sort(key=lambda packet: packet.dts * packet.time_base)
        for packet in packets:
            output.mux(packet)
        output.close()
        return path.read_bytes()


def reference(data: bytes, fps: Fraction) -> list[np.ndarray]:
    """The rule, over every frame decoded."""
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        start = stream.start_time if stream.start_time is not None else frames[0].pts
        times = [(frame.pts - start) * stream.time_base for frame in frames]
        end = times[-1] + Fraction(1, 25)
        chosen, sample = [], 0
        while sample / fps < end - Fraction(1, 500):
            chosen.append(frames[max(bisect_right(times, sample / fps) - 1, 0)])
            sample += 1
        return [
            frame.reformat(224, 224, "rgb24", interpolation="AREA").to_ndarray() for frame in chosen
        ]


def frames_of(source: Any, settings: MediaSettings = SILENT) -> list[np.ndarray]:
    pieces = video_pieces(source, settings, "x")
    return [unpatchify(piece.payload) for piece in pieces if piece.kind == "video"]


def outline(pieces: list[Piece]) -> str:
    """`t` a timestamp, `v` a frame, `a` sound."""
    return "".join(piece.kind[0] for piece in pieces)


GOP = {"g": "20", "bf": "3", "preset": "veryfast", "sc_threshold": "0"}
STREAMS = {
    "h264-mp4": ("mp4", "libx264", GOP),
    "h264-mkv": ("matroska", "libx264", GOP),
    "h264-ts": ("mpegts", "libx264", GOP),
    "h264-flv": ("flv", "libx264", GOP),
    "h264-open-gop": ("matroska", "libx264", {**GOP, "x264-params": "open-gop=1"}),
    "h264-open-gop-ts": ("mpegts", "libx264", {**GOP, "x264-params": "open-gop=1"}),
    "h264-intra-refresh": ("matroska", "libx264", {**GOP, "x264-params": "intra-refresh=1"}),
    "h264-one-gop": ("mp4", "libx264", {**GOP, "g": "1000"}),
    "vp9": (
        "webm",
        "libvpx-vp9",
        {"g": "20", "deadline": "realtime", "cpu-used": "8", "lag-in-frames": "10"},
    ),
    "mpeg2-ts": ("mpegts", "mpeg2video", {"g": "12", "bf": "2"}),
    "mpeg4-avi": ("avi", "mpeg4", {"g": "20"}),
    "mjpeg": ("matroska", "mjpeg", {}),
}


@pytest.mark.parametrize("name", STREAMS)
def test_samples_are_those_of_a_full_decode(name: str, monkeypatch) -> None:
    container, codec, options = STREAMS[name]
    data = film(container, codec, options=options)
    decoded = made = 0
    decode = avfile.Decoder.decode

    def counting(self, packet, shown=True):
        nonlocal decoded, made
        decoded += packet is not None
        frames = decode(self, packet, shown)
        made += len(frames)
        return frames

    monkeypatch.setattr(avfile.Decoder, "decode", counting)
    for fps in (1.0, 0.3, 2.5, 25.0, 40.0):
        decoded = made = 0
        got = frames_of(data, MediaSettings(audio=False, fps=fps))
        expected = reference(data, Fraction(str(fps)))
        assert len(got) == len(expected)
        for ours, theirs in zip(got, expected, strict=True):
            assert np.array_equal(ours, theirs)
        if fps == 0.3 and name in ("h264-mp4", "h264-mkv", "h264-ts", "vp9", "mjpeg"):
            assert decoded < 160  # of 250: groups of pictures were left out
        if fps == 1.0 and name in ("h264-mp4", "h264-mkv", "h264-ts"):
            assert made < 0.9 * decoded  # so were frames that no other is made from
        if "open-gop" in name or "refresh" in name:
            assert decoded == 250
    if container != "mp4":
        assert all(map(np.array_equal, frames_of(Pipe(data)), frames_of(data)))


def test_ten_seconds_are_ten_samples() -> None:
    for container in ("matroska", "mp4", "mpegts"):
        data = film(container, options=GOP, seconds=10, sound=10)
        pieces = list(video_pieces(data, MediaSettings(), "clip"))
        assert outline(pieces) == "tva" * 10
        texts = [piece.text for piece in pieces[::3]]
        assert texts == [f"00:{second:02}" for second in range(10)]
        for second in range(10):
            span = (second * 1_000_000, (second + 1) * 1_000_000)
            text, frame, sound = pieces[3 * second : 3 * second + 3]
            assert text.time == frame.time == span
            assert sound.time[0] == span[0]
            assert frame.payload.shape == (256, 14, 14, 3)
            assert frame.meta == {"source": "clip", "sample": second}
            assert 24 <= len(sound.payload) <= 25


def test_other_rates() -> None:
    data = film(seconds=4, sound=4)
    half = list(video_pieces(data, MediaSettings(fps=0.5), "x"))
    assert outline(half) == "tvaa" * 2
    assert [piece.text for piece in half if piece.kind == "text"] == ["00:00", "00:02"]
    assert half[1].time == (0, 2_000_000)
    double = list(video_pieces(data, MediaSettings(fps=2), "x"))
    assert outline(double) == "tvva" * 4
    assert double[2].time == (500_000, 1_000_000)


@pytest.mark.timeout(20)
def test_one_frame_of_all() -> None:
    for sound, expected in ((None, "tv"), (4, "tvaaaa")):
        data = film(seconds=4, options=GOP, sound=sound)
        (shown, *_) = frames_of(data)
        pieces = list(video_pieces(data, MediaSettings(fps=1e-9), "x"))
        assert outline(pieces) == expected
        assert pieces[1].payload is not None
        assert np.array_equal(unpatchify(pieces[1].payload), shown)
        assert pieces[1].time == (0, 10**15)


def test_settings() -> None:
    data = film(seconds=2, sound=2)
    assert outline(list(video_pieces(data, SILENT, "x"))) == "vv"
    assert outline(list(video_pieces(data, MediaSettings(timestamps=False), "x"))) == "vava"
    low = list(video_pieces(data, MediaSettings(image_tokens=66, audio_rate=32), "x"))
    assert [len(piece.payload) for piece in low[1:3]] == [64, 32]


def test_sound_of_another_length() -> None:
    longer = list(video_pieces(film(seconds=2, sound=4.5), MediaSettings(), "x"))
    assert outline(longer) == "tvatvaaaa"
    assert longer[-1].time[0] == 4_000_000
    shorter = list(video_pieces(film(seconds=4, sound=1.5), MediaSettings(), "x"))
    assert outline(shorter) == "tvatvatvtv"


def test_sound_is_that_of_the_sound_alone() -> None:
    from gemtool.data.audio import audio_pieces

    data = film(seconds=4, sound=4)
    beside = [p for p in video_pieces(data, MediaSettings(), "x") if p.kind == "audio"]
    alone = list(audio_pieces(data, MediaSettings(), "x"))
    for a, b in zip(beside, alone, strict=True):
        assert np.array_equal(a.payload, b.payload)


def test_short_sound_is_not_waited_for(monkeypatch) -> None:
    # Two seconds of sound in a minute and a half: samples must come out long before the end.
    data = film(seconds=90, rate=2, sound=1.9)
    packets = avfile.MediaFile.packets
    read = 0

    def counting(self, *streams):
        nonlocal read
        for packet in packets(self, *streams):
            read += packet.stream_index == 0
            yield packet

    monkeypatch.setattr(avfile.MediaFile, "packets", counting)
    waited, pieces = [], []
    for piece in video_pieces(data, MediaSettings(), "x"):
        pieces.append(piece)
        if piece.kind == "video":
            waited.append(read / 2 - piece.time[0] / 1_000_000)
    assert outline(pieces) == "tva" * 2 + "tv" * 88
    # Thirty seconds, and the group of pictures in the decoder.
    assert max(waited) < 60


def test_sound_that_waits_to_be_resampled_is_not_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    data = film(codec="mpeg4", seconds=40, sound=40)
    expected = list(video_pieces(data, MediaSettings(), "x"))
    monkeypatch.setattr(video, "_PICTURE_LEAD", 1.15)  # less than sound may wait
    got = list(video_pieces(data, MediaSettings(), "x"))
    assert outline(got) == outline(expected) == "tva" * 40
    for a, b in zip(got, expected, strict=True):
        assert a.payload is b.payload or np.array_equal(a.payload, b.payload)


def test_badly_interleaved_file_is_refused() -> None:
    with pytest.raises(GemtoolError, match=r"^tape: picture and sound .* ffmpeg -i"):
        data = film(
            "mpegts",
            "mpeg4",
            seconds=80,
            rate=25,
            sound=80,
            apart=True,
            container_options={"max_interleave_delta": "1"},
        )
        list(video_pieces(Pipe(data), MediaSettings(), "tape"))


def test_slides() -> None:
    # A frame every 20 seconds: each stands until the next.
    data = film(seconds=5, rate=1, pts=lambda number: 20 * number, codec="mpeg4")
    got = frames_of(data)
    assert len(got) in (81, 100)  # the last frame's length is the container's guess
    assert all(np.array_equal(got[0], frame) for frame in got[1:20])
    assert not np.array_equal(got[19], got[20])
    assert np.array_equal(got[20], got[39])


def test_timestamps_start_anywhere() -> None:
    data = film("mpegts", seconds=4, options=GOP, pts=lambda number: number + 90_000)
    got = frames_of(data)
    assert len(got) == 4
    assert all(map(np.array_equal, got, reference(data, Fraction(1))))


def test_joined_recordings() -> None:
    # MPEG-TS may be concatenated: time starts again in the middle.
    part = film("mpegts", seconds=4, options=GOP, sound=4)
    pieces = list(video_pieces(part + part, MediaSettings(), "x"))
    seconds = [piece.time[0] // 1_000_000 for piece in pieces if piece.kind == "video"]
    assert seconds == list(range(len(seconds)))
    assert len(seconds) in (8, 9)
    sound = [piece.time[0] // 1_000_000 for piece in pieces if piece.kind == "audio"]
    assert sound == sorted(set(sound))
    assert len(sound) in (8, 9)


def test_jump_of_three_hours() -> None:
    jumpy = film("matroska", "mpeg4", seconds=4, pts=lambda n: n + 270_000 * (n >= 30))
    assert len(frames_of(jumpy)) in (4, 5)


def test_raw_stream_without_timestamps() -> None:
    data = film("h264", seconds=4, options={**GOP, "bf": "0"})
    assert len(frames_of(data)) in (4, 5)


def test_timestamp() -> None:
    times = [timestamp(second) for second in (0, 59, 60, 3599, 3600, 37994)]
    assert times == ["00:00", "00:59", "01:00", "59:59", "1:00:00", "10:33:14"]


def test_not_video(capfd) -> None:
    for data in (b"", b"plain text\n" * 99, bytes(9999), b"\x1aE\xdf\xa3" + bytes(99)):
        with pytest.raises(CorruptInput, match=r"^film\.mkv: "):
            list(video_pieces(data, MediaSettings(), "film.mkv"))
    assert capfd.readouterr() == ("", "")


def test_truncated_video_is_found(capfd) -> None:
    faststart = {"movflags": "faststart"}
    for container, options in (("matroska", {}), ("mp4", faststart), ("avi", {})):
        data = film(container, "mpeg4", seconds=8, container_options=options)
        for part in (0.3, 0.6, 0.85):
            with pytest.raises(CorruptInput, match=r"^film: "):
                list(video_pieces(data[: int(len(data) * part)], MediaSettings(), "film"))
            with pytest.raises(CorruptInput, match=r"^film: "):
                list(video_pieces(Pipe(data[: int(len(data) * part)]), MediaSettings(), "film"))
    assert capfd.readouterr().out == ""


def test_index_at_the_end_needs_a_file(tmp_path: Path) -> None:
    data = film("mp4", "mpeg4", seconds=2)
    with pytest.raises(GemtoolError, match=r"^a\.mp4: .*ffmpeg -i .* -movflags \+faststart"):
        list(video_pieces(Pipe(data), SILENT, "a.mp4"))
    path = tmp_path / "a.mp4"
    path.write_bytes(data)
    expected = frames_of(path)
    for flags in ("faststart", "frag_keyframe+empty_moov"):
        streamable = film("mp4", "mpeg4", seconds=2, container_options={"movflags": flags})
        assert all(map(np.array_equal, frames_of(Pipe(streamable)), expected))


def test_container_cannot_reach_other_files(tmp_path: Path) -> None:
    secret = tmp_path / "secret.mkv"
    secret.write_bytes(film(seconds=1))
    for text in (
        f"ffconcat version 1.0\nfile '{secret}'\n",
        f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{secret}\n#EXT-X-ENDLIST\n",
    ):
        with pytest.raises(CorruptInput):
            list(video_pieces(text.encode(), SILENT, "x"))


def ffmpeg(*arguments: object) -> bytes:
    command = shutil.which("ffmpeg")
    if command is None:
        pytest.skip("the ffmpeg command is not installed")
    run = [command, "-v", "error", "-y", *map(str, arguments)]
    return subprocess.run(run, check=True, capture_output=True).stdout


def ffmpeg_frames(path: Path, rate: int = 25, place: str = "") -> np.ndarray:
    """Every 25th frame as the command scales it: uint8 [n, 224, 224, 3]."""
    chosen = rf"select=not(mod(n\,{rate})),scale=224:224:flags=area{place},format=rgb24"
    raw = ffmpeg("-i", path, "-vf", chosen, "-vsync", "0", "-f", "rawvideo", "-")
    return np.frombuffer(raw, np.uint8).reshape(-1, 224, 224, 3)


# The command's scaler takes chroma samples to lie in the middle of their pixels unless it is told
# what the stream says; for H.264, HEVC and MPEG that is: at the left.
LEFT = ":in_h_chr_pos=0:in_v_chr_pos=128"


@pytest.mark.parametrize(
    ("container", "codec", "place"),
    [
        ("webm", "libvpx-vp9", ""),
        ("matroska", "mjpeg", ""),
        ("mp4", "libx264", LEFT),
        ("matroska", "libx265", LEFT),
        ("mpegts", "mpeg2video", LEFT),
        ("avi", "mpeg4", LEFT),
    ],
)
def test_frames_are_those_of_the_ffmpeg_command(
    container: str, codec: str, place: str, tmp_path: Path
) -> None:
    path = tmp_path / "film"
    quiet = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    options = {"g": "30", "cpu-used": "8", **quiet}
    path.write_bytes(film(container, codec, seconds=6, options=options))
    ours, theirs = np.stack(frames_of(path)).astype(int), ffmpeg_frames(path, place=place)
    assert len(ours) == len(theirs) == 6
    assert np.abs(ours - theirs).max() <= 1
    if place:  # and not by chance
        assert np.abs(ours - ffmpeg_frames(path)).max() > 10


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("quarters", range(4))
def test_films_are_shown_upright(quarters: int, mirrored: bool, tmp_path: Path) -> None:
    """Clockwise quarter turns of a film that was mirrored from left to right before, or not."""
    plain = film("mp4", seconds=1)
    across = ((1, 0), (0, 1), (-1, 0), (0, -1))[quarters]
    down = ((0, 1), (-1, 0), (0, -1), (1, 0))[quarters]
    if mirrored:
        across = (-across[0], -across[1])
    entries = (across[0] << 16, across[1] << 16, 0, down[0] << 16, down[1] << 16, 0, 0, 0, 1 << 30)
    path = tmp_path / "turned.mp4"
    at = plain.index(b"tkhd") + 44  # the matrix in the track's header
    path.write_bytes(plain[:at] + struct.pack(">9i", *entries) + plain[at + 36 :])
    (flat,), (shown,) = frames_of(plain), frames_of(path)
    assert np.array_equal(shown, np.rot90(flat[:, ::-1] if mirrored else flat, -quarters))
    (theirs,) = ffmpeg_frames(path, place=LEFT)  # turned first, chroma and all, then scaled
    assert np.abs(shown.astype(int) - theirs).mean() < 1


def test_pictures_are_let_go(tmp_path: Path) -> None:
    path = tmp_path / "hd.mkv"
    source = "testsrc2=size=1280x720:rate=25:duration=6"
    ffmpeg("-f", "lavfi", "-i", source, "-c:v", "mpeg4", "-q:v", 9, path)
    script = (
        "import sys\n"
        "from gemtool.data.settings import MediaSettings\n"
        "from gemtool.data.video import video_pieces\n"
        "from gemtool.data.worker import peak_memory\n"
        "settings = MediaSettings(fps=25, timestamps=False)\n"
        "for number, piece in enumerate(video_pieces(sys.argv[1], settings, 'x')):\n"
        "    if number == 30: early = peak_memory()\n"
        "grown = peak_memory() - early\n"
        "assert grown < 10 << 20, grown\n"  # seven pictures; a hundred would be 138 MB
    )
    command = [sys.executable, "-c", script, str(path)]
    subprocess.run(command, env=command_environment(), check=True)


def test_real_film(real_media: Path) -> None:
    path = real_media / "film.mp4"
    pieces = list(video_pieces(path, MediaSettings(), "film.mp4"))
    assert outline(pieces) == "tva" * 6
    soft = sum(len(piece.payload) for piece in pieces if piece.payload is not None)
    assert soft == 6 * 256 + 5 * 25 + 8  # 5.28 s of picture, 5.312 s of sound
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    for second in range(6):
        scaled = frames[25 * second].reformat(224, 224, "rgb24", interpolation="AREA")
        assert np.array_equal(unpatchify(pieces[3 * second + 1].payload), scaled.to_ndarray())
