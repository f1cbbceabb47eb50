"""gemtool train: shards -> a run folder with a checkpoint; metrics as JSONL on stdout."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from gemtool.cmd.options import (
    CompiledLength,
    CompileOnly,
    Force,
    Kernels,
    Mesh,
    Seed,
    Topology,
    common,
    compiled,
    require_given,
)
from gemtool.errors import UsageError


class Precision(StrEnum):
    """What activations and multiplied weights are."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def presets() -> list[str]:
    """Names that --model knows, for completion."""
    from gemtool.model.config import PRESETS

    return list(PRESETS)


@common
def train(
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="DIR[:WEIGHT]",
            help="A shard folder, and its share if there are several (repeatable).",
        ),
    ] = None,
    ckpt: Annotated[
        str | None,
        typer.Option("--ckpt", metavar="DIR", help="The folder of the run, to be written."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="PRESET|FILE",
            autocompletion=presets,
            help="Architecture: a preset (nano, mini, flash, pro) or a TOML file; nano by default. "
            "Its vocabulary size and soft tokens follow the data.",
        ),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            "--init",
            metavar="CKPT",
            help="Begin with the model of a checkpoint; with --model, which has all of it, the rest "
            "of that is fresh.",
        ),
    ] = None,
    vocab: Annotated[
        str | None,
        typer.Option(
            "--vocab", metavar="FILE", help="The vocabulary of the data, if not the shipped one."
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", metavar="N", min=1, help="Length of the run; 1,000 by default."),
    ] = None,
    stages: Annotated[
        str | None,
        typer.Option(
            "--stages",
            metavar="FILE",
            help="Train in stages, which a TOML file lists: how long and how fast each is, and "
            "whether it trains the trunk or the index; instead of --steps, --lr and --warmup.",
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option("--batch", metavar="N", min=1, help="Sequences in a step; 4 by default."),
    ] = None,
    accumulate: Annotated[
        int,
        typer.Option(
            "--accumulate",
            metavar="N",
            min=1,
            help="Compute a step in N parts, for less memory; N divides --batch.",
        ),
    ] = 1,
    mesh: Mesh = None,
    dtype: Annotated[
        Precision | None,
        typer.Option(
            "--dtype",
            help="Of activations and multiplied weights: float32 or bfloat16; by default float32 on "
            "a CPU. Parameters, moments, routers and the loss are float32 in any case.",
        ),
    ] = None,
    remat: Annotated[
        bool | None,
        typer.Option(
            "--remat/--no-remat",
            help="Compute each layer again in the backward pass instead of keeping its inside: less "
            "memory, a third more work. By default not on a CPU.",
        ),
    ] = None,
    scan: Annotated[
        bool | None,
        typer.Option(
            "--scan/--no-scan",
            help="Run equal layers as a loop, which compiles faster. By default not on a CPU, where "
            "it is slower.",
        ),
    ] = None,
    kernels: Kernels = None,
    lr: Annotated[
        float | None,
        typer.Option(
            "--lr",
            metavar="RATE",
            min=0.0,
            help="Peak learning rate; by default 0.003, less in proportion for models wider "
            "than 128. It falls to a tenth along a cosine.",
        ),
    ] = None,
    warmup: Annotated[
        int | None,
        typer.Option(
            "--warmup",
            metavar="N",
            min=0,
            help="Steps until the peak; by default a tenth of the run, at most 1,000.",
        ),
    ] = None,
    eval: Annotated[
        str | None,
        typer.Option("--eval", metavar="DIR", help="Report the loss on these shards too."),
    ] = None,
    eval_every: Annotated[
        int,
        typer.Option(
            "--eval-every", metavar="N", min=1, help="Steps between evaluations; the last counts."
        ),
    ] = 100,
    save_every: Annotated[
        int,
        typer.Option(
            "--save-every", metavar="N", min=1, help="Steps between saves; the last is saved too."
        ),
    ] = 100,
    keep: Annotated[
        int, typer.Option("--keep", metavar="N", min=1, help="States to keep for --resume.")
    ] = 2,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue the run in --ckpt, or begin it; one that is finished is left alone.",
        ),
    ] = False,
    compile_only: CompileOnly = False,
    topology: Topology = None,
    length: CompiledLength = None,
    force: Force = False,
    seed: Seed = 0,
) -> None:
    """Train a model on shards; metrics as JSONL, checkpoints in a folder.

    An interrupted run continues with the same command and --resume, and ends with the same bits as
    if it had never stopped. The folder is a checkpoint for prefill, decode and probe from the
    first save on.
    """
    precision = None if dtype is None else dtype.value
    sequences = {"batch": batch, "accumulate": accumulate, "data": tuple(data or ())}
    how = {"mesh": mesh, "dtype": precision, "remat": remat, "scan": scan, "kernels": kernels}
    if compile_only and stages is not None:
        raise UsageError(
            "--stages goes without --compile-only, which compiles a trunk's step alone"
        )
    if data and length is not None:
        raise UsageError("--length: that of the sequences in --data is taken; leave it out")
    if compiled(
        "train", compile_only, topology, length, model=model, ckpt=init, **sequences, **how
    ):
        return
    require_given({"--data": data, "--ckpt": ckpt})
    assert data is not None
    assert ckpt is not None
    from gemtool.train.loop import TrainOptions, to_json
    from gemtool.train.loop import train as run

    options = TrainOptions(
        data=tuple(data),
        ckpt=ckpt,
        model=model,
        init=init,
        vocab=vocab,
        steps=steps,
        stages=stages,
        batch=4 if batch is None else batch,
        accumulate=accumulate,
        mesh=mesh,
        dtype=precision,
        remat=remat,
        scan=scan,
        kernels=kernels,
        lr=lr,
        warmup=warmup,
        eval=eval,
        eval_every=eval_every,
        save_every=save_every,
        keep=keep,
        seed=seed,
        resume=resume,
        force=force,
    )
    run(options, lambda row: print(to_json(row), flush=True))
