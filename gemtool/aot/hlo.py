"""What a compiled program does, read off its text: operations, bytes of memory, collectives.

XLA's own cost analysis counts the body of a loop once. Here each computation counts as often as it is
run, where the number of turns of a loop is written in the program, or the name of its scope tells it
(`gemtool.kernels.turns`); other loops whose end depends on data count once and are reported. Custom
kernels count as what they say of themselves, if they do.

The grammar is that of HLO text (https://openxla.org/xla/operation_semantics).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
# They move nothing in memory: another name for the same bytes, or bookkeeping.
_FREE = {
    "after-all", "bitcast", "constant", "get-tuple-element", "iota", "parameter", "partition-id",
    "replica-id", "tuple", "while", "conditional", "call", "opt-barrier", "domain",
    "copy-done", "async-done", "all-gather-done", "all-reduce-done", "collective-permute-done",
    "send", "recv", "send-done", "recv-done",
}  # fmt: skip
_BITS = {"pred": 8, "token": 0, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^{}]*\})?")


@dataclass(frozen=True)
class Array:
    """One array of a (tuple) type; `on_chip` in a memory other than HBM."""

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool

    @property
    def bytes(self) -> int:
        """Size of the values, without padding of tiles."""
        digits = re.search(r"\d+", self.dtype)
        bits = _BITS.get(self.dtype, int(digits[0]) if digits else 0)
        return math.prod(self.shape) * bits // 8


@dataclass(frozen=True)
class Instruction:
    """A line of a computation."""

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    rest: str
    """Everything behind the operands."""
    literal: str
    """What stands between the parentheses, as of a constant."""

    def attribute(self, name: str) -> str | None:
        """The value of `name=%computation`, or None."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found[1] if found else None

    @cached_property
    def collective(self) -> str | None:
        """Which collective this begins, if it does."""
        base = self.opcode.removesuffix("-start")
        return base if base in COLLECTIVES else None


@dataclass
class Computation:
    """Instructions by name, in order."""

    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""


@dataclass
class Collective:
    """All of one kind in a program: how many a step, and bytes that a chip sends for them."""

    count: int = 0
    bytes: float = 0.0


