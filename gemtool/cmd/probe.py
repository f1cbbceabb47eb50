"""gemtool probe: run a diagnostic evaluation case by case, and draw what it found."""

from __future__ import annotations

import gzip
import importlib.resources
import json
import os
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemtool import log
from gemtool.cmd.options import Force, Output, Seed, common
from gemtool.errors import CorruptInput, GemtoolError, UsageError, did_you_mean, reason
from gemtool.probes import PROBES

if TYPE_CHECKING:
    from gemtool.infer.engine import Engine
    from gemtool.probes.needle import Case


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
    prefix: Annotated[
        bool, typer.Option("--prefix/--no-prefix", help="Begin the model's turn for it.")
    ] = True,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw the grid of scores.")
    ] = None,
    summary: Annotated[
        bool, typer.Option("--summary", help="A row a cell (length and depth), not a row a case.")
    ] = False,
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
    if resume and output in (None, "-"):
        raise UsageError("--resume needs -o FILE: standard output cannot be read back")
    grid = parse_lengths(lengths)
    target = None if output in (None, "-") else Path(str(output))
    if target is not None and target.exists() and not target.is_file():
        raise UsageError(f"{target}: is no regular file; leave -o out for standard output")
    if target is not None and target.exists() and not force:
        if resume:
            log.info(f"{target}: complete already, nothing to do")
            return
        raise UsageError(f"{target}: exists already; add -f to replace it")
    if plot is not None and plot.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise UsageError(f"--plot {plot}: expected a name that ends in .png, .pdf or .svg")

    from gemtool.runtime import setup_jax

    setup_jax()
    from gemtool.checkpoint import open_checkpoint
    from gemtool.infer.engine import Engine
    from gemtool.probes import needle

    text = read_haystack(haystack)
    engine = Engine(open_checkpoint(ckpt))
    wanted = list(
        needle.cases(engine.vocab, text, lengths=grid, depths=depths, repetitions=cases, seed=seed)
    )
    run = {"probe": name, "model": engine.checkpoint.fingerprint, "seed": seed, "prefix": prefix}
    with RowLog(target, run, wanted, resume=resume) as rows:
        total = sum(case.length for case in wanted)
        with log.progress(f"probe {name}", total=total, unit="tokens") as bar:
            for case in wanted:
                row = rows.done.get((case.length, case.depth, case.case))
                if row is None:
                    row = {**run, **run_case(engine, case, prefix=prefix)}
                    rows.add(row, shown=not summary)
                bar.update(case.length)
        found = [rows.done[case.length, case.depth, case.case] for case in wanted]
        if summary:
            rows.summary = list(cells(found))
    if plot is not None:
        from gemtool.probes.plot import plot_heat_map

        score = sum(row["score"] for row in found) / len(found)
        title = f"{name}: {engine.config.name}, recall {score:.2f} of {len(found)} cases"
        plot_heat_map(found, plot, title=title)


def run_case(engine: Engine, case: Case, *, prefix: bool) -> dict[str, Any]:
    """Prefills the context, asks the question greedily, and scores the answer."""
    from gemtool.probes import needle

    started = time.perf_counter()
    answer = engine.ask(
        case.context,
        case.question,
        prefix=case.prefix if prefix else "",
        max_tokens=2 * needle.NUMBER_DIGITS + (0 if prefix else 24),
    )
    return {
        "length": case.length,
        "depth": case.depth,
        "case": case.case,
        "needle_at": case.needle_at,
        "question": case.question,
        "answer": case.answer,
        "text": answer,
        "score": needle.score(case, answer),
        "seconds": round(time.perf_counter() - started, 3),
    }


