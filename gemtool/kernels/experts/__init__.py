"""Mixture of SwiGLU experts, dropless: every token reaches every expert it chose.

The fast implementation sorts the (token, expert) pairs by expert and multiplies block by block, as
in MegaBlocks (arXiv 2211.15841): no capacity, no token dropped, no padding to the fullest expert.
"""

from __future__ import annotations

import jax

from gemtool.kernels.dispatch import dispatch
from gemtool.kernels.experts.reference import experts_reference
from gemtool.kernels.experts.xla import experts_xla

IMPLEMENTATIONS = {"xla": experts_xla, "reference": experts_reference}


def expert_mlp(
    x: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    w_down: jax.Array,
    impl: str | None = None,
) -> jax.Array:
    """Weighted sum of each token's chosen experts.

        out[t] = sum over k of weights[t, k] * expert[expert_ids[t, k]](x[t])
        expert[e](x) = (silu(x @ w_gate[e]) * (x @ w_up[e])) @ w_down[e]

    Args:
        x: [T, D] floating.
        expert_ids: int32 [T, K], each 0 .. E - 1, or E for "no expert" (adds zero and costs next to
            nothing: padding). A token may name an expert twice.
        weights: floating [T, K]; usually the router's.
        w_gate: [E, D, F] floating.
        w_up: [E, D, F].
        w_down: [E, F, D].
        impl: name of the implementation; by default the best of this platform.

    Returns:
        [T, D] in x's dtype. Differentiable (reverse mode) in everything but expert_ids.

    Raises:
        ValueError: shapes do not fit together.
    """
    arrays = {"x": x, "expert_ids": expert_ids, "weights": weights}
    arrays |= {"w_gate": w_gate, "w_up": w_up, "w_down": w_down}
    experts, dim, hidden = w_gate.shape
    fits = (
        x.ndim == 2
        and x.shape[1] == dim
        and expert_ids.ndim == 2
        and expert_ids.shape[0] == x.shape[0]
        and weights.shape == expert_ids.shape
        and w_up.shape == w_gate.shape
        and w_down.shape == (experts, hidden, dim)
    )
    if not fits:
        got = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
        raise ValueError(f"experts: shapes do not fit together: {got}")
    return dispatch("experts", IMPLEMENTATIONS, impl, x, expert_ids, weights, w_gate, w_up, w_down)
