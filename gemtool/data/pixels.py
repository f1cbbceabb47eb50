"""Pixels of tiles and frames stored as pictures, as shards may hold them: PNG, or JPEG.

A payload of patches is uint8 [n, 14, 14, 3], n a square: row by row the patches of a picture.
"""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass

import numpy as np

from gemtool.data.image import patchify, unpatchify
from gemtool.data.settings import PATCH
from gemtool.errors import UsageError
from gemtool.stream.spans import Span, Stored, stored_raw

ENCODED = ("jpeg", "png")
"""Values of `payload_dtype` for pictures."""


@dataclass(frozen=True)
class PixelFormat:
    """How pixels are stored: `raw`, `png` (the same pixels again) or `jpeg` (nearly the same)."""

    name: str = "raw"
    quality: int = 0

    @classmethod
    def parse(cls, text: str) -> PixelFormat:
        """Reads `raw`, `png`, `jpeg:Q`.

        Raises:
            UsageError: none of these, or Q is not from 1 to 100.
        """
        match = re.fullmatch(r"jpeg:(\d{1,3})", text)
        if match and 1 <= int(match[1]) <= 100:
            return cls("jpeg", int(match[1]))
        if text in ("raw", "png"):
            return cls(text)
        raise UsageError(f"--media {text}: expected raw, png, or jpeg:Q with Q from 1 to 100")

    def __str__(self) -> str:
        return f"jpeg:{self.quality}" if self.name == "jpeg" else self.name

    def encode(self, span: Span) -> Stored | None:
        """The payload of a span as it is stored: a picture if it holds the pixels of one."""
        payload = span.payload
        if self.name == "raw" or payload is None or not is_picture(payload):
            return stored_raw(span)
        from PIL import Image

        sink = io.BytesIO()
        options = {"quality": self.quality} if self.name == "jpeg" else {}
        Image.fromarray(unpatchify(payload)).save(sink, self.name, **options)
        return np.frombuffer(sink.getbuffer(), np.uint8), self.name, list(payload.shape)


RAW = PixelFormat()


def decode_pixels(raw: np.ndarray, dtype: str, shape: list[int]) -> np.ndarray | None:
    """The patches of a stored picture; None if the payload is not stored as one.

    Raises:
        ValueError: it cannot be decoded, or is not of the shape that it is said to have.
    """
    if dtype not in ENCODED:
        return None
    from PIL import Image

    try:
        with Image.open(io.BytesIO(raw.tobytes()), formats=[dtype]) as image:
            side = PATCH * math.isqrt(shape[0])
            if image.size != (side, side):
                raise ValueError(f"{image.size} pixels where the shape is {shape}")
            return patchify(np.asarray(image.convert("RGB")))
    except Exception as problem:  # Pillow's parsers raise whatever damage makes them stumble over
        raise ValueError(f"a damaged {dtype} picture ({problem})") from None


def is_picture(payload: np.ndarray) -> bool:
    """Whether a payload is the patches of a square picture."""
    return (
        payload.dtype == np.uint8
        and payload.ndim == 4
        and payload.shape[1:] == (PATCH, PATCH, 3)
        and math.isqrt(len(payload)) ** 2 == len(payload) > 0
    )
