"""The activation of gated networks: what stands between the two input projections and the output."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Glu:
    """A gated activation; hashable, so that it can be static under `jax.jit`.

    swiglu          silu(gate) * up                                   arXiv 2002.05202
    geglu           gelu(gate) * up, gelu by its tanh approximation   arXiv 2002.05202
    clamped_swiglu  g * sigmoid(alpha * g) * (u + 1)                  arXiv 2508.10925
                    with g = min(gate, limit), u = clip(up, -limit, limit)
    """

    name: str = "swiglu"
    alpha: float = 1.702
    limit: float = 7.0

    def __call__(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        """Two arrays of one shape and floating dtype -> one like them.

        Raises:
            ValueError: no activation has this name.
        """
        match self.name:
            case "swiglu":
                return jax.nn.silu(gate) * up
            case "geglu":
                return jax.nn.gelu(gate, approximate=True) * up
            case "clamped_swiglu":
                gate = jnp.minimum(gate, self.limit)
                up = jnp.clip(up, -self.limit, self.limit)
                return gate * jax.nn.sigmoid(self.alpha * gate) * (up + 1)
        raise ValueError(f"glu: no activation {self.name!r}")


SWIGLU = Glu()
