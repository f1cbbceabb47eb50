"""The Pallas kernels of `pallas_tpu.py`: blocks of queries against blocks of keys.

Axes: N batch rows times the key heads that are apart, R rows of a block of queries, C keys of a block
of keys, D head dimension. A row is a query with one of its heads, query by query; an array of rows
is a whole number of blocks. Keys need not be: what a block reads beyond them is hidden.

The grid's last axis walks along the blocks that can be seen, whose first and last a table has for
each block of the other side. Numbers that decide what is seen (`span`) and the table are prefetched
scalars, so that they may be traced.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gemtool.kernels.attention.reference import NOTHING
from gemtool.kernels.attention.xla import Options, range_of

LANES = 128
Scalar = Any
Ref = Any

# Contracted axes of a product of two matrices.
INNER = (((1,), (0,)), ((), ()))
LAST = (((1,), (1,)), ((), ()))


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What is fixed while tracing."""

    options: Options
    apart: int  # key heads that are apart: N is as many times B
    per_query: int  # rows of a query
    side_by_side: int  # key heads whose keys alternate: key by key, head by head
    keys_minor: bool  # keys and values are [N, D, keys], not [N, keys, D]
    rows: int  # R
    keys: int  # C
    dtype: Any  # of the factors of products
    interpret: bool

    @property
    def queries(self) -> int:
        """Positions of a block of queries."""
        return self.rows // self.per_query

    @property
    def positions(self) -> int:
        """Positions of a block of keys."""
        return self.keys // self.side_by_side


