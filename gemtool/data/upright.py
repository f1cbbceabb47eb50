"""Pictures of a video as a player shows them: turned and mirrored as the file says."""

from __future__ import annotations

from typing import Any

import numpy as np

_Orientation = tuple[bool, int, int]
"""Whether rows and columns change places; then steps (1 or -1) through rows and columns."""


class Upright:
    """Turns and mirrors the frames of one stream."""

    def __init__(self) -> None:
        # libav's binding ties a frame whose side data was looked at into a reference cycle, which
        # would keep hundreds of pictures in memory: so it is looked at once for each angle.
        self._known: dict[int, _Orientation] = {}

    def apply(self, pixels: np.ndarray, frame: Any) -> np.ndarray:
        """A view of the pixels of a frame, upright; angles in between go to a quarter turn.

        Args:
            pixels: [S, S, 3], square, so that it may be scaled before it is turned.
            frame: libav's.
        """
        angle = frame.rotation
        if angle not in self._known:
            self._known[angle] = _orientation(frame)
        swapped, down, across = self._known[angle]
        return (pixels.swapaxes(0, 1) if swapped else pixels)[::down, ::across]


def _orientation(frame: Any) -> _Orientation:
    """From the display matrix, which maps a pixel (x, y) to (ax + cy, bx + dy)."""
    from av.sidedata.sidedata import Type

    matrix = frame.side_data.get(Type.DISPLAYMATRIX)
    if matrix is None:
        return False, 1, 1
    a, b, _, c, d = (int(entry) for entry in np.frombuffer(bytes(matrix), np.int32, 5))
    swapped = abs(b) + abs(c) > abs(a) + abs(d)
    across, down = (c, b) if swapped else (a, d)
    return swapped, -1 if down < 0 else 1, -1 if across < 0 else 1
