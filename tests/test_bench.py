"""The benchmarks' helper: what a row says, and how the command ends."""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemtool.model.config import load_preset
from gemtool.model.params import count_params
from tests.families import convert

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("measure")


@pytest.fixture
def model(measure: Any) -> Any:
    return importlib.import_module("model")


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


def test_costs_of_turns_keep_their_order(measure: Any) -> None:
    calls = []

    def action(name: str) -> Any:
        return lambda: calls.append(name) or len(calls)

    costs = measure.in_turns([action("a"), action("b"), action("c")], 2, warm_up=False)
    assert "".join(calls) == "cbaabc"
    assert costs == [[3, 4], [2, 5], [1, 6]]


def test_an_unknown_benchmark_is_named() -> None:
    done = subprocess.run([sys.executable, BENCH, "speed"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("no benchmark of 'speed'; there are kernels, ")


def test_needed_operations_are_counted(model: Any) -> None:
    family = model.qwen3_moe()
    total, _ = count_params(family.ours)
    assert round(total / 1e6) == 408
    # Queries, keys, values and outputs; the router; 4 experts of 3 matrices. Then scores and values
    # of the pairs that see each other.
    layer = 768 * (12 + 4 + 4 + 12) * 64 + 768 * 32 + 4 * 3 * 768 * 384
    pairs = 512 * 513 / 2
    assert model.operations(family.ours, 512) == 12 * (2 * 512 * layer + 4 * 12 * 64 * pairs)
    nano = load_preset("nano")
    window = next(kind for kind in nano.kinds if kind.window)
    one = dataclasses.replace(nano, layers=window.letter, kinds=(window,))
    grown = model.operations(one, 2 * window.window + 1) - model.operations(one, 2 * window.window)
    weights = model.operations(one, 1) - 4 * window.heads * window.head_dim
    assert grown == weights + 4 * window.heads * window.head_dim * window.window


@pytest.mark.slow
def test_models_are_compared_and_agree(
    measure: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("torch", "transformers"):
        pytest.importorskip(module)
    monkeypatch.setattr(model, "PREFILL", ((96, 1),))
    for name, value in {"CONTEXT": 64, "TOKENS": 4, "STEPS": 1}.items():
        monkeypatch.setattr(model, name, value)
    family = model.qwen3_moe(2, 64, heads=(2, 1), hidden=32, choices=(2, 4), vocab=500)
    params = convert(family, model.random_model(family.theirs))
    peer = measure.OwnProcess(model.Peer, family.theirs)
    *exact, rounded = model.inference_rows(family, params, peer)
    exact.append(model.training_row(family, params, peer, 1, 96))
    peer.close()
    assert [row["what"].split()[0] for row in exact] == ["prefill", "decoding", "training"]
    # A loss is one number, which may well be the same.
    assert all(0 <= row["difference"] <= model.TOLERANCE for row in exact)
    assert all(row["difference"] > 0 for row in exact[:-1])
    assert rounded["difference"] > max(row["difference"] for row in exact)
    with pytest.raises(SystemExit, match=r"differ by 0\.5"):
        model.assert_close(1.0, 1.5)


@pytest.mark.slow
def test_contexts_are_compared_and_agree(
    measure: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With llama.cpp where it is installed, which `make bench` does in an environment of its own."""
    for module in ("torch", "transformers"):
        pytest.importorskip(module)
    contexts, formats = map(importlib.import_module, ("contexts", "formats"))
    monkeypatch.setattr(contexts, "FRESH", 1)
    formats.write_model(formats.qwen3(2, 64, (2, 1), 96), tmp_path)
    programs = contexts.programs(tmp_path, room=200)
    rows = list(contexts.compared(programs, tmp_path, ((150, 1),)))
    ours, *peers = programs
    assert ours == "gemtool"
    whats = ["prefill of 150", "decoding after 150", "saving 150", "loading 150"]
    whats.append("a fresh process loading 150")
    assert [row["what"] for row in rows] == [f"{w}, against {p}" for w in whats for p in peers]
    assert all(row["ratio"] > 0 for row in rows)
    differences = [row["difference"] for row in rows if "difference" in row]
    assert len(differences) == 3 * len(peers)
    assert all(0 < difference < contexts.TOLERANCE for difference in differences)  # short as it is
    with pytest.raises(SystemExit, match=r"the scores of x differ by 0\.5"):
        contexts.differences({"gemtool": [1.0, 2.0], "x": [1.5, 2.0]}, {"x": 0.1})


def test_weights_have_the_names_of_llama_cpp(
    measure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = pytest.importorskip("gguf")
    formats = importlib.import_module("formats")
    family = formats.qwen3(1, 64, (2, 1), 96)
    weights = {"model.layers.0.self_attn.q_proj.weight": np.ones((128, 64), np.float32)}
    weights["model.norm.weight"] = np.ones(64, np.float32)
    formats.write_gguf(tmp_path / "a.gguf", family.theirs, weights, "float16")
    found = {t.name: t.data.dtype.name for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert found == {"blk.0.attn_q.weight": "float16", "output_norm.weight": "float32"}
