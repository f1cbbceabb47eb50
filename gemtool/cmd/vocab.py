"""gemtool vocab: learns a vocabulary from text, or appends pieces of a new language to one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemtool import log
from gemtool.cmd.options import Force, Inputs, Output, Seed, common
from gemtool.errors import CorruptInput
from gemtool.stream.files import display_name, open_input, open_output

if TYPE_CHECKING:
    from gemtool.data.vocab import Vocab


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
    """Learn a vocabulary from text or JSONL.

    In the end it says, for each language, how many bytes a token stands for. The language of a
    JSONL record is its "lang"; that of anything else is the name of its file.
    """
    from gemtool.data.vocab import Vocab, train_vocab

    base = None if extend is None else Vocab.load(extend)
    with open_output(output, force=force) as file, log.progress("read", unit="lines") as bar:
        samples: dict[str, StringIO] = {}
        lines = _sampled(_lines(inputs or ["-"]), samples, bar)
        model = train_vocab(lines, size=size, extend=base, seed=seed, sentences=sentences)
        file.write(model)
    made = Vocab(model, Path(output or "<stdout>"))
    log.info("vocabulary done", ids=made.size, fingerprint=made.fingerprint)
    for language, sample in sorted(samples.items()):
        text = sample.getvalue()
        before = {} if base is None else {"before": bytes_a_token(base, text)}
        log.info(language, bytes_a_token=bytes_a_token(made, text), **before)


SAMPLE = 1 << 18
"""Characters of a language that are kept to be measured."""


def bytes_a_token(vocab: Vocab, text: str) -> float:
    """How many bytes of a text a token stands for, to two decimals; 0 for an empty text."""
    return round(len(text.encode()) / max(len(vocab.encode(text)), 1), 2)


def _sampled(
    lines: Iterator[tuple[str, str]], samples: dict[str, StringIO], bar: log.progress
) -> Iterator[str]:
    """Passes lines on, and keeps the beginning of each language's in `samples`."""
    for language, line in lines:
        bar.update()
        sample = samples.setdefault(language, StringIO())
        if sample.tell() < SAMPLE:
            sample.write(line if line.endswith("\n") else line + "\n")
        yield line


def _lines(inputs: list[str]) -> Iterator[tuple[str, str]]:
    """Languages and lines of all inputs. If the first line of one is a JSON object with a text, it
    is JSONL.

    Ill-formed UTF-8 is left out: a vocabulary holds it as single bytes anyway.
    """
    for path in inputs:
        is_jsonl = False
        name = display_name(path)
        with open_input(path) as file:
            for number, raw in enumerate(file, 1):
                line = raw.decode("utf-8", errors="ignore")
                if number == 1:
                    is_jsonl = _record_of(line) is not None
                if not is_jsonl:
                    yield name, line
                elif line.strip():
                    record = _record_of(line)
                    if record is None:
                        raise CorruptInput(
                            f"{name}: line {number}: expected a JSON object with a "
                            f'"text" string, as in line 1'
                        )
                    language = str(record.get("lang", name))
                    yield from ((language, part) for part in record["text"].splitlines())


def _record_of(line: str) -> dict[str, Any] | None:
    """A line of JSONL that holds a text; None for any other line."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    has_text = isinstance(record, dict) and isinstance(record.get("text"), str)
    return record if has_text else None
