"""Dropless mixture of experts (after MegaBlocks, arXiv 2211.15841) in plain XLA.

Pairs (token, choice) are sorted by expert. An outer loop takes one expert at a time, and inner loops
with dynamic bounds take its rows block by block, each one matmul with that expert's weights: work
follows the number of rows that exist, not a capacity. Blocks are tall, for speed, then low, so that
little of the last one is empty. That one runs on into rows of the next experts; what it writes there
is overwritten when their turn comes, so that rows need no padding. The backward pass saves the gate
and up projections and accumulates an expert's weight gradients block by block, writing them to the
[E, ...] arrays once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gemtool.kernels.dtypes import accumulator
from gemtool.kernels.experts.pairs import Pairs, combine, sort_pairs
from gemtool.kernels.glu import Glu
from gemtool.kernels.rows import row_dots

# Up to this many pairs (decoding), each is a chain of matrix-vector products by itself.
FEW_PAIRS = 16

# (mean rows of an expert, rows of its blocks). Taller matmuls are faster, but the last block is on
# average half empty. Low blocks are slow, in the backward pass above all, so that what tall ones leave
# is taken in one or two.
BLOCK_ROWS: tuple[tuple[int, tuple[int, ...]], ...] = (
    (512, (256, 64, 16)),
    (96, (128, 96, 64, 48, 32, 16)),
    (48, (64, 48, 32, 16)),
    (32, (32, 16)),
    (16, (16,)),
    (0, (8,)),
)

Weights = dict[str, jax.Array]
"""Matrices "gate", "up" [E, D, F] and "down" [E, F, D], and "gate_bias" [E, F], ... where there are
biases; of one expert, the same without E."""


def experts_xla(
    x: jax.Array, expert_ids: jax.Array, weights: jax.Array, w: Weights, glu: Glu
) -> jax.Array:
    """See `gemtool.kernels.experts.expert_mlp`."""
    with jax.named_scope("experts"):
        return _experts(glu, x, expert_ids, weights, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _experts(
    glu: Glu, x: jax.Array, expert_ids: jax.Array, weights: jax.Array, w: Weights
) -> jax.Array:
    if expert_ids.size <= FEW_PAIRS:
        return _few(glu, x, expert_ids, weights, w)
    return _forward(False, glu, x, expert_ids, weights, w)[0]


def _experts_fwd(glu: Glu, *arrays: Any) -> tuple[jax.Array, Any]:
    out, kept = _forward(True, glu, *arrays)
    return out, (arrays, kept)


def _forward(
    keep: bool,
    glu: Glu,
    x: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array,
    w: Weights,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The output; with `keep` also the gate and up projections of sorted pairs [N + lowest, F]."""
    experts, dim, hidden = w["gate"].shape
    dtype = accumulator(x.dtype)
    pairs, blocks = sort_pairs(expert_ids, experts), _block_rows(expert_ids, experts)
    x_rows = _gather(x.astype(dtype), pairs, blocks)
    rows = len(x_rows)

    def one_expert(e: jax.Array, carry: Any) -> Any:
        own = _expert(w, e, dtype)

        def one_block(at: jax.Array, size: int, carry: Any) -> Any:
            y_rows, *kept = carry
            x_b = lax.dynamic_slice_in_dim(x_rows, at, size)
            gate, up = _project(own, "gate", x_b), _project(own, "up", x_b)
            y = _project(own, "down", glu(gate, up))
            new = (y, gate, up) if keep else (y,)
            return [_put(old, value, at) for old, value in zip((y_rows, *kept), new, strict=True)]

        return _over_blocks(pairs, blocks, e, one_block, carry)

    widths = (dim, hidden, hidden) if keep else (dim,)
    carry = [jnp.zeros((rows, width), dtype) for width in widths]
    y_rows, *kept = lax.fori_loop(jnp.int32(0), jnp.int32(experts), one_expert, carry)
    out = combine(y_rows, pairs, expert_ids, weights.astype(dtype), experts)
    return out.astype(x.dtype), tuple(kept)


