"""The arrays a training step takes: packed tokens, and the media that fill their soft positions."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

Array = Any
"""A numpy array on the host, a jax array on a device."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MediaGroups:
    """Soft tokens of one modality. A group is an image tile, a video frame or a second of audio.

    `values`    [N, P, F] raw features: uint8 pixels (F = 588) or float16 log-mel (F = 320).
    `at`        int32 [N], where the first soft token lies in the flattened batch (row * T + column);
                B * T or more: the group is absent.
    `rows`      int32 [N], how many of the P rows are real.
    """

    values: Array
    at: Array
    rows: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed sequences, [B, T] each.

    `tokens`       int32 ids.
    `segments`     int32, which document of its sequence a position belongs to, from 1; 0: padding.
    `positions`    int32 index within the segment.
    `targets`      int32, the next token.
    `weights`      float32, weight of that target in the loss; 0 where the next token is another
                   document's.
    `documents`    int32, a number made from the id of the document of a position, never 0; 0 where
                   there is padding. Alike in two rows that hold parts of one document. None where
                   nobody asks: only negatives do (see `transformer.forward`).
    `media`        `MediaGroups` by encoder ("visual", "audio").
    """

    tokens: Array
    segments: Array
    positions: Array
    targets: Array
    weights: Array
    documents: Array | None = dataclasses.field(default=None, kw_only=True)
    media: dict[str, MediaGroups] = dataclasses.field(default_factory=dict)
