"""Meshes: which axis of which array is spread over which devices.

Every mesh has the same five axes, of size 1 where they are not used:

* `data`      copies of the model, each with its own sequences;
* `fsdp`      sequences too, and the parameters are cut, gathered where a layer needs them (ZeRO,
              arXiv 1910.02054);
* `expert`    sequences too, and each device holds some of the experts; tokens travel to them; what is
              not of experts is cut as by fsdp;
* `context`   positions of a sequence (ring attention, arXiv 2310.01889), or of what a cache keeps;
* `tensor`    heads and hidden units (Megatron, arXiv 1909.08053).

`RULES` is the one table that maps the meaning of an array's axis to axes of the mesh. Dense parts of
the model are left to XLA's partitioner, which follows the shardings of parameters and activations;
attention and experts say themselves what is sent where (`parallel.py`, `expert_parallel.py`,
`buffers.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gemtool.errors import UsageError, did_you_mean
from gemtool.model.config import ModelConfig
from gemtool.model.params import ParamSpec, Tree, map_specs

AXES = ("data", "fsdp", "expert", "context", "tensor")

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "length": ("context",),
    "cache": ("context",),
    "cache_all_heads": ("context", "tensor"),
    "embed": ("fsdp", "expert"),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "expert": ("expert",),
    "expert_mlp": ("tensor",),
    "head_dim": (),
    "layers": (),
    "taps": (),
    "features": (),
}


def parse_mesh(text: str) -> dict[str, int]:
    """Sizes of all axes from `data=2,tensor=4`; an axis that is not named has size 1.

    Raises:
        UsageError: an unknown or repeated axis, or a size that is no positive number.
    """
    sizes: dict[str, int] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, equals, size = (part.strip() for part in entry.partition("="))
        if name not in AXES:
            raise UsageError(
                f"--mesh: no axis {name!r}{did_you_mean(name, AXES)} (there are {', '.join(AXES)})"
            )
        if name in sizes:
            raise UsageError(f"--mesh: the axis {name} is given twice")
        if not equals or not size.isdecimal() or int(size) < 1:
            raise UsageError(f"--mesh: {entry!r}: give the axis a size, as in {name}=2")
        sizes[name] = int(size)
    return {name: sizes.get(name, 1) for name in AXES}


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of these sizes over the first devices; one device where sizes are all 1.

    Raises:
        UsageError: it takes more devices than there are.
    """
    devices = jax.devices() if devices is None else devices
    shape = tuple(sizes.get(name, 1) for name in AXES)
    count = math.prod(shape)
    if count > len(devices):
        raise UsageError(
            f"the mesh {describe(sizes)} takes {count} devices; there "
            f"{'is' if len(devices) == 1 else 'are'} {len(devices)}"
        )
    kinds = (AxisType.Auto,) * len(AXES)
    # Neighbours along an axis are neighbours in the network of the chips, as far as that is possible.
    placed = mesh_utils.create_device_mesh(shape, devices[:count], allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=kinds)


def describe(sizes: Mapping[str, int]) -> str:
    """The axes that are used: `data=2,tensor=4`, or `1 device`."""
    return (
        ",".join(f"{name}={sizes[name]}" for name in AXES if sizes.get(name, 1) > 1) or "1 device"
    )


def current_mesh() -> Any:
    """The mesh that `jax.set_mesh` made current (abstract while tracing), or None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def partition(axes: Sequence[str | None], shape: Sequence[int], mesh: Any) -> PartitionSpec:
    """How an array with these logical axes is cut.

    An axis of the array that the mesh's axes do not divide stays whole: so two key heads on four tensor
    devices are in all of them. "embed" gets those that no other axis of the array asks for, but the
    last if together they do not divide it.
    """
    asked = {name for axis in axes if axis not in (None, "embed") for name in RULES[axis]}
    parts: list[Any] = []
    for axis, size in zip(axes, shape, strict=True):
        names = () if axis is None else RULES[axis]
        if axis == "embed":
            names = tuple(name for name in names if name not in asked)
            if size % device_count(names, mesh):
                names = names[:-1]
        parts.append(names if names and size % device_count(names, mesh) == 0 else None)
    return PartitionSpec(*parts)


def cut_axes(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The axes of the mesh that an entry of a `PartitionSpec` names: jax writes one without a tuple."""
    return (part,) if isinstance(part, str) else part or ()


def device_count(names: Iterable[str], mesh: Any) -> int:
    """How many devices these axes of a mesh spread an array over."""
    return math.prod(mesh.shape[name] for name in names)


def param_shardings(config: ModelConfig, mesh: Mesh, stacked: bool = False) -> Tree:
    """`NamedSharding` of every parameter, in the structure of the parameters."""

    def build(_: str, spec: ParamSpec) -> NamedSharding:
        return NamedSharding(mesh, partition(spec.axes, spec.shape, mesh))

    return map_specs(config, build, stacked)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` cut by the logical axes under the current mesh; unchanged without one."""
    mesh = current_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, partition(axes, x.shape, mesh))


def open_mesh(
    text: str | None, config: ModelConfig, batch: int | None = None, length: int | None = None
) -> Mesh | None:
    """The mesh that a `--mesh` asks for, checked against what will run on it; None without one.

    Raises:
        UsageError: as `parse_mesh`, `make_mesh` and `require_fit`.
    """
    if text is None:
        return None
    mesh = make_mesh(parse_mesh(text))
    require_fit(config, mesh, batch, length)
    return mesh


def require_fit(
    config: ModelConfig, mesh: Mesh, batch: int | None = None, length: int | None = None
) -> None:
    """Checks that heads and experts can be spread evenly and, where they are to be cut (in training),
    `batch` sequences of `length` positions.

    Raises:
        UsageError: naming the axis that does not divide.
    """
    sizes = mesh.shape
    sequences = device_count(RULES["batch"], mesh)
    problems = []
    if batch is not None and batch % sequences:
        problems.append(f"data x fsdp x expert = {sequences} does not divide {batch} sequences")
    if length is not None and length % sizes["context"]:
        problems.append(f"context = {sizes['context']} does not divide {length} positions")
    for kind in {kind.letter: kind for kind in config.layer_kinds}.values():
        if kind.heads % sizes["tensor"]:
            problems.append(f"tensor = {sizes['tensor']} does not divide {kind.heads} heads")
    experts = config.moe.experts if config.moe is not None else 0
    if experts % sizes["expert"] if experts else sizes["expert"] > 1:
        problems.append(f"expert = {sizes['expert']} does not divide {experts} experts")
    if problems:
        raise UsageError(f"the mesh {describe(sizes)} does not fit: {'; '.join(problems)}")
