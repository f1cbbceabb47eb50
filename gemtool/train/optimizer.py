"""AdamW (arXiv 1711.05101) with a clipped gradient; a learning rate of warm-up and cosine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gemtool.model.config import ModelConfig
from gemtool.model.params import ParamSpec, Tree, map_specs
from gemtool.train.parts import TRUNK, split

B1, B2 = 0.9, 0.95
WEIGHT_DECAY = 0.1
CLIP = 1.0
"""Largest norm of the gradient over all parameters."""
FLOOR = 0.1
"""What is left of the peak learning rate at the last step."""


@dataclass(frozen=True)
class Schedule:
    """Learning rates of a run: a linear rise, then half a cosine (arXiv 1608.03983)."""

    steps: int
    """Length of the run."""
    peak: float
    warmup: int
    """Steps of the rise; the last of them runs at the peak."""

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 1."""
        if step <= self.warmup:
            return self.peak * step / self.warmup
        progress = min((step - self.warmup) / max(self.steps - self.warmup, 1), 1.0)
        return self.peak * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * progress)))


def default_peak(config: ModelConfig) -> float:
    """A learning rate that trains a model of this width: 3e-3, less in proportion above 128."""
    return 3e-3 * min(1.0, 128 / config.d_model)


def default_warmup(steps: int) -> int:
    """A tenth of the run, at most 1,000 steps."""
    return min(max(steps // 10, 1), 1000)


def make_optimizer(
    config: ModelConfig, stacked: bool = False, part: str = TRUNK
) -> optax.GradientTransformation:
    """The optimizer of a part of a model's parameters (see parts.py), `stacked` or not; it knows of no
    others. Its updates are still to be multiplied by minus the learning rate, which is an argument of
    the step: a program serves any schedule.
    """
    decaying, _ = split(decayed(config, stacked), part)
    chain = optax.chain(
        clip_by_norm(CLIP),
        optax.scale_by_adam(B1, B2),
        optax.add_decayed_weights(WEIGHT_DECAY, decaying),
    )

    def update(*arguments: Any) -> Any:
        # optax raises floats to integer powers, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            return chain.update(*arguments)

    return optax.GradientTransformation(chain.init, update)


def clip_by_norm(largest: float) -> optax.GradientTransformation:
    """Scales gradients whose norm over all parameters exceeds `largest` (arXiv 1211.5063).

    As `optax.clip_by_global_norm`, but a factor is multiplied by instead of a norm divided by: XLA
    computes a product anew wherever it is read, where a quotient becomes a second tree of gradients.
    """

    def update(grads: Tree, state: Any, params: Any = None) -> tuple[Tree, Any]:
        norm = optax.tree.norm(grads)
        factor = jnp.where(norm < largest, 1.0, largest / norm)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def decayed(config: ModelConfig, stacked: bool = False) -> Tree:
    """A tree of booleans: whether a parameter decays. Matrices do; norms, biases, temperatures and
    convolution taps, for which zero means something else, do not.
    """

    def decays(path: str, spec: ParamSpec) -> bool:
        matrix = len(spec.shape) - spec.axes.count("layers") >= 2 and not path.endswith(
            ("norm", "bias")
        )
        return matrix and "taps" not in spec.axes

    return map_specs(config, decays, stacked)
