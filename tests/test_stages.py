"""Runs in stages: the schedule of each, what is trained and what stays, exact resumption."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemtool.checkpoint import open_checkpoint
from gemtool.data.vocab import Vocab, train_vocab
from gemtool.model.batch import Batch
from gemtool.model.config import ModelConfig
from gemtool.model.params import flatten, init_params, is_index, unflatten
from gemtool.model.transformer import index_loss
from gemtool.train.loop import TrainOptions, train
from gemtool.train.optimizer import FLOOR, Schedule, make_optimizer
from gemtool.train.parts import INDEX, PARTS, TRUNK, merge, split
from gemtool.train.step import abstract_state, init_state, make_train_step, restacked, stack
from tests.conftest import Command, command_environment
from tests.test_compile_once import Watch, watch
from tests.test_train import arguments, environment, refused, rows_of, weights, write_shards
from tests.test_train_step import CONFIG, LENGTH, MODEL, VOCAB_SIZE, random_batch

__all__ = ["watch"]  # a fixture

TWO = """
[[stage]]
name = "first"
steps = 5
train = "trunk"
lr = 3e-3
warmup = 2

[[stage]]
name = "second"
steps = 4
train = "trunk"
lr = 1e-3
"""

INDEXED_MODEL = MODEL.replace(
    "[kinds.G]\n", '[kinds.G]\nattention = "indexed"\nqk_norm = "unit"\ntemperature = 8.0\n'
).replace(
    "\n[moe]",
    "\n[kinds.G.index]\nblock = 4\nlandmarks = 2\ndim = 8\nhidden = 16\nlocal = 0\nselect = 2\n\n[moe]",
)
LEARNED = """
[[stage]]
name = "trunk"
steps = 3
train = "trunk"
negatives = 1

[[stage]]
name = "index"
steps = 3
train = "index"
lr = 1.5e-3
"""


def indexed(layers: str = "LG") -> ModelConfig:
    table = {**tomllib.loads(INDEXED_MODEL), "vocab_size": VOCAB_SIZE, "layers": layers}
    return ModelConfig.from_dict({**table, "dense_layers": 0} if len(layers) > 2 else table)


def fixed_text() -> list[str]:
    """Lines of made-up words: what is learned from them does not depend on any file."""
    rng = np.random.default_rng(0)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    words = ["".join(rng.choice(syllables, n)) for n in rng.integers(1, 4, 300)]
    return [" ".join(rng.choice(words, 8)) for _ in range(500)]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards, a vocabulary and models, as `tests.test_train.arguments` names them."""
    folder = tmp_path_factory.mktemp("workshop")
    lines = fixed_text()
    (folder / "vocab.model").write_bytes(train_vocab(lines, size=VOCAB_SIZE))
    (folder / "model.toml").write_text(MODEL)
    (folder / "indexed.toml").write_text(INDEXED_MODEL)
    (folder / "two.toml").write_text(TWO)
    (folder / "learned.toml").write_text(LEARNED)
    vocab = Vocab.load(folder / "vocab.model")
    write_shards(folder / "shards", vocab, lines)
    write_shards(folder / "held-out", vocab, lines[:40])
    return folder


def written(folder: Path, text: str) -> str:
    (folder / "stages.toml").write_text(text)
    return str(folder / "stages.toml")


def staged(workshop: Path, run: str | Path, *more: object, stages: object = None) -> list[object]:
    file = workshop / "two.toml" if stages is None else stages
    return arguments(workshop, run, "--stages", file, *more)


def on_indexed(workshop: Path, command: list[object]) -> list[object]:
    place = command.index(workshop / "model.toml")
    return [*command[:place], workshop / "indexed.toml", *command[place + 1 :]]


def completed(workshop: Path, command: list[object]) -> list[dict[str, Any]]:
    """The metrics of a run from beginning to end, for fixtures that outlive a test."""
    done = subprocess.run(
        [sys.executable, "-m", "gemtool", *map(str, command)],
        capture_output=True,
        check=True,
        env={**command_environment(), **environment(workshop)},
    )
    return rows_of(done.stdout)


ALL_STATES = ("--save-every", 1, "--keep", 99)

Whole = tuple[list[dict[str, Any]], Path]