def _experts_bwd(glu: Glu, saved: Any, d_out: jax.Array) -> tuple[Any, ...]:
    (x, expert_ids, weights, w), (gate_rows, up_rows) = saved
    experts = w["gate"].shape[0]
    dtype = accumulator(x.dtype)
    pairs, blocks = sort_pairs(expert_ids, experts), _block_rows(expert_ids, experts)
    x_rows, d_rows = (_gather(rows.astype(dtype), pairs, blocks) for rows in (x, d_out))
    share_rows = jnp.zeros(len(x_rows), dtype)
    share_rows = share_rows.at[pairs.place.reshape(-1)].set(weights.astype(dtype).reshape(-1))

    def one_expert(e: jax.Array, carry: Any) -> Any:
        d_x_rows, d_share, d_w = carry
        own = _expert(w, e, dtype)

        def one_block(at: jax.Array, size: int, carry: Any) -> Any:
            d_x_rows, d_share, d_own = carry
            row = at + jnp.arange(size, dtype=jnp.int32)
            mine = (row < pairs.start[e] + pairs.rows[e])[:, None]  # the rest is other experts'

            def block(rows: jax.Array) -> jax.Array:
                return lax.dynamic_slice_in_dim(rows, at, size)

            x_b, d_out_b, gate, up = (block(r) for r in (x_rows, d_rows, gate_rows, up_rows))
            share = jnp.where(mine, block(share_rows)[:, None], 0)
            h, glu_vjp = jax.vjp(glu, gate, up)
            d_h = d_out_b @ own["down"].T  # before the pair's weight
            d_weight = row_dots(d_h, h)
            if "down_bias" in own:
                d_weight = d_weight + d_out_b @ own["down_bias"]
            d_share = _put(d_share, d_weight, at)
            d_gate, d_up = glu_vjp(d_h * share)
            d_x_rows = _put(d_x_rows, d_gate @ own["gate"].T + d_up @ own["up"].T, at)
            new = {"gate": x_b.T @ d_gate, "up": x_b.T @ d_up, "down": (h * share).T @ d_out_b}
            if "down_bias" in own:
                new["gate_bias"], new["up_bias"] = d_gate.sum(axis=0), d_up.sum(axis=0)
                new["down_bias"] = (share * d_out_b).sum(axis=0)
            return d_x_rows, d_share, jax.tree.map(jnp.add, d_own, new)

        start = (d_x_rows, d_share, jax.tree.map(jnp.zeros_like, own))
        d_x_rows, d_share, d_own = _over_blocks(pairs, blocks, e, one_block, start)
        d_w = {
            name: lax.dynamic_update_index_in_dim(old, d_own[name].astype(old.dtype), e, 0)
            for name, old in d_w.items()
        }
        return d_x_rows, d_share, d_w

    carry = (
        jnp.zeros_like(x_rows),
        jnp.zeros_like(share_rows),
        jax.tree.map(jnp.zeros_like, w),
    )
    d_x_rows, d_share, d_w = lax.fori_loop(jnp.int32(0), jnp.int32(experts), one_expert, carry)
    d_x = combine(d_x_rows, pairs, expert_ids, jnp.ones(expert_ids.shape, dtype), experts)
    d_weights = jnp.where(expert_ids < experts, d_share[pairs.place], 0)
    return d_x.astype(x.dtype), None, d_weights.astype(weights.dtype), d_w


_experts.defvjp(_experts_fwd, _experts_bwd)


def _few(
    glu: Glu, x: jax.Array, expert_ids: jax.Array, weights: jax.Array, w: Weights
) -> jax.Array:
    """One pair after the other: the fastest of the forms tried, though XLA copies the weights of an
    expert out of [E, ...] before it multiplies them, a third of a decoding step."""
    experts, choices = w["gate"].shape[0], expert_ids.shape[1]
    dtype = accumulator(x.dtype)
    flat = expert_ids.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)  # those without an expert come last
    inputs, shares = jnp.asarray(x, dtype), jnp.asarray(weights, dtype).reshape(-1)

    def one_pair(i: jax.Array, out: jax.Array) -> jax.Array:
        pair = order[i]
        token, e = pair // choices, flat[pair]
        own, x_t = _expert(w, e, dtype), inputs[token]
        h = glu(_project(own, "gate", x_t), _project(own, "up", x_t))
        return out.at[token].add(shares[pair] * _project(own, "down", h))

    used = (flat < experts).sum(dtype=jnp.int32)
    out = lax.fori_loop(jnp.int32(0), used, one_pair, jnp.zeros(x.shape, dtype))
    return out.astype(x.dtype)


def _expert(w: Weights, e: jax.Array, dtype: Any) -> Weights:
    """The weights of one expert."""
    return {
        name: lax.dynamic_index_in_dim(array, e, keepdims=False).astype(dtype)
        for name, array in w.items()
    }


def _project(own: Weights, name: str, x: jax.Array) -> jax.Array:
    """[..., I] through a matrix of one expert, and its bias where it has one -> [..., O]."""
    y = x @ own[name]
    bias = own.get(f"{name}_bias")
    return y if bias is None else y + jnp.broadcast_to(bias, y.shape)


def _block_rows(expert_ids: jax.Array, experts: int) -> tuple[int, ...]:
    """Rows of the matmuls, the tallest first."""
    mean = expert_ids.size // experts
    return next(sizes for least, sizes in BLOCK_ROWS if mean >= least)


def _over_blocks(
    pairs: Pairs,
    blocks: tuple[int, ...],
    e: jax.Array,
    body: Callable[[jax.Array, int, Any], Any],
    carry: Any,
) -> Any:
    """Fold `body(first row, rows, carry)` over the blocks of an expert."""
    least = blocks[-1]
    at, left = pairs.start[e], (pairs.rows[e] + least - 1) // least * least
    for size in blocks:

        def one_block(b: jax.Array, carry: Any, size: int = size, at: jax.Array = at) -> Any:
            return body(at + b * size, size, carry)

        carry = lax.fori_loop(jnp.int32(0), left // size, one_block, carry)
        at, left = at + left // size * size, left % size
    return carry


def _gather(x: jax.Array, pairs: Pairs, blocks: tuple[int, ...]) -> jax.Array:
    """[T, D] -> [N + lowest, D]: row of each sorted pair, then zeros for the last block."""
    return jnp.pad(x[pairs.token], ((0, blocks[-1]), (0, 0)))


def _put(rows: jax.Array, block: jax.Array, at: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(rows, block, at, 0)
