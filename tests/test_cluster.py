"""tokenize over a Ray cluster on this machine: the same bytes, and a killed worker is no loss."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from gemtool.cmd.tokenize import plain_options
from gemtool.data import cluster
from gemtool.data.cluster import groups
from gemtool.data.documents import LEFT_OUT
from gemtool.data.settings import MediaSettings
from gemtool.data.sniff import Modality
from gemtool.errors import CorruptInput, GemtoolError
from gemtool.stream.checked import CheckedReader, Source
from gemtool.stream.spans import VERSION, Header
from tests.conftest import Command, command_environment
from tests.samples import sample


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
    (line,) = done.stderr.decode().splitlines()
    assert line.endswith("pip install 'gemtool[ray]'")


# The task itself, without a cluster around it


@pytest.fixture
def this_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", command_environment()["PYTHONPATH"])


def run_task(folder: Path, *options: str) -> tuple[bytes, Any]:
    files = sorted(path.name for path in folder.iterdir())
    *chunks, end = cluster._tokenize(list(options), files, str(folder))
    return b"".join(chunks), end


def test_a_task_is_the_command(
    this_checkout: None, gemtool: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEMTOOL_TOKENIZE_ENGINE", "ray")  # would go on for ever
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a\nb.txt").write_text("one")
    (folder / "os.py").write_text("raise SystemExit('taken over')")
    stream, end = run_task(folder, "--no-pg")
    assert end == {"code": 0, "messages": []}
    names = sorted(path.name for path in folder.iterdir())
    assert stream == gemtool("tokenize", "--no-pg", *names, cwd=folder).stdout
    (folder / "c.png").write_bytes(b"\x89PNG\r\n\x1a\n no picture")
    _, end = run_task(folder, "--keep-going")
    assert end["code"] == 1
    assert [level for level, _ in end["messages"]] == ["error", "error"]
    assert LEFT_OUT.match(end["messages"][-1][1])
    assert run_task(folder)[1]["code"] == 3


def test_a_killed_command_asks_for_another_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_START", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(cluster._Lost, match="signal 9"):
        list(cluster._tokenize([], ["a"], str(tmp_path)))


def read_header(stream: bytes) -> dict[str, Any]:
    return CheckedReader(Source(BytesIO(stream)), "x", stream="spans", version=VERSION).header


def bare_cluster(header: Header) -> cluster.Cluster:
    made = cluster.Cluster.__new__(cluster.Cluster)
    made._header, made.problems = header, 0
    made._items = iter  # type: ignore[method-assign,assignment]
    return made


def test_outputs_of_tasks(this_checkout: None, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    stream, end = run_task(tmp_path)
    header = Header.from_dict(read_header(stream))
    assert list(bare_cluster(header)._spans_of([stream, end]))
    with pytest.raises(GemtoolError, match=r"Ray cluster has the vocabulary \{'fingerprint'"):
        list(bare_cluster(Header(settings=header.settings))._spans_of([stream, end]))
    with pytest.raises(GemtoolError, match=r"Ray cluster has the media settings \{"):
        list(bare_cluster(Header(vocab=header.vocab))._spans_of([stream, end]))
    other, _ = run_task(tmp_path, "--no-pg")  # as if of a version that does not tell
    with pytest.raises(GemtoolError, match="Ray cluster has gemtool None, this one "):
        list(bare_cluster(header)._spans_of([other, end]))
    with pytest.raises(GemtoolError, match="lost the end of a task's output"):
        list(bare_cluster(header)._spans_of([stream[:2000]]))
    failed = {"code": 3, "messages": [("error", "a.txt: damaged")]}
    with pytest.raises(CorruptInput, match=r"^a\.txt: damaged$"):
        list(bare_cluster(Header())._spans_of([b"", failed]))


# With Ray: `make test-ray`


@pytest.fixture
def ray() -> None:
    pytest.importorskip("ray", reason="ray is not installed: run `make test-ray`")


@pytest.fixture
def nothing_left(tmp_path: Path) -> Callable[[], None]:
    """Waits until no process and no file of the clusters made since then is there."""
    before = traces()

    def check() -> None:
        deadline = time.monotonic() + 20
        while (left := traces() - before) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not left

    return check


def traces() -> set[str]:
    """Folders that Ray or we make for a cluster, and processes of one."""
    folder = Path(os.environ.get("TMPDIR", "/tmp"))
    found = {str(path) for path in [*folder.glob("gt-*"), *Path("/tmp/ray").glob("*")]}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (path / "cmdline").read_bytes()
            if b"ray::" in command or b"/ray/" in command:
                found.add(path.name)
    return found


def make_inputs(folder: Path) -> None:
    folder.mkdir()
    for name in ("png", "wav", "mkv", "txt", "jsonl", "txt.gz"):
        with contextlib.suppress(LookupError):
            (folder / f"a.{name}").write_bytes(sample(name))
    for number in range(150):
        (folder / f"b{number:03}.txt").write_text(f"Text number {number}.\n")


@pytest.mark.slow
def test_the_same_bytes(ray: None, tmp_path: Path, nothing_left: Callable[[], None]) -> None:
    make_inputs(tmp_path / "in")
    (tmp_path / "in" / "b050.png").write_bytes(b"\x89PNG\r\n\x1a\n no picture")
    (tmp_path / "numpy.py").write_text("raise SystemExit('taken over')")
    options = ["tokenize", "in", "--no-pg", "--image-tokens", "66", "--keep-going"]
    start = "import sys; sys.path.remove(''); from gemtool.__main__ import main; main()"
    environment = {**command_environment(), "GEMTOOL_TOKENIZE_ENGINE": "ray"}
    plain, spread = (
        subprocess.run(
            [sys.executable, "-c", start, *options, *more],
            cwd=tmp_path, env=environment, capture_output=True, check=False,
        )
        for more in (["--engine", "local"], [])
    )  # fmt: skip
    assert spread.stderr == plain.stderr
    assert (spread.returncode, spread.stdout) == (1, plain.stdout)
    nothing_left()


@pytest.mark.slow
def test_failures(
    ray: None, gemtool: Command, tmp_path: Path, nothing_left: Callable[[], None]
) -> None:
    make_inputs(tmp_path / "in")
    (tmp_path / "in" / "b050.png").write_bytes(b"\x89PNG\r\n\x1a\n no picture")
    options = ["tokenize", "in", "--engine", "ray", "-o", "out"]
    done = gemtool(*options, check=False)
    assert done.returncode == 3
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("gemtool: error: in/b050.png: ")
    done = gemtool(*options, "-@", 999, check=False)
    assert done.returncode == 2
    assert b"no machine of the Ray cluster has so many processors" in done.stderr
    done = gemtool(*options, check=False, env={"RAY_ADDRESS": "ray://localhost:1"})
    assert done.returncode == 2
    assert b"RAY_ADDRESS=auto" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"in"}
    nothing_left()


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


def start(folder: Path, output: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "gemtool", "tokenize", "in", "--no-pg", "--engine", "ray"]
    return subprocess.Popen(
        [*command, "-o", output],
        cwd=folder,
        env=command_environment(),
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked for in /proc")
def test_a_killed_worker_is_no_loss(
    ray: None, gemtool: Command, tmp_path: Path, nothing_left: Callable[[], None]
) -> None:
    make_inputs(tmp_path / "in")
    gemtool("tokenize", "in", "--no-pg", "-o", "plain")
    tool = start(tmp_path, "spread")
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
    assert (tool.wait(), said) == (0, b"")
    assert killed == 2
    assert (tmp_path / "spread").read_bytes() == (tmp_path / "plain").read_bytes()
    nothing_left()


# A cluster of two machines, as far as Ray can tell; the second is lost in the middle of a task.
TWO_MACHINES = """
import os, signal, subprocess, sys, time
from pathlib import Path
from ray.cluster_utils import Cluster