@pytest.fixture(scope="module")
def whole(workshop: Path) -> Whole:
    """An uninterrupted run in two stages of 5 and 4 steps, with the state of each step."""
    run, more = workshop / "whole", ("--eval", workshop / "held-out", "--eval-every", 3)
    return completed(workshop, staged(workshop, run, *ALL_STATES, *more)), run


@pytest.fixture(scope="module")
def learned(workshop: Path) -> Whole:
    """The same of three steps of a trunk and three of its index."""
    run, file = workshop / "learned", workshop / "learned.toml"
    more = (*ALL_STATES, "--eval", workshop / "held-out", "--eval-every", 2)
    command = staged(workshop, run, *more, stages=file)
    return completed(workshop, on_indexed(workshop, command)), run


# A run


def test_each_stage_has_its_rates_and_steps_go_on(whole: Whole) -> None:
    rows, run = whole
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert [row["stage"] for row in rows] == ["first"] * 5 + ["second"] * 4
    schedules = [Schedule(5, 3e-3, 2)] * 5 + [Schedule(4, 1e-3, 1)] * 4
    rates = [s.rate(n) for s, n in zip(schedules, [1, 2, 3, 4, 5, 1, 2, 3, 4], strict=True)]
    np.testing.assert_allclose([row["lr"] for row in rows], rates, rtol=1e-6)
    assert np.isclose(rows[4]["lr"], FLOOR * 3e-3)
    assert [row["step"] for row in rows if "eval_loss" in row] == [3, 5, 6, 9]
    assert rows[8]["eval_loss"] < rows[2]["eval_loss"]
    assert np.all(np.diff([row["tokens"] for row in rows]) > 0)
    training = open_checkpoint(run).card["training"]
    assert training["steps"] == 9
    assert [stage["name"] for stage in training["stages"]] == ["first", "second"]


def test_the_first_stage_is_the_run_without_stages(
    gemtool: Command, workshop: Path, whole: Whole, tmp_path: Path
) -> None:
    more = ("--steps", 5, "--lr", 3e-3, "--warmup", 2, "--eval-every", 3)
    command = arguments(workshop, "run", *more, "--eval", workshop / "held-out")
    rows = rows_of(gemtool(*command, env=environment(workshop)).stdout)
    assert rows == [{k: v for k, v in row.items() if k != "stage"} for row in whole[0][:5]]
    assert "stages" not in open_checkpoint(tmp_path / "run").card["training"]


def cut_off(run: Path, step: int, where: Path) -> Path:
    """A copy of a run as it was when the state of a step was its last."""
    shutil.copytree(run, where)
    for state in (where / "state").iterdir():
        if int(state.name) > step:
            shutil.rmtree(state)
    return where


@pytest.mark.parametrize("step", [2, 5, 6, pytest.param(4, marks=pytest.mark.slow), 8])
def test_resumed_from_any_step_of_any_stage(
    gemtool: Command, workshop: Path, whole: Whole, tmp_path: Path, step: int
) -> None:
    rows, folder = whole
    run = cut_off(folder, step, tmp_path / "run")
    more = ("--eval", workshop / "held-out", "--eval-every", 3, "--resume")
    done = gemtool(*staged(workshop, run, *more), env=environment(workshop))
    assert rows_of(done.stdout) == rows[step:]
    assert weights(run) == weights(folder)


def test_the_end_of_a_stage_is_saved(
    gemtool: Command, workshop: Path, whole: Whole, tmp_path: Path
) -> None:
    """Killed in the second stage, a run that hardly ever saves goes on from where that begins."""
    rows, folder = whole
    run = tmp_path / "run"
    command = staged(workshop, run, "--save-every", 99)
    process = subprocess.Popen(
        [sys.executable, "-m", "gemtool", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**command_environment(), **environment(workshop)},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line)["step"] == 6:
            # What is saved is written in the background.
            assert wait_for(run / "state" / "5")
            process.send_signal(signal.SIGKILL)
            break
    process.communicate(timeout=60)
    if process.returncode == 0:
        cut_off(run, 5, tmp_path / "cut")  # it was done before the signal came
        run = tmp_path / "cut"
    done = gemtool(*staged(workshop, run, "--resume"), env=environment(workshop))
    found = rows_of(done.stdout)
    assert found == [{k: v for k, v in row.items() if k != "eval_loss"} for row in rows[5:]]
    assert weights(run) == weights(folder)


