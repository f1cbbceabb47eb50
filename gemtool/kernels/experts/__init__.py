"""Mixture of gated experts, dropless: every token reaches every expert it chose.

The fast implementation sorts the (token, expert) pairs by expert and multiplies block by block, as
in MegaBlocks (arXiv 2211.15841): no capacity, no token dropped, no padding to the fullest expert.
"""

from __future__ import annotations

import jax

from gemtool.kernels.dispatch import deferred, dispatch
from gemtool.kernels.experts.reference import experts_reference
from gemtool.kernels.experts.xla import experts_xla
from gemtool.kernels.glu import SWIGLU, Glu

IMPLEMENTATIONS = {
    "pallas_tpu": deferred("gemtool.kernels.experts.pallas_tpu", "experts_pallas_tpu"),
    "gpu": deferred("gemtool.kernels.experts.gpu", "experts_gpu"),
    "xla": experts_xla,
    "reference": experts_reference,
}


def expert_mlp(
    x: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    w_down: jax.Array,
    *,
    b_gate: jax.Array | None = None,
    b_up: jax.Array | None = None,
    b_down: jax.Array | None = None,
    glu: Glu = SWIGLU,
    impl: str | None = None,
) -> jax.Array:
    """Weighted sum of each token's chosen experts.

        out[t] = sum over k of weights[t, k] * expert[expert_ids[t, k]](x[t])
        expert[e](x) = glu(x @ w_gate[e] + b_gate[e], x @ w_up[e] + b_up[e]) @ w_down[e] + b_down[e]

    Args:
        x: [T, D] floating.
        expert_ids: int32 [T, K], each 0 .. E - 1, or E for "no expert" (adds zero and costs next to
            nothing: padding). A token may name an expert twice.
        weights: floating [T, K]; usually the router's.
        w_gate: [E, D, F] floating.
        w_up: [E, D, F].
        w_down: [E, F, D].
        b_gate: [E, F]; the three biases are given together, or none.
        b_up: [E, F].
        b_down: [E, D].
        glu: the activation.
        impl: name of the implementation; by default the best of this platform.

    Returns:
        [T, D] in x's dtype. Differentiable (reverse mode) in everything but expert_ids.

    Raises:
        ValueError: shapes do not fit together, or not all biases are given.
    """
    experts, dim, hidden = w_gate.shape
    w = {"gate": w_gate, "up": w_up, "down": w_down}
    shapes: dict[str, tuple[int, ...]] = {
        "gate": (experts, dim, hidden),
        "up": (experts, dim, hidden),
        "down": (experts, hidden, dim),
        "gate_bias": (experts, hidden),
        "up_bias": (experts, hidden),
        "down_bias": (experts, dim),
    }
    biases = {"gate_bias": b_gate, "up_bias": b_up, "down_bias": b_down}
    given = {name: bias for name, bias in biases.items() if bias is not None}
    if given:
        if len(given) < len(biases):
            raise ValueError(f"experts: all three biases or none; got {', '.join(given)}")
        w |= given
    fits = (
        x.ndim == 2
        and x.shape[1] == dim
        and expert_ids.ndim == 2
        and expert_ids.shape[0] == x.shape[0]
        and weights.shape == expert_ids.shape
        and all(array.shape == shapes[name] for name, array in w.items())
    )
    if not fits:
        arrays = {"x": x, "expert_ids": expert_ids, "weights": weights, **w}
        got = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
        raise ValueError(f"experts: shapes do not fit together: {got}")
    return dispatch("experts", IMPLEMENTATIONS, impl, x, expert_ids, weights, w, glu)
