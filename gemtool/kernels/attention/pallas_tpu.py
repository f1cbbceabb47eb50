"""FlashAttention (arXiv 2205.14135, 2307.08691) for TPUs, in Pallas.

JAX's own splash attention, which is tokamax's too, wants its mask while tracing, keeps a table of all
pairs of blocks in scalar memory and gives no gradient of the log of the denominator. Here a position
is a number that arrives with the call, so that one kernel serves training, prefill and decode over a
buffer of a million keys: `visible_blocks` says which blocks of keys a block of queries can see, and
the grid is as long as the longest run of them. Other blocks are neither fetched nor computed.

Inside a block, rows are the queries of one key head: R = G * (queries in the block), G = H / KV,
query by query. Keys lie in one of three ways (`Layout`), whichever needs no copy:

* heads of less than 128 dimensions as [B * KV, D, S]: the order in which XLA stores [B, S, KV, D],
  since its minor axis is cut into 128 lanes;
* few queries (decode) as [B, S * KV, D]: keys of all heads side by side, those of other heads hidden
  by the mask. It computes KV times too much, which costs less than reading the buffer twice would;
* many queries as [B * KV, S, D], a copy, made of `PIECE` keys at a time where the buffer is large.

TPUs do not compute in float16 and kernels do not even read it: such keys are converted, a piece at
a time. Products are of bfloat16 where queries are, else of float32; sums are float32.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gemtool.kernels.attention import tpu_blocks
from gemtool.kernels.attention.merge import merge_attention
from gemtool.kernels.attention.reference import NOTHING
from gemtool.kernels.attention.tpu_blocks import LANES, Blocks, Inputs, visible_blocks
from gemtool.kernels.attention.xla import Options, round_up
from gemtool.kernels.dispatch import target_platform
from gemtool.kernels.turns import counted_turns

# (rows, keys) of a block: a tile of scores is float32, and a few of them fit into the vector memory.
FORWARD = (1024, 512)
BACKWARD = (512, 512)
# Up to so many rows the kernel waits for keys: a block of them is as large as fits (keys, bytes).
FEW_ROWS = 128
FEW_ROWS_KEYS, FEW_ROWS_BYTES = 4096, 2**20
# Queries times heads up to which copying keys would cost more than computing too much.
SIDE_BY_SIDE = 512
# Keys that are copied at a time, where they must be.
PIECE = 2**16
# What a kernel can read.
READABLE = (jnp.float32, jnp.bfloat16)


def attention_pallas_tpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float,
    causal: bool,
    window: int | None,
    q_start: int | jax.Array,
    kv_length: int | jax.Array,
    q_segments: jax.Array | None,
    kv_segments: jax.Array | None,
    sink: jax.Array | None,
    soft_cap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """See `gemtool.kernels.attention.partial_attention`.

    For another platform than TPUs the kernels are interpreted, to try them.

    Raises:
        NotImplementedError: anything is float64.
    """
    if jnp.float64 in (q.dtype, k.dtype, v.dtype):
        raise NotImplementedError("TPUs have no float64")
    start = jnp.asarray(q_start, jnp.int32)
    stop = jnp.minimum(jnp.asarray(kv_length, jnp.int32), k.shape[1])
    options = Options(scale, causal, window, soft_cap)
    with jax.named_scope("flash_attention"):
        return _flash(options, q, k, v, start, stop, q_segments, kv_segments, sink)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(
    options: Options,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_start: jax.Array,
    kv_length: jax.Array,
    q_segments: jax.Array | None,
    kv_segments: jax.Array | None,
    sink: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    plan = _Plan.forward(options, q, k)
    segments = q_segments, kv_segments
    if plan.copies and k.shape[1] > PIECE:
        part = _by_pieces(plan, q, k, v, q_start, kv_length, *segments)
    else:
        # What is yet to be merged is not rounded before.
        dtype = q.dtype if sink is None else jnp.float32
        part = _at_once(plan, dtype, q, k, v, _span(q_start, 0, kv_length), *segments)
    out, lse = part if sink is None else merge_attention([part], sink)
    return out.astype(q.dtype), lse


def _flash_fwd(options: Options, *arrays: Any) -> tuple[tuple[jax.Array, jax.Array], Any]:
    out, lse = _flash(options, *arrays)
    return (out, lse), (arrays, out, lse)


def _flash_bwd(
    options: Options, saved: Any, d_results: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array | None, ...]:
    (q, k, v, q_start, kv_length, q_segments, kv_segments, sink), out, lse = saved
    d_out, d_lse = d_results
    # Through the softmax: d_scores = p * (d_p - delta), delta = sum of p * d_p = out . d_out, less
    # what comes through the log of the denominator, whose slope is p.
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1) - d_lse
    plan = _Plan.backward(options, q, k)
    inputs = plan.inputs(q, k, v, _span(q_start, 0, kv_length), q_segments, kv_segments)
    along = (
        plan.rows(d_out.astype(plan.blocks.dtype)),
        plan.rows(lse[..., None], -NOTHING)[..., 0],  # rows of no query: no mass
        plan.rows(delta[..., None])[..., 0],
    )
    d_q = plan.unrows(tpu_blocks.d_queries(plan.blocks, inputs, *along))
    d_k, d_v = (plan.unkeys(x, k.shape[1]) for x in tpu_blocks.d_keys(plan.blocks, inputs, *along))
    d_sink = None
    if sink is not None:
        share = jnp.exp(sink.astype(jnp.float32)[None, None] - lse)
        d_sink = -jnp.sum(share * delta, axis=(0, 1)).astype(sink.dtype)
    d_qkv = d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)
    return *d_qkv, None, None, None, None, d_sink


_flash.defvjp(_flash_fwd, _flash_bwd)


def _at_once(
    plan: _Plan,
    dtype: Any,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    span: jax.Array,
    q_segments: jax.Array | None,
    kv_segments: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """The output [B, T, H, D] in `dtype` and the log of its sum of exponentials [B, T, H]."""
    inputs = plan.inputs(q, k, v, span, q_segments, kv_segments)
    out, lse = tpu_blocks.forward(plan.blocks, inputs, dtype)
    return plan.unrows(out), plan.unrows(lse[..., None])[..., 0]


def _by_pieces(
    plan: _Plan,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_start: jax.Array,
    kv_length: jax.Array,
    q_segments: jax.Array | None,
    kv_segments: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """As `_at_once`, in float32, copying no more than `PIECE` keys at a time and only those seen."""
    options, capacity = plan.blocks.options, k.shape[1]
    stop = jnp.minimum(kv_length, q_start + plan.length) if options.causal else kv_length
    first = jnp.int32(0)
    if options.window is not None:
        first = jnp.maximum(q_start - options.window + 1, 0) // PIECE

    def visit(piece: jax.Array, seen: tuple[jax.Array, jax.Array]) -> Any:
        # The last piece ends where the keys do, so it may overlap the one before it.
        start = jnp.minimum(piece * PIECE, capacity - PIECE)

        def cut(x: jax.Array) -> jax.Array:
            return lax.dynamic_slice_in_dim(x, start, PIECE, axis=1)

        span = _span(q_start, piece * PIECE, jnp.minimum(kv_length, start + PIECE)) - start
        theirs = None if kv_segments is None else cut(kv_segments)
        part = _at_once(plan, jnp.float32, q, cut(k), cut(v), span, q_segments, theirs)
        return merge_attention([seen, part])

    nothing = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:3], NOTHING, jnp.float32)
    pieces = -(-capacity // PIECE)
    if options.window is not None:
        pieces = min(pieces, (options.window + plan.length + PIECE - 3) // PIECE + 1)
    with counted_turns(pieces):  # of a full buffer
        return lax.fori_loop(first, (stop + PIECE - 1) // PIECE, visit, nothing)


def _span(q_start: jax.Array, first: jax.Array | int, end: jax.Array) -> jax.Array:
    return jnp.stack([q_start, jnp.asarray(first, jnp.int32), end])


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How arrays are laid out for the kernels."""

    blocks: Blocks
    length: int  # T
    copies: bool  # whether keys have to be moved or converted

    @classmethod
    def forward(cls, options: Options, q: jax.Array, k: jax.Array) -> _Plan:
        """Keys as they lie, or else in the layout with the least work."""
        whole_lanes = q.shape[3] % LANES == 0
        few = q.shape[1] * q.shape[2] <= SIDE_BY_SIDE
        side_by_side = k.shape[2] if whole_lanes and few else 1
        return cls._of(options, q, k, FORWARD, side_by_side, keys_minor=not whole_lanes)

    @classmethod
    def backward(cls, options: Options, q: jax.Array, k: jax.Array) -> _Plan:
        return cls._of(options, q, k, BACKWARD, side_by_side=1, keys_minor=False)

    @classmethod
    def _of(
        cls,
        options: Options,
        q: jax.Array,
        k: jax.Array,
        most: tuple[int, int],
        side_by_side: int,
        keys_minor: bool,
    ) -> _Plan:
        length, heads, dim = q.shape[1:]
        apart = k.shape[2] // side_by_side
        per_query = heads // apart
        rows = per_query * _queries(length, per_query, most[0])
        dtype = jnp.bfloat16 if q.dtype == jnp.bfloat16 else jnp.float32
        keys = max(most[1] // side_by_side, LANES)
        if rows <= FEW_ROWS:
            width = jnp.dtype(dtype).itemsize * (dim if keys_minor else round_up(dim, LANES))
            keys = min(FEW_ROWS_KEYS, FEW_ROWS_BYTES // width) // side_by_side
        keys = min(keys, round_up(k.shape[1], LANES), round_up(options.window or keys, LANES))
        blocks = Blocks(
            options=options,
            apart=apart,
            per_query=per_query,
            side_by_side=side_by_side,
            keys_minor=keys_minor,
            rows=rows,
            keys=max(keys // LANES, 1) * LANES * side_by_side,
            dtype=dtype,
            interpret=target_platform() != "tpu",
        )
        return cls(blocks, length, (apart > 1 and not keys_minor) or k.dtype not in READABLE)

    def inputs(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        span: jax.Array,
        q_segments: jax.Array | None,
        kv_segments: jax.Array | None,
    ) -> Inputs:
        blocks, batch = self.blocks, q.shape[0]
        q, k, v = self.rows(q.astype(blocks.dtype)), self.keys(k), self.keys(v)
        count = -(-k.shape[2 if blocks.keys_minor else 1] // blocks.keys)
        if q_segments is not None and kv_segments is not None:
            q_segments = jnp.repeat(self.padded(q_segments), blocks.per_query, axis=1)
            missing = count * blocks.positions - kv_segments.shape[1]
            kv_segments = jnp.pad(kv_segments, ((0, 0), (0, missing)))
            kv_segments = jnp.repeat(kv_segments, blocks.side_by_side, axis=1)
        shape = batch, q.shape[1] // blocks.rows, count
        visible = visible_blocks(blocks, span, shape, q_segments, kv_segments)
        return Inputs(q, k, v, q_segments, kv_segments, span, visible)

    def padded(self, x: jax.Array, fill: float = 0) -> jax.Array:
        """[B, T, ...] with a whole number of blocks of queries."""
        missing = round_up(self.length, self.blocks.queries) - self.length
        padding = [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)]
        return jnp.pad(x, padding, constant_values=fill)

    def rows(self, x: jax.Array, fill: float = 0) -> jax.Array:
        """[B, T, H, X] -> [N, rows, X]."""
        x = self.padded(x, fill)
        x = x.reshape(*x.shape[:2], self.blocks.apart, self.blocks.per_query, x.shape[3])
        batch, length, apart, per_query, width = x.shape
        return x.transpose(0, 2, 1, 3, 4).reshape(batch * apart, length * per_query, width)

    def unrows(self, x: jax.Array) -> jax.Array:
        """The inverse of `rows`."""
        apart, per_query = self.blocks.apart, self.blocks.per_query
        x = x.reshape(-1, apart, x.shape[1] // per_query, per_query, x.shape[2])
        x = x.transpose(0, 2, 1, 3, 4)
        return x.reshape(*x.shape[:2], apart * per_query, x.shape[4])[:, : self.length]

    def keys(self, x: jax.Array) -> jax.Array:
        """Keys or values [B, S, KV, D] as the kernels read them."""
        blocks = self.blocks
        if x.dtype not in READABLE:
            x = x.astype(blocks.dtype)
        if self.copies or x.shape[1] < blocks.positions:
            missing = round_up(x.shape[1], blocks.positions) - x.shape[1]
            x = jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0)))
        batch, length, heads, dim = x.shape
        if blocks.keys_minor:
            return x.transpose(0, 2, 3, 1).reshape(batch * heads, dim, length)
        if blocks.apart > 1:
            x = x.transpose(0, 2, 1, 3)
        return x.reshape(batch * blocks.apart, -1, dim)

    def unkeys(self, x: jax.Array, length: int) -> jax.Array:
        """Gradients [N, keys, D], of heads apart -> [B, S, KV, D]."""
        x = x.reshape(-1, self.blocks.apart, *x.shape[1:])
        return x.transpose(0, 2, 1, 3)[:, :length]


def _queries(length: int, per_query: int, rows: int) -> int:
    """Queries of a block of about so many rows: whole tiles, or else all queries there are."""
    unit = LANES // math.gcd(LANES, per_query)
    many = max(rows // per_query // unit, 1) * unit
    sublanes = 16 // math.gcd(16, per_query)
    return min(many, round_up(length, sublanes))
