"""Attention to chosen blocks for TPUs, in Pallas.

The numbers of the blocks are prefetched scalars: the grid walks along each query's list, and the
index of the block of keys to fetch next is read from it. So the pipeline fetches the listed blocks,
each while the one before it is computed, and nothing else. A place without a block fetches the first
of the buffer and computes nothing.

Keys lie in one of two ways, as in `attention/pallas_tpu.py`, whichever needs no copy: heads of less
than 128 dimensions as [B * KV, D, S], others as [B, S * KV, D], keys of all heads side by side, those
of other heads hidden. What is fetched is a tile: a block, or in the first way at least the 128 keys
that fill the lanes, of which those of other blocks are hidden.

Kernels for TPUs take no float16. Of such a buffer they read the bits, 16-bit integers, and make of
them what they stand for (`_widened`). To XLA, taking bits as another type is work on the whole buffer,
unless it is part of the kernel: `_bits` says how it becomes that.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gemtool.kernels.attention.merge import merge_attention
from gemtool.kernels.attention.reference import NOTHING
from gemtool.kernels.attention.tpu_blocks import INNER, LANES, LAST
from gemtool.kernels.dispatch import target_platform

READABLE = (jnp.float32, jnp.bfloat16, jnp.float16)
# Keys side by side come in whole tiles of so many rows, in either readable type.
SUBLANES = 16
# Numbers that are prefetched at a time, of each kind: 128 KiB of scalar memory.
PREFETCHED = 2**15
# Of a tile in float32; tiles of keys and of values are in memory, and the next ones.
MOST_BYTES = 2**20

Ref = Any
Scalar = Any


def block_attention_pallas_tpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    blocks: jax.Array,
    newest: jax.Array,
    *,
    block: int,
    scale: float,
    soft_cap: float | None,
    sink: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """See `gemtool.kernels.blocks.partial_block_attention`; `newest` int32 [B, T, C] is the last key
    seen of each block named, 0 .. block - 1, and -1 where there is none.

    For another platform than TPUs the kernel is interpreted, to try it.

    Raises:
        NotImplementedError: anything is float64; the buffer is of a type that kernels cannot read,
            since it would have to be converted as a whole; blocks do not fit into tiles.
    """
    if jnp.float64 in (q.dtype, k.dtype, v.dtype):
        raise NotImplementedError("TPUs have no float64")
    if k.dtype not in READABLE or v.dtype not in READABLE:
        raise NotImplementedError(f"a kernel cannot read {k.dtype} and {v.dtype}")
    plan = _Plan.of(q, k, block, scale, soft_cap)
    # What is yet to be merged is not rounded before.
    out_dtype = q.dtype if sink is None else jnp.float32
    with jax.named_scope("block_attention"):
        k, v = plan.arranged(k), plan.arranged(v)
        part = _by_pieces(plan, q, k, v, blocks, newest, out_dtype)
        out, lse = part if sink is None else merge_attention([part], sink)
        return out.astype(q.dtype), lse


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is fixed while tracing."""

    block: int
    scale: float
    soft_cap: float | None
    apart: int  # key heads that are apart
    side_by_side: int  # key heads whose keys alternate: key by key, head by head
    keys_minor: bool  # keys and values are [N, D, keys], not [N, keys, D]
    positions: int  # of a tile
    dtype: Any  # of the factors of products

    @classmethod
    def of(
        cls, q: jax.Array, k: jax.Array, block: int, scale: float, soft_cap: float | None
    ) -> _Plan:
        kv_heads, dim = k.shape[2:]
        keys_minor = dim % LANES != 0
        apart, side_by_side = (kv_heads, 1) if keys_minor else (1, kv_heads)
        if keys_minor and block % LANES and LANES % block:
            raise NotImplementedError(f"blocks of {block} keys are no whole share of {LANES}")
        if not keys_minor and block * kv_heads % SUBLANES:
            raise NotImplementedError(f"{block} keys of {kv_heads} heads are no whole tile")
        positions = max(block, LANES) if keys_minor else block
        if positions * side_by_side * dim * 4 > MOST_BYTES:
            raise NotImplementedError(f"blocks of {block} keys are too large")
        dtype = jnp.bfloat16 if q.dtype == jnp.bfloat16 else jnp.float32
        return cls(block, scale, soft_cap, apart, side_by_side, keys_minor, positions, dtype)

    @property
    def keys(self) -> int:
        """Keys of a tile."""
        return self.positions * self.side_by_side

    def arranged(self, x: jax.Array) -> jax.Array:
        """Keys or values [B, S, KV, D] as the kernel reads them: no copy but of the shortest."""
        if x.shape[1] < self.positions:
            x = jnp.pad(x, ((0, 0), (0, self.positions - x.shape[1]), (0, 0), (0, 0)))
        batch, length, heads, dim = x.shape
        if self.keys_minor:
            return x.transpose(0, 2, 3, 1).reshape(batch * heads, dim, length)
        return x.reshape(batch, length * heads, dim)


