"""Products row by row, in the form that XLA's CPU compiler runs fast.

There a sum of products over the last axis, sum(a * b), takes ten times as long as the same as a dot
product (1024 x 768: 2.2 ms against 0.2), and is what differentiating a scaled row gives.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def row_dots(a: jax.Array, b: jax.Array) -> jax.Array:
    """Dot products of rows: [..., D] twice -> [...], exact in float32 on every platform."""
    return jnp.einsum("...d,...d->...", a, b, precision=jax.lax.Precision.HIGHEST)


@jax.custom_vjp
def scale_rows(x: jax.Array, factor: jax.Array) -> jax.Array:
    """Each row [..., D] times its factor [..., 1]."""
    return x * factor


def _scale_rows_forward(
    x: jax.Array, factor: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x * factor, (x, factor)


def _scale_rows_backward(
    saved: tuple[jax.Array, jax.Array], d_out: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, factor = saved
    return d_out * factor, row_dots(d_out, x)[..., None]


scale_rows.defvjp(_scale_rows_forward, _scale_rows_backward)
