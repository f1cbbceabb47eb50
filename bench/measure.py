"""What the benchmarks share: runs side by side, what they cost, and how that is shown.

`gemtool` and its peer work in turns, so that a busy machine slows both. A row's `ratio` is the
median over the turns of ours / peer: of rates if each has a rate, else of speeds (peer's seconds /
our seconds). Seconds are those of processors (user and system, of all processes and threads of it)
or, where a row says so, those of the clock.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # the gemtool of this checkout

Row = dict[str, Any]

_HEADING = f"{'ours':>9} {'peer':>9} {'unit':12} {'ratio':>6}  {'spread':12} {'wall':>5}  what"


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds that something took.

    Attributes:
        wall: by the clock.
        cpu: of processors, in all processes and threads of it.
    """

    wall: float
    cpu: float


Action = Callable[[], Cost]
Clock = Literal["cpu", "wall"]


def keep_to_one_core() -> None:
    """Where the system can be told so. To be called before jax and torch count cores and make
    their threads."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def call(function: Callable[[], object]) -> Cost:
    """The cost of a function in this process."""
    return _measured(resource.RUSAGE_SELF, function)


def processes(function: Callable[[], object]) -> Cost:
    """The cost of processes that a function starts and waits for."""
    return _measured(resource.RUSAGE_CHILDREN, function)


def shell(command: str, folder: Path) -> Cost:
    """The cost of a shell's pipeline; `gemtool` in it is the command of this checkout.

    Raises:
        subprocess.CalledProcessError: a process of the pipeline failed.
    """
    gemtool = f"{shlex.quote(sys.executable)} -P -m gemtool"
    script = f'set -o pipefail; gemtool() {{ {gemtool} "$@"; }}; {command}'
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/local/bin:/usr/bin:/bin"}

    def run() -> None:
        subprocess.run(["bash", "-c", script], check=True, cwd=folder, env=environment)

    return processes(run)


class OwnProcess:
    """An object in a process of its own, so that neither side's settings (of malloc, of threads)
    are the other's.

    Args:
        make: makes it there; of a module's top level.
        given: the arguments of `make`.
    """

    def __init__(self, make: Callable[..., Any], *given: Any) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs, make, given), daemon=True)
        self._process.start()
        theirs.close()

    def cost(self, method: str, *given: Any) -> Cost:
        """What calling a method of the object cost there."""
        return self._ask(method, given)[0]

    def result(self, method: str, *given: Any) -> Any:
        """What a method of the object returned."""
        return self._ask(method, given)[1]

    def _ask(self, method: str, given: tuple[Any, ...]) -> tuple[Cost, Any]:
        self._pipe.send((method, given))
        return self._pipe.recv()

    def close(self) -> None:
        """Ends the process."""
        self._pipe.close()
        self._process.join()


def _serve(pipe: Any, make: Callable[..., Any], given: tuple[Any, ...]) -> None:
    made = make(*given)
    with contextlib.suppress(EOFError):
        while True:
            method, arguments = pipe.recv()
            result: list[Any] = []

            def run(method: str = method, arguments: Any = arguments, to: Any = result) -> None:
                to.append(getattr(made, method)(*arguments))

            pipe.send((call(run), result[0]))


def _measured(who: int, function: Callable[[], object]) -> Cost:
    before, start = resource.getrusage(who), time.perf_counter()
    function()
    wall, after = time.perf_counter() - start, resource.getrusage(who)
    return Cost(wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)


def compare(
    what: str,
    ours: Action,
    peer: Action,
    *,
    repeats: int,
    unit: str = "s",
    work: tuple[float, float] | None = None,
    clock: Clock = "cpu",
    warm_up: bool = True,
) -> Row:
    """Runs both in turns, as `in_turns`, and says how they compare, as `row_of`."""
    mine, theirs = in_turns([ours, peer], repeats, warm_up=warm_up)
    return row_of(what, mine, theirs, unit=unit, work=work, clock=clock)


def in_turns(actions: Sequence[Action], repeats: int, *, warm_up: bool = True) -> list[list[Cost]]:
    """The costs of each of some actions, which run one after the other, so often, and begin with
    the first and with the last alternately; with `warm_up` after a turn that does not count."""
    if warm_up:
        for action in actions:
            action()
    costs: list[list[Cost]] = [[] for _ in actions]
    for turn in range(repeats):
        order = list(zip(actions, costs, strict=True))
        for action, own in order if turn % 2 else reversed(order):
            own.append(action())
    return costs


def row_of(
    what: str,
    ours: Sequence[Cost],
    peer: Sequence[Cost],
    *,
    unit: str = "s",
    work: tuple[float, float] | None = None,
    clock: Clock = "cpu",
) -> Row:
    """A row of what both took, turn by turn.

    Args:
        what: the row's name.
        ours, peer: the costs of the two.
        unit: of `ours` and `peer` in the row.
        work: what each does in a turn, in units times seconds; the row then has rates.
        clock: which seconds count.

    Returns:
        A row: medians of `ours` and `peer`, the median `ratio` and its least and greatest value,
        and the median ratio by the clock (`wall`), where others on the machine count as well.
    """
    share = work[0] / work[1] if work else 1.0

    def ratios(kind: str) -> list[float]:
        pairs = zip(ours, peer, strict=True)
        return [share * getattr(b, kind) / getattr(a, kind) for a, b in pairs]

    def shown(costs: Sequence[Cost], amount: float) -> float:
        seconds = statistics.median(getattr(cost, clock) for cost in costs)
        return amount / seconds if work else seconds

    found = ratios(clock)
    return {
        "what": what,
        "unit": unit,
        "ours": shown(ours, work[0] if work else 0),
        "peer": shown(peer, work[1] if work else 0),
        "ratio": statistics.median(found),
        "spread": [min(found), max(found)],
        "wall": statistics.median(ratios("wall")),
        "clock": clock,
        "repeats": len(ours),
    }


def line(row: Row) -> str:
    """A row for a person."""
    low, high = row["spread"]
    spread = f"{low:.2f}..{high:.2f}"
    ours, peer = (f"{x:9.{2 if x >= 1 else 4}f}" for x in (row["ours"], row["peer"]))
    return (
        f"{ours} {peer} {row['unit']:12} {row['ratio']:6.2f}  "
        f"{spread:12} {row['wall']:5.2f}  {row['what']}"
    )


def table(rows: Iterable[Row]) -> None:
    """Writes rows to stderr for a person, each when it comes."""
    print(_HEADING, file=sys.stderr)
    for row in rows:
        print(line(row), file=sys.stderr, flush=True)


def report(rows: Callable[[Path], Iterator[Row]]) -> None:
    """Makes rows in a folder that is removed afterwards: JSON on stdout, a table on stderr."""

    def written() -> Iterator[Row]:
        for row in rows(Path(folder)):
            print(json.dumps(_rounded(row)), flush=True)
            yield row

    with tempfile.TemporaryDirectory() as folder:
        try:
            table(written())
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)


def _rounded(value: Any) -> Any:
    """Four significant digits of every float."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
