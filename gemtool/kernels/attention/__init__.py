"""Softmax attention with grouped heads, windows, chunks, packed segments, and a learned sink.

The fast implementation is FlashAttention (arXiv 2205.14135): blocks of queries against blocks of
keys with an online softmax, so that no [T, S] matrix ever exists and blocks that cannot be seen are
never visited.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gemtool.kernels.attention.merge import merge_attention
from gemtool.kernels.attention.reference import attention_reference
from gemtool.kernels.attention.xla import attention_xla
from gemtool.kernels.dispatch import deferred, dispatch

__all__ = ["chunk_segments", "flash_attention", "merge_attention", "partial_attention"]

IMPLEMENTATIONS = {
    "pallas_tpu": deferred("gemtool.kernels.attention.pallas_tpu", "attention_pallas_tpu"),
    "gpu": deferred("gemtool.kernels.attention.gpu", "attention_gpu"),
    "xla": attention_xla,
    "reference": attention_reference,
}


def flash_attention(q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> jax.Array:
    """Attend from each query to the keys it can see: the output of `partial_attention`."""
    return partial_attention(q, k, v, **options)[0]


def partial_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    q_start: int | jax.Array = 0,
    kv_length: int | jax.Array | None = None,
    q_segments: jax.Array | None = None,
    kv_segments: jax.Array | None = None,
    sink: jax.Array | None = None,
    soft_cap: float | None = None,
    impl: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attend from each query to the keys it can see, so that more keys can be attended to later.

    A query at absolute position `p = q_start + t` sees key `s` if all of these hold: `s <= p`
    (when causal); `s > p - window` (when there is a window); `s < kv_length`; the segments of
    both are equal and not 0 (when given). A query that sees nothing returns zeros. For chunked
    attention see `chunk_segments`.

    Work is proportional to the visible blocks: a buffer of keys may be far larger than
    `kv_length`, and a window makes the cost linear in T. Scores, softmax and sums are float32
    (float64 when `q` is float64).

    Args:
        q: [B, T, H, D] floating. A temperature belongs in here, multiplied by the caller.
        k: [B, S, KV, D] floating, of any floating type; converted block by block. KV divides H;
            query head h uses key head h // (H // KV).
        v: [B, S, KV, D] as k.
        scale: multiplies the scores; D ** -0.5 by default.
        causal: whether keys after a query's position are hidden.
        window: number of positions a query sees, itself included; at least 1.
        q_start: int or int32 [] (may be traced): position of the first query.
        kv_length: int or int32 [] (may be traced): keys from this index on are absent; by default
            none is.
        q_segments: int32 [B, T], with kv_segments: documents of a packed sequence; 0 is padding.
        kv_segments: int32 [B, S].
        sink: floating [H]: a logit that takes part in the softmax and has no value.
        soft_cap: scores become `soft_cap * tanh(scores / soft_cap)`.
        impl: name of the implementation; by default the best of this platform.

    Returns:
        The output [B, T, H, D] in q's dtype, and the log of the sum of exponentials that it was
        divided by [B, T, H] (`merge_attention` needs it; -1e30 where nothing is seen). Both are
        differentiable (reverse mode) in q, k, v and sink.

    Raises:
        ValueError: shapes or options do not fit together.
    """
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(f"attention: q, k, v are [B, T|S, heads, D]; got {_shapes(q, k, v)}")
    batch, length, heads, dim = q.shape
    if k.shape[0] != batch or k.shape[3] != dim or heads % k.shape[2]:
        raise ValueError(f"attention: B, D or heads of q and k do not match: {_shapes(q, k, v)}")
    if window is not None and window < 1:
        raise ValueError(f"attention: window={window}; expected at least 1 or None")
    if (q_segments is None) != (kv_segments is None):
        raise ValueError("attention: give q_segments and kv_segments together, or neither")
    if q_segments is not None and kv_segments is not None:
        got = _shapes(q_segments, kv_segments)
        if q_segments.shape != (batch, length) or kv_segments.shape != k.shape[:2]:
            raise ValueError(f"attention: segments are [B, T] and [B, S]; got {got}")
    if sink is not None and sink.shape != (heads,):
        raise ValueError(f"attention: sink is [H] = [{heads}]; got {_shapes(sink)}")
    return dispatch(
        "attention",
        IMPLEMENTATIONS,
        impl,
        q,
        k,
        v,
        scale=dim**-0.5 if scale is None else float(scale),
        causal=causal,
        window=window,
        q_start=q_start,
        kv_length=k.shape[1] if kv_length is None else kv_length,
        q_segments=q_segments,
        kv_segments=kv_segments,
        sink=sink,
        soft_cap=soft_cap,
    )


def chunk_segments(positions: jax.Array, segments: jax.Array, chunk: int) -> jax.Array:
    """The segments with which `flash_attention` is chunked attention: a query sees the keys of its
    own chunk of `chunk` positions, counted from the beginning of its document.

    Blocks of other chunks are skipped as those of other documents are.

    Args:
        positions: int32 [B, T], ascending within a document.
        segments: int32 [B, T], the document of each position, ascending; 0 is padding.
        chunk: at least 1.

    Returns:
        int32 [B, T]: the number of the chunk in its row, from 1; 0 where `segments` is.
    """
    index = positions // chunk
    begins = (segments[:, 1:] != segments[:, :-1]) | (index[:, 1:] != index[:, :-1])
    count = jnp.cumsum(jnp.pad(begins, ((0, 0), (1, 0))), axis=1, dtype=jnp.int32)
    return jnp.where(segments == 0, 0, count + 1)


def _shapes(*arrays: jax.Array) -> str:
    return ", ".join(str(list(a.shape)) for a in arrays)
