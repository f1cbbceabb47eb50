"""gemtool vocab: learns a vocabulary from text, or appends pieces of a new language to one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from gemtool import log
from gemtool.cmd.options import Force, Inputs, Output, Seed, common
from gemtool.errors import CorruptInput
from gemtool.stream.files import display_name, open_input, open_output


@common
def vocab(
    inputs: Inputs = None,
    size: Annotated[int, typer.Option("--size", metavar="N", help="Ids in all.")] = 16384,
    extend: Annotated[
        Path | None,
        typer.Option(
            "--extend", metavar="MODEL", help="Keep the ids of MODEL and append new pieces."
        ),
    ] = None,
    sentences: Annotated[
        int,
        typer.Option(
            "--sentences", metavar="N", min=1, help="Learn from a sample of N lines of the input."
        ),
    ] = 500_000,
    output: Output = None,
    force: Force = False,
    seed: Seed = 0,
) -> None:
    """Learn a vocabulary from text or JSONL."""
    from gemtool.data.vocab import Vocab, train_vocab

    base = None if extend is None else Vocab.load(extend)
    with open_output(output, force=force) as file, log.progress("read", unit="lines") as bar:
        lines = _counted(_lines(inputs or ["-"]), bar)
        model = train_vocab(lines, size=size, extend=base, seed=seed, sentences=sentences)
        file.write(model)
    made = Vocab(model, Path(output or "<stdout>"))
    log.info("vocabulary done", ids=made.size, fingerprint=made.fingerprint)


def _counted(lines: Iterator[str], bar: log.progress) -> Iterator[str]:
    for line in lines:
        bar.update()
        yield line


def _lines(inputs: list[str]) -> Iterator[str]:
    """Lines of all inputs. An input whose first line is a JSON object with a text is JSONL.

    Ill-formed UTF-8 is left out: a vocabulary holds it as single bytes anyway.
    """
    for path in inputs:
        is_jsonl = False
        with open_input(path) as file:
            for number, raw in enumerate(file, 1):
                line = raw.decode("utf-8", errors="ignore")
                if number == 1:
                    is_jsonl = _text_of(line) is not None
                if not is_jsonl:
                    yield line
                elif line.strip():
                    text = _text_of(line)
                    if text is None:
                        raise CorruptInput(
                            f"{display_name(path)}: line {number}: expected a JSON object with a "
                            f'"text" string, as in line 1'
                        )
                    yield from text.splitlines()


def _text_of(line: str) -> str | None:
    """The text of a line of JSONL; None for any other line."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    text = record.get("text") if isinstance(record, dict) else None
    return text if isinstance(text, str) else None
