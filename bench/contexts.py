"""Contexts as files against llama.cpp and transformers, on one core: `python bench/contexts.py`.

The same random weights of a dense Qwen3 (55 million, float32) and the same tokens for three programs,
each in a process of its own: reading a text, writing what was made of it to a file, going back to the
file, and decoding behind it. They take turns. Keys and values are float16 in ours and llama.cpp's (its
default), float32 in transformers'. Scores have to agree, as far as float16 does, before anything is
timed. llama.cpp runs as it does by default, with its flash attention; without that; and with float16
weights. Its flash attention sums in float16 where it decodes: the longer the text, the further its
scores are off, which rows say and nothing refuses. Without it, the same file is held to the tolerance.

"loading" is from the file to the scores after one more token, by a process that has the model;
"a fresh process" does so from its start: imports, weights, programs that it compiled before. Our files
are checksummed, verified and synced to disk; theirs are not.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from measure import Action, OwnProcess, Row, in_turns, keep_to_one_core, processes, report, row_of
from peers import Gemtool, LlamaCpp, Transformers

TOLERANCE = 5e-3
"""Of scores, whose own size is about 2."""
LENGTHS = ((2048, 5), (8192, 3))
"""Tokens of the text, and turns of each."""
TOKENS = 32
"""That a turn of decoding has."""
FRESH = 3
"""Processes that are started for each length."""


@dataclass(frozen=True)
class Program:
    """What makes a program, of what, and how far its scores may be from ours."""

    make: Callable[..., Any]
    given: tuple[Any, ...]
    tolerance: float = TOLERANCE

    def start(self) -> OwnProcess:
        """It, in a process of its own."""
        return OwnProcess(self.make, *self.given)


def rows(folder: Path) -> Iterator[Row]:
    import formats

    try:
        formats.write_model(formats.qwen3(), folder)
    except ImportError as missing:
        print(f"{missing.name} is not installed: not compared", file=sys.stderr)
        return
    yield from compared(programs(folder), folder, LENGTHS)


def programs(folder: Path, room: int = LENGTHS[-1][0] + TOKENS) -> dict[str, Program]:
    """Ours, and the peers that are installed, with the models in a folder."""
    found: dict[str, Program] = {
        "gemtool": Program(Gemtool, (str(folder),)),
        "transformers": Program(Transformers, (str(folder),)),
    }
    if importlib.util.find_spec("llama_cpp") is None:
        print("llama-cpp-python is not installed: not compared", file=sys.stderr)
        return found
    for name, weights, flash in (
        ("llama.cpp", "float32", True),
        ("llama.cpp (no flash attention)", "float32", False),
        ("llama.cpp (float16 weights)", "float16", True),
    ):
        given = str(folder), weights, flash, room
        found[name] = Program(LlamaCpp, given, np.inf if flash else TOLERANCE)
    return found


def compared(
    made_by: dict[str, Program], folder: Path, lengths: Sequence[tuple[int, int]]
) -> Iterator[Row]:
    """The rows of programs, of which the first is ours, for texts of some lengths and their turns."""
    text = np.random.default_rng(0).integers(320, 16000, lengths[-1][0] + TOKENS, np.int32)
    with contextlib.closing(Programs(made_by, folder)) as running:
        for length, turns in lengths:
            tokens, more = text[:length], text[length : length + TOKENS]
            race = partial(running.race, turns=turns)
            yield from race(f"prefill of {length}", "prefill", tokens, work=length)
            yield from race(f"decoding after {length}", "decode", more, work=TOKENS)
            yield from race(f"saving {length}", "save", of_file=True)
            yield from race(f"loading {length}", "load", more[:1], of_file=True)
            yield from running.race_afresh(f"a fresh process loading {length}", more[:1])


class Programs:
    """Programs side by side, each with a file of its own in a folder."""

    def __init__(self, made_by: dict[str, Program], folder: Path) -> None:
        self._made_by = made_by
        self._running = {name: program.start() for name, program in made_by.items()}
        self._files = {name: str(folder / f"{at}.context") for at, name in enumerate(made_by)}

    def close(self) -> None:
        """Ends them."""
        for process in self._running.values():
            process.close()

    def race(
        self, what: str, method: str, *given: Any, turns: int, work: int = 0, of_file: bool = False
    ) -> Iterator[Row]:
        """A row a peer of a method that is given these and, first, with `of_file`, the program's file.

        What the first calls give has to agree; they are not timed. `work` as tokens of a turn.
        """
        actions, found = {}, {}
        for name, process in self._running.items():
            own = (self._files[name], *given) if of_file else given
            found[name] = process.result(method, *own)
            actions[name] = partial(process.cost, method, *own)
        limits = {name: program.tolerance for name, program in self._made_by.items()}
        about = megabytes(found) if method == "save" else differences(found, limits)
        return versus(what, actions, turns, work, about)

    def race_afresh(self, what: str, token: np.ndarray) -> Iterator[Row]:
        """A row a peer of processes that are started to load the program's file."""
        actions = {
            name: partial(processes, partial(loaded_afresh, program, self._files[name], token))
            for name, program in self._made_by.items()
        }
        return versus(what, actions, FRESH)


def loaded_afresh(program: Program, path: str, token: np.ndarray) -> None:
    """Starts a program, has it load a file, and ends it."""
    process = program.start()
    process.result("load", path, token)
    process.close()


def versus(
    what: str,
    actions: Mapping[str, Action],
    turns: int,
    work: int = 0,
    about: dict[str, Row] | None = None,
) -> Iterator[Row]:
    """Runs actions in turns: a row each but the first, which is ours, with what there is about it."""
    (_, ours), *peers = zip(
        actions, in_turns([*actions.values()], turns, warm_up=False), strict=True
    )
    for name, costs in peers:
        title, rate = f"{what}, against {name}", (work, work) if work else None
        row = row_of(title, ours, costs, unit="tokens/CPU-s" if work else "s", work=rate)
        yield {**row, **(about or {}).get(name, {})}


def differences(scores: dict[str, Any], tolerances: Mapping[str, float]) -> dict[str, Row]:
    """By peer: how far its scores are from ours, which are the first.

    Raises:
        SystemExit: further than is tolerated.
    """
    (_, ours), *peers = scores.items()
    found = {name: float(np.max(np.abs(np.subtract(ours, theirs)))) for name, theirs in peers}
    for name, difference in found.items():
        most = tolerances[name]
        if not difference <= most:
            sys.exit(f"the scores of {name} differ by {difference:.2g}; expected {most:g} at most")
    return {name: {"difference": difference} for name, difference in found.items()}


def megabytes(sizes: dict[str, int]) -> dict[str, Row]:
    """By peer: the size of our file and of its own."""
    (_, ours), *peers = sizes.items()
    return {name: {"our_mb": ours / 1e6, "peer_mb": theirs / 1e6} for name, theirs in peers}


if __name__ == "__main__":
    keep_to_one_core()
    report(rows)
