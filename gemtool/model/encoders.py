"""Media encoders: raw features of soft positions -> vectors in the place of token embeddings.

An image tile or a video frame is one group of 256 (or 64) patches; audio comes in groups of at most a
second. Every soft token is encoded by itself and told where in its group it lies; relating them is the
decoder's work. So a video of any length streams through in constant memory.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gemtool.model.config import EncoderConfig
from gemtool.model.layers import rms_norm
from gemtool.model.params import Tree


def encode(p: Tree, encoder: EncoderConfig, values: jax.Array, eps: float) -> jax.Array:
    """Raw features [N, P, F], uint8 or float -> float32 [N, P, D]; P at most `encoder.tokens`."""
    x = _normalise(values.astype(jnp.float32), encoder.normalise).astype(p["in"].dtype)
    x = jnp.einsum("npf,fh->nph", x, p["in"]) + p["in_bias"][None, None, :]
    x = jnp.einsum("nph,hd->npd", jax.nn.gelu(x), p["out"])
    x = x + _positions(p, encoder)[None, : values.shape[1]]
    for block in p.get("blocks", {}).values():
        hidden = jnp.einsum("npd,dh->nph", rms_norm(x, block["norm"], eps), block["in"])
        x = x + jnp.einsum("nph,hd->npd", jax.nn.gelu(hidden), block["out"])
    return x


def _normalise(x: jax.Array, how: str) -> jax.Array:
    if how == "pixel":
        return x / 127.5 - 1.0
    if how == "row":
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        deviation = jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True))
        # A flat patch or digital silence should stay flat, not become amplified rounding.
        return x / jnp.maximum(deviation, 1e-2)
    return x


def _positions(p: Tree, encoder: EncoderConfig) -> jax.Array:
    """Learned embedding of each place in a group, [tokens, D]; rasters add one of row and column."""
    if encoder.kind == "audio":
        return p["position"]
    grid = p["row"][:, None, :] + p["column"][None, :, :]
    return grid.reshape(encoder.tokens, -1)
