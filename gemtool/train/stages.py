"""The stages of a run: what is trained, how long and how fast, one after the other."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemtool.errors import GemtoolError, UsageError, reason
from gemtool.model.config import ModelConfig
from gemtool.model.tables import build, choice, not_negative, positive, require
from gemtool.train.optimizer import Schedule, default_peak, default_warmup
from gemtool.train.parts import INDEX, PARTS, TRUNK

_MOST_STEPS = 2**31 - 1
"""What the counter of a state holds."""


@dataclass(frozen=True)
class Stage:
    """A stretch of a run, with a learning rate that rises and falls and moments of its own.

    `name`       as metrics and progress show it.
    `steps`      its length.
    `train`      "trunk": all but the index, by next-token loss; "index": the index alone, by
                 distillation from the trunk, which stays as it is.
    `lr`         peak learning rate.
    `warmup`     steps until the peak.
    `negatives`  other sequences of the batch whose keys global attention sees too; trunk only.
    """

    name: str
    steps: int
    train: str
    lr: float
    warmup: int
    negatives: int = 0

    def __post_init__(self) -> None:
        where = f"stage {self.name!r}"
        positive(where, self, "steps")
        choice(where, self, "train", PARTS)
        not_negative(where, self, "warmup", "negatives")
        require(
            self.train == TRUNK or not self.negatives,
            f"{where}: negatives are for stages that train the trunk",
        )

    @property
    def schedule(self) -> Schedule:
        """Its learning rates, of steps counted from its own beginning."""
        return Schedule(self.steps, self.lr, self.warmup)


@dataclass(frozen=True)
class _File:
    """A stage file: TOML with a table [[stage]] for each."""

    stage: Any


def stages_of(settings: dict[str, Any]) -> tuple[Stage, ...]:
    """The stages in the settings of a run: one, of the trunk, where it has no stage file."""
    if "stages" in settings:
        return tuple(Stage(**stage) for stage in settings["stages"])
    return (Stage("", settings["steps"], TRUNK, settings["lr"], settings["warmup"]),)


def stage_of(stages: Sequence[Stage], step: int) -> tuple[Stage, int]:
    """The stage of a step, counted from 1 over all of them, and how many steps come before it."""
    before = 0
    for stage in stages:
        if step <= before + stage.steps:
            return stage, before
        before += stage.steps
    raise ValueError(f"step {step} is after the last stage")


def read_stages(
    path: str, config: ModelConfig, sequences: int, begun: Sequence[dict[str, Any]] = ()
) -> tuple[Stage, ...]:
    """The stages of a file, for a model and a batch.

    Args:
        path: of the file.
        config: the model's; learning rates that are left out follow its width.
        sequences: of a batch, or of a part of it if it is computed in parts.
        begun: the stages that a run was begun with, as dicts; what is left out stays as it was.

    Raises:
        UsageError: no such file; a stage does not suit the model or the batch.
        GemtoolError: the file does not describe stages.
    """
    try:
        table = tomllib.loads(Path(path).read_text("utf-8"))
        rows = build(_File, table, "the file").stage
        is_list = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
        require(is_list and rows != [], "stages are tables under headings [[stage]]")
        stages = []
        for number, row in enumerate(rows, 1):
            known = dict(begun[number - 1]) if number <= len(begun) else {}
            stages.append(_stage(row, f"stage {number}", config, known))
        _require_distinct(stages)
    except OSError as problem:
        raise UsageError(f"--stages {path}: cannot be read: {reason(problem)}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise GemtoolError(f"{path}: not TOML: {problem}") from None
    except GemtoolError as problem:
        raise GemtoolError(f"{path}: {problem}") from None
    for stage in stages:
        if stage.train == INDEX and not config.has_index:
            raise UsageError(
                f"--stages {path}: stage {stage.name!r} trains an index, which model "
                f"{config.name!r} does not have: none of its layers has indexed attention"
            )
        if stage.negatives >= sequences:
            raise UsageError(
                f"--stages {path}: stage {stage.name!r} has negatives from {stage.negatives} other "
                f"sequences; --batch / --accumulate is {sequences}, of which one is a sequence's own"
            )
    return tuple(stages)


def _stage(row: dict[str, Any], where: str, config: ModelConfig, known: dict[str, Any]) -> Stage:
    steps = row.get("steps")
    whole = steps if type(steps) is int else 1  # `build` says so if it is something else
    defaults = {
        "lr": known.get("lr", default_peak(config)),
        "warmup": known.get("warmup", default_warmup(whole)),
    }
    stage = build(Stage, {**defaults, **row}, where)
    require(stage.name != "", f"{where}: its name is empty")
    require(0 < stage.lr < math.inf, f"{where}: lr must be a positive number, not {stage.lr}")
    return stage


def _require_distinct(stages: Sequence[Stage]) -> None:
    names = [stage.name for stage in stages]
    for name in names:
        require(names.count(name) == 1, f"two stages have the name {name!r}")
    total = sum(stage.steps for stage in stages)
    require(total <= _MOST_STEPS, f"{total:,} steps are too many")


def require_same(folder: Path, begun: Sequence[dict[str, Any]], stages: Sequence[Stage]) -> None:
    """Refuses other stages than a run was begun with, except for more steps of the last one.

    Raises:
        UsageError: naming the first difference.
    """
    resume = "resume it with that, or start another run with --init"
    if len(begun) != len(stages):
        raise UsageError(
            f"{folder}: was begun with --stages of {len(begun)} stages, not {len(stages)}; {resume}"
        )
    for number, (was, stage) in enumerate(zip(begun, stages, strict=True), 1):
        for key, value in asdict(stage).items():
            grows = key == "steps" and number == len(stages) and value > was[key]
            if value != was[key] and not grows:
                raise UsageError(
                    f"{folder}: was begun with --stages whose stage {was['name']!r} has {key} "
                    f"{was[key]}, not {value}; {resume}"
                )
