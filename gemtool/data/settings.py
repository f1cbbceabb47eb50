"""How media becomes tokens. The settings travel with a stream, its shards and the checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from gemtool.errors import GemtoolError, did_you_mean

PATCH = 14
"""Side of a square visual patch, in pixels."""

MELS = 80
FRAMES_PER_AUDIO_TOKEN = 4


@dataclass(frozen=True)
class MediaSettings:
    """Token budgets of the Gemini 1.5 report and API (arXiv 2403.05530)."""

    image_tokens: int = 258
    """Tokens of an image tile or video frame with its two markers: 258, or 66 at low resolution."""
    tiles: bool = True
    """Cut images larger than 384 pixels into tiles."""
    fps: float = 1.0
    """Video frames sampled each second."""
    audio_rate: int = 25
    """Audio tokens a second: 25 (the report) or 32 (the API)."""
    audio: bool = True
    """Tokenize the sound of a video."""
    timestamps: bool = True
    """Put the time, `MM:SS`, before each video frame."""
    subtitles: bool = False
    """Put the text of a video's subtitles into the second in which they begin."""

    def __post_init__(self) -> None:
        if self.image_tokens not in (258, 66):
            raise GemtoolError(f"image_tokens is {self.image_tokens}; expected 258 or 66")
        if self.audio_rate not in (25, 32):
            raise GemtoolError(f"audio_rate is {self.audio_rate}; expected 25 or 32")
        if not 1e-9 <= self.fps <= 120:  # times beyond 30 years would not fit the stream
            raise GemtoolError(f"fps is {self.fps}; expected 1e-9 to 120")

    @property
    def image_soft(self) -> int:
        """Soft positions (patches) of a tile or frame: 256 or 64."""
        return self.image_tokens - 2

    @property
    def image_size(self) -> int:
        """Side in pixels to which a tile or frame is scaled: 224 or 112."""
        return PATCH * int(self.image_soft**0.5)

    @property
    def audio_hop(self) -> int:
        """Samples at 16 kHz between log-mel frames: 160 (10 ms) or 125."""
        return 16000 // (self.audio_rate * FRAMES_PER_AUDIO_TOKEN)

    def structural(self) -> dict[str, Any]:
        """The settings a model depends on: with others, its encoders would read nonsense."""
        return {"image_tokens": self.image_tokens, "audio_rate": self.audio_rate}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MediaSettings:
        """Raises GemtoolError for a key that is no setting."""
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise GemtoolError(f"unknown media setting {key!r}{did_you_mean(key, known)}")
        return cls(**values)
