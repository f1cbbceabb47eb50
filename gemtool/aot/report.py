"""What a program takes on a slice, and whether it fits: a row of JSON, and sentences."""

from __future__ import annotations

import re
import time
from typing import Any

import jax

from gemtool.aot.hlo import Analysis, analyse
from gemtool.aot.programs import Program
from gemtool.aot.topology import Topology
from gemtool.errors import GemtoolError, counted

Row = dict[str, Any]

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"\(?([\d.]+)([KMGT]?)\)?"
_REFUSED = (
    re.compile(f"{_SIZE} exceeds available HBM {_SIZE}"),
    re.compile(f"Used {_SIZE} of {_SIZE} hbm"),
)
# The memory of which there is too little, where a message first names one: as "memory space vmem",
# "on HBM" or in "CompileTimeScopedVmemOom".
_SPACE = re.compile(r"memory space (\w+)|(hbm|[vs]mem)", re.IGNORECASE)


def compile_program(program: Program, topology: Topology) -> Row:
    """Compiles it with the real compiler, and says what it found. Sizes are of one chip, in bytes.

    Raises:
        GemtoolError: the compiler refuses it, and not because the memory of a chip is too small.
    """
    chip, began = topology.chip, time.perf_counter()
    row: Row = {"program": program.name, "topology": topology.name, "chips": len(topology.devices)}
    try:
        compiled = program.lowered.compile()
    except jax.errors.JaxRuntimeError as problem:
        message = str(problem)
        if "RESOURCE_EXHAUSTED" not in message and "scoped vmem" not in message:
            raise
        space = _space(message)
        if space != "hbm":
            raise GemtoolError(_other_refusal(message, space, program, topology)) from problem
        return row | _refused(message, program, topology, time.perf_counter() - began)
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
        "flops": found.flops,
        "kernel_flops": found.kernel_flops,
        "needed_flops": program.needed_flops / len(topology.devices),
        "bytes": found.bytes,
        "collectives": {
            kind: {"count": total.count, "bytes": total.bytes}
            for kind, total in sorted(found.collectives.items())
        },
        "kernels": dict(sorted(found.kernels.items())),
        "silent_kernels": sorted(found.silent),
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
    """Seconds that each part of a chip is busy at least. What the mathematics needs is computed in any
    case, also by what a program hides: kernels that say nothing, loops that count once."""
    chip, chips = topology.chip, len(topology.devices)
    sent = sum(total.bytes for total in found.collectives.values())
    return {
        "compute": max(found.flops, program.needed_flops / chips) / chip.flops,
        "memory": found.bytes / chip.memory_bandwidth,
        "links": sent / chip.link_bandwidth,
    }


def _space(message: str) -> str | None:
    """The memory that the compiler wants more of, in small letters; None where it names none."""
    named = _SPACE.search(message)
    return (named[1] or named[2]).lower() if named else None


def _other_refusal(message: str, space: str | None, program: Program, topology: Topology) -> str:
    """Of a program that the compiler refuses for something else than HBM, which more chips may not
    help: mostly a kernel that wants more of a core's own memory than it has."""
    refused = f"the TPU compiler refuses the {program.name} for {topology.name}"
    if space is None:
        return f"{refused}: {_words(message)}"
    return (
        f"{refused} for memory of a core ({space}), not for that of a chip: {_words(message)}; "
        "if it is one of our kernels, --kernels xla does without"
    )


def _words(message: str) -> str:
    """The compiler's own, in a line: without its codes, and without the text of an instruction."""
    plain = re.sub(r"\b(RESOURCE_EXHAUSTED|INTERNAL|E\d{4}|\w+Oom):", "", message)
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    # "an allocation [its shape ...] :: the kernel that it is of"
    first = re.sub(r" :: #.*\]", "", lines[0]) if lines else "it does not say why"
    said = [first.partition(" = ")[0][:300]]
    scoped = re.search(r"Scoped allocation.*?vmem limit(?: by [\d.]*\d\w?)?", plain)
    if scoped and scoped[0] not in said[0]:
        said.append(scoped[0])
    return "; ".join(said)


def _refused(message: str, program: Program, topology: Topology, seconds: float) -> Row:
    """Of a program that the compiler refuses for the memory of a chip."""
    told = next(filter(None, (pattern.search(message) for pattern in _REFUSED)), None)
    needed = program.needed_flops / len(topology.devices)
    capacity = topology.chip.memory
    total = None
    if told:
        total = int(float(told[1]) * _UNITS[told[2]])
        capacity = int(float(told[3]) * _UNITS[told[4]])
    row: Row = {
        "fits": False,
        "hbm": {"total": total, "capacity": capacity},
        "reason": _words(message),
        "needed_flops": needed,
        "seconds": {"compute": needed / topology.chip.flops},
        "tokens": program.tokens,
        "compile_seconds": round(seconds, 1),
    }
    return row | {"says": _says(row, capacity)}


def _says(row: Row, capacity: int) -> str:
    """Whether it fits, what dominates, and what is not known."""
    memory = row["hbm"]
    total = "more than" if memory["total"] is None else f"{memory['total'] / 2**30:,.1f} of"
    within = f"it takes {total} {capacity / 2**30:,.1f} GiB of memory a chip."
    if row["fits"]:
        said = [f"It fits: {within}"]
    else:
        said = [
            f"It does not fit: {within} Take more chips, cut parameters along fsdp, expert or tensor "
            "and positions along context, or lower the batch."
        ]
    names = {"compute": "arithmetic", "memory": "reading and writing memory", "links": "sending"}
    seconds = row["seconds"]
    if "step" not in seconds:
        least = _duration(seconds["compute"])
        return " ".join([*said, f"The arithmetic that a step needs takes {least} at least."])
    others = ", ".join(
        f"{names[name]} {_duration(seconds[name])}" for name in names if name != row["dominates"]
    )
    takes = "a step takes" if row["fits"] else "a step would take"
    said.append(
        f"At best {takes} {_duration(seconds['step'])}, which {names[row['dominates']]} dominates "
        f"({others})."
    )
    if row["unknown_loops"]:
        said.append(
            f"That is a lower bound: {counted(row['unknown_loops'], 'loop')} whose length depends on "
            f"data {'count' if row['unknown_loops'] > 1 else 'counts'} once."
        )
    if row["silent_kernels"]:
        said.append(f"Operations of {', '.join(row['silent_kernels'])} are not known.")
    return " ".join(said)


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
    lines.append(("operations needed", f"{row['needed_flops']:.3g}"))
    if "flops" in row:
        lines.append(("operations", f"{row['flops']:.3g}"))
        lines.append(("of kernels", f"{row['kernel_flops']:.3g}"))
        lines.append(("memory traffic", f"{row['bytes'] / 2**30:,.2f} GiB"))
        for kind, total in row["collectives"].items():
            lines.append((kind, f"{total['count']:,}, {total['bytes'] / 2**20:,.1f} MiB sent"))
        for name, count in row["kernels"].items():
            lines.append((f"kernel {name}", f"{count:,}"))
        if row["unknown_loops"]:
            lines.append(("loops counted once", f"{row['unknown_loops']:,}"))
        lines.append(("tokens a second", f"at most {row['tokens_per_s']:,.0f}"))
    width = max(len(name) for name, _ in lines) + 2
    shown = [f"{name:{width}}{value}" for name, value in lines]
    return "\n".join([*shown, row["says"], ""])