class RowLog:
    """The rows of a run: printed, or gathered in FILE.partial until FILE is whole.

    Args:
        target: FILE; None is standard output.
        run: what all rows say of the run.
        wanted: the cases of the run.
        resume: take over the rows of an interrupted run.

    Attributes:
        done: rows by (length, depth, case), those of an interrupted run included.
        summary: if set, the rows that are written in the end instead.

    Raises:
        GemtoolError: the rows to take over are of another run.
    """

    def __init__(
        self, target: Path | None, run: dict[str, Any], wanted: list[Case], *, resume: bool
    ) -> None:
        from gemtool.stream.files import atomic_write

        self._target = target
        self.done: dict[tuple[int, float, int], dict[str, Any]] = {}
        self.summary: list[dict[str, Any]] | None = None
        if target is None:
            return
        self._partial = target.with_name(target.name + ".partial")
        if resume and self._partial.exists():
            cases = {(case.length, case.depth, case.case): case for case in wanted}
            for row in read_rows(self._partial):
                key = row["length"], row["depth"], row["case"]
                self._require_same(row, run, cases.get(key))
                self.done[key] = row
        atomic_write(self._partial, to_lines(self.done.values()))
        self._file = self._partial.open("ab")

    def _require_same(self, row: dict[str, Any], run: dict[str, Any], case: Case | None) -> None:
        """Refuses a row that this run would not have written."""
        again = "finish that run as it was begun, or remove the file"
        own = run if case is None else {**run, "needle_at": case.needle_at, "answer": case.answer}
        for name, value in own.items():
            if row.get(name) != value:
                raise GemtoolError(
                    f"{self._partial}: its rows have {name} {row.get(name)!r}, this run {value!r}; "
                    + again
                )
        if case is None:
            raise GemtoolError(
                f"{self._partial}: case {row['case']} at length {row['length']} and depth "
                f"{row['depth']} is none of this run; {again}"
            )

    def __enter__(self) -> RowLog:
        return self

    def add(self, row: dict[str, Any], *, shown: bool) -> None:
        """Records a row at once; without a file, prints it if it is to be shown."""
        self.done[row["length"], row["depth"], row["case"]] = row
        if self._target is not None:
            self._file.write(to_lines([row]))
            self._file.flush()
        elif shown:
            print(json.dumps(row, ensure_ascii=False), flush=True)

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> None:
        from gemtool.stream.files import atomic_write, sync_folder

        if self._target is None:
            if kind is None and self.summary is not None:
                print(to_lines(self.summary).decode(), end="", flush=True)
            return
        with self._file:
            os.fsync(self._file.fileno())
        if kind is not None:
            return
        if self.summary is None:
            self._partial.replace(self._target)
            sync_folder(self._target.parent)
        else:
            atomic_write(self._target, to_lines(self.summary))
            self._partial.unlink()


def to_lines(rows: Iterable[dict[str, Any]]) -> bytes:
    """JSONL."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The whole rows of an interrupted run; a last line that was cut short is left out.

    Raises:
        CorruptInput: another line is no JSON object.
    """
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
            row["length"], row["depth"], row["case"]
        except (ValueError, KeyError, TypeError):
            raise CorruptInput(f"{path}: line {number} is no row of a probe") from None
        yield row


def cells(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One row for each length and depth: how many cases, and their mean score."""
    grouped: dict[tuple[int, float], list[float]] = {}
    for row in rows:
        grouped.setdefault((row["length"], row["depth"]), []).append(row["score"])
    for (length, depth), scores in grouped.items():
        mean = sum(scores) / len(scores)
        yield {"length": length, "depth": depth, "cases": len(scores), "score": mean}


def parse_lengths(text: str) -> list[int]:
    """Token counts of "1k,256k,10M,5000".

    Raises:
        UsageError: one of them is no count.
    """
    sizes = {"": 1, "k": 1_000, "K": 1_000, "m": 1_000_000, "M": 1_000_000}
    lengths = []
    for part in text.split(","):
        number, unit = part.strip(), ""
        if number[-1:].isalpha():
            number, unit = number[:-1], number[-1]
        try:
            lengths.append(round(float(number) * sizes[unit]))
        except (ValueError, KeyError, OverflowError):
            raise UsageError(f"--lengths: {part!r} is no length; write 1k,256k,10M") from None
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
