"""Rotary position embedding (arXiv 2104.09864) and its scalings to longer sequences."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from gemtool.model.kinds import RopeScaling


def rotary(
    x: jax.Array, positions: jax.Array, theta: float, scaling: RopeScaling | None = None
) -> jax.Array:
    """Rotates each pair of values of a head; the two halves of a head are the pairs.

    `x` [B, T, H, K] and `positions` int32 [B or 1, T] -> [B, T, H, K]. Scores of rotated queries
    and keys depend on the difference of positions only.
    """
    frequency, amplitude = frequencies(x.shape[-1], theta, scaling)
    angle = positions.astype(jnp.float32)[:, :, None] * jnp.asarray(frequency)[None, None]
    return rotate(x, angle, amplitude)


def rotate(x: jax.Array, angle: jax.Array, amplitude: float = 1.0) -> jax.Array:
    """`x` [B, T, H, K] with its pairs of values turned by `angle` [B or 1, T, K / 2], in radians."""
    half = x.shape[-1] // 2
    angle = angle[:, :, None, :]
    # XLA would compute them anew for each head. It keeps a single array behind a barrier; not two.
    table = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    cos, sin = jnp.split(jax.lax.optimization_barrier(table), 2, axis=-1)
    if amplitude != 1:
        cos, sin = cos * amplitude, sin * amplitude
    x1, x2 = (part.astype(jnp.float32) for part in (x[..., :half], x[..., half:]))
    rotated = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
    return rotated.astype(x.dtype)


def frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[np.ndarray, float]:
    """Radians a position turns each pair by, float32 [head_dim / 2], and what rotated vectors are
    multiplied by. See `RopeScaling` for the meaning of its fields.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    base = theta**-exponent
    amplitude = 1.0
    if scaling is None:
        scaled = base
    elif scaling.kind == "linear":
        scaled = base / scaling.factor
    elif scaling.kind == "ntk":
        scaled = (theta * scaling.factor ** (head_dim / (head_dim - 2))) ** -exponent
    else:
        kept = _kept(base, head_dim, theta, scaling)
        scaled = base * (kept + (1 - kept) / scaling.factor)
        if scaling.kind == "yarn":
            amplitude = scaling.amplitude or 0.1 * math.log(scaling.factor) + 1
    return scaled.astype(np.float32), amplitude


def _kept(base: np.ndarray, head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """How much of each frequency is kept, from 0 (all is divided by the factor) to 1."""
    if scaling.kind == "llama3":
        turns = scaling.original_length * base / (2 * math.pi)
        return np.clip((turns - scaling.slow) / (scaling.fast - scaling.slow), 0, 1)

    def dimension(turns: float) -> float:
        """The pair, as a fraction of an index, that turns so often within the original length."""
        length = scaling.original_length / (2 * math.pi * turns)
        return head_dim * math.log(length) / (2 * math.log(theta))

    low, high = dimension(scaling.fast), dimension(scaling.slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a step, not a division by zero
    return 1 - np.clip((np.arange(head_dim // 2) - low) / (high - low), 0, 1)
