"""The benchmarks' helper: what a row says, and how the command ends."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("measure")


def test_a_ratio_is_that_of_runs_side_by_side(measure: Any) -> None:
    ours = iter([measure.Cost(9, 9), *(measure.Cost(wall=2, cpu=c) for c in (1, 2, 4))])
    peer = iter([measure.Cost(9, 9), *(measure.Cost(wall=4, cpu=c) for c in (3, 4, 12))])

    def row(**options: Any) -> Any:
        return measure.compare("x", lambda: next(ours), lambda: next(peer), repeats=3, **options)

    got = row()
    assert (got["ours"], got["peer"], got["unit"]) == (2, 4, "s")
    assert (got["ratio"], got["spread"], got["wall"]) == (3, [2, 3], 2)


def test_rates_are_work_over_the_seconds_that_count(measure: Any) -> None:
    got = measure.compare(
        "x",
        lambda: measure.Cost(wall=2, cpu=1),
        lambda: measure.Cost(wall=4, cpu=8),
        repeats=1,
        unit="GB/s",
        work=(10, 40),
        clock="wall",
        warm_up=False,
    )
    assert (got["ours"], got["peer"], got["ratio"], got["wall"]) == (5, 10, 0.5, 0.5)


def test_all_that_a_pipeline_uses_is_counted(measure: Any, tmp_path: Path) -> None:
    busy = "import time\nwhile time.process_time() < 0.3: pass"
    cost = measure.shell(f"{sys.executable} -c '{busy}' | {sys.executable} -c '{busy}'", tmp_path)
    assert cost.cpu >= 0.6
    with pytest.raises(subprocess.CalledProcessError):
        measure.shell("false | true", tmp_path)


REPORT = """
import measure
def rows(folder):
    assert folder.is_dir()
    for _ in range(3000):
        yield measure.compare("x", lambda: measure.Cost(1, 3), lambda: measure.Cost(1, 1),
                              repeats=1)
measure.report(rows)
"""


def test_a_report_is_json_and_a_closed_pipe_is_quiet() -> None:
    command = [sys.executable, "-c", REPORT]
    done = subprocess.run(command, cwd=BENCH, capture_output=True, check=True, text=True)
    first, *_ = map(json.loads, done.stdout.splitlines())
    assert first["ratio"] == 0.3333
    with subprocess.Popen(
        command, cwd=BENCH, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
    assert process.returncode == 141


def test_an_unknown_benchmark_is_named() -> None:
    done = subprocess.run([sys.executable, BENCH, "speed"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("no benchmark of 'speed'; there are kernels, ")
