"""Signals: the exit code says which, nothing half-written stays, and no moment is a bad one."""

from __future__ import annotations

import os
import pty
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gemtool.data.vocab import Vocab
from tests.conftest import command_environment
from tests.test_prefill_decode import make_engine, tiny

NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def start(cwd: Path, *arguments: str, **options: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(  # type: ignore[call-overload,no-any-return]
        [sys.executable, "-m", "gemtool", *arguments],
        cwd=cwd,
        env=command_environment(),
        **{"stdin": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )


@pytest.mark.parametrize("number", NUMBERS)
def test_says_so_and_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    process = start(tmp_path, "tokenize", "-o", "out.spans")
    assert process.stdin is not None
    process.stdin.write(b"some text\n" * 1000)
    process.stdin.flush()
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob(".out.spans.*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    word = {2: b"interrupted", 15: b"terminated", 1: b"hung up"}[number]
    assert errors == b"gemtool: " + word + b"\n"
    assert list(tmp_path.iterdir()) == []


def test_nohup_is_respected(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gemtool", "tokenize", "-o", "out.spans"]
    process = subprocess.Popen(
        ["sh", "-c", "trap '' HUP; exec \"$@\"", "sh", *command],
        stdin=subprocess.PIPE,
        cwd=tmp_path,
        env=command_environment(),
    )
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob(".out.spans.*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGHUP)
    process.communicate(b"text", timeout=30)
    assert process.returncode == 0


def at_some_moment(cwd: Path, number: signal.Signals, delay: float, *arguments: str) -> None:
    """Signals a command whose input does not end; it must end by that and leave nothing."""
    process = start(cwd, *arguments)
    time.sleep(delay)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    # Before there is a handler the signal itself ends the process.
    assert process.returncode in (128 + number, -number), errors.decode()
    assert len(errors.splitlines()) <= 1, errors.decode()
    assert list(cwd.iterdir()) == []


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    vocab = Vocab.load()
    path = tmp_path_factory.mktemp("model") / "run"
    make_engine(path, tiny(vocab.size), vocab, 64)
    return path


@pytest.mark.parametrize("delay", [0.15, 0.5, 1.0, 1.5, 2.0])
def test_no_moment_is_a_bad_one(delay: float, run: Path, tmp_path: Path) -> None:
    """While libraries are imported too, where an exception from a handler would be lost."""
    at_some_moment(tmp_path, signal.SIGTERM, delay, *waiting(run))


@pytest.mark.slow
def test_many_moments(run: Path, tmp_path: Path) -> None:
    moments = random.Random(0)
    for trial in range(60):
        at_some_moment(tmp_path, NUMBERS[trial % 3], moments.uniform(0.1, 3.0), *waiting(run))


def waiting(run: Path) -> list[str]:
    """A verb that imports jax and then waits for its input."""
    return ["decode", "--ckpt", str(run), "--prompts", "-", "-o", "out.jsonl"]


def test_rows_are_not_wrapped_beside_a_progress_bar(tmp_path: Path) -> None:
    """With stdout and stderr on one terminal, and with stdout in a file."""
    code = (
        "import sys\n"
        "from gemtool import log\n"
        "with log.progress('work', total=2) as bar:\n"
        "    bar.update()\n"
        "    print('x' * 300, flush=True)\n"
    )
    for stdout_is_terminal in (True, False):
        leader, follower = pty.openpty()
        with (tmp_path / "rows").open("wb") as file:
            done = subprocess.Popen(
                [sys.executable, "-c", code],
                stdout=follower if stdout_is_terminal else file,
                stderr=follower,
                env={**command_environment(), "TERM": "xterm", "COLUMNS": "80"},
            )
            os.close(follower)
            shown = b""
            while True:
                try:
                    part = os.read(leader, 65536)
                except OSError:
                    break
                if not part:
                    break
                shown += part
            os.close(leader)
            assert done.wait(30) == 0
        where = shown if stdout_is_terminal else (tmp_path / "rows").read_bytes()
        assert b"x" * 300 in where


@pytest.mark.parametrize("explains", [True, False])
def test_memory_that_is_a_file_which_was_cut(tmp_path: Path, explains: bool) -> None:
    """Said and cleaned up, if it is known which; else as any program ends."""
    (tmp_path / "a").write_bytes(bytes(100_000))
    code = f"""
import mmap, os, pathlib
from gemtool import signals
from gemtool.signals import explain_bus_errors, removed_on_signal

signals.install()
explain_bus_errors(lambda: "a: was cut" if {explains} else None)
explain_bus_errors(lambda: "not this one")
with open("a", "r+b") as file, removed_on_signal(lambda: os.unlink("b")):
    pathlib.Path("b").touch()
    memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    file.truncate(10)
    print("not printed", memory[99_999])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=command_environment(), capture_output=True,
        check=False,
    )  # fmt: skip
    says = b"gemtool: error: a: was cut\n" if explains else b""
    ends = 3 if explains else -signal.SIGBUS
    assert (done.returncode, done.stdout, done.stderr) == (ends, b"", says)
    assert (tmp_path / "b").exists() is not explains
