"""The worker that decodes media: what hostile files do to it never reaches the tool."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import wave
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from PIL import Image

from gemtool.data import decoders, wire, worker
from gemtool.data.decoders import Decoders, Job
from gemtool.data.image import image_pieces
from gemtool.data.pieces import Piece
from gemtool.data.settings import MediaSettings
from gemtool.data.wire import Channel, WireError, piece_message, read_piece
from gemtool.errors import CorruptInput
from tests.conftest import Command, command_environment

SETTINGS = MediaSettings()

# A worker that does to itself what a name of a file asks for, as a hostile file might.
HOSTILE = """
import ctypes, os, socket, sys, time
from gemtool import log
from gemtool.data import worker
from gemtool.data.pieces import Piece
from gemtool.errors import CorruptInput

def front_end(source, settings, name):
    if name.startswith("late"):
        yield Piece("text", text="first")
    what = name.split("-")[-1]
    if what == "crash": ctypes.string_at(0)
    if what == "abort": os.abort()
    if what == "exit": os._exit(7)
    if what == "hang": time.sleep(99)
    if what == "spin":
        while True: pass
    if what == "slow":
        for _ in range(6): time.sleep(0.5); yield Piece("text", text="slow")
    if what == "memory": held = bytearray(2 << 30)
    if what == "much": b"x" * (500 << 20)
    if what == "bug": raise ZeroDivisionError("of our own making")
    if what == "open": open("/etc/passwd").read()
    if what == "connect": socket.socket()
    if what == "corrupt": raise CorruptInput(f"{name}: damaged")
    if what == "warn": log.warning(f"{name}: careful")
    if what == "print": print("libav: noise", file=sys.stderr); os.write(2, b"noise"); print("x")
    if what == "read": yield Piece("text", text=source.read(5).decode())
    if what == "gulp": yield Piece("text", text=str(len(source.read(5 << 20))))
    if what == "raw": channel.sock.sendall(b"x" * 99)
    if what == "huge": channel.sock.sendall(b"\\xff" * 8)
    if what == "lies": channel.send({"type": "piece", "kind": "image", "shape": [9, 9]}, b"abc")
    if what == "astray": channel.send({"type": "dance"})
    if what == "pid": yield Piece("text", text=str(os.getpid()))

def load(kind):
    return front_end

class Kept(worker.Channel):
    def __init__(self, sock):
        global channel
        super().__init__(sock)
        channel = self

