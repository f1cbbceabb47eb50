"""Slices of TPU chips by name (`v5p:4x4x4`), and what a chip can do, as its maker publishes it."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemtool.errors import GemtoolError, UsageError, did_you_mean


@dataclass(frozen=True)
class Chip:
    """Limits of one chip: bfloat16 operations, bytes of memory and of links, each a second."""

    name: str
    flops: float
    memory: int
    """Bytes of HBM that a program may use: what is left of it on a chip."""
    memory_bandwidth: float
    link_bandwidth: float
    """Of all links of a chip to its neighbours together."""
    dimensions: int
    """Of the torus or mesh that a slice is."""


# https://cloud.google.com/tpu/docs/system-architecture-tpu-vm, a page for each generation. Memory is
# what the compiler of libtpu 0.0.42 allows, which is a little less.
CHIPS = {
    "v4": Chip("v4", 275e12, int(30.75 * 2**30), 1228e9, 300e9, 3),
    "v5e": Chip("v5e", 197e12, int(15.75 * 2**30), 819e9, 200e9, 2),
    "v5p": Chip("v5p", 459e12, int(95.74 * 2**30), 2765e9, 600e9, 3),
    "v6e": Chip("v6e", 918e12, int(31.25 * 2**30), 1640e9, 448e9, 2),
}


@dataclass(frozen=True)
class Topology:
    """A slice: `devices` are abstract, and programs can be compiled for them but not run."""

    name: str
    chip: Chip
    devices: tuple[Any, ...]


def parse_topology(text: str) -> tuple[Chip, tuple[int, ...]]:
    """The chip and the shape of `v5p:4x4x4`.

    Raises:
        UsageError: no such chip, or no shape that slices of it have.
    """
    generation, _, shape = text.partition(":")
    if generation not in CHIPS:
        raise UsageError(
            f"--topology {text}: no chip {generation!r}{did_you_mean(generation, CHIPS)} "
            f"(there are {', '.join(CHIPS)})"
        )
    chip = CHIPS[generation]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        example = "x".join("4" * chip.dimensions)
        raise UsageError(f"--topology {text}: give the slice a shape, as in {generation}:{example}")
    sides = tuple(map(int, shape.split("x")))
    if len(sides) != chip.dimensions:
        raise UsageError(
            f"--topology {text}: slices of {generation} have {chip.dimensions} dimensions, "
            f"not {len(sides)}"
        )
    return chip, sides


def prepare_process() -> None:
    """To be called before jax looks for devices: this process has a CPU, and the TPU compiler asks
    nobody on the network what it runs on."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    # There is no TPU that two processes could quarrel about.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def open_topology(text: str) -> Topology:
    """The slice of this name, from the TPU compiler. `prepare_process` goes before.

    Raises:
        UsageError: there is no such slice.
        GemtoolError: the TPU compiler is not installed.
    """
    chip, sides = parse_topology(text)
    if importlib.util.find_spec("libtpu") is None:
        raise GemtoolError("--topology needs the TPU compiler: pip install 'gemtool[tpu]'")
    from jax.experimental import topologies

    # The two cores of a v4 chip work as one, as they do on the machines.
    options = {"chip_config_name": "megacore"} if chip.name == "v4" else {}
    try:
        with _quiet():
            found = topologies.get_topology_desc(platform="tpu", topology_name=text, **options)
    except Exception as problem:
        raise UsageError(
            f"--topology {text}: the TPU compiler knows no such slice: {_first_line(problem)}"
        ) from problem
    if len(found.devices) != math.prod(sides):
        raise UsageError(
            f"--topology {text}: {len(found.devices)} devices instead of {math.prod(sides)}"
        )
    return Topology(text, chip, tuple(found.devices))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """libtpu writes what it does to standard error."""
    with Path(os.devnull).open("wb") as nowhere:
        kept = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _first_line(problem: Exception) -> str:
    return (str(problem).splitlines() or [type(problem).__name__])[0][:200]
