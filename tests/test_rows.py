"""Products row by row: what they are, and what they differentiate to."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from gemtool.kernels.rows import row_dots, scale_rows

SHAPES = [(5,), (3, 7), (2, 3, 4, 6), (2, 0)]


@pytest.mark.parametrize("shape", SHAPES)
def test_row_dots_are_sums_of_products(shape: tuple[int, ...]) -> None:
    a, b = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)
    found = row_dots(jnp.asarray(a), jnp.asarray(b))
    expected = np.sum(a.astype(np.float64) * b, axis=-1)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_scaled_rows_and_their_gradients(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    factor = jnp.asarray(rng.standard_normal((*shape[:-1], 1)), jnp.float32)
    np.testing.assert_array_equal(scale_rows(x, factor), x * factor)
    if x.size:
        check_grads(scale_rows, (x, factor), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)
    weight = jnp.asarray(rng.standard_normal(shape), jnp.float32)

    def plain(x: jax.Array, factor: jax.Array) -> jax.Array:
        return jnp.sum(weight * (x * factor))

    def fast(x: jax.Array, factor: jax.Array) -> jax.Array:
        return jnp.sum(weight * scale_rows(x, factor))

    for found, expected in zip(
        jax.grad(fast, (0, 1))(x, factor), jax.grad(plain, (0, 1))(x, factor), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
