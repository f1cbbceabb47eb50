"""Dropless mixture of experts (after MegaBlocks, arXiv 2211.15841) for GPUs, as Pallas kernels that
Triton compiles.

Why not `jax.lax.ragged_dot`: for NVIDIA's GPUs XLA (of jaxlib 0.10) expands it to one dense product
with E copies of the rows, masked, unless an experimental flag is set; even then so for the gradient
of the weights. That is E / K times the work, and the memory. tokamax (0.0.12) has a `ragged_dot` that
would do, and with it ten more packages, one of them pinned to a version of 2021.

Rows (token, choice) are put in order of their experts, each expert's beginning at a whole tile, so
that a tile of rows has one expert and rows that fill up a tile are zero. Then two kernels do: rows
times the matrix of their tile's expert, and, for the gradient of a matrix, the transposed product of
an expert's tiles. Everything else is gathers along unique indices, which XLA differentiates without
atomic additions: results do not vary from run to run.

Matmuls are of the inputs' type (float32: as fast as XLA's default for the GPU, TF32) with float32
sums, and give float32. Elsewhere than for a GPU the same kernels are interpreted, which is how tests
run them. Block sizes are modest and have not been tuned on hardware.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from gemtool.kernels.dispatch import target_platform
from gemtool.kernels.glu import Glu
from gemtool.kernels.triton import pad, power_of_two, product

ROWS = 128
"""Most rows of a tile; less where experts have fewer."""
COLUMNS = 64
"""Most columns of a block, of either side of a matrix."""


class _Tiles(NamedTuple):
    """Whose the tiles of rows are."""

    expert: jax.Array  # int32 [tiles], E: nobody's
    first: jax.Array  # int32 [E + 1]: the first tile of an expert; the last: of nobody


@dataclasses.dataclass(frozen=True)
class _Options:
    """What is fixed while tracing."""

    rows: int  # a tile
    interpret: bool

    def call(self, kernel: Any, **arguments: Any) -> Any:
        return pl.pallas_call(
            kernel,
            interpret=self.interpret,
            compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
            **arguments,
        )


def experts_gpu(
    x: jax.Array, expert_ids: jax.Array, weights: jax.Array, w: dict[str, jax.Array], glu: Glu
) -> jax.Array:
    """See `gemtool.kernels.experts.expert_mlp`; `w` has its matrices and biases by name.

    Raises:
        NotImplementedError: float64.
    """
    if x.dtype == jnp.float64:
        raise NotImplementedError("float64")
    with jax.named_scope("experts"):
        experts, (length, choices) = len(w["gate"]), expert_ids.shape
        mean = -(-expert_ids.size // experts)
        options = _Options(min(ROWS, power_of_two(mean)), target_platform() != "gpu")
        place, tiles = _arrange(options, expert_ids, experts)
        total = len(tiles.expert) * options.rows
        # Set, not gathered: so the gradient is a gather, and a sum over choices.
        pairs = jnp.broadcast_to(x[:, None, :], (length, choices, x.shape[1]))
        rows = jnp.zeros((total, x.shape[1]), x.dtype)
        rows = rows.at[place].set(pairs, mode="drop", unique_indices=True)

        def project(name: str, rows: jax.Array) -> jax.Array:
            y = _grouped(options, rows, w[name], tiles)
            if (bias := w.get(f"{name}_bias")) is None:
                return y
            by_tile = bias.astype(y.dtype).at[tiles.expert].get(mode="fill", fill_value=0)
            return (y.reshape(len(by_tile), -1, y.shape[1]) + by_tile[:, None]).reshape(y.shape)

        hidden = glu(project("gate", rows), project("up", rows)).astype(x.dtype)
        y = project("down", hidden)
        y = y.at[place].get(mode="fill", fill_value=0, unique_indices=True)  # [T, K, D]
        # No product of matrices, which would be of fewer bits.
        return jnp.sum(y * weights.astype(y.dtype)[..., None], axis=1).astype(x.dtype)


def _arrange(options: _Options, expert_ids: jax.Array, experts: int) -> tuple[jax.Array, _Tiles]:
    """Where each pair's row is, int32 [T, K], past the end where it has no expert."""
    pairs = expert_ids.size
    flat = expert_ids.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    owner = flat[order]
    edges = jnp.searchsorted(owner, jnp.arange(experts + 1, dtype=jnp.int32)).astype(jnp.int32)
    ends = jnp.cumsum(-(-jnp.diff(edges) // options.rows), dtype=jnp.int32)
    # The last tile of each expert is not full.
    count = pairs // options.rows + min(pairs, experts)
    expert = jnp.searchsorted(ends, jnp.arange(count, dtype=jnp.int32), side="right")
    first = jnp.pad(ends, (1, 0))
    row = first[owner] * options.rows + jnp.arange(pairs, dtype=jnp.int32) - edges[owner]
    # Distinct beyond the end too: indices are said to be unique.
    row = jnp.where(owner < experts, row, count * options.rows + order)
    place = jnp.zeros(pairs, jnp.int32).at[order].set(row, unique_indices=True)
    return place.reshape(expert_ids.shape), _Tiles(expert.astype(jnp.int32), first)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(options: _Options, rows: jax.Array, w: jax.Array, tiles: _Tiles) -> jax.Array:
    """Rows [M, I] times the matrix of `w` [E, I, O] of their tile: float32 [M, O]."""
    return _rows_times_matrices(options, rows, w, tiles, transposed=False)


def _grouped_fwd(options: _Options, rows: jax.Array, w: jax.Array, tiles: _Tiles) -> Any:
    return _grouped(options, rows, w, tiles), (rows, w, tiles)


def _grouped_bwd(options: _Options, saved: Any, d_y: jax.Array) -> tuple[Any, ...]:
    rows, w, tiles = saved
    d_y = d_y.astype(rows.dtype)
    d_rows = _rows_times_matrices(options, d_y, w, tiles, transposed=True)
    d_w = _rows_times_rows(options, rows, d_y, tiles)
    return d_rows.astype(rows.dtype), d_w.astype(w.dtype), None


_grouped.defvjp(_grouped_fwd, _grouped_bwd)


def _rows_times_matrices(
    options: _Options, rows: jax.Array, w: jax.Array, tiles: _Tiles, *, transposed: bool
) -> jax.Array:
    """Rows [M, I] times the matrix of their tile, [I, O] or transposed [O, I]: float32 [M, O]."""
    size = w.shape[1 if transposed else 2]
    inner, outer = _block(rows.shape[1]), _block(size)
    rows = pad(rows, None, inner)
    w = pad(w, None, *((outer, inner) if transposed else (inner, outer)))
    experts, width = len(w), -(-size // outer) * outer

    def kernel(expert: Any, x: Any, w: Any, y: Any) -> None:
        e, column = expert[...], pl.program_id(1)
        there = pl.ds(column * outer, outer)

        def step(i: jax.Array, total: jax.Array) -> jax.Array:
            here = pl.ds(i * inner, inner)
            matrix = w[e, there, here] if transposed else w[e, here, there]
            return total + product(x[:, here], matrix, (1, 1 if transposed else 0))

        steps = jnp.where(e < experts, jnp.int32(x.shape[1] // inner), 0)
        y[...] = jax.lax.fori_loop(0, steps, step, jnp.zeros(y.shape, jnp.float32))

    y = options.call(
        kernel,
        grid=(len(tiles.expert), width // outer),
        in_specs=[
            pl.BlockSpec((None,), lambda m, n: (m,)),
            pl.BlockSpec((options.rows, rows.shape[1]), lambda m, n: (m, 0)),
            pl.BlockSpec(w.shape, lambda m, n: (0, 0, 0)),
        ],
        out_specs=pl.BlockSpec((options.rows, outer), lambda m, n: (m, n)),
        out_shape=jax.ShapeDtypeStruct((len(rows), width), jnp.float32),
        name="rows_times_matrices",
    )(tiles.expert, rows, w)
    return y[:, :size]


def _rows_times_rows(
    options: _Options, rows: jax.Array, others: jax.Array, tiles: _Tiles
) -> jax.Array:
    """Of each expert's tiles of [M, I] and [M, O]: the transposed product float32 [E, I, O]."""
    shape = rows.shape[1], others.shape[1]
    inner, outer = (_block(size) for size in shape)
    rows, others = pad(rows, None, inner), pad(others, None, outer)
    experts = len(tiles.first) - 1

    def kernel(first: Any, x: Any, d_y: Any, d_w: Any) -> None:
        e = pl.program_id(0)

        def step(m: jax.Array, total: jax.Array) -> jax.Array:
            here = pl.ds(m * options.rows, options.rows)
            return total + product(x[here, :], d_y[here, :], (0, 0))

        zero = jnp.zeros(d_w.shape, jnp.float32)
        d_w[...] = jax.lax.fori_loop(first[e], first[e + 1], step, zero)

    d_w = options.call(
        kernel,
        grid=(experts, rows.shape[1] // inner, others.shape[1] // outer),
        in_specs=[
            pl.BlockSpec((experts + 1,), lambda e, i, o: (0,)),
            pl.BlockSpec((len(rows), inner), lambda e, i, o: (0, i)),
            pl.BlockSpec((len(rows), outer), lambda e, i, o: (0, o)),
        ],
        out_specs=pl.BlockSpec((None, inner, outer), lambda e, i, o: (e, i, o)),
        out_shape=jax.ShapeDtypeStruct((experts, rows.shape[1], others.shape[1]), jnp.float32),
        name="rows_times_rows",
    )(tiles.first, rows, others)
    return d_w[:, : shape[0], : shape[1]]


def _block(size: int) -> int:
    return min(COLUMNS, power_of_two(size))
