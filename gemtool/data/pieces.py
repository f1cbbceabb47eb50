"""What the media front ends hand on: one image tile, video frame or second of sound at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a document before it has tokens: markers and placeholders are added further on.

    Attributes:
        kind: what it is.
        payload: the features of its soft positions, one row each: uint8 [n, 14, 14, 3] pixels of
            an image tile or a video frame, float16 [n, 4, 80] log-mel of sound, None for text.
        text: of a text piece only.
        time: start and end in the source, in microseconds from its beginning.
        meta: where it comes from; plain JSON values.
    """

    kind: Literal["image", "video", "audio", "text"]
    payload: np.ndarray | None = None
    text: str | None = None
    time: tuple[int, int] | None = None
    meta: dict[str, Any] | None = None
