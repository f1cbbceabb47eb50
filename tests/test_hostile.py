"""Inputs that reach for the network or for other files, have no end, or claim to be huge."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest

from gemtool.data import inputs, worker
from gemtool.data.compressed import decompressed
from gemtool.data.documents import Part
from gemtool.data.inputs import read_documents
from gemtool.data.settings import MediaSettings
from gemtool.errors import CorruptInput, GemtoolError
from gemtool.stream.checked import Source
from tests.conftest import Command, command_environment
from tests.samples import NAMES, sample
from tests.test_video import film

SETTINGS = MediaSettings()


@pytest.fixture
def listener() -> Iterator[tuple[str, list[str]]]:
    """An address on the loopback interface, and who connected to it: nobody should."""
    seen: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        stop = threading.Event()

        def accept() -> None:
            while not stop.is_set():
                try:
                    connection, peer = server.accept()
                except TimeoutError:
                    continue
                seen.append(str(peer))
                connection.close()

        thread = threading.Thread(target=accept)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}", seen
        stop.set()
        thread.join()


def box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", 8 + len(content)) + kind + content


def referring(data: bytes, kind: bytes, target: bytes) -> bytes:
    """An MP4 whose samples lie in another file: the table of data references names `target`.

    The index is the last box, so no offset into the file changes; the boxes around the table grow.
    """
    at = data.index(b"dref") - 4
    size = int.from_bytes(data[at : at + 4], "big")
    entry = box(kind, bytes(4) + target + b"\0")  # flags 0: not in this file
    table = box(b"dref", struct.pack(">II", 0, 1) + entry)
    grown = bytearray(data[:at] + table + data[at + size :])
    for name in (b"moov", b"trak", b"mdia", b"minf", b"dinf"):
        start = data.index(name) - 4
        length = int.from_bytes(data[start : start + 4], "big") + len(table) - size
        grown[start : start + 4] = length.to_bytes(4, "big")
    return bytes(grown)


def reaching(target: str) -> dict[str, bytes]:
    """Files, by name, of every kind that can tell its reader to open something else."""
    url = target if "://" in target else f"file://{target}"
    mp4 = film("mp4", "mpeg4", seconds=1)
    texts = {
        "list.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{target}\n#EXT-X-ENDLIST\n",
        "key.m3u8": (
            f'#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXT-X-KEY:METHOD=AES-128,URI="{url}"\n'
            f"#EXTINF:9,\n{url}\n#EXT-X-ENDLIST\n"
        ),
        "master.m3u8": f"#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=9\nmaster.m3u8\n{url}\n",
        "concat.ffconcat": f"ffconcat version 1.0\nfile '{target}'\nfile 'concat.ffconcat'\n",
        "session.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
        "m=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
        "manifest.mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" '
        f'type="static"><Period><AdaptationSet mimeType="video/mp4"><Representation id="1">'
        f"<BaseURL>{url}</BaseURL></Representation></AdaptationSet></Period></MPD>",
        "play.asx": f'<asx version="3.0"><entry><ref href="{url}"/></entry></asx>',
        "play.smil": f'<smil><body><video src="{url}"/></body></smil>',
        "picture.svg": '<svg xmlns="http://www.w3.org/2000/svg" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink"><image xlink:href="{url}"/></svg>',
        "rtsp.txt": f"rtsptext\nrtsp://{target}/x\n",
        "print.eps": f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n({target}) run\n",
    }
    files = {name: text.encode() for name, text in texts.items()}
    files["url.mp4"] = referring(mp4, b"url ", url.encode())
    files["alias.mov"] = referring(mp4, b"alis", bytes(150) + target.encode())
    return files


@pytest.mark.parametrize("modality", ["video", "audio", "image"])
def test_nothing_connects_and_no_other_file_is_read(
    gemtool: Command, tmp_path: Path, listener: tuple[str, list[str]], modality: str
) -> None:
    address, seen = listener
    secret = tmp_path / "secret.mkv"
    secret.write_bytes(film(seconds=1))
    for target in (f"http://{address}/x.mp4", str(secret)):
        files = reaching(target)
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
        named = [*files, f"http://{address}/x.mp4", f"rtsp://{address}/x", f"concat:{secret}"]
        done = gemtool(
            "tokenize", "--keep-going", "--count", "--modality", modality, *named, check=False
        )
        lines = done.stderr.decode().splitlines()
        assert done.returncode == 1
        *documents, total = map(json.loads, done.stdout.splitlines())
        # A reader that takes an MP4's own bytes for the samples that lie elsewhere reads no other.
        assert {entry["doc"] for entry in documents} <= {"url.mp4", "alias.mov"}
        assert len(documents) + sum(line.endswith("; left out") for line in lines) == len(named)
        assert total["text"] <= 100
    assert not seen


def test_a_listener_that_is_called_knows(listener: tuple[str, list[str]]) -> None:
    address, seen = listener
    host, _, port = address.partition(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.recv(1)
    assert len(seen) == 1


def test_records_name_files_only(
    gemtool: Command, tmp_path: Path, listener: tuple[str, list[str]]
) -> None:
    address, seen = listener
    kinds = ("image", "audio", "video")
    lines = [json.dumps({"parts": [{kind: f"http://{address}/x"}]}) for kind in kinds]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    done = gemtool("tokenize", "--keep-going", "a.jsonl", "-o", "out", check=False)
    assert done.returncode == 1
    assert done.stderr.count(b"no such file or directory; left out") == 3
    assert not seen


# Without an end


def feed(command: list[str], block: bytes, cwd: Path) -> tuple[int, bytes, int]:
    """Writes blocks to a command until it has enough: exit code, stderr, MiB that it took."""
    tool = subprocess.Popen(
        [sys.executable, "-m", "gemtool", *command],
        stdin=subprocess.PIPE, stderr=subprocess.PIPE, cwd=cwd, env=command_environment(),
    )  # fmt: skip
    assert tool.stdin is not None
    assert tool.stderr is not None
    taken = 0
    try:
        while taken < 2 << 30:
            taken += os.write(tool.stdin.fileno(), block)
    except BrokenPipeError:
        pass
    finally:
        tool.stdin.close()
    with tool.stderr:
        said = tool.stderr.read()
    return tool.wait(), said, taken >> 20


@pytest.mark.parametrize(
    ("modality", "code", "complaint"),
    [
        ("auto", 3, b"binary data that is no known image, audio or video"),
        ("image", 1, b"has more than 512 MiB, for an image"),
        ("audio", 3, b"no sound or video in a known format"),
        ("video", 3, b"no sound or video in a known format"),
    ],
)
def test_endless_zeros(tmp_path: Path, modality: str, code: int, complaint: bytes) -> None:
    command = ["tokenize", "--modality", modality, "-o", "out"]
    got, said, taken = feed(command, bytes(1 << 20), tmp_path)
    assert got == code
    assert complaint in said
    assert len(said.splitlines()) == 1
    assert taken <= (514 if modality == "image" else 20)


def test_an_endless_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert inputs.LONGEST_LINE == 256 << 20
    monkeypatch.setattr(inputs, "LONGEST_LINE", 100_000)
    path = tmp_path / "a.jsonl"
    good = b'{"text": "good"}\n'
    whole = b'{"text": "%s"}\n' % (b"x" * (100_000 - 13))
    assert len(whole) == 100_000
    path.write_bytes(good + whole + b'{"text": "%s"}\n' % (b"x" * 250_000) + good)
    first, second, third, last = read_documents([str(path)], SETTINGS)
    assert [len(b"".join(part.text or b"" for part in d.parts)) for d in (first, second, last)] == [
        4, 100_000 - 13, 4,
    ]  # fmt: skip
    with pytest.raises(CorruptInput, match=r"a\.jsonl: line 3: longer than 0 MiB; long texts are"):
        list(third.parts)


def test_an_endless_picture_file() -> None:
    class Endless(worker._Pipe):
        def __init__(self) -> None:
            pass

        def read(self, size: int) -> bytes:
            return bytes(size)

    with pytest.raises(GemtoolError, match="x: has more than 512 MiB, for an image"):
        worker._read_all(Endless(), "x")


# Huge claims


def test_a_window_of_gigabytes() -> None:
    # A zstd frame asks its reader to keep 2^41 bytes of what came before.
    data = b"\x28\xb5\x2f\xfd\x00\xf8" + bytes(100)
    with pytest.raises(CorruptInput, match=r"^x: damaged or truncated zstd: "):
        decompressed(Source(BytesIO(data)), "zstd", "x").read()


def claimed_size(name: str, side: int) -> bytes:
    """A small picture or film whose header says that it has `side` pixels a side."""
    data = bytearray(sample(name))
    match name:
        case "jpg":
            at = data.index(b"\xff\xc0") + 5
            data[at : at + 4] = struct.pack(">HH", side, side)
        case "gif":
            data[6:10] = struct.pack("<HH", side, side)
            at = data.index(b"\x2c") + 5
            data[at : at + 4] = struct.pack("<HH", side, side)
        case "bmp":
            data[18:26] = struct.pack("<ii", side, side)
        case "jp2":
            at = data.index(b"ihdr") + 4
            data[at : at + 8] = struct.pack(">II", side, side)
    return bytes(data)


@pytest.mark.parametrize("name", ["jpg", "gif", "bmp", "jp2"])
def test_claims_of_a_header_are_not_believed(gemtool: Command, tmp_path: Path, name: str) -> None:
    (tmp_path / f"a.{name}").write_bytes(claimed_size(name, 60_000))
    done = gemtool("tokenize", f"a.{name}", "-o", "out", check=False)
    assert done.returncode == 1
    (line,) = done.stderr.decode().splitlines()
    assert f"a.{name}: the image has more than 100,000,000 pixels" in line


# Every format through a pipe (what it holds as a file: test_formats)


def contents(parts: Iterator[Part]) -> list[tuple[object, ...]]:
    return [
        (p.kind, p.text, p.time, None if p.payload is None else p.payload.tobytes()) for p in parts
    ]


# An M4A has its index at the end (test_formats).
@pytest.mark.parametrize("name", sorted({*NAMES} - {"m4a"}))
def test_a_named_pipe_is_the_file(tmp_path: Path, name: str) -> None:
    try:
        data = sample(name)
    except LookupError as problem:
        pytest.skip(str(problem))
    file, pipe = tmp_path / f"a.{name}", tmp_path / f"b.{name}"
    file.write_bytes(data)
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(data,))
    writer.start()
    got, expected = (
        [contents(document.parts) for document in read_documents([str(path)], SETTINGS)]
        for path in (pipe, file)
    )
    writer.join()
    if name == "mp3":  # libav finds the padding at the end only if it knows the file's size
        assert 0 < got[0][-1][2][1] - expected[0][-1][2][1] < 50_000
        got = [got[0][: len(expected[0])]]
    assert got == expected
    assert any(got)
