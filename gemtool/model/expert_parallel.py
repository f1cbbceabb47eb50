"""Experts on a mesh: rows travel to the device that holds their expert, and back.

Without a current mesh (`jax.set_mesh`) this is the kernel itself. On one, it runs per device
(`jax.shard_map`). Where each device of the expert axis has rows of its own, they travel; where all
have the same rows (a batch that the axis does not divide, as in decoding), each computes what its
experts make of them, and the sum is taken.

How rows travel depends on the platform that the program is for. TPUs and GPUs send what there is to
send (`jax.lax.ragged_all_to_all`), in one round where the choice of experts is even enough, else in
more. XLA's CPU compiler has no such operation: there blocks of equal size travel, each with room for
the worst case. No row is ever dropped.

Axes: B sequences, T positions, D model, E experts, C choices of a row; within a device they are that
device's share.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from gemtool.kernels.dispatch import target_platform
from gemtool.kernels.experts import expert_mlp
from gemtool.kernels.turns import counted_turns
from gemtool.model.mesh import AXES, current_mesh, partition

AXIS = "expert"
ROOM = 1.5
"""Rows that a device receives in a round, as a multiple of what it gets where the choice is even."""


def routed_experts(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    w: dict[str, jax.Array],
    *,
    weigh: str = "output",
    **options: Any,
) -> jax.Array:
    """The weighted sum of each row's chosen experts.

    `x` [..., D], on a mesh [B, T, D]; `ids` int32 [..., C], distinct for a row, E for none; `weights`
    [..., C], of each expert's "output" or, as `weigh` says, of its "input"; `w` and `options` are the
    other arguments of `expert_mlp`, the former with a leading axis E. Returns an array like `x`.
    """
    mesh = current_mesh()
    if mesh is None:
        return _weighed(_flat, weigh, x, ids, weights, w, options)
    rows = partition(("batch", "length", None), x.shape, mesh)
    hidden = {"w_down": 1, "b_down": None}  # which axis has the hidden units; the last of others
    specs = {}
    for name, array in w.items():
        axes: list[str | None] = [AXIS, *[None] * (array.ndim - 1)]
        if (axis := hidden.get(name, -1)) is not None:
            axes[axis] = "tensor"
        specs[name] = PartitionSpec(*axes)
    size, copies = mesh.shape[AXIS], mesh.shape["tensor"]
    run, summed = _flat, ["tensor"]
    if size > 1 and rows[0] is None:
        run, summed = _own_experts, [AXIS, "tensor"]
    elif size > 1:
        run = functools.partial(_travel, size)

    def local(
        x: jax.Array, ids: jax.Array, weights: jax.Array, w: dict[str, jax.Array]
    ) -> jax.Array:
        if "b_down" in w:
            w = {**w, "b_down": w["b_down"] / copies}
        return _weighed(run, weigh, x, ids, weights, w, options)[None]

    # Each device of the tensor axis has a part of the hidden units, and where rows do not travel,
    # each of the expert axis has some of the experts: what they add up to is summed here.
    parts = jax.shard_map(
        local,
        in_specs=(rows, rows, rows, specs),
        out_specs=PartitionSpec(tuple(summed), *rows),
        check_vma=False,
    )(x, ids, weights, w)
    return jnp.sum(parts, axis=0)


def _weighed(
    run: Callable[..., jax.Array],
    weigh: str,
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    w: dict[str, jax.Array],
    options: dict[str, Any],
) -> jax.Array:
    """`run` with weights of outputs; where inputs are weighed, each choice is a row of its own."""
    if weigh == "output":
        return run(x, ids, weights, w, options)
    inputs = (x[..., None, :] * weights[..., None].astype(x.dtype)).reshape(-1, x.shape[-1])
    y = run(inputs, ids.reshape(-1, 1), jnp.ones((len(inputs), 1), weights.dtype), w, options)
    return jnp.sum(y.reshape(*ids.shape, x.shape[-1]), axis=-2)


def _flat(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    w: dict[str, jax.Array],
    options: dict[str, Any],
) -> jax.Array:
    rows, choices, shares = (a.reshape(-1, a.shape[-1]) for a in (x, ids, weights))
    given: dict[str, Any] = {**w, **options}
    return expert_mlp(rows, choices, shares, **given).reshape(x.shape)


def _own_experts(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    w: dict[str, jax.Array],
    options: dict[str, Any],
) -> jax.Array:
    """What this device's experts make of rows that all devices have."""
    experts = len(w["w_gate"])
    own = ids - jax.lax.axis_index(AXIS) * experts
    own = jnp.where((own >= 0) & (own < experts), own, experts)
    return _flat(x, own, weights, w, options)


