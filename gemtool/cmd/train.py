"""gemtool train: shards -> a run folder with a checkpoint; metrics as JSONL on stdout."""

from __future__ import annotations

from typing import Annotated

import typer

from gemtool.cmd.options import Force, Mesh, Seed, common


def presets() -> list[str]:
    """Names that --model knows, for completion."""
    from gemtool.model.config import PRESETS

    return list(PRESETS)


@common
def train(
    data: Annotated[
        list[str],
        typer.Option(
            "--data",
            metavar="DIR[:WEIGHT]",
            help="A shard folder, and its share if there are several (repeatable).",
        ),
    ],
    ckpt: Annotated[
        str, typer.Option("--ckpt", metavar="DIR", help="The folder of the run, to be written.")
    ],
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
        typer.Option("--init", metavar="CKPT", help="Begin with the model of a checkpoint."),
    ] = None,
    vocab: Annotated[
        str | None,
        typer.Option(
            "--vocab", metavar="FILE", help="The vocabulary of the data, if not the shipped one."
        ),
    ] = None,
    steps: Annotated[
        int, typer.Option("--steps", metavar="N", min=1, help="Length of the run.")
    ] = 1000,
    batch: Annotated[
        int, typer.Option("--batch", metavar="N", min=1, help="Sequences in a step.")
    ] = 4,
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
    force: Force = False,
    seed: Seed = 0,
) -> None:
    """Train a model on shards; metrics as JSONL, checkpoints in a folder.

    An interrupted run continues with the same command and --resume, and ends with the same bits as
    if it had never stopped. The folder is a checkpoint for prefill, decode and probe from the
    first save on.
    """
    from gemtool.train.loop import TrainOptions, to_json
    from gemtool.train.loop import train as run

    options = TrainOptions(
        data=tuple(data),
        ckpt=ckpt,
        model=model,
        init=init,
        vocab=vocab,
        steps=steps,
        batch=batch,
        accumulate=accumulate,
        mesh=mesh,
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
