"""Attention to blocks as a mask over all keys, and the choice of blocks by sorting all scores."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gemtool.kernels.attention.reference import NOTHING
from gemtool.kernels.dtypes import accumulator


def block_attention_reference(
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
    seen of each block named, 0 .. block - 1, and -1 where there is none."""
    dtype = accumulator(q.dtype)
    repeats = q.shape[2] // k.shape[2]
    keys = jnp.repeat(k.astype(dtype), repeats, axis=2)
    values = jnp.repeat(v.astype(dtype), repeats, axis=2)
    scores = jnp.einsum("bthd,bshd->bhts", q.astype(dtype), keys) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)

    key = jnp.arange(k.shape[1], dtype=jnp.int32)[None, None, None, :]
    named = (blocks[..., None] == key // block) & (key % block <= newest[..., None])
    visible = named.any(axis=2)[:, None]  # [B, 1, T, S]
    hidden = jnp.finfo(dtype).min
    top = jnp.where(visible, scores, hidden).max(axis=-1, keepdims=True)
    if sink is not None:
        logit = sink.astype(dtype)[None, :, None, None]
        top = jnp.maximum(top, logit)
    masses = jnp.where(visible, jnp.exp(scores - top), 0)
    total = masses.sum(axis=-1, keepdims=True)
    if sink is not None:
        total = total + jnp.exp(logit - top)
    total = jnp.where(total == 0, 1, total)
    out = jnp.einsum("bhts,bshd->bthd", masses / total, values).astype(q.dtype)
    lse = jnp.maximum(top + jnp.log(total), NOTHING)
    return out, lse[..., 0].transpose(0, 2, 1)


def paged_block_attention_reference(
    q: jax.Array,
    memory: jax.Array,
    table: jax.Array,
    blocks: jax.Array,
    *,
    block: int,
    page: int,
    kv_heads: int,
    scale: float,
    soft_cap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """See `gemtool.kernels.blocks.paged_block_attention`."""
    batch, dim = q.shape[0], q.shape[3]
    rows = page * kv_heads * dim // memory.shape[1]
    at = table[:, :, None] + jnp.arange(rows, dtype=jnp.int32)[None, None]
    k, v = (
        jnp.broadcast_to(
            x.reshape(1, -1, kv_heads, dim), (batch, x.size // kv_heads // dim, kv_heads, dim)
        )
        for x in memory[at]
    )
    newest = jnp.where(blocks >= 0, jnp.int32(block - 1), -1)
    return block_attention_reference(
        q, k, v, blocks, newest, block=block, scale=scale, soft_cap=soft_cap, sink=None
    )


def block_scores(u: jax.Array, landmarks: jax.Array, *, sticky: int = 8) -> jax.Array:
    """The scores that `choose_blocks` compares: [B, T, NB] of all queries and blocks."""
    dtype = accumulator(u.dtype)
    products = jnp.einsum(
        "bti,bmij->bmtj",
        u.astype(dtype),
        landmarks.astype(dtype),
        precision=jax.lax.Precision.HIGHEST,
    )
    best = products.max(axis=1)
    length = u.shape[1] - sticky + 1
    return jnp.stack([best[:, back : back + length] for back in range(sticky)]).max(axis=0)


def choose_blocks_reference(
    u: jax.Array,
    landmarks: jax.Array,
    *,
    candidates: jax.Array,
    width: jax.Array,
    most: int,
    sticky: int,
) -> jax.Array:
    """See `gemtool.kernels.blocks.choose_blocks`."""
    scores = block_scores(u, landmarks, sticky=sticky)
    block = jnp.arange(landmarks.shape[3], dtype=jnp.int32)
    scores = jnp.where(block[None, None] < candidates[None, :, None], scores, -jnp.inf)
    order = jnp.argsort(scores, axis=-1, stable=True, descending=True).astype(jnp.int32)
    order = jnp.pad(order, ((0, 0), (0, 0), (0, most)), constant_values=-1)[..., :most]
    exists = jnp.arange(most, dtype=jnp.int32)[None] < jnp.minimum(width, candidates)[:, None]
    return jnp.where(exists[None], order, -1)
