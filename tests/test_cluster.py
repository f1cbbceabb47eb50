"""tokenize over a Ray cluster on this machine: the same bytes, and a killed worker is no loss."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gemtool.cmd.tokenize import plain_options
from gemtool.data.cluster import groups
from gemtool.data.settings import MediaSettings
from gemtool.data.sniff import Modality
from tests.conftest import Command, command_environment
from tests.samples import sample


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="ray is not installed")


def make_inputs(folder: Path) -> None:
    folder.mkdir()
    for name in ("png", "wav", "mkv", "txt", "jsonl", "txt.gz"):
        with contextlib.suppress(LookupError):
            (folder / f"a.{name}").write_bytes(sample(name))
    for number in range(150):
        (folder / f"b{number:03}.txt").write_text(f"Text number {number}.\n")


def test_groups_keep_the_order(tmp_path: Path) -> None:
    files = [str(tmp_path / f"{i:03}") for i in range(150)]
    Path(files[0]).write_bytes(b"x")
    with Path(files[10]).open("wb") as file:
        file.truncate(100 << 20)
    got = list(groups(iter(files)))
    assert [path for group in got for path in group] == files
    assert [len(group) for group in got] == [10, 1, 64, 64, 11]


def test_plain_options_say_the_settings_again() -> None:
    settings = MediaSettings(image_tokens=66, tiles=False, fps=0.5, subtitles=True)
    options = plain_options(settings, Modality.image, Path("v.model"))
    assert options == (
        "--modality image --vocab v.model --image-tokens 66 --no-tiles --fps 0.5 --audio-rate 25 "
        "--audio --timestamps --subtitles"
    ).split(" ")


def test_without_ray_and_what_it_cannot_do(gemtool: Command, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    for arguments in (["a.txt", "--one-document"], ["-"]):
        done = gemtool("tokenize", "--engine", "ray", *arguments, check=False)
        assert done.returncode == 2
        assert b"--engine ray takes neither" in done.stderr
    (tmp_path / "ray.py").write_text("raise ImportError")
    path = f"{tmp_path}{os.pathsep}{command_environment()['PYTHONPATH']}"
    done = gemtool("tokenize", "--engine", "ray", "a.txt", check=False, env={"PYTHONPATH": path})
    assert done.returncode == 2
    assert b"pip install 'gemtool[ray]'" in done.stderr


@pytest.mark.slow
def test_the_same_bytes(ray: None, gemtool: Command, tmp_path: Path) -> None:
    make_inputs(tmp_path / "in")
    options = ["tokenize", "in", "--no-pg", "--image-tokens", "66"]
    plain = gemtool(*options)
    spread = gemtool(*options, "--engine", "ray")
    assert spread.stdout == plain.stdout
    (tmp_path / "in" / "b050.png").write_bytes(b"\x89PNG\r\n\x1a\n no picture")
    plain = gemtool(*options, "--keep-going", check=False)
    spread = gemtool(*options, "--keep-going", "--engine", "ray", check=False)
    assert (spread.returncode, spread.stdout) == (1, plain.stdout)
    assert spread.stderr == plain.stderr
    spread = gemtool(*options, "--engine", "ray", "-o", "out", check=False)
    assert spread.returncode == 3
    assert b"in/b050.png: " in spread.stderr
    assert not (tmp_path / "out").exists()


def ray_workers(tool: int) -> list[int]:
    """Processes of this run in which a task is under way."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            title = (path / "cmdline").read_bytes()
            if title.startswith(b"ray::") and b"_tokenize" in title and descends(path.name, tool):
                found.append(int(path.name))
    return found


def descends(pid: str, tool: int) -> bool:
    """Whether a process was started, however indirectly, by the tool."""
    while int(pid) > 1:
        if int(pid) == tool:
            return True
        fields: Any = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        pid = fields[1]
    return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked for in /proc")
def test_a_killed_worker_is_no_loss(ray: None, gemtool: Command, tmp_path: Path) -> None:
    make_inputs(tmp_path / "in")
    options = ["tokenize", "in", "--no-pg", "-o"]
    gemtool(*options, "plain")
    tool = subprocess.Popen(
        [sys.executable, "-m", "gemtool", *options, "spread", "--engine", "ray"],
        cwd=tmp_path,
        env=command_environment(),
        stderr=subprocess.PIPE,
    )
    killed = 0
    deadline = time.monotonic() + 120
    while tool.poll() is None and time.monotonic() < deadline:
        for worker in ray_workers(tool.pid):
            if killed < 2:
                os.kill(worker, signal.SIGKILL)
                killed += 1
        time.sleep(0.05)
    assert tool.stderr is not None
    with tool.stderr:
        said = tool.stderr.read()
    assert tool.wait() == 0, said.decode()
    assert killed == 2
    assert (tmp_path / "spread").read_bytes() == (tmp_path / "plain").read_bytes()
