"""A training run: shards in, metrics out, states and checkpoints on the way."""

from __future__ import annotations

import contextlib
import json
import math
import time
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gemtool import log, signals
from gemtool.checkpoint import VOCAB, open_checkpoint, write_checkpoint
from gemtool.data.arrays import ENCODERS
from gemtool.data.settings import MediaSettings
from gemtool.data.shards import ShardFolder
from gemtool.data.vocab import Vocab
from gemtool.errors import GemtoolError, UsageError, counted, did_you_mean
from gemtool.model.config import PRESETS, ModelConfig, load_preset
from gemtool.model.execution import chosen
from gemtool.model.mesh import open_mesh
from gemtool.model.params import Tree, count_params
from gemtool.model.stacking import unstack_layers
from gemtool.runtime import memory_size, setup_jax
from gemtool.stream.files import printable
from gemtool.stream.header import provenance
from gemtool.train.evaluation import Evaluation
from gemtool.train.extend import add_params, extend_params, require_parts_of
from gemtool.train.loader import Loader, open_data, require_match
from gemtool.train.optimizer import default_peak, default_warmup, make_optimizer
from gemtool.train.parts import INDEX, TRUNK, split
from gemtool.train.placement import place_batches, state_shardings
from gemtool.train.stages import Stage, read_stages, require_same, stage_of, stages_of
from gemtool.train.state import RunFolder, open_run
from gemtool.train.step import (
    STATE_BYTES,
    TrainState,
    abstract_state,
    init_state,
    make_train_step,
    restacked,
    stack,
    with_fresh_moments,
)

STEPS = 1000
"""Of a run that is not told how many."""

Row = dict[str, Any]


@dataclass(frozen=True)
class TrainOptions:
    """What `gemtool train` was asked for; see its help for each."""

    data: tuple[str, ...]
    ckpt: str
    model: str | None = None
    init: str | None = None
    vocab: str | None = None
    steps: int | None = None
    stages: str | None = None
    batch: int = 4
    accumulate: int = 1
    mesh: str | None = None
    dtype: str | None = None
    remat: bool | None = None
    scan: bool | None = None
    kernels: str | None = None
    lr: float | None = None
    warmup: int | None = None
    eval: str | None = None
    eval_every: int = 100
    save_every: int = 100
    keep: int = 2
    seed: int = 0
    resume: bool = False
    force: bool = False


