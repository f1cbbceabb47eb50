"""What Pallas kernels that Triton compiles have in common."""

from __future__ import annotations

import jax
import jax.numpy as jnp

SMALLEST_BLOCK = 16
"""Rows and columns that Triton's matrix product takes at least."""


def power_of_two(n: int) -> int:
    """The least power of two that is not below n, nor below SMALLEST_BLOCK: sizes of blocks."""
    return max(SMALLEST_BLOCK, 1 << (n - 1).bit_length())


def pad(x: jax.Array, *blocks: int | None) -> jax.Array:
    """`x` with zeros up to whole blocks along each axis; None leaves an axis as it is."""
    return jnp.pad(
        x, [(0, 0 if b is None else -n % b) for n, b in zip(x.shape, blocks, strict=True)]
    )


def product(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Of two matrices over an axis of each: float32 from float32 sums.

    They are multiplied as they are if they are of one type (the tensor cores'), else as float32.
    """
    if a.dtype != b.dtype:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    contracted = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, contracted, preferred_element_type=jnp.float32)