worker.Channel = Kept
worker._load = load
worker.main()
"""


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders, "_START", f"import sys; sys.path[:] = sys.argv[1:]{HOSTILE}")
    monkeypatch.setattr(decoders, "PATIENCE", 2.0)


@contextmanager
def handed(file: Any, regular: bool) -> Iterator[tuple[BinaryIO, bool]]:
    yield file, regular


@contextmanager
def opened(path: str | Path) -> Iterator[tuple[BinaryIO, bool]]:
    with open(path, "rb") as file:  # noqa: PTH123
        yield file, True


def pieces(pool: Decoders, name: str, kind: str = "image") -> list[Piece]:
    return list(pool.pieces(Job(kind, name, SETTINGS, opened(os.devnull))))


def texts(pool: Decoders, name: str) -> list[str | None]:
    return [piece.text for piece in pieces(pool, name)]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("a-crash", "its decoder crashed (SIGSEGV)"),
        ("a-abort", "its decoder crashed (SIGABRT)"),
        ("a-exit", "its decoder ended unexpectedly (status 7)"),
        ("a-hang", "its decoder got nowhere in 2 seconds"),
        ("a-spin", "its decoder got nowhere in 2 seconds"),
        ("a-memory", "needs more than the 768 MiB"),
        ("a-bug", "its decoder stumbled (ZeroDivisionError: of our own making)"),
        ("a-open", "Too many open files"),
        ("a-connect", "Too many open files"),
        ("a-corrupt", "a-corrupt: damaged"),
        ("a-raw", "a message is larger than any can be"),
        ("a-huge", "a message is larger than any can be"),
        ("a-lies", "a piece is malformed"),
        ("a-astray", "went astray"),
    ],
)
def test_whatever_happens_is_an_error_of_the_file(
    hostile: None, name: str, what: str, capfd: Any
) -> None:
    with Decoders() as pool:
        for full in (name, f"late-{name}", name):
            with pytest.raises(CorruptInput) as problem:
                pieces(pool, full)
            assert str(problem.value).startswith(f"{full}: ")
            assert what in str(problem.value)
        assert texts(pool, "late-fine") == ["first"]
    assert capfd.readouterr() == ("", "")


def test_slow_progress_is_no_hang(hostile: None) -> None:
    with Decoders() as pool:
        assert texts(pool, "a-slow") == ["slow"] * 6


def test_messages_come_where_they_belong(hostile: None, capfd: Any) -> None:
    with Decoders(2) as pool:
        first, second = (
            pool.pieces(Job("image", name, SETTINGS, opened(os.devnull)))
            for name in ("a-print", "b-warn")
        )
        time.sleep(0.5)
        assert list(first) == []
        assert capfd.readouterr() == ("", "")  # what libraries print is shown to nobody
        assert list(second) == []
        assert capfd.readouterr() == ("", "gemtool: warning: b-warn: careful\n")


def test_a_worker_serves_many_files_until_one_hurts_it(hostile: None) -> None:
    with Decoders() as pool:
        first = texts(pool, "a-pid")
        assert texts(pool, "b-pid") == first
        with pytest.raises(CorruptInput):
            pieces(pool, "a-corrupt")  # a damaged file is nothing unusual
        assert texts(pool, "b-pid") == first
        with pytest.raises(CorruptInput):
            pieces(pool, "a-crash")
        assert texts(pool, "c-pid") != first
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(int(first[0] or 0), 0)
            time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="where a child counts its parent's memory")
def test_the_memory_of_the_tool_retires_no_worker(hostile: None) -> None:
    # Linux counts the peak of the process that forked in that of the one that it became.
    held = np.ones(decoders.MEMORY, np.uint8)
    with Decoders() as pool:
        first = texts(pool, "a-pid")
        assert texts(pool, "b-pid") == first
    assert held[-1] == 1


def test_a_worker_that_used_much_memory_is_replaced(hostile: None) -> None:
    with Decoders() as pool:
        first = texts(pool, "a-pid")
        assert texts(pool, "a-much") == []
        assert texts(pool, "b-pid") != first


def test_a_waiting_pipe_is_no_hang(hostile: None) -> None:
    reader, writer = os.pipe()

    def feed() -> None:
        time.sleep(3)  # more than the worker's limit
        os.write(writer, b"hello")
        os.close(writer)

    thread = threading.Thread(target=feed)
    thread.start()
    with Decoders() as pool, open(reader, "rb") as file:  # noqa: PTH123
        job = Job("audio", "x-read", SETTINGS, handed(file, False), waits=True)
        assert [piece.text for piece in pool.pieces(job)] == ["hello"]
    thread.join()


def test_a_pipe_is_read_in_bounded_steps(hostile: None) -> None:
    # libav asks for a long index at once.
    with Decoders() as pool:
        source = handed(BytesIO(bytes(3 << 20)), False)
        job = Job("audio", "x-gulp", SETTINGS, source, waits=True)
        assert [piece.text for piece in pool.pieces(job)] == [str(1 << 20)]


def test_what_is_not_wanted_is_not_decoded_for_ever(hostile: None) -> None:
    with Decoders() as pool:
        for _ in range(3):
            started = pool.pieces(Job("image", "late-slow", SETTINGS, opened(os.devnull)))
            assert next(started).text == "first"
            started.close()
        assert texts(pool, "a-slow") == ["slow"] * 6


def test_systems_without_what_linux_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", None)
    worker.die_with_parent()
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert decoders._processors() == os.cpu_count()


@pytest.mark.skipif(sys.platform != "linux", reason="macOS ends it at its next message")
def test_the_worker_dies_with_the_tool(hostile: None) -> None:
    script = (
        "import sys, time, os\n"
        "from gemtool.data import decoders\n"
        "worker = decoders._Worker()\n"
        "print(worker._process.pid, flush=True)\n"
        "time.sleep(99)\n"
    )
    tool = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env=command_environment()
    )
    assert tool.stdout is not None
    with tool.stdout:
        worker = int(tool.stdout.readline())
    time.sleep(0.5)
    tool.send_signal(signal.SIGKILL)
    tool.wait()
    for _ in range(100):
        if (
            not Path(f"/proc/{worker}").exists()
            or b"\0" not in Path(f"/proc/{worker}/cmdline").read_bytes()
        ):
            return
        time.sleep(0.05)
    raise AssertionError("the worker outlived the tool")


def test_pieces_travel_unchanged() -> None:
    ours, theirs = socket.socketpair()
    sent = [
        Piece("text", text="a\ud800b", time=(0, 5), meta={"x": [1, None, "é"]}),
        Piece("image", np.arange(24, dtype=np.uint8).reshape(2, 3, 4)[:, ::-1]),
        Piece("audio", np.linspace(-1, 1, 9, dtype=np.float16).reshape(3, 3), time=(7, 8)),
        Piece("video", np.zeros((0, 14, 14, 3), np.uint8)),
    ]
    with ours, theirs:
        for piece in sent:
            Channel(ours).send(*piece_message(piece))
            message = Channel(theirs).receive()
            assert message is not None
            got = read_piece(*message)
            assert (got.kind, got.text, got.time, got.meta) == (
                piece.kind, piece.text, piece.time, piece.meta,
            )  # fmt: skip
            if piece.payload is not None:
                assert got.payload is not None
                assert got.payload.dtype == piece.payload.dtype
                assert np.array_equal(got.payload, piece.payload)
        ours.close()
        assert Channel(theirs).receive() is None


def test_small_messages_travel_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "_TOGETHER", 1000)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        sender, receiver = Channel(ours), Channel(theirs, ahead=True)

        def came() -> list[tuple[Any, int]]:
            found = []
            with suppress(BlockingIOError):
                while message := receiver.receive():
                    found.append((message[0]["n"], len(message[1])))
            return found

        sender.post({"n": 0}, b"a")
        sender.post({"n": 1}, b"bc")
        assert came() == []
        sender.send({"n": 2})
        assert came() == [(0, 1), (1, 2), (2, 0)]
        sender.post({"n": 3}, bytes(500))
        sender.post({"n": 4}, bytes(600))  # too much to wait
        assert came() == [(3, 500), (4, 600)]
        sender.post({"n": 5}, bytes(5000))
        assert came() == [(5, 5000)]
        monkeypatch.setattr(wire, "_PATIENCE", 0)
        sender.post({"n": 6})
        assert came() == [(6, 0)]


@pytest.mark.parametrize(
    "data",
    [b"\x05", b"\x05\0\0\0\0\0\0\0nope!", b"\x02\0\0\0\0\0\0\0[]", b"\x02\0\0\0\x09\0\0\0{}"],
)
def test_half_messages_are_noticed(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            ours.sendall(data)
        with pytest.raises(WireError):
            Channel(theirs).receive()


# With real files


def photo(path: Path, number: int) -> Path:
    noise = np.random.default_rng(number)
    pixels = noise.integers(0, 256, (6, 8 + number % 3, 3), np.uint8)
    Image.fromarray(pixels).resize((400, 300)).save(path)
    return path


@pytest.mark.parametrize("count", [1, 2, 5])
def test_order_and_bytes_do_not_depend_on_the_workers(tmp_path: Path, count: int) -> None:
    files = [photo(tmp_path / f"{i:02}.png", i) for i in range(12)]
    files[5].write_bytes(files[5].read_bytes()[:200])
    with Decoders(count) as pool:
        pool.count = count  # even where there are fewer processors
        jobs = [pool.pieces(Job("image", path.name, SETTINGS, opened(path))) for path in files]
        for i, (path, job) in enumerate(zip(files, jobs, strict=True)):
            if i == 5:
                with pytest.raises(CorruptInput, match=r"^05\.png: damaged or truncated image"):
                    list(job)
                continue
            for ours, theirs in zip(job, image_pieces(path, SETTINGS, path.name), strict=True):
                assert ours.meta == theirs.meta
                assert np.array_equal(ours.payload, theirs.payload)


def test_decoding_ahead_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "long.png"
    Image.new("RGB", (30_000, 9), "red").save(path)  # 118 tiles of 150 kB
    with Decoders(1) as pool:
        jobs = [pool.pieces(Job("image", "long", SETTINGS, opened(path))) for _ in range(2)]
        for job in jobs:
            for _ in job:
                assert pool._buffered <= decoders._AHEAD + (1 << 20)
        assert pool._buffered == 0


def test_threads_change_no_byte(gemtool: Command, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(8):
        photo(folder / f"{number}.jpg", number)
    with wave.open(str(folder / "3.wav"), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(bytes(64_000))
    (folder / "4.txt").write_text("between\n")
    (folder / "5.jpg").write_bytes(b"\xff\xd8\xff damaged")
    (folder / "9.jsonl").write_text(
        '{"parts": [{"image": "1.jpg"}, {"text": "a"}, {"audio": "3.wav"}, {"image": "2.jpg"}]}\n'
    )
    runs = [
        gemtool("tokenize", "in", "--no-pg", "--keep-going", *options, check=False)
        for options in ([], ["-@", 2], ["-@", 5])
    ]
    assert [run.returncode for run in runs] == [1, 1, 1]
    assert len({(run.stdout, run.stderr) for run in runs}) == 1
    assert len(runs[0].stderr.splitlines()) == 2


def test_a_folder_of_modules_is_not_trusted(gemtool: Command, tmp_path: Path) -> None:
    # Whoever unpacks media somewhere and runs the tool there runs nothing that lay beside them.
    photo(tmp_path / "a.png", 1)
    for name in ("numpy", "PIL", "av", "gemtool"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('taken over')\n")
    script = "import sys; sys.path.remove(''); from gemtool.__main__ import main; main()"
    command = [sys.executable, "-c", script, "tokenize", "a.png", "-o", "out"]
    done = subprocess.run(
        command, cwd=tmp_path, env=command_environment(), capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_ctrl_c_is_quiet(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gemtool", "tokenize", "--modality", "audio", "-o", "out"]
    reader, writer = os.pipe()
    tool = subprocess.Popen(
        command,
        stdin=reader,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env=command_environment(),
        start_new_session=True,
    )
    os.close(reader)
    sound = BytesIO()
    with wave.open(sound, "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(bytes(1_000_000))
    os.write(writer, sound.getvalue()[:60_000])  # and then nothing
    time.sleep(2.5)
    os.killpg(tool.pid, signal.SIGINT)  # as a terminal does, to the worker too
    assert tool.stderr is not None
    with tool.stderr:
        said = tool.stderr.read()
    assert tool.wait() == 130
    os.close(writer)
    assert b"Traceback" not in said
    assert b"worker" not in said
    assert not list(tmp_path.iterdir())