def wait_for(path: Path, seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.01)
    return path.exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps = 5", "steps = 6", "stage 'first' has steps 5, not 6"),
        ("steps = 4", "steps = 3", "stage 'second' has steps 4, not 3"),
        ("lr = 1e-3", "lr = 2e-3", "stage 'second' has lr 0.001, not 0.002"),
        ("warmup = 2", "warmup = 1", "stage 'first' has warmup 2, not 1"),
        ('"second"', '"last"', "stage 'second' has name second, not last"),
        ("lr = 1e-3", "lr = 1e-3\nnegatives = 1", "has negatives 0, not 1"),
        ("[[stage]]\nname", '[[stage]]\nname = "0"\nsteps = 1\ntrain = "trunk"\n\n[[stage]]\nname',
         "2 stages, not 4"),
    ],
)  # fmt: skip
def test_a_changed_file_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    workshop: Path,
    whole: Whole,
    tmp_path: Path,
    old: str,
    new: str,
    message: str,
) -> None:
    changed = TWO.replace(old, new)
    if "not 4" in message:
        changed = changed.replace('"0"', '"1"', 1)
    file = written(tmp_path, changed)
    run = cut_off(whole[1], 6, tmp_path / "run")
    found = refused(monkeypatch, workshop, run, stages=file, resume=True)
    assert (message in found[0], found[1]) == (True, 2), found
    assert weights(run) == weights(whole[1])


def test_a_run_keeps_its_kind(
    monkeypatch: pytest.MonkeyPatch, workshop: Path, whole: Whole, tmp_path: Path
) -> None:
    run = cut_off(whole[1], 6, tmp_path / "run")
    found = refused(monkeypatch, workshop, run, steps=9, resume=True)
    assert ("was begun with --stages" in found[0], found[1]) == (True, 2)


def test_the_last_stage_may_grow(
    gemtool: Command, workshop: Path, whole: Whole, tmp_path: Path
) -> None:
    """Of a finished run too; its learning rate falls again, from where the longer one is by then."""
    shutil.copytree(whole[1], tmp_path / "run")
    file = written(tmp_path, TWO.replace("steps = 4", "steps = 7"))
    command = staged(workshop, "run", "--resume", stages=file)
    done = gemtool(*command, env=environment(workshop))
    rows = rows_of(done.stdout)
    assert [row["step"] for row in rows] == [10, 11, 12]
    assert np.isclose(rows[0]["lr"], Schedule(7, 1e-3, 1).rate(5), rtol=1e-6)
    assert b"its learning rate now falls until step 12" in done.stderr
    again = gemtool(*command, env=environment(workshop))
    assert again.stdout == b""
    assert b"finished already" in again.stderr


# What is trained


@pytest.mark.parametrize("layers", ["LG", "LGLG", "LLLG"])
def test_parts_of_a_state_are_stacked_and_unstacked(layers: str) -> None:
    """Moments too, those of an index among layers that have none."""
    config = indexed(layers)
    for part in PARTS:
        apart, joined = (
            init_state(config, make_optimizer(config, stacked, part), 0, None, stacked, part)
            for stacked in (False, True)
        )
        assert_same(restacked(config, apart, True), joined)
        assert_same(restacked(config, joined, False), apart)
        inside, outside = split(joined.params, part)
        assert_same(merge(inside, outside), joined.params)
        assert all(is_index(path) == (part == INDEX) for path in flatten(inside))
        assert flatten(outside).keys() == flatten(split(joined.params, other(part))[0]).keys()


def other(part: str) -> str:
    return TRUNK if part == INDEX else INDEX


