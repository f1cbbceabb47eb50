"""gemtool probe: run a diagnostic evaluation case by case, and draw what it found."""

from __future__ import annotations

import gzip
import hashlib
import importlib.resources
import itertools
import os
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemtool import log
from gemtool.cmd.options import Force, Kernels, Mesh, Output, Seed, common, parse_length
from gemtool.errors import CorruptInput, GemtoolError, UsageError, did_you_mean, reason
from gemtool.probes import PROBES, open_probe, probe_options
from gemtool.probes.wordings import WORDINGS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gemtool.infer.engine import Engine
    from gemtool.infer.sequence import Sequence
    from gemtool.probes.haystack import Case


@common
def probe(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help=f"One of: {', '.join(PROBES)}.",
            autocompletion=lambda: list(PROBES),
        ),
    ],
    ckpt: Annotated[
        str, typer.Option("--ckpt", metavar="CKPT", help="Checkpoint folder of the model to probe.")
    ],
    lengths: Annotated[
        str,
        typer.Option(
            "--lengths", metavar="N,...", help="Context lengths in tokens; k is 1,000, M 1,000,000."
        ),
    ] = "1k,2k,4k",
    depths: Annotated[
        int, typer.Option("--depths", metavar="N", min=1, help="Places of the needle a length.")
    ] = 5,
    cases: Annotated[
        int, typer.Option("--cases", metavar="N", min=1, help="Cases a length and depth.")
    ] = 1,
    haystack: Annotated[
        list[Path] | None,
        typer.Option("--haystack", metavar="FILE", help="Text to hide the needle in, or more."),
    ] = None,
    shared: Annotated[
        bool | None,
        typer.Option(
            "--shared/--no-shared",
            help="Hide the needles of all depths in one context, and ask for each: one prefill "
            "instead of as many as depths.",
        ),
    ] = None,
    wording: Annotated[
        str | None,
        typer.Option(
            "--wording",
            metavar="NAME",
            help="Words of needle, question and prefix: report, unless another is named. "
            f"One of: {', '.join(WORDINGS)}.",
            autocompletion=lambda: list(WORDINGS),
        ),
    ] = None,
    distractors: Annotated[
        int | None,
        typer.Option(
            "--distractors", metavar="N", min=0, help="Near misses for each needle; 0 if not given."
        ),
    ] = None,
    values: Annotated[
        int | None,
        typer.Option(
            "--values",
            metavar="N",
            min=1,
            help="Numbers of each city, all asked for at once; 1 if not given.",
        ),
    ] = None,
    absent: Annotated[
        bool | None,
        typer.Option("--absent", help="Ask for what is not there: no number is the right answer."),
    ] = None,
    prefix: Annotated[
        bool, typer.Option("--prefix/--no-prefix", help="Begin the model's turn for it.")
    ] = True,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw the grid of scores.")
    ] = None,
    summary: Annotated[
        bool, typer.Option("--summary", help="A row a cell (length and depth), not a row a case.")
    ] = False,
    mesh: Mesh = None,
    kernels: Kernels = None,
    seed: Seed = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted --output.")
    ] = False,
    output: Output = None,
    force: Force = False,
) -> None:
    """Measure what a model finds in long contexts."""
    if name not in PROBES:
        raise UsageError(f"no probe {name!r}{did_you_mean(name, PROBES)}")
    options = chosen_options(
        name,
        shared=shared,
        wording=wording,
        distractors=distractors,
        values=values,
        absent=absent,
    )
    if resume and output in (None, "-"):
        raise UsageError("--resume needs -o FILE: standard output cannot be read back")
    grid = parse_lengths(lengths)
    target = None if output in (None, "-") else Path(str(output))
    check_outputs(target, plot)
    if target is not None and target.exists() and not (force or resume):
        raise UsageError(f"{target}: exists already; add -f to replace it")

    from gemtool.checkpoint import open_checkpoint
    from gemtool.probes.rows import RowLog, cells, require_finished

    module = open_probe(name)
    text = read_haystack(haystack)
    checkpoint = open_checkpoint(ckpt)
    wanted = list(
        module.cases(
            checkpoint.vocab,
            text,
            lengths=grid,
            depths=depths,
            repetitions=cases,
            seed=seed,
            **options,
        )
    )
    run = {
        "probe": name,
        "model": checkpoint.fingerprint,
        "seed": seed,
        "prefix": prefix,
        **options,
        "haystack": hashlib.sha256(text.encode()).hexdigest()[:16],
    }
    title = f"{titled(name, options)}: {checkpoint.config.name}"
    if target is not None and target.exists() and not force:
        found = require_finished(target, run, wanted, summary=summary)
        log.info(f"{target}: complete already, nothing to do")
        if plot is not None:
            draw(found, plot, title)
        return

    from gemtool.runtime import setup_jax

    setup_jax(kernels=kernels)
    from gemtool.infer.engine import Engine
    from gemtool.model.mesh import open_mesh

    devices = open_mesh(mesh, checkpoint.config)
    with RowLog(target, run, wanted, resume=resume, force=force) as rows:
        engine = Engine(checkpoint, mesh=devices)
        require_memory(engine, grid)
        contexts = [list(same) for _, same in itertools.groupby(wanted, lambda c: id(c.haystack))]
        total = sum(same[0].length for same in contexts)
        context: Sequence | None = None
        with log.progress(f"probe {name}", total=total, unit="tokens") as bar:
            for same in contexts:
                ask = [c for c in same if (c.length, c.depth, c.case) not in rows.done]
                if not ask:
                    bar.update(same[0].length)
                    continue
                started = time.perf_counter()
                # In the buffers of the one before: two of millions of tokens fill the memory.
                context = engine.prefill(ask[0].context, bar.update, reuse=context)
                context.wait()
                prefill = time.perf_counter() - started
                for _, those in itertools.groupby(ask, lambda c: c.question):
                    for row in answered(engine, context, list(those), module.score, prefix=prefix):
                        rows.add(
                            {**run, **row, "prefill_seconds": round(prefill, 3)}, shown=not summary
                        )
        found = [rows.done[case.length, case.depth, case.case] for case in wanted]
        if summary:
            rows.summary = [{**run, **cell} for cell in cells(found)]
    if plot is not None:
        draw(found, plot, title)


