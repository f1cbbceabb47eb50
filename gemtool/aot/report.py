"""What a program takes on a slice, and whether it fits: a row of JSON, and sentences."""

from __future__ import annotations

import re
import time
from typing import Any

import jax

from gemtool.aot.hlo import Analysis, analyse
from gemtool.aot.programs import Program
from gemtool.aot.topology import Topology

Row = dict[str, Any]

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_REFUSED = re.compile(r"\(?([\d.]+)([KMGT]?)\)? exceeds available HBM \(([\d.]+)([KMGT]?)\)")


def compile_program(program: Program, topology: Topology) -> Row:
    """Compiles it with the real compiler, and says what it found. Sizes are of one chip, in bytes."""
    chip, began = topology.chip, time.perf_counter()
    row: Row = {"program": program.name, "topology": topology.name, "chips": len(topology.devices)}
    try:
        compiled = program.lowered.compile()
    except jax.errors.JaxRuntimeError as problem:
        if "RESOURCE_EXHAUSTED" not in str(problem):
            raise
        return row | _refused(str(problem), topology, time.perf_counter() - began)
    seconds = time.perf_counter() - began
    memory = _memory(compiled.memory_analysis(), chip.memory)
    found = analyse(compiled.as_text())
    times = _times(found, program, topology)
    dominates = max(times, key=lambda name: times[name])
    step = times[dominates]
    fits = memory["total"] <= chip.memory
    row |= {
        "fits": fits,
        "hbm": memory,
        "flops": max(found.flops, program.needed_flops / len(topology.devices)),
        "needed_flops": program.needed_flops / len(topology.devices),
        "bytes": found.bytes,
        "collectives": {
            kind: {"count": total.count, "bytes": total.bytes}
            for kind, total in sorted(found.collectives.items())
        },
        "kernels": dict(sorted(found.kernels.items())),
        "unknown_loops": found.unknown_loops,
        "seconds": times | {"step": step},
        "dominates": dominates,
        "tokens": program.tokens,
        "tokens_per_s": program.tokens / step if step else None,
        "compile_seconds": round(seconds, 1),
    }
    return row | {"says": _says(row, chip.memory)}


def _memory(stats: Any, capacity: int) -> dict[str, int]:
    """Outputs that take the place of arguments (a state that is consumed) count once. Temporaries are
    those that are there when most is: all that ever are would be more than the compiler needs."""
    arguments = stats.argument_size_in_bytes
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    parts = {
        "arguments": arguments,
        "outputs": outputs,
        "temporaries": max(stats.peak_memory_in_bytes - arguments - outputs, 0),
        "program": stats.generated_code_size_in_bytes,
    }
    return {**parts, "total": sum(parts.values()), "capacity": capacity}


def _times(found: Analysis, program: Program, topology: Topology) -> dict[str, float]:
    """Seconds that each part of a chip is busy at least."""
    chip, chips = topology.chip, len(topology.devices)
    sent = sum(total.bytes for total in found.collectives.values())
    return {
        "compute": max(found.flops, program.needed_flops / chips) / chip.flops,
        "memory": found.bytes / chip.memory_bandwidth,
        "links": sent / chip.link_bandwidth,
    }


def _refused(message: str, topology: Topology, seconds: float) -> Row:
    """Of a program that the compiler refuses for memory."""
    told = _REFUSED.search(message)
    capacity = topology.chip.memory
    total = None
    if told:
        total = int(float(told[1]) * _UNITS[told[2]])
        capacity = int(float(told[3]) * _UNITS[told[4]])
    row: Row = {
        "fits": False,
        "hbm": {"total": total, "capacity": capacity},
        "reason": message.removeprefix("RESOURCE_EXHAUSTED: ").splitlines()[0],
        "compile_seconds": round(seconds, 1),
    }
    return row | {"says": _says(row, capacity)}


def _says(row: Row, capacity: int) -> str:
    """Whether it fits, and what dominates."""
    memory = row["hbm"]
    total = "more than" if memory["total"] is None else f"{memory['total'] / 2**30:,.1f} of"
    within = f"{total} {capacity / 2**30:,.1f} GiB of memory a chip"
    if not row["fits"]:
        return (
            f"It does not fit: it takes {within}. Take more chips, cut parameters along fsdp, expert "
            "or tensor and positions along context, or lower the batch."
        )
    names = {"compute": "arithmetic", "memory": "reading and writing memory", "links": "sending"}
    seconds = row["seconds"]
    others = ", ".join(
        f"{names[name]} {_duration(seconds[name])}" for name in names if name != row["dominates"]
    )
    return (
        f"It fits: it takes {within}. At best a step takes {_duration(seconds['step'])}, which "
        f"{names[row['dominates']]} dominates ({others})."
    )


def _duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def table(row: Row) -> str:
    """A row for a person, a fact a line."""
    lines = [(f"{row['program']} of {row['model']}", f"{row['topology']}, {row['mesh']}")]
    memory = row["hbm"]
    parts = [name for name in ("arguments", "outputs", "temporaries", "program") if name in memory]
    lines += [(f"memory: {name}", f"{memory[name] / 2**30:,.2f} GiB") for name in parts]
    if "flops" in row:
        lines.append(("operations", f"{row['flops']:.3g} ({row['needed_flops']:.3g} needed)"))
        lines.append(("memory traffic", f"{row['bytes'] / 2**30:,.2f} GiB"))
        for kind, total in row["collectives"].items():
            lines.append((kind, f"{total['count']:,}, {total['bytes'] / 2**20:,.1f} MiB sent"))
        for name, count in row["kernels"].items():
            lines.append((f"kernel {name}", f"{count:,}"))
        lines.append(("tokens a second", f"{row['tokens_per_s']:,.0f}"))
    width = max(len(name) for name, _ in lines) + 2
    shown = [f"{name:{width}}{value}" for name, value in lines]
    return "\n".join([*shown, row["says"], ""])
