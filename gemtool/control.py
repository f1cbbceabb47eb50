"""Control tokens: the same ids in every vocabulary, so streams and checkpoints agree on them."""

from __future__ import annotations

UNK = 0
BOS = 1
EOD = 2
SYSTEM = 3
USER = 4
MODEL = 5
END_TURN = 6
IMAGE = 7
BEGIN_IMAGE = 8
END_IMAGE = 9
VIDEO = 10
BEGIN_FRAME = 11
END_FRAME = 12
AUDIO = 13
BEGIN_AUDIO = 14
END_AUDIO = 15

CONTROL_COUNT = 64
"""Ids below this are control tokens; the 256 byte pieces and the text pieces follow."""

_NAMED = (
    "<unk>",
    "<s>",
    "<eod>",
    "<system>",
    "<user>",
    "<model>",
    "<end_turn>",
    "<image>",
    "<begin_image>",
    "<end_image>",
    "<video>",
    "<begin_frame>",
    "<end_frame>",
    "<audio>",
    "<begin_audio>",
    "<end_audio>",
)
CONTROL_TOKENS: tuple[str, ...] = _NAMED + tuple(
    f"<reserved_{i}>" for i in range(len(_NAMED), CONTROL_COUNT)
)

PLACEHOLDERS = frozenset({IMAGE, VIDEO, AUDIO})
"""Tokens that stand for soft positions: the model puts an encoded patch or audio frame there."""

MEDIA_MARKERS = frozenset({BEGIN_IMAGE, END_IMAGE, BEGIN_FRAME, END_FRAME, BEGIN_AUDIO, END_AUDIO})
"""Begin and end of a run of soft positions."""

UNTRAINED_TARGETS = PLACEHOLDERS | MEDIA_MARKERS
"""Tokens whose default weight as a target is 0: they carry no information about text."""
