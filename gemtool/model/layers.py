"""Small pieces that several parts share: norms, gated networks, rounding, soft caps."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from gemtool.kernels.dtypes import accumulator
from gemtool.kernels.glu import Glu
from gemtool.kernels.rows import scale_rows
from gemtool.model.config import ModelConfig
from gemtool.model.params import Tree


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """RMSNorm (arXiv 1910.07467) over the last axis: [..., D] and a scale [D] -> [..., D] like x."""
    wide = x.astype(accumulator(x.dtype))
    return (plain_rms_norm(wide, eps) * jnp.broadcast_to(scale.astype(wide.dtype), x.shape)).astype(
        x.dtype
    )


def plain_rms_norm(x: jax.Array, eps: float) -> jax.Array:
    """RMSNorm without a scale, [..., D] -> [..., D] like x."""
    wide = x.astype(accumulator(x.dtype))
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return scale_rows(wide, scale).astype(x.dtype)


def norm(config: ModelConfig, x: jax.Array, scale: jax.Array) -> jax.Array:
    """The decoder's RMSNorm, whose scale is the parameter or 1 + it: [..., D] and [D] -> [..., D]."""
    return rms_norm(x, scale + 1 if config.norm_offset else scale, config.norm_eps)


def unit_norm(x: jax.Array) -> jax.Array:
    """Vectors of length one along the last axis; a zero vector stays zero, with finite gradient."""
    wide = x.astype(accumulator(x.dtype))
    scale = jax.lax.rsqrt(jnp.sum(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)
    return scale_rows(wide, scale).astype(x.dtype)


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """cap * tanh(x / cap) (arXiv 2408.00118): about x where it is small, never beyond the cap."""
    return cap * jnp.tanh(x / cap)


def glu_of(config: ModelConfig) -> Glu:
    """The activation of the gated networks of a model."""
    return Glu(config.activation, config.glu_alpha, config.glu_limit)


def gated_mlp(x: jax.Array, p: Tree, glu: Glu) -> jax.Array:
    """A gated network: [..., D] with gate, up [D, F] and down [F, D], and biases of the outputs of
    any of them ("gate_bias" [F], ...) -> [..., D]."""

    def project(name: str, y: jax.Array) -> jax.Array:
        y = jnp.einsum("...i,io->...o", y, p[name])
        bias = p.get(f"{name}_bias")
        return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)

    return project("down", glu(project("gate", x), project("up", x)))


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
