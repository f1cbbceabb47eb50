"""FlashAttention (arXiv 2205.14135, 2307.08691) for GPUs, as Pallas kernels that Triton compiles.

Why not cuDNN's (`jax.nn.dot_product_attention`): training runs packed documents, and there cuDNN is
told of documents by a bias [B, 1, T, S] alone, which at long lengths is the very array that flash
attention exists to avoid. Its packed layout wants a static bound on documents a sequence, keeps
statistics of each of them for each query, and is reachable through private modules of JAX only. It
gives no gradient of the log-sum-exp (ring attention needs it), and no soft cap. Pallas' own
`ops.gpu.attention` knows documents, but no windows, grouped heads or sinks, and visits every block
before the diagonal, whatever documents there are. tokamax (0.0.12) returns no log-sum-exp, is told of
documents by a mask [B, N, T, S] in all of its public interface, and has no gradient of the soft cap.

Here, XLA first works out from segments, causality and window which range of key blocks each block
of queries can see (int32 pairs, one a block), and the kernels walk over these ranges only. Three
kernels: the output; gradients of queries; gradients of keys and values, where a program owns a
block of keys of one key head and adds up all query heads that share it, so that nothing is written
by two.

Matmuls are of the inputs' type (float32: as fast as XLA's default for the GPU, TF32) with float32
sums. Elsewhere than for a GPU the same kernels are interpreted, which is how tests run them. Block
sizes are modest and have not been tuned on hardware.

Axes: B sequences, T queries, S keys, H query heads, N key heads, G = H / N, K head dimension.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from gemtool.kernels.attention.reference import NOTHING
from gemtool.kernels.attention.xla import range_of
from gemtool.kernels.dispatch import target_platform
from gemtool.kernels.triton import pad, power_of_two, product

LARGEST_HEAD = 256
"""Head dimension beyond which a block does not fit a multiprocessor's shared memory."""


@dataclasses.dataclass(frozen=True)
class _Options:
    """What is fixed while tracing."""

    scale: float
    causal: bool
    window: int | None
    soft_cap: float | None
    queries: int  # a block
    keys: int  # a block
    interpret: bool

    def call(self, kernel: Callable[..., None], dim: int, **arguments: Any) -> Any:
        return pl.pallas_call(
            functools.partial(kernel, self),
            interpret=self.interpret,
            compiler_params=triton.CompilerParams(num_warps=4 if dim <= 64 else 8, num_stages=2),
            **arguments,
        )