def train(options: TrainOptions, emit: Callable[[Row], None]) -> None:
    """Trains; `emit` gets the metrics of each step.

    Raises:
        UsageError, GemtoolError, CorruptInput: the options, the data or the folder do not fit; the
            loss is no longer finite.
        SystemExit: on SIGINT, SIGTERM and SIGHUP, after the step was saved.
    """
    require_parts(options.batch, options.accumulate)
    for name in ("steps", "lr", "warmup"):
        if options.stages is not None and getattr(options, name) is not None:
            raise UsageError(f"--{name} goes without --stages: each stage has its own in the file")
    if options.resume and options.force:
        raise UsageError("--resume continues what -f would remove; give one of them")
    setup_jax(kernels=options.kernels)
    data = [open_data(text) for text in options.data]
    with (
        open_run(
            options.ckpt, resume=options.resume, force=options.force, keep=options.keep
        ) as folder,
        contextlib.closing(
            Loader(data, options.batch // options.accumulate, options.seed)
        ) as loader,
    ):
        _Run(options, folder, data, loader, emit).go()


def require_parts(batch: int, accumulate: int) -> None:
    """Raises UsageError where a step cannot be computed in so many equal parts."""
    if batch % accumulate:
        raise UsageError(f"--accumulate {accumulate} does not divide --batch {batch}")


class _Run:
    """One process's share of a run: from fresh or restored state to the last step."""

    def __init__(
        self,
        options: TrainOptions,
        folder: RunFolder,
        data: list[tuple[ShardFolder, float]],
        loader: Loader,
        emit: Callable[[Row], None],
    ) -> None:
        self.options, self.folder, self.data = options, folder, data
        self.loader, self.emit = loader, emit
        self.start = folder.latest() or 0
        self.record = folder.record(self.start) if self.start else None
        self.tokens: int = self.record["tokens"] if self.record else 0
        self.last: Row = self.record["last"] if self.record else {}
        # A run that began with --init has its model in its record: the other may be gone by now.
        begins = self.record is None
        self.initial = open_checkpoint(options.init) if options.init and begins else None
        self.vocab = self._find_vocab()
        self.config = self._find_model()
        asked = options.dtype, options.remat, options.scan
        self.execution = chosen(jax.default_backend(), *asked)
        self.evaluation = self._open_evaluation()
        self.settings = self._settings()
        self.stages = stages_of(self.settings)
        self.steps: int = self.settings["steps"]
        self.mesh = self._make_mesh()
        stacked = self.execution.stacked
        # Of each part that some stage trains.
        parts = dict.fromkeys(stage.train for stage in self.stages)
        self.optimizers = {part: make_optimizer(self.config, stacked, part) for part in parts}
        self.shardings = {
            part: None
            if self.mesh is None
            else state_shardings(self.config, optimizer, self.mesh, stacked, part)
            for part, optimizer in self.optimizers.items()
        }
        self.train_steps: dict[tuple[str, int], Any] = {}
        self._require_memory()

    # What a run is made of

    def _find_vocab(self) -> Vocab:
        """The vocabulary that the shards were made with: a file with their fingerprint."""
        wanted = self.loader.vocab.get("fingerprint")
        where = self.data[0][0].path
        if self.options.vocab is not None:
            vocab = Vocab.load(self.options.vocab)
            if vocab.fingerprint != wanted:
                raise GemtoolError(
                    f"{where}: made with vocabulary {wanted}; that of --vocab "
                    f"{self.options.vocab} is {vocab.fingerprint}"
                )
            if self.initial is not None and not vocab.extends(self.initial.vocab):
                raise GemtoolError(
                    f"{self.initial.path}: has another vocabulary than --vocab "
                    f"{self.options.vocab}, which does not extend it (`gemtool vocab --extend`)"
                )
            return vocab
        if self.initial is not None:
            own_vocab = self.initial.vocab
            if own_vocab.fingerprint != wanted:
                raise GemtoolError(
                    f"{self.initial.path}: its vocabulary is {own_vocab.fingerprint}, that of the "
                    f"shards {wanted}; if that extends it, name its file with --vocab"
                )
            return own_vocab
        own = self.folder.path / VOCAB
        for path in [own, None] if own.exists() else [None]:
            vocab = Vocab.load(path)
            if vocab.fingerprint == wanted:
                return vocab
        raise GemtoolError(
            f"{where}: made with vocabulary {wanted}, which is not the one that ships with "
            "gemtool; name its file with --vocab"
        )

    def _find_model(self) -> ModelConfig:
        options, loader = self.options, self.loader
        if self.initial is not None:
            initial = self.initial
            own, other = initial.settings.structural(), loader.settings.structural()
            if own != other:
                raise GemtoolError(
                    f"{initial.path}: its media settings are {own}, those of the shards {other}"
                )
            config = replace(initial.config, vocab_size=self.vocab.size)
            if options.model is not None:
                config = self._fitted(options.model)
                require_parts_of(str(initial.path), initial.config, config)
        elif self.record is not None:
            config = ModelConfig.from_dict(self.record["settings"]["model"])
            if options.model is not None and config != self._fitted(options.model):
                raise UsageError(
                    f"{self.folder.path}: its model is not --model {options.model}; leave that "
                    "out, or start another run"
                )
        else:
            config = self._fitted(options.model or "nano")
        for kind in sorted(loader.kinds & ENCODERS.keys()):
            config.encoder(ENCODERS[kind])  # raises where the model has none
        return config

    def _fitted(self, model: str) -> ModelConfig:
        return fit_to_data(load_model(model), self.vocab.size, self.loader.settings)

    def _open_evaluation(self) -> Evaluation | None:
        if self.options.eval is None:
            return None
        folder = ShardFolder(self.options.eval)
        require_match(self.data[0][0], folder, length=False)
        for kind in sorted(folder.kinds & ENCODERS.keys()):
            self.config.encoder(ENCODERS[kind])
        size = self.options.batch // self.options.accumulate
        return Evaluation(folder, self.config, size, self.execution)

    def _settings(self) -> Row:
        """What determines the result; of a resumed run, what it began with.

        Raises:
            UsageError, GemtoolError: something else is asked for now. --steps may change, and those of
                the last stage grow.
        """
        options = self.options
        saved = self.record["settings"] if self.record else {}
        if saved and ("stages" in saved) != (options.stages is not None):
            raise UsageError(
                f"{self.folder.path}: was begun {'with' if 'stages' in saved else 'without'} "
                "--stages; resume it so, or start another run with --init"
            )
        settings: Row = {
            "model": self.config.to_dict(),
            "data": self.loader.fingerprint,
            "batch": options.batch,
            "accumulate": options.accumulate,
            "dtype": self.execution.dtype,
            "seed": options.seed,
        }
        if options.stages is None:
            steps = STEPS if options.steps is None else options.steps
            lr, warmup = options.lr, options.warmup
            if lr is None:
                lr = saved.get("lr", default_peak(self.config))
            if warmup is None:
                warmup = saved.get("warmup", default_warmup(steps))
            settings |= {"steps": steps, "lr": lr, "warmup": warmup}
        for name in ("batch", "accumulate", "dtype", "seed", "lr", "warmup"):
            if name in saved and saved[name] != settings[name]:
                raise UsageError(
                    f"{self.folder.path}: was begun with --{name} {saved[name]}, not "
                    f"{settings[name]}; resume it with that, or start another run with --init"
                )
        if saved and saved["data"] != settings["data"]:
            raise GemtoolError(
                f"{self.folder.path}: was begun with other --data (fingerprint {saved['data']}, "
                f"now {settings['data']}); resume it with that, or start another run with --init"
            )
        if options.stages is not None:
            begun = saved.get("stages", [])
            sequences = options.batch // options.accumulate
            stages = read_stages(options.stages, self.config, sequences, begun)
            if saved:
                require_same(self.folder.path, begun, stages)
            settings |= {
                "steps": sum(stage.steps for stage in stages),
                "stages": [asdict(stage) for stage in stages],
            }
        return settings

    def _make_mesh(self) -> Mesh | None:
        sequences = self.options.batch // self.options.accumulate
        mesh = open_mesh(self.options.mesh, self.config, sequences, self.loader.length)
        cuts = mesh is not None and mesh.shape["context"] > 1
        if cuts and any(stage.negatives for stage in self.stages):
            raise UsageError(
                f"--mesh {self.options.mesh}: its context axis cuts sequences, and a stage has "
                "negatives, which need whole ones; use data, fsdp, expert or tensor"
            )
        return mesh

    def _require_memory(self) -> None:
        """Refuses a model or a batch that cannot fit, before it is built.

        Raises:
            UsageError: the parameters with their gradients and moments, or the arrays of a batch and
                of a part of it what each layer hands on, exceed all memory.
        """
        options, length, there = self.options, self.loader.length, memory_size()
        count, _ = count_params(self.config)
        state = STATE_BYTES * count
        if there is not None and state > there and self.mesh is None:
            raise UsageError(
                f"{self.config.name}: to train its {count:,} parameters takes more than "
                f"{state / 1e9:,.0f} GB, the device has {there / 1e9:,.1f} GB; "
                "take a smaller model"
            )
        layers = len(self.config.layer_kinds)
        part = options.batch // options.accumulate
        needed = 4 * length * (5 * options.batch + part * self.config.d_model * layers)
        if there is not None and needed > there:
            raise UsageError(
                f"--batch {options.batch}: a step of so many sequences of {length:,} takes more "
                f"than {needed / 1e9:,.1f} GB, the device has {there / 1e9:,.1f} GB; lower it, or "
                "raise --accumulate"
            )

    def _restore_or_begin(self) -> TrainState:
        params = None
        if self.initial is not None:
            params = self.initial.load_params()
            if self.vocab.size > self.initial.vocab.size:
                params = extend_params(params, self.initial.config, self.initial.vocab, self.vocab)
            if self.options.model is not None:
                params = add_params(params, self.config, self.options.seed)
        stacked = self.execution.stacked
        part = stage_of(self.stages, max(self.start, 1))[0].train
        if self.record is None:
            optimizer, seed = self.optimizers[part], self.options.seed
            state = init_state(self.config, optimizer, seed, params, stacked, part)
            return self._placed(state, part)
        self.loader.set_state(self.record["loader"])
        # Its layers lie as those of the run that saved it.
        was_stacked = self.record["stacked"]
        optimizer = make_optimizer(self.config, was_stacked, part)
        like = abstract_state(self.config, optimizer, was_stacked, part)
        if self.mesh is not None:
            places = state_shardings(self.config, optimizer, self.mesh, was_stacked, part)
            like = jax.tree.map(lambda x, where: x.update(sharding=where), like, places)
        state = restacked(self.config, self.folder.restore(self.start, like), stacked)
        return self._placed(state, part)

    def _placed(self, state: TrainState, part: str) -> TrainState:
        """Where it is, told to the arrays, as those of a restored state are: else a resumed run would
        be another program."""
        return jax.device_put(state, self.shardings[part] or jax.devices()[0])

    # The run

    def go(self) -> None:
        options = self.options
        if self.record is not None and self.start >= self.steps:
            if self._exported_step() != self.start:  # killed between state and checkpoint
                self._export(self.start, self._restore_or_begin().params)
            log.info(f"{self.folder.path}: finished already, at step {self.start:,}")
            return
        if self.record is not None and self.record["settings"]["steps"] != self.steps:
            was = self.record["settings"]["steps"]
            begun = f"--steps {was}" if options.stages is None else f"--stages of {was} steps"
            log.warning(
                f"the run was begun with {begun}; its learning rate now falls until step "
                f"{self.steps}"
            )
        total, active = count_params(self.config)
        log.info(
            f"{'resuming' if self.start else 'training'} {self.config.name}: {total:,} parameters "
            f"({active:,} active) on {self.loader.sequences:,} sequences of {self.loader.length:,}"
            + (f", from step {self.start:,}" if self.start else "")
            + "; the first step takes longer, as it is compiled"
        )
        had = self.initial is not None and self.initial.config.has_index
        learns = had or any(stage.train == INDEX for stage in self.stages)
        if self.config.has_index and not learns:
            log.warning(
                "the index of this model is not trained in this run: beyond what it attends to anyway "
                "it will find nothing; give it a stage of its own (--stages)"
            )
        state = self._restore_or_begin()
        with (
            contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh),
            # A step consumes the state that it changes, so it is never interrupted half-way.
            signals.deferred("saving after this step") as stop,
            log.progress("train", self.steps, unit="steps", start=self.start) as bar,
        ):
            for step in range(self.start + 1, self.steps + 1):
                stage, before = stage_of(self.stages, step)
                if step in (self.start + 1, before + 1):
                    state = self._enter(stage, state, afresh=1 < step == before + 1)
                began = time.perf_counter()
                batches = [next(self.loader) for _ in range(options.accumulate)]
                tokens = sum(int(np.count_nonzero(batch.segments)) for batch in batches)
                rate = stage.schedule.rate(step - before)
                stacked = stack(batches)
                if self.mesh is not None:
                    stacked = place_batches(stacked, self.mesh)
                state, metrics = self._train_step(stage)(state, stacked, rate)
                values = {name: _shortest(value) for name, value in metrics.items()}
                seconds = time.perf_counter() - began
                self.tokens += tokens
                has_targets = any(np.any(batch.weights) for batch in batches)
                row: Row = {
                    "step": step,
                    **({} if options.stages is None else {"stage": stage.name}),
                    "loss": values.pop("loss"),
                    "tokens": self.tokens,
                    "tokens_per_s": round(tokens / seconds, 1),
                    "lr": _shortest(rate),
                    **values,
                    "seconds": round(seconds, 4),
                }
                is_last, ends = step == self.steps, step == before + stage.steps
                is_finite = math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])
                if not has_targets and stage.train == TRUNK:
                    row["loss"] = None
                    row["reason"] = "loss: the batch has no target"
                evaluates = ends or step % options.eval_every == 0
                if self.evaluation is not None and is_finite and evaluates:
                    row |= self.evaluation.row(state.params, stage.train)
                row = strict(row)
                self.emit(row)
                if not is_finite:
                    self._fail(step)
                self.last = {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s")}
                stops_here = bool(stop) and not is_last  # a signal after this is for the next step
                if ends or stops_here or step % options.save_every == 0:
                    self._save(step, state)
                loss = "no target" if row["loss"] is None else f"loss {row['loss']:.3f}"
                name = "" if options.stages is None else f"{stage.name}, "
                bar.update(1, f"{name}{loss}, {tokens / seconds:,.0f} tokens/s")
                if stops_here:
                    self.folder.finish()
                    log.info(f"{self.folder.path}: saved step {step:,}; continue with --resume")
                    raise SystemExit(128 + stop[0])
        self.folder.finish()

    def _enter(self, stage: Stage, state: TrainState, *, afresh: bool) -> TrainState:
        """The state for the steps of a stage that come now; `afresh`: that of the stage before."""
        part = stage.train
        if self.options.stages is not None:
            trained, _ = split(state.params, part)
            count = sum(leaf.size for leaf in jax.tree.leaves(trained))
            log.info(
                f"stage {stage.name}: {counted(stage.steps, 'step')} train {count:,} parameters "
                f"({part})"
            )
        if not afresh:
            return state
        optimizer, shardings = self.optimizers[part], self.shardings[part]
        return self._placed(with_fresh_moments(state, optimizer, part, shardings), part)

    def _train_step(self, stage: Stage) -> Any:
        """The step of a stage; stages of a kind share one."""
        kind = part, negatives = stage.train, stage.negatives
        if kind not in self.train_steps:
            self.train_steps[kind] = make_train_step(
                self.config,
                self.optimizers[part],
                self.shardings[part],
                self.execution,
                part,
                negatives,
            )
        return self.train_steps[kind]

    def _fail(self, step: int) -> None:
        self.folder.finish()
        kept = self.folder.latest()
        rest = "nothing was saved" if kept is None else f"the state of step {kept:,} is kept"
        raise GemtoolError(
            f"step {step}: the loss or its gradient is no longer finite; {rest}; "
            + (
                "try a lower --lr or a longer --warmup"
                if self.options.stages is None
                else "try a lower lr or a longer warmup of its stage"
            )
        )

    def _save(self, step: int, state: TrainState) -> None:
        record = {
            "tokens": self.tokens,
            "last": self.last,
            "loader": self.loader.get_state(),
            "settings": self.settings,
            "stacked": self.execution.stacked,
        }
        self.folder.save(step, state, record)
        self._export(step, state.params)

    def _export(self, step: int, params: Tree) -> None:
        """The checkpoint that prefill and decode read."""
        chain = tuple(self.data[0][0].manifest.get("pg", ()))
        settings = {k: v for k, v in self.settings.items() if k not in ("model", "data")}
        init = {"init": printable(self.options.init)} if self.options.init else {}
        card = {
            "metrics": self.last,
            "training": settings | init,
            "data": [
                {"path": printable(f.path), "weight": weight, "fingerprint": f.fingerprint}
                for f, weight in self.data
            ],
            "pg": [*chain, provenance("train", chain, self.options.seed)],
        }
        params = unstack_layers(
            self.config, jax.tree.map(np.asarray, params), lambda x, index: x[index]
        )
        write_checkpoint(
            self.folder.path, self.config, params, self.vocab, self.loader.settings, card, step
        )

    def _exported_step(self) -> int | None:
        try:
            return open_checkpoint(self.folder.path).step
        except GemtoolError:
            return None


def load_model(name: str) -> ModelConfig:
    """An architecture: a preset's name, or the path of a TOML file.

    Raises:
        UsageError: neither.
        GemtoolError: the file does not describe a model.
    """
    if name in PRESETS:
        return load_preset(name)
    try:
        return ModelConfig.from_dict(tomllib.loads(Path(name).read_text("utf-8")))
    except FileNotFoundError:
        raise UsageError(
            f"--model {name}: neither a preset ({', '.join(PRESETS)}) nor a file"
            f"{did_you_mean(name, PRESETS)}"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise GemtoolError(f"{name}: not TOML: {problem}") from None
    except GemtoolError as problem:
        raise GemtoolError(f"{name}: {problem}") from None


def fit_to_data(config: ModelConfig, vocab_size: int, settings: MediaSettings) -> ModelConfig:
    """The architecture with as many token embeddings and soft positions as the data need."""
    tokens = {"visual": settings.image_soft, "audio": settings.audio_rate}
    encoders = tuple(replace(encoder, tokens=tokens[encoder.kind]) for encoder in config.encoders)
    return replace(config, vocab_size=vocab_size, encoders=encoders)


def _shortest(value: Any) -> float:
    """A float32 scalar as the float that prints with no more digits than it takes to tell it."""
    return float(str(np.asarray(value, np.float32)))


def strict(row: Row) -> Row:
    """A row fit for JSON: a number that is not finite becomes None, and "reason" says what it was."""
    bad = [k for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)]
    if not bad:
        return row
    reasons = [row["reason"]] if "reason" in row else []
    reasons += [f"{name} is {row[name]}" for name in bad]
    return {**row, **dict.fromkeys(bad), "reason": ", ".join(reasons)}


def to_json(row: Row) -> str:
    """A line of JSONL, made `strict`."""
    return json.dumps(strict(row), allow_nan=False)
