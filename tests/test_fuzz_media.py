"""Damaged media of every format: no traceback, no hang, bounded memory, a documented exit code."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.conftest import command_environment
from tests.samples import NAMES, sample

LARGEST = 1_000_000_000
"""Bytes resident, of the tool and its workers together."""


def mutate(data: bytes, pick: random.Random) -> bytes:
    """One to eight wounds: what disks, networks and ill will do to files."""
    changed = bytearray(data)
    for _ in range(pick.choice((1, 1, 2, 4, 8))):
        if len(changed) < 8:
            break
        # Headers are short, and most of what a parser believes.
        reach = len(changed) if pick.random() < 0.5 else min(len(changed), 600)
        at = pick.randrange(reach - 4) if reach > 4 else 0
        length = pick.choice((1, 4, 16, 200, 5000))
        match pick.randrange(8):
            case 0:
                changed[at] ^= 1 << pick.randrange(8)
            case 1:
                changed[at : at + length] = pick.randbytes(min(length, len(changed) - at))
            case 2:
                del changed[pick.randrange(len(changed)) :]
            case 3:
                del changed[at : at + length]
            case 4:
                changed[at:at] = changed[at : at + length]
            case 5:
                size = pick.choice((2, 4, 8))
                extreme = pick.choice((0, 1, -1, 2 ** (8 * size - 1), 2 ** (8 * size - 1) - 1))
                order = pick.choice(("big", "little"))
                value = (extreme % 2 ** (8 * size)).to_bytes(size, order)  # type: ignore[arg-type]
                changed[at : at + size] = value
            case 6:
                other = pick.randrange(len(changed))
                changed[at : at + length] = changed[other : other + length]
            case 7:
                changed[at:at] = pick.randbytes(length)
    return bytes(changed)


def write_mutated(folder: Path, count: int, seed: int) -> list[Path]:
    pick = random.Random(seed)
    known = {}
    for name in NAMES:
        try:
            known[name] = sample(name)
        except LookupError:
            continue
    names = list(known)
    files = []
    for number in range(count):
        name = names[number % len(names)]
        path = folder / f"{number:05}.{name}"
        path.write_bytes(mutate(known[name], pick))
        files.append(path)
    return files


class Watch:
    """The peak of resident memory of a process and its children."""

    def __init__(self, pid: int) -> None:
        self.peak = 0
        self._pid = pid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            self.peak = max(self.peak, family_rss(self._pid))

    def close(self) -> int:
        self._stop.set()
        self._thread.join()
        return self.peak


def family_rss(pid: int) -> int:
    """Bytes resident of a process and its children; 0 where there is no /proc."""
    total = 0
    for path in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in path.read_text().splitlines())
            if pid in (int(fields["Pid"]), int(fields["PPid"])):
                total += int(fields["VmRSS"].split()[0]) * 1024
        except (OSError, ValueError, KeyError):
            continue
    return total


def tokenize(*arguments: object) -> tuple[int, list[str], int, float]:
    """Exit code, lines on stderr, peak of memory and seconds of a run without an output."""
    started = time.monotonic()
    command = [sys.executable, "-m", "gemtool", "tokenize", "-o", "/dev/null", *arguments]
    tool = subprocess.Popen(
        list(map(str, command)), stderr=subprocess.PIPE, env=command_environment()
    )
    watch = Watch(tool.pid)
    assert tool.stderr is not None
    with tool.stderr:
        said = tool.stderr.read().decode()
    code = tool.wait()
    return code, said.splitlines(), watch.close(), time.monotonic() - started


def check_batch(files: list[Path]) -> tuple[int, int, float]:
    """Runs one process over many files; how many were left out, the peak, the seconds."""
    code, lines, peak, seconds = tokenize("--keep-going", *files)
    assert code in (0, 1), lines[-3:]
    for line in lines:
        assert line.startswith("gemtool: "), line
        assert "Traceback" not in line
    problems = [line for line in lines if line.endswith(("left out", "its document ends there"))]
    assert (code == 1) == bool(problems)
    assert peak < LARGEST
    return len(problems), peak, seconds


def check_alone(path: Path) -> None:
    code, lines, peak, seconds = tokenize(path)
    assert code in (0, 1, 3), (path.name, code, lines)
    assert all(line.startswith("gemtool: ") for line in lines), (path.name, lines)
    assert sum("error: " in line for line in lines) == (code != 0)
    assert peak < LARGEST
    assert seconds < 60, path.name  # 20 without progress, and what a busy machine adds


def test_sixty_damaged_files(tmp_path: Path) -> None:
    files = write_mutated(tmp_path, 60, seed=1)
    problems, _, _ = check_batch(files)
    assert 5 < problems < 60
    for path in files[3:6]:
        check_alone(path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("batch", range(20))
def test_two_thousand_damaged_files(tmp_path: Path, batch: int) -> None:
    files = write_mutated(tmp_path, 100, seed=1000 + batch)
    problems, peak, seconds = check_batch(files)
    print(f"batch {batch}: {problems} of 100 refused, peak {peak >> 20} MiB, {seconds:.0f} s")
    for path in files[batch::33]:
        check_alone(path)
