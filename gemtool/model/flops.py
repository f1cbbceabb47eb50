"""Floating-point operations that a model needs: what the mathematics takes, not what a program spends.

Two for each multiplication and addition of matrix products and of attention to visible keys; norms,
rotations, softmax and look-ups are left out, and so is what is recomputed, as is usual when the use of
a machine is reckoned (arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

import numpy as np

from gemtool.model.config import ModelConfig
from gemtool.model.kinds import IndexConfig, LayerKind
from gemtool.model.params import ParamSpec, flatten, param_specs

TRAINING = 3
"""A backward pass takes twice what a forward pass does."""


def forward_flops(
    config: ModelConfig, length: int, start: int = 0, scored: int = 0, *, chosen: bool = False
) -> float:
    """Of one sequence's `length` positions after `start`, `scored` of which get logits. Encoders of
    media are not counted. With `chosen` indexed attention is what it is in inference, not dense."""
    specs = flatten(param_specs(config))
    layers = sum(_multiplied(config, path, spec) for path, spec in specs.items())
    attention = sum(_attention_flops(kind, length, start, chosen) for kind in config.layer_kinds)
    return 2.0 * layers * length + attention + 2.0 * scored * config.vocab_size * config.d_model


def keys_flops(config: ModelConfig, length: int, start: int = 0) -> float:
    """The part of `forward_flops` that writing the keys and values of positions takes: the layers
    before the last that keeps all of its keys, and these."""
    last = max((i for i, kind in enumerate(config.layer_kinds) if kind.grows), default=0)
    own = tuple(f"layers/{last}/attention/{name}" for name in ("k", "v", "index"))
    values = sum(
        _multiplied(config, path, spec)
        for path, spec in flatten(param_specs(config)).items()
        if path.startswith((*(f"layers/{i}/" for i in range(last)), *own))
    )
    kinds = config.layer_kinds[:last]
    attention = sum(_attention_flops(kind, length, start, chosen=True) for kind in kinds)
    return 2.0 * values * length + attention


def _attention_flops(kind: LayerKind, length: int, start: int, chosen: bool) -> float:
    if chosen and kind.index is not None:
        return _chosen_flops(kind, kind.index, length, start)
    return 4.0 * kind.heads * kind.head_dim * visible_pairs(kind, length, start)


def visible_pairs(kind: LayerKind, length: int, start: int = 0) -> int:
    """Pairs of a query among `length` positions after `start` and a key that it sees."""

    def before(stop: int) -> int:
        """Pairs of the queries before position `stop`."""
        if kind.attention == "chunk":
            chunks, rest = divmod(stop, kind.window)
            return chunks * kind.window * (kind.window + 1) // 2 + rest * (rest + 1) // 2
        reach = min(stop, kind.window) if kind.bounded else stop
        return reach * (reach + 1) // 2 + (stop - reach) * reach

    return before(start + length) - before(start)


def _chosen_flops(kind: LayerKind, index: IndexConfig, length: int, start: int) -> float:
    """Attention to the blocks that queries choose, and the choice itself."""
    positions = np.arange(start, start + length)
    far = np.maximum(positions // index.block - index.local, 0)
    doublings = np.frexp(np.maximum(positions // index.floor, 1))[1] - 1
    near = positions + 1 - far * index.block
    keys = near + index.block * np.minimum(far, index.select + index.growth * doublings)
    choice = 2.0 * index.landmarks * index.dim * far
    return float((4.0 * kind.heads * kind.head_dim * keys + choice).sum())


def _multiplied(config: ModelConfig, path: str, spec: ParamSpec) -> float:
    """Values of a parameter that a token is multiplied by, if it is a matrix."""
    if not path.startswith("layers/"):
        return 0
    if "taps" in spec.axes or path.endswith(("norm", "bias")) or len(spec.shape) < 2:
        return 0
    if spec.axes[0] == "expert" and config.moe is not None:
        return spec.size * config.moe.top_k / config.moe.experts if len(spec.shape) > 2 else 0
    return spec.size
