"""The file of `train --stages`: what it says, and mistakes in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemtool.errors import GemtoolError
from gemtool.train.optimizer import Schedule, default_peak, default_warmup
from gemtool.train.parts import INDEX, TRUNK
from gemtool.train.stages import Stage, read_stages, stage_of, stages_of
from tests.conftest import ROOT, Command
from tests.test_stages import LEARNED, TWO, indexed, staged, workshop, written
from tests.test_train import refused
from tests.test_train_step import CONFIG

__all__ = ["workshop"]  # a fixture


def test_a_file_says_what_stages_there_are(tmp_path: Path) -> None:
    config = indexed()
    first, second = read_stages(written(tmp_path, LEARNED), config, 2)
    peak, warmup = default_peak(config), default_warmup(3)
    assert first == Stage("trunk", 3, TRUNK, peak, warmup, negatives=1)
    assert second == Stage("index", 3, INDEX, 0.0015, warmup)
    (alone,) = read_stages(written(tmp_path, TWO.partition("\n\n")[0]), config, 1)
    assert alone.warmup == 2
    assert alone.schedule == Schedule(5, 0.003, 2)


def test_what_is_left_out_stays_as_a_run_began_with_it(tmp_path: Path) -> None:
    longer = written(tmp_path, TWO.replace("steps = 4", "steps = 4000"))
    begun = [{"lr": 1.0, "warmup": 7}, {"lr": 1.0, "warmup": 1}]
    stages = read_stages(longer, CONFIG, 4, begun)
    assert [(stage.lr, stage.warmup) for stage in stages] == [(0.003, 2), (0.001, 1)]
    assert [s.warmup for s in read_stages(longer, CONFIG, 4)] == [2, default_warmup(4000)]


def test_steps_belong_to_stages() -> None:
    stages = [Stage("a", 2, TRUNK, 1.0, 0), Stage("b", 1, TRUNK, 1.0, 0)]
    found = [(stage.name, before) for stage, before in (stage_of(stages, n) for n in (1, 2, 3))]
    assert found == [("a", 0), ("a", 0), ("b", 2)]
    with pytest.raises(ValueError, match="step 4"):
        stage_of(stages, 4)
    (only,) = stages_of({"steps": 9, "lr": 0.5, "warmup": 2})
    assert (only.steps, only.train, only.schedule) == (9, TRUNK, Schedule(9, 0.5, 2))


def test_the_example_of_the_manual_is_a_stage_file(tmp_path: Path) -> None:
    page = (ROOT / "man" / "man1" / "gemtool-train.1").read_text()
    example = page.partition(".SS Stages")[2].partition(".EX\n")[2].partition(".EE")[0]
    stages = read_stages(written(tmp_path, example.replace("\\-", "-")), indexed(), 4)
    assert [stage.train for stage in stages] == [TRUNK, INDEX]


@pytest.mark.parametrize(
    ("old", "new", "message", "code"),
    [
        ("steps = 4", "step = 4", "stage 2: unknown key 'step'; did you mean 'steps'?", 1),
        ("steps = 4\n", "", "stage 2: missing steps", 1),
        ('train = "trunk"\nlr = 1', "lr = 1", "stage 2: missing train", 1),
        ("steps = 4", "steps = 4.5", "stage 2: steps must be int, not 4.5", 1),
        ("steps = 4", "steps = true", "stage 2: steps must be int", 1),
        ("steps = 4", 'steps = "4"', "stage 2: steps must be int", 1),
        ("steps = 4", "steps = 0", "stage 'second': steps must be positive", 1),
        ("steps = 4", "steps = 9223372036854775807", "steps are too many", 1),
        ("lr = 1e-3", "lr = 0", "stage 2: lr must be a positive number, not 0", 1),
        ("lr = 1e-3", "lr = nan", "lr must be a positive number, not nan", 1),
        ("lr = 1e-3", "lr = inf", "lr must be a positive number, not inf", 1),
        ("lr = 1e-3", 'lr = "fast"', "stage 2: lr must be float", 1),
        ("warmup = 2", "warmup = -1", "stage 'first': warmup must not be negative", 1),
        ("lr = 1e-3", "negatives = -1", "negatives must not be negative", 1),
        ("lr = 1e-3", "negatives = 4", "--batch / --accumulate is 4", 2),
        ('name = "second"', 'name = "first"', "two stages have the name 'first'", 1),
        ('name = "second"', 'name = ""', "stage 2: its name is empty", 1),
        ('"trunk"\nlr = 1', '"trunc"\nlr = 1', "train must be one of trunk, index, not 'trunc'", 1),
        ('"trunk"\nlr = 1', '"index"\nlr = 1', "trains an index, which model 'tiny' does not", 2),
        ('"trunk"\nlr = 1e-3', '"index"\nnegatives = 1', "negatives are for stages that", 1),
        (TWO, TWO.replace("[[stage]]", "[[stages]]"), "'stages'; did you mean 'stage'?", 1),
        (TWO, "", "missing stage", 1),
        (TWO, "stage = []", "stages are tables under headings [[stage]]", 1),
        (TWO, "stage = [1]", "stages are tables under headings [[stage]]", 1),
        (TWO, TWO.partition("\n\n")[0].replace("[[stage]]", "[stage]"), "headings [[stage]]", 1),
        (TWO, "stage: first", "not TOML", 1),
        (TWO, None, "cannot be read: no such file or directory", 2),
    ],
)
def test_mistakes_in_a_file(
    monkeypatch: pytest.MonkeyPatch,
    workshop: Path,
    tmp_path: Path,
    old: str,
    new: str | None,
    message: str,
    code: int,
) -> None:
    path = tmp_path / "stages.toml"
    if new is not None:
        assert old in TWO
        path.write_text(TWO.replace(old, new))
    found = refused(monkeypatch, workshop, tmp_path / "run", stages=str(path))
    assert (message in found[0], str(path) in found[0], found[1]) == (True, True, code), found
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--steps", 9), "--steps goes without --stages"),
        (("--lr", 0.1), "--lr goes without --stages"),
        (("--warmup", 0), "--warmup goes without --stages"),
        (("--compile-only", "--topology", "v5p:2x2x1"), "--stages goes without --compile-only"),
    ],
)
def test_options_that_stages_replace(
    gemtool: Command, workshop: Path, more: tuple[object, ...], message: str
) -> None:
    done = gemtool(*staged(workshop, "run", *more), check=False)
    assert done.returncode == 2
    (line,) = done.stderr.decode().splitlines()
    assert message in line


def test_errors_are_of_this_tool() -> None:
    with pytest.raises(GemtoolError, match="stage 'a': steps must be positive, not 0"):
        Stage("a", 0, TRUNK, 1.0, 0)
