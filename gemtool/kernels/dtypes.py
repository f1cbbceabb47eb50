"""The types that kernels compute in."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp


def accumulator(dtype: Any) -> Any:
    """The type a kernel computes in: float64 for float64, float32 for every other floating type."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32