@dataclass
class Analysis:
    """What one chip does in one run of a program."""

    flops: float = 0.0
    """Of matrix products, and of kernels that tell."""
    bytes: float = 0.0
    """Read from and written to HBM."""
    collectives: dict[str, Collective] = field(default_factory=dict)
    kernels: Counter[str] = field(default_factory=Counter)
    """Custom kernels by name, how often they run."""
    kernel_flops: float = 0.0
    """What of `flops` kernels say of themselves."""
    silent: set[str] = field(default_factory=set)
    """Kernels that say nothing: their operations are not in `flops`."""
    unknown_loops: int = 0
    """Loops whose turns the program does not tell: they count once."""


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a module by name, and the name of its entry."""
    computations: dict[str, Computation] = {}
    current, entry = None, ""
    # What a kernel that is part of a fusion tells of itself goes over several lines.
    text = re.sub(r'\n(?="|\}, "|\}\})', "", text)
    for line in text.splitlines():
        if line.endswith("{") and (head := re.match(r"(ENTRY )?%?([\w.\-]+) \(", line)):
            current = computations[head[2]] = Computation()
            if head[1]:
                entry = head[2]
        elif line.startswith("}"):
            current = None
        elif current is not None and " = " in line:
            instruction = _instruction(line)
            if instruction is not None:
                current.instructions[instruction.name] = instruction
                if line.lstrip().startswith("ROOT "):
                    current.root = instruction.name
    return computations, entry


def _instruction(line: str) -> Instruction | None:
    head, _, body = line.strip().removeprefix("ROOT ").partition(" = ")
    stop = _closing(body, 0) + 1 if body.startswith("(") else body.find(" ")
    kind, rest = body[:stop], body[stop:].lstrip()
    opcode, parenthesis, _ = rest.partition("(")
    if not parenthesis or not re.fullmatch(r"[a-z][\w\-]*", opcode):
        return None
    close = _closing(rest, len(opcode))
    inside = rest[len(opcode) + 1 : close]
    arrays = tuple(
        Array(dtype, tuple(map(int, filter(None, sides.split(",")))), "S(" in (layout or ""))
        for dtype, sides, layout in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", kind))
    )
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(head.lstrip("%"), arrays, opcode, operands, rest[close + 1 :], inside)


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index
    return len(text)


def analyse(text: str) -> Analysis:
    """What a compiled program (`compiled.as_text()`) does."""
    computations, entry = parse(text)
    found = Analysis()
    _count(computations, entry, 1.0, found, inside_fusion=False)
    return found


def _count(
    computations: dict[str, Computation],
    name: str,
    times: float,
    found: Analysis,
    inside_fusion: bool,
) -> None:
    own = computations.get(name)
    if own is None:
        return
    for instruction in own.instructions.values():
        opcode = instruction.opcode
        if opcode == "while":
            turns = _turns(computations, own, instruction)
            if turns is None:
                turns = _named_turns(instruction)
            if turns is None:
                found.unknown_loops += 1
            body = instruction.attribute("body") or ""
            if turns != 0:
                _count(computations, body, times * (turns or 1), found, inside_fusion)
        elif opcode == "conditional":
            _count_longest(computations, instruction, times, found, inside_fusion)
        else:
            fused = inside_fusion or opcode == "fusion"
            for called in _called(instruction):
                _count(computations, called, times, found, fused)
        if opcode in ("dot", "convolution"):
            found.flops += times * _product_flops(own, instruction)
        if _is_kernel(instruction):
            _count_kernel(instruction, times, found)
        if (kind := instruction.collective) is not None:
            # TPU programs write a reduce-scatter as the fusion of an all-reduce and a slice.
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            total = found.collectives.setdefault(kind, Collective())
            total.count += round(times)
            total.bytes += times * _sent(instruction, kind)
        if not inside_fusion and opcode not in _FREE:
            found.bytes += times * _traffic(computations, own, instruction)


def _called(instruction: Instruction) -> Iterator[str]:
    """Computations that run as part of an instruction; not those of a reduction, one value each."""
    if instruction.opcode in ("fusion", "call", "async-start"):
        for name in ("calls", "to_apply", "called_computation"):
            if called := instruction.attribute(name):
                yield called


def _count_longest(
    computations: dict[str, Computation],
    instruction: Instruction,
    times: float,
    found: Analysis,
    inside_fusion: bool,
) -> None:
    """Of a conditional, the branch that computes most."""
    listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
    names = re.findall(r"%?([\w.\-]+)", listed[1]) if listed else []
    names += filter(None, map(instruction.attribute, ("true_computation", "false_computation")))

    def cost(name: str) -> tuple[float, float]:
        alone = Analysis()
        _count(computations, name, 1.0, alone, inside_fusion)
        return alone.flops, alone.bytes

    if names:
        _count(computations, max(names, key=cost), times, found, inside_fusion)


def _turns(computations: dict[str, Computation], own: Computation, loop: Instruction) -> int | None:
    """How often a loop runs, where its condition compares a counter with a constant."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    condition = computations.get(loop.attribute("condition") or "", Computation())
    root = condition.instructions.get(condition.root)
    if root is not None and root.opcode == "fusion":  # its operands are those of the comparison
        inner = computations.get(root.attribute("calls") or "", Computation())
        comparison = inner.instructions.get(inner.root)
        if comparison is None or comparison.opcode != "compare":
            return None
        by_number = {
            i.name: int(i.literal) for i in inner.instructions.values() if i.opcode == "parameter"
        }
        sides = [
            root.operands[by_number[o]] if o in by_number else None for o in comparison.operands
        ]
    elif root is not None and root.opcode == "compare":
        comparison, sides = root, list(root.operands)
    else:
        return None
    if "direction=LT" not in comparison.rest or len(sides) != 2 or None in sides:
        return None
    start, stop = (_at_first(condition, own, loop, side) for side in sides if side is not None)
    return None if start is None or stop is None else max(stop - start, 0)