def visible_blocks(
    blocks: Blocks,
    span: jax.Array,
    shape: tuple[int, int, int],
    q_segments: jax.Array | None,
    k_segments: jax.Array | None,
) -> jax.Array:
    """Which blocks of keys a block of queries may see: bool [B, blocks of queries, of keys].

    `span` int32 [3]: position of the first query, first and end of the keys that exist; `shape` that
    of the result; segments int32 [B, rows] of whole blocks, 0 for padding.
    """
    i = jnp.arange(shape[1], dtype=jnp.int32)[None, :, None]
    j = jnp.arange(shape[2], dtype=jnp.int32)[None, None, :]
    oldest = span[0] + i * blocks.queries
    newest = oldest + blocks.queries - 1
    low, high = j * blocks.positions, (j + 1) * blocks.positions - 1
    visible = jnp.broadcast_to((high >= span[1]) & (low < span[2]), shape)
    if blocks.options.causal:
        visible &= low <= newest
    if blocks.options.window is not None:
        visible &= high > oldest - blocks.options.window
    if q_segments is not None and k_segments is not None:
        # Segments match only if their ranges overlap, however they are arranged.
        least, greatest = range_of(q_segments.reshape(*shape[:2], blocks.rows))
        low, high = range_of(k_segments.reshape(shape[0], shape[2], blocks.keys))
        visible &= (least[..., None] <= high[:, None]) & (greatest[..., None] >= low[:, None])
    return visible


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """`q` [N, rows, D]; `k`, `v` [N, keys, D] or [N, D, keys]; segments int32 [B, rows] and [B, keys],
    0 for padding, both of whole blocks; `span` int32 [3]: position of the first query, first and end
    of the keys that exist; `visible` bool [B, blocks of queries, blocks of keys]."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    q_segments: jax.Array | None
    k_segments: jax.Array | None
    span: jax.Array
    visible: jax.Array


def forward(blocks: Blocks, inputs: Inputs, out_dtype: Any) -> tuple[jax.Array, jax.Array]:
    """The output [N, rows, D], and the log of its sum of exponentials float32 [N, rows]."""
    q = inputs.q
    shapes = jax.ShapeDtypeStruct(q.shape, out_dtype), _row_shape(q)
    rows = blocks.rows
    out, lse = _walk(
        blocks,
        _forward_kernel,
        inputs,
        inputs.visible,
        [_Operand(q, rows), *_walked_keys(blocks, inputs)],
        [_Operand(shapes[0], rows), _Operand(shapes[1], rows, axis=2)],
        scratch=[(rows, LANES), (rows, LANES), (rows, q.shape[2])],
        products=2,
    )
    return out, lse[:, 0]


def _forward_kernel(
    blocks: Blocks,
    segmented: bool,
    first: Ref,
    end: Ref,
    span: Ref,
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    *refs: Ref,
) -> None:
    *segments, out_ref, lse_ref, top, total, acc = refs
    i, j, inside = _place(blocks, first, end)

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        top[...] = jnp.full_like(top, NOTHING)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    def visit(masked: bool) -> None:
        k, v = k_ref[...].astype(blocks.dtype), v_ref[...].astype(blocks.dtype)
        scores, _ = _scores(blocks, q_ref[...], k, INNER if blocks.keys_minor else LAST)
        if masked:
            mask = _mask(blocks, span, i, j, segments, axis=0)
            scores = jnp.where(mask, scores, -jnp.inf)
            v = _existing(blocks, span, j, v)
        before = top[...]
        now = jnp.maximum(before, scores.max(axis=1, keepdims=True))
        # Hidden scores are -inf, and exp(-inf - NOTHING) is 0 where exp(-inf - -inf) would be NaN.
        masses = jnp.exp(scores - _wide(now, blocks.keys))
        shrink = jnp.exp(before - now)
        top[...] = now
        total[...] = total[...] * shrink + masses.sum(axis=1, keepdims=True)
        more = _dot(masses.astype(blocks.dtype), v, LAST if blocks.keys_minor else INNER)
        acc[...] = acc[...] * _wide(shrink, acc.shape[1]) + more

    _visit(blocks, segmented, span, i, j, inside, visit)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _() -> None:
        sums = jnp.where(total[...] == 0, 1.0, total[...])  # sees nothing: zeros
        out_ref[...] = (acc[...] / _wide(sums, acc.shape[1])).astype(out_ref.dtype)
        lse_ref[...] = (top[...] + jnp.log(sums)).T[:1]


def d_queries(
    blocks: Blocks, inputs: Inputs, d_out: jax.Array, lse: jax.Array, delta: jax.Array
) -> jax.Array:
    """Gradient of the queries float32 [N, rows, D]; `d_out` [N, rows, D], the others [N, rows]."""
    rows = blocks.rows
    given = [_Operand(inputs.q, rows), _Operand(d_out, rows)]
    given += [_Operand(x[:, None], rows, axis=2) for x in (lse, delta)]
    shape = jax.ShapeDtypeStruct(inputs.q.shape, jnp.float32)
    (d_q,) = _walk(
        blocks,
        _d_queries_kernel,
        inputs,
        inputs.visible,
        [*given, *_walked_keys(blocks, inputs)],
        [_Operand(shape, rows)],
        products=3,
    )
    return d_q


def _d_queries_kernel(
    blocks: Blocks,
    segmented: bool,
    first: Ref,
    end: Ref,
    span: Ref,
    q_ref: Ref,
    d_out_ref: Ref,
    lse_ref: Ref,
    delta_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    *refs: Ref,
) -> None:
    *segments, d_q_ref = refs
    i, j, inside = _place(blocks, first, end)

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        d_q_ref[...] = jnp.zeros_like(d_q_ref)

    def visit(masked: bool) -> None:
        k, v = k_ref[...].astype(blocks.dtype), v_ref[...].astype(blocks.dtype)
        if masked:
            k, v = (_existing(blocks, span, j, x) for x in (k, v))
        scores, slope = _scores(blocks, q_ref[...], k, LAST)
        if masked:
            mask = _mask(blocks, span, i, j, segments, axis=0)
            scores = jnp.where(mask, scores, -jnp.inf)
        p = jnp.exp(scores - lse_ref[0][:, None])
        d_scores = p * (_dot(d_out_ref[...], v, LAST) - delta_ref[0][:, None])
        if slope is not None:
            d_scores = d_scores * slope
        d_q_ref[...] += _dot(d_scores.astype(blocks.dtype), k, INNER) * blocks.options.scale

    _visit(blocks, segmented, span, i, j, inside, visit)


def d_keys(
    blocks: Blocks, inputs: Inputs, d_out: jax.Array, lse: jax.Array, delta: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradients of keys and values, float32 [N, keys, D]; arguments as of `d_queries`.

    Scores are transposed here, [C, R], so that what belongs to a query lies along the lanes.
    """
    rows, keys = blocks.rows, blocks.keys
    given = [_Operand(x, keys) for x in (inputs.k, inputs.v)]
    given += [_Operand(x, rows, walked=True) for x in (inputs.q, d_out)]
    given += [_Operand(x[:, None], rows, axis=2, walked=True) for x in (lse, delta)]
    if inputs.q_segments is not None and inputs.k_segments is not None:
        own = _unmatched(inputs.q_segments)[:, None]
        given.append(_Operand(own, rows, axis=2, walked=True, of_batch=True))
        given.append(_Operand(inputs.k_segments[..., None], keys, of_batch=True))
    shape = jax.ShapeDtypeStruct(inputs.k.shape, jnp.float32)
    return _walk(
        blocks,
        _d_keys_kernel,
        inputs,
        inputs.visible.swapaxes(1, 2),
        given,
        [_Operand(shape, keys)] * 2,
        products=4,
    )