def assert_same(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_model_without_an_index_is_all_trunk() -> None:
    params = init_params(CONFIG, jax.random.key(0))
    inside, outside = split(params, TRUNK)
    assert outside == {}
    assert flatten(inside).keys() == flatten(params).keys()


@pytest.mark.parametrize("part", PARTS)
def test_what_is_not_trained_costs_no_moments(part: str) -> None:
    config = indexed()
    state = abstract_state(config, make_optimizer(config, part=part), part=part)
    trained = jax.tree.leaves(split(state.params, part)[0])
    own = sum(leaf.size for leaf in trained)
    assert sum(leaf.size for leaf in jax.tree.leaves(state.optimizer)) == 2 * own + 1


@pytest.mark.parametrize("part", PARTS)
def test_micro_batches_of_a_part(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses of a step in parts are means; what is not trained does not move a bit, weights that
    decay and biases of routers included."""
    monkeypatch.setenv("GEMTOOL_KERNELS", "reference")
    config = indexed()
    optimizer = make_optimizer(config, part=part)
    step = make_train_step(config, optimizer, part=part)
    documents = np.full((2, 32), 7, np.int32)
    batch = random_batch(0, documents=documents)
    before = jax.tree.map(np.array, init_state(config, optimizer, 0, part=part))
    metrics = {}
    for count in (1, 2):
        start = jax.tree.map(jnp.asarray, before)
        state, metrics[count] = step(start, stack([batch] * count), 0.01)
    for name, value in metrics[1].items():
        np.testing.assert_allclose(metrics[2][name], value, rtol=1e-5, err_msg=name)
    after = flatten(jax.tree.map(np.array, state.params))
    for path, value in flatten(before.params).items():
        moves = is_index(path) == (part == INDEX)
        assert np.any(after[path] != value) == moves, path


def params_of(workshop: Path, run: Path, step: int) -> dict[str, np.ndarray]:
    """The parameters in a state of a run of the indexed model."""
    import orbax.checkpoint as ocp

    restored = ocp.StandardCheckpointer().restore((run / "state" / str(step) / "state").absolute())
    return flatten(jax.tree.map(np.asarray, restored["params"]))


def test_the_index_learns_and_the_trunk_stays(workshop: Path, learned: Whole) -> None:
    rows, run = learned
    assert [row["stage"] for row in rows] == ["trunk"] * 3 + ["index"] * 3
    metrics = {"index_top1", "index_topk", "index_mass"}
    assert all(metrics.isdisjoint(row) and "expert_load" in row for row in rows[:3])
    assert all(metrics <= row.keys() and "expert_load" not in row for row in rows[3:])
    assert all(0 <= row[name] <= 1 for row in rows[3:] for name in metrics)
    assert rows[3]["loss"] != rows[2]["loss"]  # another objective
    # Nothing that the trunk says changes while the index learns.
    assert [row["step"] for row in rows if "eval_loss" in row] == [2, 3, 4, 6]
    assert rows[5]["eval_loss"] == rows[3]["eval_loss"] == rows[2]["eval_loss"]

    config = open_checkpoint(run).config
    begun = flatten(jax.tree.map(np.asarray, init_params(config, jax.random.key(0))))
    trunk, index = params_of(workshop, run, 3), params_of(workshop, run, 6)
    assert any(map(is_index, begun))
    for path, value in begun.items():
        assert np.array_equal(trunk[path], value) == is_index(path), path
        assert np.array_equal(index[path], trunk[path]) != is_index(path), path
    batch = text_batch(Vocab.load(workshop / "vocab.model"))
    before, after = (index_loss(unflatten(p), config, batch)[0] for p in (trunk, index))
    assert after < before


def text_batch(vocab: Vocab, rows: int = 16) -> Batch:
    """Sequences of the text, a document each."""
    tokens = vocab.encode("\n".join(fixed_text()))[: rows * LENGTH].reshape(rows, LENGTH)
    ones, positions = np.ones_like(tokens), np.arange(LENGTH, dtype=np.int32)
    weights = ones.astype(np.float32)
    return Batch(tokens, ones, np.tile(positions, (rows, 1)), np.roll(tokens, -1, 1), weights)


@pytest.mark.parametrize("step", [2, 3, 4])
def test_an_index_is_resumed_exactly(
    gemtool: Command, workshop: Path, learned: Whole, tmp_path: Path, step: int
) -> None:
    rows, folder = learned
    run = cut_off(folder, step, tmp_path / "run")
    more = ("--eval", workshop / "held-out", "--eval-every", 2, "--resume")
    command = staged(workshop, run, *more, stages=workshop / "learned.toml")
    done = gemtool(*on_indexed(workshop, command), env=environment(workshop))
    assert rows_of(done.stdout) == rows[step:]
    assert weights(run) == weights(folder)


def test_without_stages_an_index_stays_as_it_began(
    gemtool: Command, workshop: Path, tmp_path: Path
) -> None:
    command = on_indexed(workshop, arguments(workshop, "run", "--steps", 2))
    done = gemtool(*command, env=environment(workshop))
    assert b"the index of this model is not trained in this run" in done.stderr
    checkpoint = open_checkpoint(tmp_path / "run")
    begun = flatten(init_params(checkpoint.config, jax.random.key(0)))
    for path, value in flatten(checkpoint.load_params()).items():
        assert np.array_equal(value, begun[path]) == is_index(path), path


def test_an_index_for_a_checkpoint_that_has_none_trained(
    gemtool: Command, workshop: Path, learned: Whole, tmp_path: Path
) -> None:
    """--init and a stage file with an index alone: trunk and index may be runs of their own."""
    only = LEARNED.partition("\n\n")[2]
    command = ["train", "--data", workshop / "shards", "--init", learned[1], "--ckpt", "run"]
    file = written(tmp_path, only)
    rows = rows_of(gemtool(*command, "--stages", file, env=environment(workshop)).stdout)
    assert [row["step"] for row in rows] == [1, 2, 3]
    before, after = (
        flatten(open_checkpoint(r).load_params()) for r in (learned[1], tmp_path / "run")
    )
    for path, value in before.items():
        assert np.array_equal(after[path], value) != is_index(path), path


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2,expert=2", "fsdp=2,tensor=1"])
def test_stages_on_a_mesh_with_a_loop_and_back(
    gemtool: Command, workshop: Path, learned: Whole, tmp_path: Path, mesh: str
) -> None:
    """Up to rounding the same; a state of a mesh is resumed without one, in the other stage."""
    rows, file = learned[0], workshop / "learned.toml"
    command = on_indexed(workshop, staged(workshop, "run", *ALL_STATES, stages=file))
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", **environment(workshop)}
    done = gemtool(*command, "--mesh", mesh, "--scan", env=devices)
    found = [row["loss"] for row in rows_of(done.stdout)]
    np.testing.assert_allclose(found, [row["loss"] for row in rows], rtol=5e-3)
    cut_off(tmp_path / "run", 4, tmp_path / "cut")
    command[command.index("run")] = "cut"
    done = gemtool(*command, "--resume", env=devices)
    np.testing.assert_allclose([r["loss"] for r in rows_of(done.stdout)], found[4:], rtol=5e-3)


AGAIN = (
    LEARNED
    + """
[[stage]]
name = "again"
steps = 2
train = "trunk"
negatives = 1
"""
)


@pytest.mark.parametrize(
    ("model", "stages", "kinds"),
    [
        ("model.toml", TWO, 1),
        pytest.param("indexed.toml", AGAIN, 2, marks=pytest.mark.slow),
    ],
)
def test_stages_of_a_kind_share_a_program(
    model: str,
    stages: str,
    kinds: int,
    workshop: Path,
    tmp_path: Path,
    watch: Watch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GEMTOOL_CACHE", "off")
    rows: list[dict[str, Any]] = []
    options = TrainOptions(
        data=(str(workshop / "shards"),), ckpt=str(tmp_path / "run"), save_every=2,
        model=str(workshop / model), vocab=str(workshop / "vocab.model"),
        stages=written(tmp_path, stages), eval=str(workshop / "held-out"), eval_every=2,
    )  # fmt: skip
    train(options, rows.append)
    assert len(rows) >= 8
    assert watch.counts("train_step", "eval_step") == {
        "train_step": (kinds, kinds),
        "eval_step": (1, 1),
    }


def test_a_stage_that_a_model_cannot_have_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, workshop: Path, tmp_path: Path
) -> None:
    def compile_nothing(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a step was made")

    monkeypatch.setattr("gemtool.train.loop.make_train_step", compile_nothing)
    file = str(workshop / "learned.toml")
    found = refused(monkeypatch, workshop, tmp_path / "run", stages=file)
    assert ("none of its layers has indexed attention" in found[0], found[1]) == (True, 2)


def test_negatives_need_whole_sequences(gemtool: Command, workshop: Path, tmp_path: Path) -> None:
    file = written(tmp_path, '[[stage]]\nname = "a"\nsteps = 1\ntrain = "trunk"\nnegatives = 1\n')
    command = staged(workshop, "run", "--mesh", "context=2", stages=file)
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", **environment(workshop)}
    done = gemtool(*command, env=devices, check=False)
    assert done.returncode == 2
    assert b"--mesh context=2: its context axis cuts sequences" in done.stderr
    assert len(done.stderr.splitlines()) == 1
