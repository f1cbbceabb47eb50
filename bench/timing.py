"""What the benchmarks of data share: runs side by side, their time on the clock and of processors.

`gemtool` and its peers do the same work in turns, so that a busy machine slows both. A row's
`ratio` is the median over the turns of peer / ours in processor time (user and system, of all
processes); `wall` is the same by the clock, where others on the machine count as well.
"""

from __future__ import annotations

import json
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


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


def call(function: Callable[[], object]) -> Cost:
    """The cost of a function in this process."""
    return _measured(resource.RUSAGE_SELF, function)


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

    return _measured(resource.RUSAGE_CHILDREN, run)


def _measured(who: int, function: Callable[[], object]) -> Cost:
    before, start = resource.getrusage(who), time.perf_counter()
    function()
    wall, after = time.perf_counter() - start, resource.getrusage(who)
    return Cost(wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)


def compare(ours: Action, peer: Action, repeats: int) -> dict[str, Any]:
    """Runs both in turns, which begin with either one alternately, after one turn to warm up.

    Returns:
        Median seconds of each, the median ratios peer / ours, and the least and greatest ratio.
    """
    ours(), peer()
    mine: list[Cost] = []
    theirs: list[Cost] = []
    for turn in range(repeats):
        order = [(ours, mine), (peer, theirs)]
        for action, costs in order if turn % 2 else reversed(order):
            costs.append(action())
    cpu = [b.cpu / a.cpu for a, b in zip(mine, theirs, strict=True)]
    wall = [b.wall / a.wall for a, b in zip(mine, theirs, strict=True)]
    median = statistics.median
    return {
        "ours_s": round(median(cost.cpu for cost in mine), 3),
        "peer_s": round(median(cost.cpu for cost in theirs), 3),
        "ratio": round(median(cpu), 3),
        "spread": [round(min(cpu), 3), round(max(cpu), 3)],
        "ours_wall_s": round(median(cost.wall for cost in mine), 3),
        "peer_wall_s": round(median(cost.wall for cost in theirs), 3),
        "wall": round(median(wall), 3),
        "repeats": repeats,
    }


def report(rows: Iterable[dict[str, Any]]) -> None:
    """Prints each row when it comes: JSON on stdout, a line of a table on stderr."""
    heading = f"{'ours':>8} {'peer':>8}  ratio  {'spread':11}  wall"
    print(f"{heading}  (seconds of processors; by the clock)", file=sys.stderr)
    for row in rows:
        print(json.dumps(row), flush=True)
        low, high = row["spread"]
        print(
            f"{row['ours_s']:8.2f} {row['peer_s']:8.2f} {row['ratio']:6.2f}  "
            f"{low:4.2f}..{high:4.2f}  {row['wall']:5.2f}  {row['what']}",
            file=sys.stderr,
            flush=True,
        )