def attention_gpu(
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

    Raises:
        NotImplementedError: float64, or heads of more than `LARGEST_HEAD` dimensions.
    """
    batch, length, heads, dim = q.shape
    capacity = k.shape[1]
    if q.dtype == jnp.float64:
        raise NotImplementedError("float64")
    if dim > LARGEST_HEAD:
        raise NotImplementedError(f"head dimension {dim}, more than {LARGEST_HEAD}")
    block = 64 if dim * max(q.dtype.itemsize, k.dtype.itemsize) <= 256 else 32
    options = _Options(
        scale=scale,
        causal=causal,
        window=window,
        soft_cap=soft_cap,
        queries=min(block, power_of_two(length)),
        keys=min(block, power_of_two(capacity)),
        interpret=target_platform() != "gpu",
    )
    if q_segments is None or kv_segments is None:
        q_segments = jnp.ones((batch, length), jnp.int32)
        kv_segments = jnp.ones((batch, capacity), jnp.int32)
    index = jnp.arange(capacity, dtype=jnp.int32)[None, :]
    kv_segments = jnp.where(index < jnp.asarray(kv_length, jnp.int32), kv_segments, 0)
    if sink is None:
        sink = jnp.full(heads, NOTHING, jnp.float32)
    # Rows up to whole blocks are padding, and dimensions up to a power of two are zero.
    wide = power_of_two(dim)
    q = pad(q, None, options.queries, None, wide)
    k, v = (pad(x, None, options.keys, None, wide) for x in (k, v))
    q_segments = pad(q_segments, None, options.queries)
    kv_segments = pad(kv_segments, None, options.keys)
    start = jnp.asarray(q_start, jnp.int32).reshape(1)
    with jax.named_scope("flash_attention"):
        out, lse = _flash(
            options, q, k, v, sink.astype(jnp.float32), start, q_segments, kv_segments
        )
    return out[:, :length, :, :dim], lse[:, :, :length].transpose(0, 2, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(options: _Options, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _forward(options, *arrays)


def _flash_fwd(options: _Options, *arrays: jax.Array) -> tuple[Any, Any]:
    results = _forward(options, *arrays)
    return results, (arrays, results)


def _forward(
    options: _Options,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sink: jax.Array,
    start: jax.Array,
    q_segments: jax.Array,
    kv_segments: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The output [B, T, H, K], and the log of its sum of exponentials float32 [B, H, T]."""
    batch, length, heads, dim = q.shape
    groups = heads // k.shape[2]
    blocks = _seen(options, start, q_segments, kv_segments)
    specs = _specs(options, q, k, groups)
    return options.call(
        _output_kernel,
        dim,
        grid=(length // options.queries, batch, heads),
        in_specs=[
            specs["range"],
            specs["start"],
            pl.BlockSpec((None,), lambda i, b, h: (h,)),
            *(specs[name] for name in ("q_segments", "kv_segments", "q", "kv", "kv")),
        ],
        out_specs=(specs["q"], specs["row"]),
        out_shape=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ),
        name="attention",
    )(_ranges(blocks, 2), start, sink, q_segments, kv_segments, q, k, v)


def _flash_bwd(options: _Options, saved: Any, d_results: Any) -> tuple[Any, ...]:
    (q, k, v, sink, start, q_segments, kv_segments), (out, lse) = saved
    d_out, d_lse = d_results
    batch, length, heads, dim = q.shape
    capacity, kv_heads = k.shape[1:3]
    groups = heads // kv_heads
    # Through the softmax: d_scores = p * (d_p - delta), delta = sum of p * d_p = out . d_out, less
    # what comes through the log of the denominator, whose slope is p.
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
    delta = delta.transpose(0, 2, 1) - d_lse
    blocks = _seen(options, start, q_segments, kv_segments)
    specs = _specs(options, q, k, groups)
    names = ("range", "start", "q_segments", "kv_segments", "q", "kv", "kv", "q", "row", "row")
    shared = (start, q_segments, kv_segments, q, k, v, d_out, lse, delta)
    d_q = options.call(
        _query_gradient_kernel,
        dim,
        grid=(length // options.queries, batch, heads),
        in_specs=[specs[name] for name in names],
        out_specs=specs["q"],
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        name="attention_query_gradients",
    )(_ranges(blocks, 2), *shared)
    group = pl.BlockSpec((None, length, groups, dim), lambda j, b, n: (b, 0, n, 0))
    group_row = pl.BlockSpec((None, groups, length), lambda j, b, n: (b, n, 0))
    own = pl.BlockSpec((None, options.keys, None, dim), lambda j, b, n: (b, j, n, 0))
    d_k, d_v = options.call(
        _key_gradients_kernel,
        dim,
        grid=(capacity // options.keys, batch, kv_heads),
        in_specs=[
            specs["range"],
            specs["start"],
            pl.BlockSpec((None, length), lambda j, b, n: (b, 0)),
            pl.BlockSpec((None, options.keys), lambda j, b, n: (b, j)),
            *(group, own, own, group, group_row, group_row),
        ],
        out_specs=(own, own),
        out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)),
        name="attention_key_gradients",
    )(_ranges(blocks, 1), *shared)
    # The sink's own value is zero, so its d_p is too.
    d_sink = -jnp.sum(jnp.exp(sink[None, :, None] - lse) * delta, axis=(0, 2))
    return d_q, d_k, d_v, d_sink, None, None, None


_flash.defvjp(_flash_fwd, _flash_bwd)


def _specs(options: _Options, q: jax.Array, k: jax.Array, groups: int) -> dict[str, pl.BlockSpec]:
    """What a program of (query block, sequence, query head) gets of each array."""
    dim, capacity = q.shape[3], k.shape[1]
    return {
        "range": pl.BlockSpec((None, None, 2), lambda i, b, h: (b, i, 0)),
        "start": pl.BlockSpec((1,), lambda i, b, h: (0,)),
        "q_segments": pl.BlockSpec((None, options.queries), lambda i, b, h: (b, i)),
        "kv_segments": pl.BlockSpec((None, capacity), lambda i, b, h: (b, 0)),
        "q": pl.BlockSpec((None, options.queries, None, dim), lambda i, b, h: (b, i, h, 0)),
        "kv": pl.BlockSpec((None, capacity, None, dim), lambda i, b, h: (b, 0, h // groups, 0)),
        "row": pl.BlockSpec((None, None, options.queries), lambda i, b, h: (b, h, i)),
    }


def _seen(
    options: _Options, start: jax.Array, q_segments: jax.Array, kv_segments: jax.Array
) -> jax.Array:
    """Which blocks of queries can see which blocks of keys: bool [B, T / queries, S / keys].

    Overlapping ranges of segment numbers are necessary for a pair to match.
    """
    batch = q_segments.shape[0]
    least, greatest = range_of(q_segments.reshape(batch, -1, options.queries))
    low, high = range_of(kv_segments.reshape(batch, -1, options.keys))
    seen = (least[:, :, None] <= high[:, None]) & (greatest[:, :, None] >= low[:, None])
    i = jnp.arange(seen.shape[1], dtype=jnp.int32)[None, :, None]
    j = jnp.arange(seen.shape[2], dtype=jnp.int32)[None, None, :]
    oldest = start[None, None, :] + i * options.queries
    if options.causal:
        seen &= j * options.keys < oldest + options.queries
    if options.window is not None:
        seen &= (j + 1) * options.keys > oldest - options.window + 1
    return seen


def _ranges(seen: jax.Array, axis: int) -> jax.Array:
    """The first block seen along an axis and the one behind the last: int32 [B, other axis, 2]."""
    first = jnp.argmax(seen, axis=axis).astype(jnp.int32)
    after = seen.shape[axis] - jnp.argmax(jnp.flip(seen, axis), axis=axis).astype(jnp.int32)
    return jnp.stack([first, jnp.where(seen.any(axis=axis), after, first)], axis=-1)


def _scores(
    options: _Options,
    q: jax.Array,
    k: jax.Array,
    at: jax.Array,
    of: jax.Array,
    own: jax.Array,
    theirs: jax.Array,
) -> tuple[jax.Array, jax.Array | None]:
    """Scores of a block float32 [queries, keys], -inf where hidden, and the slope of the soft cap.

    `at` and `of` are positions int32 [queries] and [keys], `own` and `theirs` their segments.
    """
    scores = product(q, k, (1, 1)) * options.scale
    slope = None
    if options.soft_cap is not None:
        squashed = jnp.tanh(scores / options.soft_cap)
        scores, slope = options.soft_cap * squashed, 1 - squashed * squashed
    visible = (own[:, None] == theirs[None, :]) & (own != 0)[:, None]
    if options.causal:
        visible &= of[None, :] <= at[:, None]
    if options.window is not None:
        visible &= of[None, :] > at[:, None] - options.window
    return jnp.where(visible, scores, -jnp.inf), slope


def _positions(block: jax.Array, size: int) -> jax.Array:
    return block * size + jnp.arange(size, dtype=jnp.int32)


def _output_kernel(
    options: _Options,
    span: Any,
    start: Any,
    sink: Any,
    q_segments: Any,
    kv_segments: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
) -> None:
    queries, own, logit = q[...], q_segments[...], sink[...]
    at = start[0] + _positions(pl.program_id(0), options.queries)

    def key_block(j: jax.Array, carry: Any) -> Any:
        top, total, acc = carry
        here = pl.ds(j * options.keys, options.keys)
        of = _positions(j, options.keys)
        scores, _ = _scores(options, queries, k[here, :], at, of, own, kv_segments[here])
        # Hidden scores are -inf, and exp(-inf - NOTHING) is 0 where exp(-inf - -inf) is NaN.
        new_top = jnp.maximum(top, scores.max(axis=1))
        masses = jnp.exp(scores - new_top[:, None])
        shrink = jnp.exp(top - new_top)
        block = v[here, :]
        acc = acc * shrink[:, None] + product(masses.astype(queries.dtype), block, (1, 0))
        return new_top, total * shrink + masses.sum(axis=1), acc

    carry = (
        jnp.full(options.queries, NOTHING, jnp.float32),
        jnp.zeros(options.queries, jnp.float32),
        jnp.zeros(queries.shape, jnp.float32),
    )
    top, total, acc = jax.lax.fori_loop(span[0], span[1], key_block, carry)
    new_top = jnp.maximum(top, logit)
    shrink = jnp.exp(top - new_top)
    total = total * shrink + jnp.where(logit > NOTHING, jnp.exp(logit - new_top), 0)
    total = jnp.where(total == 0, 1, total)  # sees nothing: zeros
    out[...] = (acc * (shrink / total)[:, None]).astype(out.dtype)
    lse[...] = new_top + jnp.log(total)


def _query_gradient_kernel(
    options: _Options,
    span: Any,
    start: Any,
    q_segments: Any,
    kv_segments: Any,
    q: Any,
    k: Any,
    v: Any,
    d_out: Any,
    lse: Any,
    delta: Any,
    d_q: Any,
) -> None:
    queries, own, d_o = q[...], q_segments[...], d_out[...]
    log, dot = lse[...], delta[...]
    at = start[0] + _positions(pl.program_id(0), options.queries)

    def key_block(j: jax.Array, total: jax.Array) -> jax.Array:
        here = pl.ds(j * options.keys, options.keys)
        of, block = _positions(j, options.keys), k[here, :]
        scores, slope = _scores(options, queries, block, at, of, own, kv_segments[here])
        p = jnp.exp(scores - log[:, None])
        d_scores = p * (product(d_o, v[here, :], (1, 1)) - dot[:, None])
        if slope is not None:
            d_scores = d_scores * slope
        return total + product(d_scores.astype(queries.dtype), block, (1, 0))

    zero = jnp.zeros(queries.shape, jnp.float32)
    total = jax.lax.fori_loop(span[0], span[1], key_block, zero)
    d_q[...] = (total * options.scale).astype(d_q.dtype)


def _key_gradients_kernel(
    options: _Options,
    span: Any,
    start: Any,
    q_segments: Any,
    kv_segments: Any,
    q: Any,
    k: Any,
    v: Any,
    d_out: Any,
    lse: Any,
    delta: Any,
    d_k: Any,
    d_v: Any,
) -> None:
    keys, values, theirs = k[...], v[...], kv_segments[...]
    of = _positions(pl.program_id(0), options.keys)
    first, count = span[0], span[1] - span[0]

    def query_block(n: jax.Array, carry: Any) -> Any:
        total_k, total_v = carry
        head, i = n // count, first + n % count
        here = pl.ds(i * options.queries, options.queries)
        at = start[0] + _positions(i, options.queries)
        queries, d_o = q[here, head, :], d_out[here, head, :]
        scores, slope = _scores(options, queries, keys, at, of, q_segments[here], theirs)
        p = jnp.exp(scores - lse[head, here][:, None])
        d_scores = p * (product(d_o, values, (1, 1)) - delta[head, here][:, None])
        if slope is not None:
            d_scores = d_scores * slope
        total_v = total_v + product(p.astype(d_o.dtype), d_o, (0, 0))
        total_k = total_k + product(d_scores.astype(queries.dtype), queries, (0, 0))
        return total_k, total_v

    zero = jnp.zeros(keys.shape, jnp.float32)
    groups = q.shape[1]
    total_k, total_v = jax.lax.fori_loop(0, groups * count, query_block, (zero, zero))
    d_k[...] = (total_k * options.scale).astype(d_k.dtype)
    d_v[...] = total_v.astype(d_v.dtype)