def _d_keys_kernel(
    blocks: Blocks,
    segmented: bool,
    first: Ref,
    end: Ref,
    span: Ref,
    k_ref: Ref,
    v_ref: Ref,
    q_ref: Ref,
    d_out_ref: Ref,
    lse_ref: Ref,
    delta_ref: Ref,
    *refs: Ref,
) -> None:
    *segments, d_k_ref, d_v_ref = refs
    j, i, inside = _place(blocks, first, end)

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        d_k_ref[...] = jnp.zeros_like(d_k_ref)
        d_v_ref[...] = jnp.zeros_like(d_v_ref)

    def visit(masked: bool) -> None:
        q, d_out = q_ref[...], d_out_ref[...]
        k, v = k_ref[...].astype(blocks.dtype), v_ref[...].astype(blocks.dtype)
        if masked:
            k, v = (_existing(blocks, span, j, x) for x in (k, v))
        scores, slope = _scores(blocks, k, q, LAST)
        if masked:
            mask = _mask(blocks, span, i, j, segments, axis=1)
            scores = jnp.where(mask, scores, -jnp.inf)
        p = jnp.exp(scores - lse_ref[...])
        d_scores = p * (_dot(v, d_out, LAST) - delta_ref[...])
        if slope is not None:
            d_scores = d_scores * slope
        d_v_ref[...] += _dot(p.astype(blocks.dtype), d_out, INNER)
        d_k_ref[...] += _dot(d_scores.astype(blocks.dtype), q, INNER) * blocks.options.scale

    _visit(blocks, segmented, span, i, j, inside, visit)


@dataclasses.dataclass(frozen=True)
class _Operand:
    """An array [N, ...] that a kernel gets in blocks along one axis."""

    array: Any
    size: int  # of a block
    axis: int = 1
    walked: bool = False  # whether its blocks are those walked along
    of_batch: bool = False  # whether it is [B, ...]

    def spec(self, apart: int) -> pl.BlockSpec:
        shape = list(self.array.shape)
        shape[self.axis] = self.size

        def index(n: Scalar, own: Scalar, step: Scalar, first: Ref, end: Ref, _: Ref) -> Any:
            place = [_divided(n, apart) if self.of_batch else n, 0, 0]
            place[self.axis] = _walked(apart, n, own, step, first, end) if self.walked else own
            return tuple(place)

        return pl.BlockSpec((None, *shape[1:]), index)


