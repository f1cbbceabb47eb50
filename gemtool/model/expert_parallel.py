"""Experts on a mesh: rows travel to the device that holds their expert, and back.

Without a current mesh (`jax.set_mesh`) this is the kernel itself. On one, it runs per device
(`jax.shard_map`). Where each device of the expert axis has rows of its own, they travel; where all
have the same rows (a batch that the axis does not divide, as in decoding), each computes what its
experts make of them, and the sum is taken.

How rows travel depends on the platform that the program is for: TPUs and GPUs send what there is to
send (`jax.lax.ragged_all_to_all`); XLA's CPU compiler has no such operation, and there blocks of
equal size travel, each with room for the worst case. On either, what is received has that room, so
that no row is ever dropped; room that is not taken costs memory, not products of matrices.

Axes: B sequences, T positions, D model, E experts, C choices of a row; within a device they are that
device's share.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from gemtool.kernels.dispatch import target_platform
from gemtool.kernels.experts import expert_mlp
from gemtool.model.mesh import current_mesh, partition

AXIS = "expert"


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
    """Rows to the devices of their experts and back.

    A device may be sent up to all rows of another one, so that none is ever dropped: there is room
    for so many from each.
    """
    experts, choices, width = len(w["w_gate"]), ids.shape[-1], x.shape[-1]
    flat = x.reshape(-1, width)
    room = len(flat) * min(choices, experts)
    form = _padded if target_platform() == "cpu" else _ragged
    send, row_ids, fetch = form(size, experts, room, ids.reshape(-1, choices))
    rows = send(flat)
    y = _flat(rows, row_ids[:, None], jnp.ones((len(rows), 1), x.dtype), w, options)
    back = fetch(y).reshape(*ids.shape, width)
    return jnp.einsum("...cd,...c->...d", back.astype(weights.dtype), weights).astype(x.dtype)


Trip = tuple[Callable[[jax.Array], jax.Array], jax.Array, Callable[[jax.Array], jax.Array]]
"""How rows travel: a function that gives the rows [M, D] that came here, of rows [N, D] that are sent;
whose they are, int32 [M], this device's experts and their number for none; and a function that fetches
what became of the sent rows, [N * C, D] for each choice in order, zero where there was none."""


def _padded(size: int, experts: int, room: int, ids: jax.Array) -> Trip:
    """In blocks of `room` rows, by all-to-all."""
    choices = ids.shape[1]
    to, at_home = (ids // experts).reshape(-1), (ids % experts).reshape(-1)
    token = jnp.arange(to.shape[0], dtype=jnp.int32) // choices
    # Place of a pair among those for the same device, in order.
    same = to[:, None] == jnp.arange(size, dtype=jnp.int32)[None, :]
    rank = jnp.sum(jnp.where(same, jnp.cumsum(same.astype(jnp.int32), axis=0) - 1, 0), axis=1)
    place = jnp.where(to < size, to * room + rank, size * room)

    def send(rows: jax.Array) -> jax.Array:
        sent = jnp.zeros((size * room, rows.shape[1]), rows.dtype)
        return _exchange(sent.at[place].set(rows[token], mode="drop"))

    def fetch(y: jax.Array) -> jax.Array:
        return _exchange(y).at[place].get(mode="fill", fill_value=0)

    row_ids = jnp.full(size * room, experts, jnp.int32).at[place].set(at_home, mode="drop")
    return send, _exchange(row_ids), fetch


def _exchange(x: jax.Array) -> jax.Array:
    """Block i of each device to device i of the expert axis."""
    return jax.lax.all_to_all(x, AXIS, split_axis=0, concat_axis=0, tiled=True)


def _ragged(size: int, experts: int, room: int, ids: jax.Array) -> Trip:
    """Only rows that there are, in order of their experts, so that counts say whose they are."""
    pairs, choices = ids.size, ids.shape[1]
    flat = ids.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    place = jnp.zeros(pairs, jnp.int32).at[order].set(jnp.arange(pairs, dtype=jnp.int32))
    edges = jnp.searchsorted(flat[order], jnp.arange(size * experts + 1, dtype=jnp.int32))
    counts = jnp.diff(edges.astype(jnp.int32)).reshape(size, experts)
    theirs = _exchange(counts)  # [size, experts]: what each device sends to each expert here
    sent, received = counts.sum(axis=1), theirs.sum(axis=1)
    here, there = _starts(sent), _starts(received)
    out = Route(here, sent, _exchange(there), received)
    back = Route(there, received, _exchange(here), sent)
    last = jnp.cumsum(theirs.reshape(-1), dtype=jnp.int32)
    index = jnp.arange(size * room, dtype=jnp.int32)
    run = jnp.searchsorted(last, index, side="right").astype(jnp.int32)
    row_ids = jnp.where(run < size * experts, run % experts, experts)

    def send(rows: jax.Array) -> jax.Array:
        return _deliver(pairs, size * room, rows[order // choices], out, back)

    def fetch(y: jax.Array) -> jax.Array:
        return _deliver(size * room, pairs, y, back, out)[place]

    return send, row_ids, fetch


class Route(NamedTuple):
    """Which rows go where, int32 [devices] each: block i goes to device i of the expert axis."""

    start: jax.Array  # of the block here
    rows: jax.Array  # of the block
    arrival: jax.Array  # where it begins there
    received: jax.Array  # rows of the blocks that come here


def _starts(sizes: jax.Array) -> jax.Array:
    """Where blocks of these sizes begin, one behind the other."""
    return jnp.cumsum(sizes, dtype=jnp.int32) - sizes


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _deliver(sent: int, total: int, rows: jax.Array, out: Route, back: Route) -> jax.Array:
    """What comes here of everybody's rows [sent, D]: [total, D], zero where nothing came.

    `back` is the reverse of `out`: gradients travel by it.
    """
    empty = jnp.zeros((total, rows.shape[1]), rows.dtype)
    return jax.lax.ragged_all_to_all(rows, empty, *out, axis_name=AXIS)


def _deliver_fwd(
    sent: int, total: int, rows: jax.Array, out: Route, back: Route
) -> tuple[jax.Array, tuple[Route, Route]]:
    return _deliver(sent, total, rows, out, back), (out, back)


def _deliver_bwd(
    sent: int, total: int, saved: tuple[Route, Route], d_received: jax.Array
) -> tuple[jax.Array, None, None]:
    out, back = saved
    return _deliver(total, sent, d_received, back, out), None, None


_deliver.defvjp(_deliver_fwd, _deliver_bwd)