def _travel(
    size: int,
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    w: dict[str, jax.Array],
    options: dict[str, Any],
) -> jax.Array:
    """Rows to the devices of their experts and back."""
    run = _padded if target_platform() == "cpu" else _ragged
    y = run(size, x.reshape(-1, x.shape[-1]), ids.reshape(-1, ids.shape[-1]), w, options)
    y = y.reshape(*ids.shape, x.shape[-1])
    return jnp.einsum("...cd,...c->...d", y.astype(weights.dtype), weights).astype(x.dtype)


def _worst_case(rows: jax.Array, ids: jax.Array, w: dict[str, jax.Array]) -> int:
    """How many rows a device may be sent by another one that has as many as this one."""
    return len(rows) * min(ids.shape[1], len(w["w_gate"]))


def _run(
    rows: jax.Array, ids: jax.Array, w: dict[str, jax.Array], options: dict[str, Any]
) -> jax.Array:
    """Rows [M, D] through one expert each, int32 [M]."""
    return _flat(rows, ids[:, None], jnp.ones((len(rows), 1), rows.dtype), w, options)


def _exchange(x: jax.Array) -> jax.Array:
    """Block i of each device to device i of the expert axis."""
    return jax.lax.all_to_all(x, AXIS, split_axis=0, concat_axis=0, tiled=True)