def _walked(apart: int, n: Scalar, own: Scalar, step: Scalar, first: Ref, end: Ref) -> Scalar:
    """The block of the other side; beyond the last one it stays, so that nothing is fetched."""
    at = _divided(n, apart) * pl.num_programs(1) + own
    return jnp.maximum(jnp.minimum(first[at] + step, end[at] - 1), 0)


def _walked_keys(blocks: Blocks, inputs: Inputs) -> list[_Operand]:
    axis = 2 if blocks.keys_minor else 1
    given = [_Operand(x, blocks.keys, axis=axis, walked=True) for x in (inputs.k, inputs.v)]
    if inputs.q_segments is not None and inputs.k_segments is not None:
        own, theirs = _unmatched(inputs.q_segments)[..., None], inputs.k_segments[:, None]
        given.append(_Operand(own, blocks.rows, of_batch=True))
        given.append(_Operand(theirs, blocks.keys, axis=2, walked=True, of_batch=True))
    return given


def _walk(
    blocks: Blocks,
    kernel: Callable[..., None],
    inputs: Inputs,
    visible: jax.Array,
    given: list[_Operand],
    results: list[_Operand],
    *,
    scratch: Sequence[tuple[int, int]] = (),
    products: int,
) -> Any:
    """Call a kernel for each N and block of one side, walking along the blocks of the other side.

    `visible` bool [B, blocks of one side, of the other]; `scratch` has shapes of float32 arrays.
    """
    first, end, steps = _runs(visible)
    return pl.pallas_call(
        functools.partial(kernel, blocks, inputs.q_segments is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(inputs.q.shape[0], visible.shape[1], steps),
            in_specs=[operand.spec(blocks.apart) for operand in given],
            out_specs=tuple(operand.spec(blocks.apart) for operand in results),
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=tuple(operand.array for operand in results),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=_cost(blocks, inputs, products),
        interpret=blocks.interpret,
        name=kernel.__name__.strip("_").replace("kernel", "attention"),
    )(first, end, inputs.span, *(operand.array for operand in given))


def _cost(blocks: Blocks, inputs: Inputs, products: int) -> pl.CostEstimate:
    """What so many products of all pairs cost, as far as shapes tell which pairs are seen."""
    count, rows, dim = inputs.q.shape
    _, query_blocks, key_blocks = inputs.visible.shape
    positions = key_blocks * blocks.positions
    share = 1.0
    if blocks.options.window is not None:
        share = min(blocks.options.window / positions, 1.0)
    elif blocks.options.causal:
        beyond = abs(query_blocks * blocks.queries - positions)
        share = 0.5 if beyond < max(blocks.queries, blocks.positions) else 1.0
    pairs = int(share * count * rows * key_blocks * blocks.keys)
    arrays = (inputs.q, inputs.q, inputs.k, inputs.v)
    return pl.CostEstimate(
        flops=products * 2 * dim * pairs,
        transcendentals=pairs,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
    )


def _runs(visible: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """First and end of what is visible on the last axis, flat, and the length of the longest run."""
    first = jnp.argmax(visible, axis=-1).astype(jnp.int32)
    end = visible.shape[-1] - jnp.argmax(visible[..., ::-1], axis=-1).astype(jnp.int32)
    end = jnp.where(visible.any(axis=-1), end, first)
    # At least one step: it writes the results of those that see nothing.
    return first.reshape(-1), end.reshape(-1), jnp.maximum((end - first).max(), 1)


def _unmatched(segments: jax.Array) -> jax.Array:
    """Segments of queries, padding as a number that no key has."""
    return jnp.where(segments == 0, -1, segments)


def _place(blocks: Blocks, first: Ref, end: Ref) -> tuple[Scalar, Scalar, Scalar]:
    """The kernel's own block, the one that it has walked to, and whether that may be seen."""
    own, step = pl.program_id(1), pl.program_id(2)
    at = _divided(pl.program_id(0), blocks.apart) * pl.num_programs(1) + own
    walked = first[at] + step
    return own, walked, walked < end[at]


def _visit(
    blocks: Blocks,
    segmented: bool,
    span: Ref,
    i: Scalar,
    j: Scalar,
    inside: Scalar,
    visit: Callable[[bool], None],
) -> None:
    """`visit(masked)` for a pair of blocks that may be seen; without a mask if all of it is."""
    if segmented or blocks.side_by_side > 1:
        pl.when(inside)(functools.partial(visit, True))
        return
    oldest = span[0] + i * blocks.queries
    low, high = j * blocks.positions, (j + 1) * blocks.positions - 1
    whole = (low >= span[1]) & (high < span[2])
    if blocks.options.causal:
        whole &= high <= oldest
    if blocks.options.window is not None:
        whole &= low >= oldest + blocks.queries - blocks.options.window
    pl.when(inside & whole)(functools.partial(visit, False))
    pl.when(inside & jnp.logical_not(whole))(functools.partial(visit, True))


def _mask(
    blocks: Blocks,
    span: Ref,
    i: Scalar,
    j: Scalar,
    segments: Sequence[Ref],
    axis: int,
) -> jax.Array:
    """Which pairs of a block of queries and one of keys see each other; queries lie along `axis`."""
    row_shape, key_shape = (
        [(blocks.rows, 1), (1, blocks.rows)],
        [(1, blocks.keys), (blocks.keys, 1)],
    )
    row = lax.broadcasted_iota(jnp.int32, row_shape[axis], axis)
    key = lax.broadcasted_iota(jnp.int32, key_shape[axis], 1 - axis)
    at = span[0] + i * blocks.queries + _divided(row, blocks.per_query)
    of = j * blocks.positions + _divided(key, blocks.side_by_side)
    most = jnp.full_like(at, span[2] - 1)
    if blocks.options.causal:
        most = jnp.minimum(most, at)
    least = jnp.full_like(at, span[1])
    if blocks.options.window is not None:
        least = jnp.maximum(least, at - blocks.options.window + 1)
    visible = (of <= most) & (of >= least)
    if blocks.side_by_side > 1:
        groups = blocks.per_query // blocks.side_by_side
        head = _divided(lax.rem(row, jnp.int32(blocks.per_query)), groups)
        visible &= head == lax.rem(key, jnp.int32(blocks.side_by_side))
    if segments:
        own, theirs = segments
        visible &= own[...] == theirs[...]
    return visible


def _existing(blocks: Blocks, span: Ref, j: Scalar, x: jax.Array) -> jax.Array:
    """A block of keys or values, those that do not exist as zeros: they might be NaN."""
    key = j * blocks.keys + lax.broadcasted_iota(jnp.int32, x.shape, int(blocks.keys_minor))
    exists = key < span[2] * blocks.side_by_side
    return jnp.where(exists, x.astype(jnp.float32), 0.0).astype(x.dtype)


def _scores(
    blocks: Blocks, a: jax.Array, b: jax.Array, contract: Any
) -> tuple[jax.Array, jax.Array | None]:
    """Scores of queries and keys, in this or the other order, and the slope of the soft cap."""
    scores = _dot(a, b, contract) * blocks.options.scale
    if blocks.options.soft_cap is None:
        return scores, None
    squashed = jnp.tanh(scores / blocks.options.soft_cap)
    return blocks.options.soft_cap * squashed, 1 - squashed * squashed


def _dot(a: jax.Array, b: jax.Array, contract: Any) -> jax.Array:
    return lax.dot_general(a, b, contract, preferred_element_type=jnp.float32)


def _divided(x: Scalar, by: int) -> Scalar:
    """`x // by` of what is not negative; the sign that `//` asks for needs a TPU to lower it."""
    return lax.div(x, jnp.int32(by))


def _wide(x: jax.Array, width: int) -> jax.Array:
    """[R, LANES], all columns alike -> [R, width]."""
    return jnp.tile(x, (1, pl.cdiv(width, LANES)))[:, :width]


def _row_shape(q: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((q.shape[0], 1, q.shape[1]), jnp.float32)
