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
    clamped_geglu   gelu(g) * u

    with g = min(gate, limit), u = clip(up, -limit, limit).
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
                gate, up = self._clamped(gate, up)
                return gate * jax.nn.sigmoid(self.alpha * gate) * (up + 1)
            case "clamped_geglu":
                gate, up = self._clamped(gate, up)
                return jax.nn.gelu(gate, approximate=True) * up
        raise ValueError(f"glu: no activation {self.name!r}")

    def _clamped(self, gate: jax.Array, up: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)


SWIGLU = Glu()
