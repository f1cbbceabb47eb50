"""When the frames of a video are shown, whatever its timestamps are worth."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from av import VideoFrame


class Clock:
    """Ticks of the stream's time base since the picture began, from timestamps of any quality."""

    def __init__(self, stream: Any, longest_gap: int) -> None:
        time_base = Fraction(stream.time_base)
        rate = stream.average_rate or stream.guessed_rate
        self.origin: int | None = stream.start_time
        self.step: float = float(1 / (rate * time_base)) if rate else 1.0
        """Ticks from one frame to the next, usually."""
        self.longest_gap = int(longest_gap / time_base)
        self._last: float | None = None
        self._shift: float = 0
        self._last_pts: int | None = None
        self._last_dts: int | None = None
        self._wrong_pts = 0
        self._wrong_dts = 0

    @property
    def now(self) -> float:
        """The tick of the last frame."""
        return self._last or 0.0

    def place(self, frame: VideoFrame) -> tuple[int, bool]:
        """The tick of the next frame, and whether its timestamp could be believed.

        A frame without a timestamp, before its predecessor or after a jump follows one step after
        the last, and those after it keep their distance from it.
        """
        time, steady = self._time_of(frame)
        if self.origin is None:
            self.origin = time or 0
        last = self._last
        if time is None:
            at = 0 if last is None else last + self.step
        else:
            at = time - self.origin + self._shift
        if last is not None and not 0 <= at - last <= self.longest_gap:
            self._shift += last + self.step - at
            at = last + self.step
            steady = False
        self._last = at
        return int(at), steady

    def _time_of(self, frame: VideoFrame) -> tuple[int | None, bool]:
        """Its pts; or its dts, where those have been in order more often (AVI has no pts)."""
        pts, dts = frame.pts, frame.dts
        if pts is None or (self._last_pts is not None and pts <= self._last_pts):
            self._wrong_pts += 1
        if dts is None or (self._last_dts is not None and dts <= self._last_dts):
            self._wrong_dts += 1
        self._last_pts = self._last_pts if pts is None else pts
        self._last_dts = self._last_dts if dts is None else dts
        if pts is None or self._wrong_pts > self._wrong_dts:
            return (pts if dts is None else dts), False
        return pts, True

    def pass_to(self, tick: int) -> None:
        """Goes over frames that are not decoded."""
        self._last = tick