def _named_turns(loop: Instruction) -> int | None:
    """Of a loop that data ends: the turns that those who wrote it named its scope for."""
    named = re.search(r'op_name="[^"]*\bcounted_(\d+)\)*/while"', loop.rest)
    return int(named[1]) if named else None


def _at_first(condition: Computation, own: Computation, loop: Instruction, name: str) -> int | None:
    """A side of the comparison as the loop begins, where that is a constant. What a loop of a scan
    compares with is one, or a value of the carried tuple that was one and stays so."""
    instruction = _behind_copies(condition, name)
    if instruction is not None and instruction.opcode == "get-tuple-element":
        index = re.search(r"index=(\d+)", instruction.rest)
        carried = own.instructions.get(loop.operands[0])
        if index is None or carried is None or carried.opcode != "tuple":
            return None
        instruction = _behind_copies(own, carried.operands[int(index[1])])
    if instruction is None or instruction.opcode != "constant":
        return None
    return int(instruction.literal) if instruction.literal.lstrip("-").isdecimal() else None


def _behind_copies(computation: Computation, name: str) -> Instruction | None:
    found = computation.instructions.get(name)
    while found is not None and found.opcode in ("copy", "bitcast", "convert"):
        found = computation.instructions.get(found.operands[0])
    return found


def _product_flops(own: Computation, instruction: Instruction) -> float:
    """Two for each multiplication and addition of a matrix product or convolution."""
    out = math.prod(instruction.arrays[0].shape)
    operands = [own.instructions[name].arrays[0].shape for name in instruction.operands[:2]]
    if instruction.opcode == "dot":
        listed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
        axes = [int(axis) for axis in listed[1].split(",") if axis] if listed else []
        return 2.0 * out * math.prod(operands[0][axis] for axis in axes)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    assert labels is not None
    source, kernel, result = labels[1], labels[2], labels[3]
    window = {
        name: value.split("x")
        for name, value in re.findall(r"(\w+)=([\d_x\-]+)", _braced(instruction.rest, "window="))
    }
    total = 2.0 * operands[1][kernel.index("i")]
    for label in "bf":
        total *= instruction.arrays[0].shape[result.index(label)]
    for axis in range(len(result) - 2):
        total *= _overlaps(
            operands[0][source.index(str(axis))],
            operands[1][kernel.index(str(axis))],
            instruction.arrays[0].shape[result.index(str(axis))],
            {name: values[axis] for name, values in window.items()},
        )
    return total


def _overlaps(source: int, kernel: int, result: int, window: dict[str, str]) -> int:
    """Pairs of result and kernel positions along an axis that meet a real value of the source: TPU
    programs write batched products as convolutions in which few do."""
    low = int(window.get("pad", "0_0").split("_")[0])
    stride, spread = int(window.get("stride", 1)), int(window.get("lhs_dilate", 1))
    at = np.arange(result)[:, None] * stride
    at = at + np.arange(kernel)[None, :] * int(window.get("rhs_dilate", 1)) - low
    return int(((at >= 0) & (at <= (source - 1) * spread) & (at % spread == 0)).sum())


def _braced(text: str, name: str) -> str:
    start = text.find(name + "{")
    return text[start : text.find("}", start)] if start >= 0 else ""


def _is_kernel(instruction: Instruction) -> bool:
    return 'custom_call_target="tpu_custom_call"' in instruction.rest


def _count_kernel(instruction: Instruction, times: float, found: Analysis) -> None:
    name = instruction.name.split(".")[0]
    found.kernels[name] += round(times)
    told = _estimate(instruction, "flops")
    if told is None:
        found.silent.add(name)
    else:
        found.flops += times * told
        found.kernel_flops += times * told


def _estimate(instruction: Instruction, what: str) -> int | None:
    """What a custom kernel says of itself: "flops" or "bytes_accessed"."""
    told = re.search(rf'"cost_estimate": ?\{{[^}}]*"{what}":"?(\d+)', instruction.rest)
    return int(told[1]) if told else None


