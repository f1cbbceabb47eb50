"""How a model is computed: choices that change speed, memory and rounding, never its meaning."""

from __future__ import annotations

from dataclasses import dataclass

from gemtool.model.tables import choice


@dataclass(frozen=True)
class Execution:
    """Hashable, so that it can be static under `jax.jit`.

    `dtype`    "float32" or "bfloat16": of activations, and of weights where they are multiplied.
               Parameters, gradients, moments, routers, statistics of norms, softmax and the loss are
               float32 in any case (mixed precision, arXiv 1710.03740).
    `remat`    keep only what goes into each layer for the backward pass, and compute the layer again
               there (arXiv 1604.06174).
    `stacked`  equal layers are one array each, run by a scan (see stacking.py).
    """

    dtype: str = "float32"
    remat: bool = False
    stacked: bool = False

    def __post_init__(self) -> None:
        choice("execution", self, "dtype", ("float32", "bfloat16"))


FLOAT32 = Execution()


def suitable(platform: str) -> Execution:
    """What suits "cpu", "gpu" or "tpu", unless told otherwise; inference takes the dtype of it.

    XLA's CPU code is fastest with float32 and separate layers, and memory is rarely what is short;
    accelerators multiply bfloat16, and programs of many unrolled layers take them long to compile.
    """
    return FLOAT32 if platform == "cpu" else Execution("bfloat16", remat=True, stacked=True)


def chosen(
    platform: str, dtype: str | None = None, remat: bool | None = None, scan: bool | None = None
) -> Execution:
    """What was asked for, and where nothing was, what suits the platform."""
    suits = suitable(platform)
    return Execution(
        dtype=suits.dtype if dtype is None else dtype,
        remat=suits.remat if remat is None else remat,
        stacked=suits.stacked if scan is None else scan,
    )