def _padded(
    size: int, flat: jax.Array, ids: jax.Array, w: dict[str, jax.Array], options: dict[str, Any]
) -> jax.Array:
    """What each choice's expert makes of rows [N, D]: [N * C, D], zero where there is none.

    Rows travel in blocks of equal size by all-to-all.
    """
    experts, choices, room = len(w["w_gate"]), ids.shape[1], _worst_case(flat, ids, w)
    to, at_home = (ids // experts).reshape(-1), (ids % experts).reshape(-1)
    token = jnp.arange(to.shape[0], dtype=jnp.int32) // choices
    # Place of a pair among those for the same device, in order.
    same = to[:, None] == jnp.arange(size, dtype=jnp.int32)[None, :]
    rank = jnp.sum(jnp.where(same, jnp.cumsum(same.astype(jnp.int32), axis=0) - 1, 0), axis=1)
    place = jnp.where(to < size, to * room + rank, size * room)
    sent = jnp.zeros((size * room, flat.shape[1]), flat.dtype)
    sent = sent.at[place].set(flat[token], mode="drop")
    sent_ids = jnp.full(size * room, experts, jnp.int32).at[place].set(at_home, mode="drop")
    y = _run(_exchange(sent), _exchange(sent_ids), w, options)
    return _exchange(y).at[place].get(mode="fill", fill_value=0)


def _ragged(
    size: int, flat: jax.Array, ids: jax.Array, w: dict[str, jax.Array], options: dict[str, Any]
) -> jax.Array:
    """As `_padded`, but only rows that there are travel.

    They are in order of their experts, so that counts say whose they are. What does not fit into
    `ROOM` comes in further rounds: of them, nothing is kept for the gradient.
    """
    experts, pairs = len(w["w_gate"]), ids.size
    order = jnp.argsort(ids.reshape(-1), stable=True).astype(jnp.int32)
    place = jnp.zeros(pairs, jnp.int32).at[order].set(jnp.arange(pairs, dtype=jnp.int32))
    edges = jnp.arange(size * experts + 1, dtype=jnp.int32)
    edges = jnp.searchsorted(ids.reshape(-1)[order], edges).astype(jnp.int32)
    plan = _Plan.of(jnp.diff(edges).reshape(size, experts))
    worst = size * _worst_case(flat, ids, w)
    room = min(worst, math.ceil(ROOM * pairs))
    fixed = (room, tuple(sorted(options.items())))
    rows = flat[order // ids.shape[1]]
    y = _round(fixed, plan, jnp.int32(0), rows, w)
    if room < worst:
        y = y + _further_rounds(fixed, rows, w, plan)
    return y[place]


Fixed = tuple[int, tuple[tuple[str, Any], ...]]
"""Rows that a device receives in a round, and options of the kernel."""


class _Plan(NamedTuple):
    """What is sent in all, in blocks: int32 [devices] each, block i to or from device i."""

    here: jax.Array  # where the block begins among this device's rows
    sent: jax.Array  # rows of it
    arrival: jax.Array  # where it begins among all that device i receives
    there: jax.Array  # where the block from device i begins among all that this one receives
    received: jax.Array  # rows of it
    origin: jax.Array  # where it begins among the rows of device i
    ends: jax.Array  # int32 [devices * experts]: where rows of one device for one expert end

    @classmethod
    def of(cls, counts: jax.Array) -> _Plan:
        """From this device's rows for each expert of each device, int32 [devices, experts]."""
        theirs = _exchange(counts)
        sent, received = counts.sum(axis=1), theirs.sum(axis=1)
        here, there = _starts(sent), _starts(received)
        ends = jnp.cumsum(theirs.reshape(-1), dtype=jnp.int32)
        return cls(here, sent, _exchange(there), there, received, _exchange(here), ends)


def _starts(sizes: jax.Array) -> jax.Array:
    """Where blocks of these sizes begin, one behind the other."""
    return jnp.cumsum(sizes, dtype=jnp.int32) - sizes


def _round(
    fixed: Fixed, plan: _Plan, number: jax.Array, rows: jax.Array, w: dict[str, jax.Array]
) -> jax.Array:
    """What experts make of those rows [P, D] that travel in this round, zero for others.

    It is `room` of the rows that a device receives in all, from `number * room` on.
    """
    room, options = fixed
    first = number * room

    def within(start: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of blocks: how many rows came earlier, come now, and where now's begin in the room."""
        earlier = jnp.clip(first - start, 0, count)
        now = jnp.clip(first + room - start, 0, count) - earlier
        return earlier, now, jnp.clip(start + earlier - first, 0, room)

    earlier, sent, arrival = within(plan.arrival, plan.sent)
    came, received, start = within(plan.there, plan.received)
    out = _Route(plan.here + earlier, sent, arrival, received)
    back = _Route(start, received, plan.origin + came, sent)
    here = _deliver(len(rows), room, rows, out, back)
    index = first + jnp.arange(room, dtype=jnp.int32)
    run = jnp.searchsorted(plan.ends, index, side="right").astype(jnp.int32)
    experts = len(w["w_gate"])
    ids = jnp.where(run < len(plan.ends), run % experts, experts)
    return _deliver(room, len(rows), _run(here, ids, w, dict(options)), back, out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _further_rounds(
    fixed: Fixed, rows: jax.Array, w: dict[str, jax.Array], plan: _Plan
) -> jax.Array:
    """The sum of all rounds but the first; there are none unless experts are chosen unevenly."""

    def add(number: jax.Array, y: jax.Array) -> jax.Array:
        return y + _round(fixed, plan, number, rows, w)

    with counted_turns(0):
        return jax.lax.fori_loop(1, _rounds(fixed, plan), add, jnp.zeros_like(rows))


def _further_rounds_fwd(fixed: Fixed, *arrays: Any) -> tuple[jax.Array, Any]:
    return _further_rounds(fixed, *arrays), arrays


def _further_rounds_bwd(fixed: Fixed, saved: Any, d_y: jax.Array) -> tuple[Any, ...]:
    rows, w, plan = saved

    def add(number: jax.Array, total: Any) -> Any:
        _, back = jax.vjp(functools.partial(_round, fixed, plan, number), rows, w)
        return jax.tree.map(jnp.add, total, back(d_y))

    zeros = jax.tree.map(jnp.zeros_like, (rows, w))
    with counted_turns(0):
        return *jax.lax.fori_loop(1, _rounds(fixed, plan), add, zeros), None


_further_rounds.defvjp(_further_rounds_fwd, _further_rounds_bwd)


def _rounds(fixed: Fixed, plan: _Plan) -> jax.Array:
    """As many on every device: all take part in what is sent."""
    return jax.lax.pmax((plan.received.sum() + fixed[0] - 1) // fixed[0], AXES)


class _Route(NamedTuple):
    """Which rows go where, int32 [devices] each: block i goes to device i of the expert axis."""

    start: jax.Array  # of the block here
    rows: jax.Array  # of the block
    arrival: jax.Array  # where it begins there
    received: jax.Array  # rows of the blocks that come here


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _deliver(sent: int, total: int, rows: jax.Array, out: _Route, back: _Route) -> jax.Array:
    """What comes here of everybody's rows [sent, D]: [total, D], zero where nothing came.

    `back` is the reverse of `out`: gradients travel by it.
    """
    empty = jnp.zeros((total, rows.shape[1]), rows.dtype)
    return jax.lax.ragged_all_to_all(rows, empty, *out, axis_name=AXIS)


def _deliver_fwd(
    sent: int, total: int, rows: jax.Array, out: _Route, back: _Route
) -> tuple[jax.Array, tuple[_Route, _Route]]:
    return _deliver(sent, total, rows, out, back), (out, back)


def _deliver_bwd(
    sent: int, total: int, saved: tuple[_Route, _Route], d_received: jax.Array
) -> tuple[jax.Array, None, None]:
    out, back = saved
    return _deliver(total, sent, d_received, back, out), None, None


_deliver.defvjp(_deliver_fwd, _deliver_bwd)