def chosen_options(name: str, **given: Any) -> dict[str, Any]:
    """The options of a probe: those that are given (not None), else its defaults.

    Raises:
        UsageError: the probe has no such option.
    """
    options = probe_options(name)
    for option, value in given.items():
        if value is not None and option not in options:
            raise UsageError(f"probe {name} has no --{option}")
    return {o: default if given[o] is None else given[o] for o, default in options.items()}


def titled(name: str, options: dict[str, Any]) -> str:
    """A probe with what is not its default: "needle --shared --values 4"."""
    defaults = probe_options(name)
    changed = {option: value for option, value in options.items() if value != defaults[option]}
    return " ".join(
        [name, *(f"--{o}" if value is True else f"--{o} {value}" for o, value in changed.items())]
    )


def check_outputs(target: Path | None, plot: Path | None) -> None:
    """Refuses, before anything is computed, outputs that could not be written in the end."""
    if target is not None and target.exists() and not target.is_file():
        raise UsageError(f"{target}: is no regular file; leave -o out for standard output")
    if plot is not None and plot.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise UsageError(f"--plot {plot}: expected a name that ends in .png, .pdf or .svg")
    if plot is not None and plot.is_dir():
        raise UsageError(f"--plot {plot}: is a folder; name a file")
    for path in (target, plot):
        if path is None:
            continue
        if not path.parent.is_dir():
            raise GemtoolError(f"{path}: cannot be written: no folder {path.parent}; make it first")
        if not os.access(path.parent, os.W_OK):
            raise GemtoolError(f"{path}: cannot be written: no permission in {path.parent}")


def require_memory(engine: Engine, lengths: list[int]) -> None:
    """Refuses contexts that no effort would fit into this machine.

    Raises:
        UsageError: the keys and values of the longest need more than all memory.
    """
    from gemtool.runtime import memory_size

    needed, there = engine.bytes_for(max(lengths)), memory_size()
    if there is not None and needed > there:
        raise UsageError(
            f"--lengths: a context of {max(lengths):,} tokens takes {needed / 1e9:,.1f} GB with "
            f"this model, the device has {there / 1e9:,.1f} GB"
        )


def draw(rows: list[dict[str, Any]], plot: Path, title: str) -> None:
    """Draws the grid of rows or cells."""
    from gemtool.probes.plot import plot_heat_map

    count = sum(row.get("cases", 1) for row in rows)
    score = sum(row["score"] * row.get("cases", 1) for row in rows) / count
    plot_heat_map(rows, plot, title=f"{title}, score {score:.2f} of {count} cases")


def answered(
    engine: Engine,
    context: Sequence,
    cases: list[Case],
    score: Callable[[Case, str], float],
    *,
    prefix: bool,
) -> Iterator[dict[str, Any]]:
    """Asks a context the question that cases have in common, greedily; scores the answer for each."""
    started = time.perf_counter()
    first = cases[0]
    text = engine.ask(
        context,
        first.question,
        prefix=first.prefix if prefix else "",
        max_tokens=first.max_tokens + (0 if prefix else first.beginning),
    )
    seconds = round(time.perf_counter() - started, 3)
    for case in cases:
        yield {
            "length": case.length,
            "depth": case.depth,
            "case": case.case,
            "needle_at": case.needle_at,
            "question": case.question,
            "answer": case.answer,
            "text": text,
            "score": score(case, text),
            "seconds": seconds,
        }


def parse_lengths(text: str) -> list[int]:
    """Token counts of "1k,256k,10M,5000".

    Raises:
        UsageError: one of them is no count, or there twice.
    """
    lengths = []
    for part in text.split(","):
        lengths.append(parse_length("--lengths", part, example="1k,256k,10M"))
        if lengths[-1] in lengths[:-1]:
            raise UsageError(
                f"--lengths: {lengths[-1]:,} is there twice; --cases asks a length more often"
            )
    return lengths


def read_haystack(paths: list[Path] | None) -> str:
    """The text of the files, or the public-domain prose that ships."""
    if not paths:
        packed = importlib.resources.files("gemtool.probes").joinpath("haystack.txt.gz")
        return gzip.decompress(packed.read_bytes()).decode()
    texts = []
    for path in paths:
        try:
            data = path.read_bytes()
            texts.append((gzip.decompress(data) if path.suffix == ".gz" else data).decode())
        except OSError as problem:
            raise GemtoolError(f"{path}: cannot be read: {reason(problem)}") from None
        except (EOFError, zlib.error) as problem:
            raise CorruptInput(f"{path}: damaged: {problem}") from None
        except UnicodeDecodeError as problem:
            raise CorruptInput(f"{path}: not UTF-8 text, at byte {problem.start}") from None
    return "\n".join(texts)
