"""Pictures of a video as a player shows them: turned and mirrored as the file says."""

from __future__ import annotations

from typing import Any

import numpy as np


def upright(pixels: np.ndarray, frame: Any) -> np.ndarray:
    """Turns and mirrors the pixels of a frame; angles in between go to the nearest quarter turn.

    Args:
        pixels: [S, S, 3], square, so that it may be scaled before it is turned.
        frame: libav's, whose display matrix maps a pixel (x, y) to (ax + cy, bx + dy).

    Returns:
        A view of `pixels`.
    """
    from av.sidedata.sidedata import Type

    matrix = frame.side_data.get(Type.DISPLAYMATRIX)
    if matrix is None:
        return pixels
    a, b, _, c, d = (int(entry) for entry in np.frombuffer(bytes(matrix), np.int32, 5))
    across, down = a, d
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels, across, down = pixels.swapaxes(0, 1), c, b
    return pixels[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]