def _by_pieces(
    plan: _Plan,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    blocks: jax.Array,
    newest: jax.Array,
    out_dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    """The output [B, T, H, D] and the log of its sum of exponentials [B, T, H], for so many queries
    at a time as scalar memory has room for."""
    batch, length, choices = blocks.shape
    most = max(PREFETCHED // (batch * choices), 1)
    if length <= most:
        return _at_once(plan, q, k, v, blocks, newest, out_dtype)
    pieces = -(-length // most)
    queries = -(-length // pieces)

    def cut(x: jax.Array, fill: int) -> jax.Array:
        """[B, T, ...] -> [pieces, B, queries, ...]."""
        widths = ((0, 0), (0, pieces * queries - length), *((0, 0) for _ in x.shape[2:]))
        x = jnp.pad(x, widths, constant_values=fill)
        return x.reshape(batch, pieces, queries, *x.shape[2:]).swapaxes(0, 1)

    def piece(item: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        own, named, last = item
        return _at_once(plan, own, k, v, named, last, out_dtype)

    results = lax.map(piece, (cut(q, 0), cut(blocks, -1), cut(newest, -1)))
    out, lse = (x.swapaxes(0, 1).reshape(batch, -1, *x.shape[3:])[:, :length] for x in results)
    return out, lse


def _at_once(
    plan: _Plan,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    blocks: jax.Array,
    newest: jax.Array,
    out_dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    batch, length, heads, dim = q.shape
    choices = blocks.shape[2]
    count, rows = batch * plan.apart, heads // plan.apart
    q_rows = q.astype(plan.dtype).reshape(batch, length, plan.apart, rows, dim)
    q_rows = q_rows.transpose(0, 2, 1, 3, 4).reshape(count, length, rows, dim)

    def of_query(n: Scalar, t: Scalar, c: Scalar, named: Ref, last: Ref) -> Any:
        return n, t, 0, 0

    def of_keys(n: Scalar, t: Scalar, c: Scalar, named: Ref, last: Ref) -> Any:
        number = jnp.maximum(named[_entry(plan, n, t, c, length, choices)], 0)
        tile = lax.div(number * plan.block, jnp.int32(plan.positions))
        return (n, 0, tile) if plan.keys_minor else (n, tile, 0)

    tile = (dim, plan.keys) if plan.keys_minor else (plan.keys, dim)
    keys_spec = pl.BlockSpec((None, *tile), of_keys)
    k, v, blocks = _bits(k, v, blocks)
    out, lse = pl.pallas_call(
        functools.partial(_kernel, plan, length, choices),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(count, length, choices),
            in_specs=[pl.BlockSpec((None, None, rows, dim), of_query), keys_spec, keys_spec],
            out_specs=(
                pl.BlockSpec((None, None, rows, dim), of_query),
                pl.BlockSpec((None, None, rows, LANES), of_query),
            ),
            scratch_shapes=[
                pltpu.VMEM((rows, LANES), jnp.float32),
                pltpu.VMEM((rows, LANES), jnp.float32),
                pltpu.VMEM((rows, dim), jnp.float32),
            ],
        ),
        out_shape=(
            jax.ShapeDtypeStruct((count, length, rows, dim), out_dtype),
            jax.ShapeDtypeStruct((count, length, rows, LANES), jnp.float32),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            # Of named, last, q, k, v: how `_bits` are taken.
            allow_input_fusion=[False, False, False, *(x.dtype == jnp.int16 for x in (k, v))],
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * count * length * choices * rows * plan.keys * dim,
            transcendentals=count * length * choices * rows * plan.keys,
            bytes_accessed=2 * count * length * choices * plan.keys * dim * k.dtype.itemsize,
        ),
        interpret=target_platform() != "tpu",
        name="block_attention",
    )(blocks.reshape(-1), newest.reshape(-1), q_rows, k, v)

    def unrows(x: jax.Array) -> jax.Array:
        x = x.reshape(batch, plan.apart, length, rows, x.shape[-1]).swapaxes(1, 2)
        return x.reshape(batch, length, heads, x.shape[-1])

    return unrows(out), unrows(lse[..., :1])[..., 0]


def _kernel(
    plan: _Plan,
    length: int,
    choices: int,
    named: Ref,
    last: Ref,
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    out_ref: Ref,
    lse_ref: Ref,
    top: Ref,
    total: Ref,
    acc: Ref,
) -> None:
    """One query and one block of its list; rows are its heads (of one key head that is apart)."""
    place = pl.program_id(2)
    entry = _entry(plan, pl.program_id(0), pl.program_id(1), place, length, choices)

    @pl.when(place == 0)
    def _() -> None:
        top[...] = jnp.full_like(top, NOTHING)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    @pl.when(named[entry] >= 0)
    def _() -> None:
        # The block's first position in its tile, and the last one that is seen.
        first = lax.rem(named[entry] * plan.block, jnp.int32(plan.positions))
        newest = first + last[entry]

        def position(shape: tuple[int, int], axis: int) -> jax.Array:
            key = lax.broadcasted_iota(jnp.int32, shape, axis)
            return lax.div(key, jnp.int32(plan.side_by_side))

        at = position((1, plan.keys), 1)
        visible = (at >= first) & (at <= newest)
        if plan.side_by_side > 1:
            rows = q_ref.shape[0]
            row = lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
            key = lax.broadcasted_iota(jnp.int32, (1, plan.keys), 1)
            head = lax.div(row, jnp.int32(rows // plan.side_by_side))
            visible = visible & (head == lax.rem(key, jnp.int32(plan.side_by_side)))
        # What is not seen might be NaN, and that times no mass is not 0.
        at_v = position(v_ref.shape, int(plan.keys_minor))
        v = _widened(v_ref[...]).astype(jnp.float32)
        v = jnp.where((at_v >= first) & (at_v <= newest), v, 0.0).astype(plan.dtype)

        k = _widened(k_ref[...]).astype(plan.dtype)
        scores = _dot(q_ref[...], k, INNER if plan.keys_minor else LAST) * plan.scale
        if plan.soft_cap is not None:
            scores = plan.soft_cap * jnp.tanh(scores / plan.soft_cap)
        scores = jnp.where(visible, scores, -jnp.inf)
        before = top[...]
        now = jnp.maximum(before, scores.max(axis=1, keepdims=True))
        # Hidden scores are -inf, and exp(-inf - NOTHING) is 0 where exp(-inf - -inf) would be NaN.
        masses = jnp.exp(scores - _wide(now, plan.keys))
        shrink = jnp.exp(before - now)
        top[...] = now
        total[...] = total[...] * shrink + masses.sum(axis=1, keepdims=True)
        more = _dot(masses.astype(plan.dtype), v, LAST if plan.keys_minor else INNER)
        acc[...] = acc[...] * _wide(shrink, acc.shape[1]) + more

    @pl.when(place == choices - 1)
    def _() -> None:
        sums = jnp.where(total[...] == 0, 1.0, total[...])  # sees nothing: zeros
        out_ref[...] = (acc[...] / _wide(sums, acc.shape[1])).astype(out_ref.dtype)
        lse_ref[...] = top[...] + jnp.log(sums)


def _bits(k: jax.Array, v: jax.Array, blocks: jax.Array) -> tuple[jax.Array, ...]:
    """Keys and values as a kernel can read them, where it lets this be fused into it: float16 as int16.

    Else XLA copies them all, so it must not move it away from the kernel: neither before reshapes, into
    which nothing is fused, nor out of a loop. It moves nothing over a barrier, and no barrier out of a
    loop that passes something of each turn, such as the blocks.
    """
    if jnp.float16 not in (k.dtype, v.dtype):
        return k, v, blocks
    k, v, blocks = lax.optimization_barrier((k, v, blocks))
    k, v = (lax.bitcast_convert_type(x, jnp.int16) if x.dtype == jnp.float16 else x for x in (k, v))
    return k, v, blocks


def _widened(x: jax.Array) -> jax.Array:
    """In a kernel: float32 of `_bits` of float16, exactly; others as they are.

    Infinities and NaN become large numbers. There are none in what is seen: keys and values are
    clipped to the largest float16 when they are rounded.
    """
    if x.dtype != jnp.int16:
        return x
    bits = x.astype(jnp.int32)
    size = bits & 0x7FFF
    # Exponents count from -15 instead of -127. What has none is not made as a subnormal float32, which
    # TPUs take for 0.
    normal = lax.bitcast_convert_type((size << 13) + (112 << 23), jnp.float32)
    value = jnp.where(size < 0x400, size.astype(jnp.float32) * 2.0**-24, normal)
    return jnp.where(bits < 0, -value, value)


def _entry(
    plan: _Plan, n: Scalar, query: Scalar, place: Scalar, length: int, choices: int
) -> Scalar:
    """Where a place of a query's list is among the prefetched numbers."""
    row = lax.div(n, jnp.int32(plan.apart))
    return (row * length + query) * choices + place


def _dot(a: jax.Array, b: jax.Array, contract: Any) -> jax.Array:
    return lax.dot_general(a, b, contract, preferred_element_type=jnp.float32)


def _wide(x: jax.Array, width: int) -> jax.Array:
    """[R, LANES], all columns alike -> [R, width]."""
    return jnp.tile(x, (1, pl.cdiv(width, LANES)))[:, :width]
