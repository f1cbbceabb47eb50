"""Small pieces that several parts share: norms, rotary positions, SwiGLU, rounding."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """RMSNorm (arXiv 1910.07467) over the last axis: [..., D] and a scale [D] -> [..., D]."""
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    return jnp.einsum("...d,d->...d", x * inverse, scale)


def unit_norm(x: jax.Array) -> jax.Array:
    """Vectors of length one along the last axis; a zero vector stays zero, with finite gradient."""
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


def rotary(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding (arXiv 2104.09864); the two halves of a head are the pairs.

    `x` [B, T, H, K] and `positions` int32 [B or 1, T] -> [B, T, H, K]. Scores of rotated queries
    and keys depend on the difference of positions only.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.einsum("bt,f->btf", positions.astype(jnp.float32), frequency)[:, :, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x1, x2 = x[..., :half], x[..., half:]
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


def swiglu(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """SwiGLU (arXiv 2002.05202): [..., D] with gate, up [D, F] and down [F, D] -> [..., D]."""
    hidden = jax.nn.silu(jnp.einsum("...d,df->...f", x, gate)) * jnp.einsum("...d,df->...f", x, up)
    return jnp.einsum("...f,fd->...d", hidden, down)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def round_to(x: jax.Array, dtype: str) -> jax.Array:
    """`x` (float32) with each value rounded to what `dtype` can hold; gradients pass unrounded.

    Training rounds keys and values like this, so that a cache of that dtype changes nothing.
    `reduce_precision` is used since a compiler may drop a cast there and back as "excess
    precision". Values beyond the largest float16 are clipped to it.
    """
    if dtype == "float32":
        return x
    info = jnp.finfo(dtype)
    largest = float(info.max)
    return jax.lax.reduce_precision(jnp.clip(x, -largest, largest), info.nexp, info.nmant)


@round_to.defjvp
def _round_to_jvp(
    dtype: str, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return round_to(primals[0], dtype), tangents[0]