def _sent(instruction: Instruction, kind: str) -> float:
    """Bytes that a chip sends for a collective, by the usual ring algorithms."""
    size = _group_size(instruction.rest)
    arrays = instruction.arrays
    if instruction.opcode.endswith("-start") and len(arrays) > 1:
        arrays = arrays[len(arrays) // 2 :] if kind != "collective-permute" else arrays[1:2]
    moved = float(sum(array.bytes for array in arrays))
    if kind == "collective-permute":
        return moved
    if kind == "all-reduce":
        return 2 * moved * (size - 1) / size
    if instruction.collective == "reduce-scatter":  # `moved` is what is left of it
        return moved * (size - 1)
    return moved * (size - 1) / size


def _group_size(rest: str) -> int:
    """Devices that take part together."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", named[2]))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(iota[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(listed[1].split(","))
    return 2


def _traffic(
    computations: dict[str, Computation], own: Computation, instruction: Instruction
) -> float:
    """Bytes of HBM that an instruction reads and writes: of a slice, what is sliced."""
    opcode = instruction.opcode
    if _is_kernel(instruction) and (told := _estimate(instruction, "bytes_accessed")) is not None:
        return float(told)
    written = sum(a.bytes for a in instruction.arrays if not a.on_chip)
    operands = [own.instructions[name] for name in instruction.operands if name in own.instructions]
    read = [sum(a.bytes for a in o.arrays if not a.on_chip) for o in operands]
    if opcode in ("dynamic-slice", "gather", "slice"):
        return 2.0 * written
    if opcode in ("dynamic-update-slice", "scatter"):
        return 2.0 * (read[1] if opcode == "dynamic-update-slice" else read[-1])
    if opcode == "fusion":
        inner = computations.get(instruction.attribute("calls") or "", Computation())
        for kernel in filter(_is_kernel, inner.instructions.values()):
            # The rest is what happens to its operands as it reads them.
            if (told := _estimate(kernel, "bytes_accessed")) is not None:
                return float(told)
        used = _read_by_fusion(computations, inner)
        read = [min(size, used.get(number, size)) for number, size in enumerate(read)]
        for array, target, update in _updated_in_place(inner, instruction):
            if not array.on_chip:
                written += min(0, 2 * update - array.bytes)
            if target is not None and target not in used:
                read[target] = 0
    return float(written + sum(read))


def _updated_in_place(
    inner: Computation, fusion: Instruction
) -> Iterator[tuple[Array, int | None, int]]:
    """Those results of a fusion that are one of its operands with a slice of it written anew: the
    result, the number of that operand where it is told, and bytes of the slice."""

    def unnamed(name: str) -> Instruction:
        found = inner.instructions[name]
        return unnamed(found.operands[0]) if found.opcode == "bitcast" else found

    root = inner.instructions.get(inner.root)
    if root is None:
        return
    results = root.operands if root.opcode == "tuple" else (root.name,)
    for array, result in zip(fusion.arrays, map(unnamed, results), strict=False):
        if result.opcode == "dynamic-update-slice":
            target = unnamed(result.operands[0])
            number = int(target.literal) if target.opcode == "parameter" else None
            yield array, number, inner.instructions[result.operands[1]].arrays[0].bytes


def _read_by_fusion(computations: dict[str, Computation], inner: Computation) -> dict[int, int]:
    """Bytes that are read of those parameters of which only slices are, also by fusions within."""
    sliced: dict[int, int] = {}
    numbers = {
        i.name: int(i.literal) for i in inner.instructions.values() if i.opcode == "parameter"
    }
    whole = set()
    for instruction in inner.instructions.values():
        read: dict[int, int] = {}
        if instruction.opcode in ("dynamic-slice", "slice", "gather"):
            read[0] = sum(array.bytes for array in instruction.arrays)
        elif instruction.opcode == "fusion":
            called = computations.get(instruction.attribute("calls") or "", Computation())
            read = _read_by_fusion(computations, called)
        for position, name in enumerate(instruction.operands):
            if name in numbers and position in read:
                sliced[numbers[name]] = sliced.get(numbers[name], 0) + read[position]
            elif name in numbers:
                whole.add(numbers[name])
    return {number: size for number, size in sliced.items() if number not in whole}