cluster = Cluster(True, head_node_args={"num_cpus": 1})
second = cluster.add_node(num_cpus=1).all_processes["raylet"][0].process.pid
tool = subprocess.Popen(sys.argv[1:], env={**os.environ, "RAY_ADDRESS": cluster.address})

def at_work():
    children = Path(f"/proc/{second}/task/{second}/children").read_text().split()
    return any(b"_tokenize" in Path(f"/proc/{child}/cmdline").read_bytes() for child in children)

while not at_work():
    assert tool.poll() is None
    time.sleep(0.02)
os.kill(second, signal.SIGKILL)
code = tool.wait()
cluster.shutdown()
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked for in /proc")
def test_a_lost_machine_is_no_loss(ray: None, gemtool: Command, tmp_path: Path) -> None:
    make_inputs(tmp_path / "in")
    gemtool("tokenize", "in", "--no-pg", "-o", "plain")
    command = [sys.executable, "-m", "gemtool", "tokenize", "in", "--no-pg", "-o", "spread"]
    with tempfile.TemporaryDirectory(prefix="gt-", ignore_cleanup_errors=True) as folder:
        own = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": folder}
        environment = {**command_environment(), **own}
        done = subprocess.run(
            [sys.executable, "-c", TWO_MACHINES, *command, "--engine", "ray"],
            cwd=tmp_path, env=environment, capture_output=True, timeout=200, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert (tmp_path / "spread").read_bytes() == (tmp_path / "plain").read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked for in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_the_cluster_too(
    ray: None, number: signal.Signals, tmp_path: Path, nothing_left: Callable[[], None]
) -> None:
    make_inputs(tmp_path / "in")
    tool = start(tmp_path, "out")
    deadline = time.monotonic() + 120
    while not ray_workers(tool.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    if number == signal.SIGINT:
        os.killpg(tool.pid, number)  # as a terminal does
    else:
        tool.send_signal(number)
    assert tool.stderr is not None
    with tool.stderr:
        said = tool.stderr.read()
    words = {2: b"gemtool: interrupted\n", 15: b"gemtool: terminated\n", 9: b""}
    assert said == words[number]
    assert tool.wait() in (128 + number, -number)
    nothing_left()
    if number != signal.SIGKILL:
        assert [path.name for path in tmp_path.iterdir()] == ["in"]
