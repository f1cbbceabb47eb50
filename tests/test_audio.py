"""Log-mel against another implementation, and sound out of real containers."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import wave
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemtool.data import audio
from gemtool.data.audio import SoundTrack, audio_pieces
from gemtool.data.logmel import SAMPLE_RATE, LogMel, mel_filters
from gemtool.data.settings import MediaSettings
from gemtool.errors import CorruptInput, GemtoolError

DEFAULT = MediaSettings()


def chirp(seconds: float, rate: int = SAMPLE_RATE) -> np.ndarray:
    time = np.arange(int(seconds * rate)) / rate
    noise = np.random.default_rng(0).standard_normal(len(time))
    return (0.3 * np.sin(2 * np.pi * (200 + 300 * time) * time) + 0.01 * noise).astype(np.float32)


def encoded(
    samples: np.ndarray, rate: int, container: str, codec: str, layout: str = "mono"
) -> bytes:
    file = io.BytesIO()
    channels = {"mono": 1, "stereo": 2, "5.1": 6}[layout]
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, layout=layout)
        planar = np.ascontiguousarray(np.repeat(samples[np.newaxis], channels, 0))
        for start in range(0, len(samples), 1000):
            part = np.ascontiguousarray(planar[:, start : start + 1000])
            frame = av.AudioFrame.from_ndarray(part, "fltp", layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def wav(samples: np.ndarray, rate: int = SAMPLE_RATE) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as output:
        output.setparams((1, 2, rate, 0, "NONE", ""))
        output.writeframes((samples * 32767).round().astype("<i2").tobytes())
    return file.getvalue()


def features(source: object, settings: MediaSettings = DEFAULT) -> np.ndarray:
    return np.concatenate([piece.payload for piece in audio_pieces(source, settings, "x")])


@pytest.mark.parametrize("rate", [25, 32])
def test_log_mel_is_that_of_scipy(rate: int) -> None:
    scipy_signal = pytest.importorskip("scipy.signal", reason="scipy is not installed")
    samples = chirp(3)
    hop = SAMPLE_RATE // (4 * rate)
    mel = LogMel(rate)
    ours = np.concatenate(list(mel.push(samples)))
    assert ours.shape == (3 * rate, 4, 80)
    assert ours.dtype == np.float16
    assert mel.finish() is None

    padded = np.concatenate([np.zeros(400 - hop), samples.astype(np.float64)])
    window = scipy_signal.get_window("hann", 400, fftbins=True)
    transform = scipy_signal.ShortTimeFFT(window, hop, SAMPLE_RATE, fft_mode="onesided")
    # Slice p is centred on sample p * hop: slices whose window starts at a multiple of hop.
    power = np.stack(
        [
            np.abs(np.fft.rfft(padded[start : start + 400] * window)) ** 2
            for start in range(0, len(padded) - 399, hop)
        ]
    )
    centre = transform.stft(padded, p0=0, p1=(len(padded) - 200) // hop + 1, k_offset=200)
    theirs = np.abs(centre.T[: len(power)]) ** 2
    assert np.allclose(theirs, power)  # the slices are where we think they are

    def hertz(mels: np.ndarray) -> np.ndarray:
        return np.where(mels < 15, mels * 200 / 3, 1000 * 6.4 ** ((mels - 15) / 27))

    top = 15 + 27 * np.log(8) / np.log(6.4)
    edges = hertz(np.linspace(0, top, 82))
    grid = np.arange(201) * 40.0
    filters = np.stack(
        [
            np.interp(grid, edges[i : i + 3], [0, 2 / (edges[i + 2] - edges[i]), 0])
            for i in range(80)
        ]
    )
    expected = (np.log10(np.maximum(theirs @ filters.T, 1e-10)) + 4) / 4
    assert np.abs(ours.reshape(-1, 80) - expected).max() < 1e-3


def test_mel_filters() -> None:
    filters = mel_filters()
    assert filters.shape == (80, 201)
    assert np.all(filters.any(axis=1))
    # Known values of the filter bank with norm="slaney", htk=False at 16 kHz and 400 points.
    assert filters[0, 1] == pytest.approx(0.02486259, abs=1e-7)
    assert filters[79, 197] == pytest.approx(0.00150, abs=2e-4)
    peaks = filters.argmax(axis=1)
    assert np.all(np.diff(peaks) >= 0)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([25, 32]),
    st.integers(0, 3 * SAMPLE_RATE),
    st.lists(st.integers(0, 20000), max_size=8),
)
def test_chunks_do_not_matter(rate: int, length: int, cuts: list[int]) -> None:
    samples = chirp(3)[:length]
    whole = LogMel(rate)
    expected = [*whole.push(samples), *filter(lambda x: x is not None, [whole.finish()])]
    streamed, mel = [], LogMel(rate)
    for cut in cuts:
        streamed += mel.push(samples[:cut])
        samples = samples[cut:]
    streamed += mel.push(samples)
    last = mel.finish()
    streamed += [] if last is None else [last]
    assert sum(map(len, streamed)) == -(-length * rate // SAMPLE_RATE)
    assert len(streamed) == len(expected)
    for a, b in zip(streamed, expected, strict=True):
        assert a.tobytes() == b.tobytes()


def test_silence_and_the_tail() -> None:
    mel = LogMel(25)
    assert list(mel.push(np.zeros(700, np.float32))) == []
    last = mel.finish()
    assert last.shape == (2, 4, 80)
    assert np.all(last == -1.5)


def test_a_piece_a_second() -> None:
    data = wav(chirp(2.5))
    for rate in (25, 32):
        pieces = list(audio_pieces(data, MediaSettings(audio_rate=rate), "talk.wav"))
        counts = [len(piece.payload) for piece in pieces]
        assert counts == [rate, rate, -(-rate // 2)]
        assert [piece.time for piece in pieces] == [
            (0, 1_000_000),
            (1_000_000, 2_000_000),
            (2_000_000, 2_500_000),
        ]
        assert {piece.kind for piece in pieces} == {"audio"}
        assert pieces[0].meta == {"source": "talk.wav"}


def test_samples_arrive_unchanged() -> None:
    samples = (chirp(2) * 32767).round() / np.float32(32768)
    data = wav(samples * 32768 / 32767)
    expected = np.concatenate(list(LogMel(25).push(samples.astype(np.float32))))
    assert np.abs(features(data) - expected).max() < 2e-3


@pytest.mark.parametrize(
    ("container", "codec", "rate", "layout"),
    [
        ("wav", "pcm_s16le", 44100, "stereo"),
        ("flac", "flac", 48000, "stereo"),
        ("mp3", "libmp3lame", 44100, "mono"),
        ("ogg", "libopus", 48000, "mono"),
        ("matroska", "aac", 48000, "5.1"),
        ("mp4", "aac", 32000, "stereo"),
        ("mpegts", "mp2", 48000, "stereo"),
    ],
)
def test_containers_and_codecs(container: str, codec: str, rate: int, layout: str) -> None:
    try:
        av.Codec(codec, "w")
    except av.codec.UnknownCodecError:
        pytest.skip(f"this build of libav has no encoder {codec}")
    data = encoded(chirp(3.2, rate), rate, container, codec, layout)
    got = features(data)
    assert abs(len(got) - 80) <= 2  # 3.2 s; codecs pad
    expected = np.concatenate(list(LogMel(25).push(chirp(3))))
    # The loudest band of each frame, in the middle of the recording, is the chirp's.
    ours = got[25:70].reshape(-1, 80).argmax(1)
    theirs = expected[25:70].reshape(-1, 80).argmax(1)
    assert np.mean(np.abs(ours - theirs) <= 2) > 0.9


def test_pipe_equals_file(tmp_path) -> None:
    path = tmp_path / "a.ogg"
    path.write_bytes(encoded(chirp(4, 48000), 48000, "ogg", "libopus"))
    reader, writer = os.pipe()

    def feed() -> None:
        with open(writer, "wb", buffering=0) as out:  # noqa: PTH123 (a descriptor)
            data = path.read_bytes()
            for start in range(0, len(data), 777):
                out.write(data[start : start + 777])

    thread = threading.Thread(target=feed)
    thread.start()
    with open(reader, "rb") as pipe:  # noqa: PTH123
        piped = features(pipe)
    thread.join()
    assert np.array_equal(piped, features(path))


def test_gap_in_the_timestamps() -> None:
    samples = chirp(3)
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as output:
        stream = output.add_stream("pcm_s16le", rate=SAMPLE_RATE, layout="mono")
        for at in range(0, 3 * SAMPLE_RATE, 1600):
            part = (samples[np.newaxis, at : at + 1600] * 32767).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(part, "s16", "mono")
            frame.sample_rate, frame.time_base = SAMPLE_RATE, Fraction(1, SAMPLE_RATE)
            # Half a second is missing after the first, five seconds after the second.
            gap = 8000 if at < 2 * SAMPLE_RATE else 8000 + 5 * SAMPLE_RATE
            frame.pts = at + (gap if at >= SAMPLE_RATE else 0)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    pieces = list(audio_pieces(file.getvalue(), DEFAULT, "x"))
    assert [(piece.time[0] // 1_000_000, piece.time[1] / 1e6) for piece in pieces] == [
        (0, 1.0),
        (1, 2.0),
        (2, 2.5),
        (7, 8.0),
        (8, 8.5),
    ]
    assert np.all(pieces[1].payload[2:12] == -1.5)  # silence where nothing was
    assert pieces[1].payload[14:].max() > 0
    assert np.all(pieces[3].payload[:12] == -1.5)


def test_memory_does_not_grow() -> None:
    script = (
        "import wave, os, threading, numpy as np\n"
        "from gemtool.data.audio import audio_pieces\n"
        "from gemtool.data.settings import MediaSettings\n"
        "from gemtool.data.worker import peak_memory\n"
        "r, w = os.pipe()\n"
        "def feed():\n"
        "    with open(w, 'wb') as f:\n"
        "        with wave.open(f, 'wb') as o:\n"
        "            o.setparams((1, 2, 16000, 16000 * 900, 'NONE', ''))\n"
        "            block = np.random.default_rng(0).integers(-9, 9, 960000).astype('<i2')\n"
        "            for _ in range(15): o.writeframesraw(block.tobytes())\n"
        "threading.Thread(target=feed).start()\n"
        "n = 0\n"
        "for piece in audio_pieces(open(r, 'rb'), MediaSettings(), 'x'):\n"
        "    n += 1\n"
        "    if n == 100: early = peak_memory()\n"
        "assert n == 900, n\n"
        "grown = peak_memory() - early\n"
        "assert grown < 8 << 20, grown\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_not_sound(capfd) -> None:
    cases = [b"", b"hello, this is plain text\n" * 200, bytes(5000)]
    cases.append(b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n")
    cases.append(b"ffconcat version 1.0\nfile '/etc/passwd'\n")
    for data in cases:
        with pytest.raises(CorruptInput, match=r"^talk\.wav: no sound or video"):
            list(audio_pieces(data, DEFAULT, "talk.wav"))
    assert capfd.readouterr() == ("", "")


def test_truncated_sound_is_found() -> None:
    for container, codec in (("wav", "pcm_s16le"), ("flac", "flac"), ("matroska", "aac")):
        data = encoded(chirp(8, 48000), 48000, container, codec)
        assert len(features(data)) >= 200
        with pytest.raises(CorruptInput, match=r"^a: .*truncated"):
            list(audio_pieces(data[: len(data) // 2], DEFAULT, "a"))


def test_damaged_packets_are_left_out(capsys) -> None:
    data = bytearray(encoded(chirp(8, 48000), 48000, "matroska", "flac"))
    noise = np.random.default_rng(1)
    for at in range(len(data) // 3, len(data) // 2, 3000):
        data[at : at + 40] = noise.bytes(40)
    try:
        count = len(features(bytes(data)))
    except CorruptInput as error:
        assert str(error).startswith("x: ")
    else:
        assert 100 < count <= 201


def test_video_without_sound_is_refused() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as output:
        stream = output.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 32
        for _ in range(5):
            output.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), "rgb24"))
            )
        output.mux(stream.encode(None))
    with pytest.raises(CorruptInput, match=r"^mute: holds no sound"):
        list(audio_pieces(file.getvalue(), DEFAULT, "mute"))


def test_index_at_the_end_on_a_pipe() -> None:
    data = encoded(chirp(2, 48000), 48000, "mp4", "aac")

    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

    with pytest.raises(GemtoolError, match=r"in\.mp4: the index.*ffmpeg -i .*faststart"):
        list(audio_pieces(Pipe(data), DEFAULT, "in.mp4"))
    assert len(features(data)) >= 50


def test_floating_point_garbage_stays_finite() -> None:
    samples = chirp(1)
    samples[100:200] = np.inf
    samples[300:400] = np.nan
    samples[500:600] = 1e38
    assert np.all(np.isfinite(features(encoded(samples, SAMPLE_RATE, "wav", "pcm_f32le"))))


def test_sound_track_aligns_to_an_origin() -> None:
    data = wav(chirp(2))
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.audio[0]
        track = SoundTrack(stream, 25, 3600, "x", origin=Fraction(-1, 2))
        seconds = [s for packet in container.demux(stream) for s in track.push(packet)]
        seconds += track.finish()
    assert [(s.index, s.samples) for s in seconds] == [(0, 16000), (1, 16000), (2, 8000)]
    assert np.all(seconds[0].features[:12] == -1.5)


@pytest.mark.parametrize("rate", [32_000, 44_100, 48_000])
def test_it_does_not_matter_how_many_frames_are_resampled_together(
    monkeypatch: pytest.MonkeyPatch, rate: int
) -> None:
    data = encoded(chirp(5, rate), rate, "matroska", "mp2", "stereo")
    together = features(data)
    monkeypatch.setattr(audio, "_GATHERED", 1)
    assert features(data).tobytes() == together.tobytes()


def test_a_second_that_waits_to_be_resampled_can_be_had() -> None:
    data = encoded(chirp(3, 44_100), 44_100, "matroska", "pcm_s16le")
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.audio[0]
        track = SoundTrack(stream, 25, 3600, "x")
        packets = [packet for packet in container.demux(stream) if packet.size]
        # 45 packets of 1,000 samples are more than a second, 89 more than two.
        pushed = [s.index for packet in packets[:89] for s in track.push(packet)]
        assert (pushed, track.position) == ([0], 1)
        assert [s.index for s in track.catch_up()] == [1]
        assert (list(track.catch_up()), track.position) == ([], 2)


def test_recorded_speech(real_media) -> None:
    recordings = sorted(real_media.glob("speech-*.wav"))
    if not recordings:
        pytest.skip("the media folder holds no recorded speech")
    for path in recordings:
        with wave.open(str(path)) as file:
            seconds = file.getnframes() / file.getframerate()
        got = features(path)
        assert len(got) == int(np.ceil(seconds * 25))
        assert 2 < seconds < 10
        assert got.std() > 0.2  # speech: neither silence nor noise
