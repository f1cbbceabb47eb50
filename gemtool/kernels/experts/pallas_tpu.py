"""Dropless mixture of experts for TPUs: JAX's grouped matmul of MegaBlocks (arXiv 2211.15841).

Rows of pairs (token, choice), sorted by expert, are multiplied with the matrices of their experts in
one kernel, whose grid visits each tile of rows once for every expert that has rows in it. Tiles of
pairs without an expert come last and are not visited: such rows are never written, and nothing
reads them. Products are of bfloat16 where both factors are, else of float32; sums are float32.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from gemtool.kernels.dispatch import target_platform
from gemtool.kernels.experts.pairs import Pairs, combine, sort_pairs
from gemtool.kernels.experts.xla import Weights
from gemtool.kernels.glu import Glu

# Rows of a tile; fewer than the least leave the matrix unit idle.
LEAST_ROWS, MOST_ROWS = 128, 512
# What else a tile measures: the greatest side, and how large one of the weights may be.
MOST_SIDE, MOST_BYTES = 1024, 2**21


def experts_pallas_tpu(
    x: jax.Array, expert_ids: jax.Array, weights: jax.Array, w: Weights, glu: Glu
) -> jax.Array:
    """See `gemtool.kernels.experts.expert_mlp`.

    For another platform than TPUs the kernels are interpreted, to try them.

    Raises:
        NotImplementedError: anything is float64.
    """
    if any(array.dtype == jnp.float64 for array in (x, weights, *w.values())):
        raise NotImplementedError("TPUs have no float64")
    experts, count = len(w["gate"]), expert_ids.size
    w = {name: _readable(array) for name, array in w.items()}
    with jax.named_scope("experts"):
        pairs = sort_pairs(expert_ids, experts)
        tile = _round_up(count, 16)
        if count > LEAST_ROWS:
            mean = -(-count // experts)
            tile = min(max(_power_of_two(mean), LEAST_ROWS), MOST_ROWS)
        rows = _spread(experts, _round_up(count, tile), _readable(x), expert_ids, pairs)
        ids = expert_ids.reshape(-1)[pairs.pair]
        ids = jnp.pad(ids, (0, len(rows) - count), constant_values=experts)

        def project(name: str, rows: jax.Array) -> jax.Array:
            y = _grouped(tile, rows, w[name], pairs.rows)
            bias = w.get(f"{name}_bias")
            if bias is None:
                return y
            wide = bias.astype(jnp.float32)
            wide = wide.at[ids].get(mode="fill", fill_value=0, indices_are_sorted=True)
            return (y.astype(jnp.float32) + wide).astype(y.dtype)

        gate, up = (project(name, rows).astype(jnp.float32) for name in ("gate", "up"))
        h = glu(gate, up).astype(rows.dtype)
        out = _collect(experts, project("down", h), weights, expert_ids, pairs)
    return out.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _spread(
    experts: int, rows: int, x: jax.Array, expert_ids: jax.Array, pairs: Pairs
) -> jax.Array:
    """The row of each pair, in their order: [T, D] -> [rows, D]. Its gradient is no scatter."""
    return jnp.pad(x[pairs.token], ((0, rows - expert_ids.size), (0, 0)))


def _spread_fwd(experts: int, rows: int, *arrays: Any) -> tuple[jax.Array, Any]:
    return _spread(experts, rows, *arrays), arrays[1:]


def _spread_bwd(experts: int, rows: int, saved: Any, d_rows: jax.Array) -> tuple[Any, ...]:
    expert_ids, pairs = saved
    ones = jnp.ones(expert_ids.shape, jnp.float32)
    d_x = combine(d_rows, pairs, expert_ids, ones, experts)
    return d_x.astype(d_rows.dtype), None, None


_spread.defvjp(_spread_fwd, _spread_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _collect(
    experts: int, rows: jax.Array, weights: jax.Array, expert_ids: jax.Array, pairs: Pairs
) -> jax.Array:
    """The weighted sum of each token's rows: [rows, D] -> float32 [T, D]."""
    return combine(rows, pairs, expert_ids, weights.astype(jnp.float32), experts)


def _collect_fwd(experts: int, *arrays: Any) -> tuple[jax.Array, Any]:
    return _collect(experts, *arrays), arrays


def _collect_bwd(experts: int, saved: Any, d_out: jax.Array) -> tuple[Any, ...]:
    rows, weights, expert_ids, pairs = saved
    share = weights.astype(jnp.float32).reshape(-1)[pairs.pair]
    # What is gathered is in the type of rows: `d_out` is the gradient of such.
    d_rows = share[:, None] * d_out.astype(rows.dtype)[pairs.token].astype(jnp.float32)
    d_rows = jnp.pad(d_rows, ((0, len(rows) - len(d_rows)), (0, 0))).astype(rows.dtype)
    along = [jnp.sum(d_out * rows[i].astype(jnp.float32), axis=1) for i in pairs.place.T]
    d_weights = jnp.where(expert_ids < experts, jnp.stack(along, axis=1), 0)
    return d_rows, d_weights.astype(weights.dtype), None, None


_collect.defvjp(_collect_fwd, _collect_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(tile: int, rows: jax.Array, w: jax.Array, counts: jax.Array) -> jax.Array:
    """Rows [M, I] in order of their experts through the matrices of these: [E, I, O] -> [M, O]."""
    return _gmm(tile, rows, w, counts)


def _grouped_fwd(tile: int, *arrays: Any) -> tuple[jax.Array, Any]:
    return _grouped(tile, *arrays), arrays


def _grouped_bwd(tile: int, saved: Any, d_y: jax.Array) -> tuple[Any, ...]:
    rows, w, counts = saved
    d_rows = _gmm(tile, d_y, w, counts, transpose=True)
    # A tile of gradients is in memory thrice, twice as weights and once in float32.
    sides = _side(w.shape[1], MOST_SIDE // 2), _side(w.shape[2], MOST_SIDE)
    with _megablox_promotion():
        d_w = tgmm(
            rows.T,
            d_y,
            counts,
            w.dtype,
            (min(tile, LEAST_ROWS), *sides),
            interpret=target_platform() != "tpu",
        )
    return d_rows, d_w, None


_grouped.defvjp(_grouped_fwd, _grouped_bwd)


def _gmm(
    tile: int, rows: jax.Array, w: jax.Array, counts: jax.Array, transpose: bool = False
) -> jax.Array:
    """`_grouped`, or with `transpose` [M, O] -> [M, I]."""
    inner, outer = w.shape[1:][::-1] if transpose else w.shape[1:]
    sides = _side(inner, MOST_BYTES // (MOST_SIDE * w.dtype.itemsize)), _side(outer, MOST_SIDE)
    with _megablox_promotion():
        return gmm(
            rows,
            w,
            counts,
            rows.dtype,
            (tile, *sides),
            transpose_rhs=transpose,
            interpret=target_platform() != "tpu",
        )


@contextmanager
def _megablox_promotion() -> Iterator[None]:
    """It mixes types and ranks, which this package does not."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def _side(length: int, most: int) -> int:
    """The side of a tile: the whole length, or else lanes that divide it if they are not too few."""
    if length <= most:
        return length
    whole = [side for side in range(most // 2, most + 1, 128) if length % side == 0]
    return max(whole, default=most)


def _readable(x: jax.Array) -> jax.Array:
    """A kernel reads float32 and bfloat16."""
    return x if x.dtype in (jnp.float32, jnp.bfloat16) else x.astype(jnp.float32)


def _power_of_two(n: int) -> int:
    """The least that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
