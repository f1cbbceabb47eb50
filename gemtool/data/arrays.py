"""Media spans as the arrays that a model's encoders take: in training batches and in prefill."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from gemtool.control import AUDIO, IMAGE, VIDEO
from gemtool.data.settings import FRAMES_PER_AUDIO_TOKEN, MELS, PATCH, MediaSettings
from gemtool.errors import CorruptInput
from gemtool.stream.spans import Span

ENCODERS = {"image": "visual", "video": "visual", "audio": "audio"}
"""Which encoder embeds the soft positions of a kind of span."""

_PLACEHOLDERS = {"image": IMAGE, "video": VIDEO, "audio": AUDIO}
_ROWS = {"visual": (PATCH, PATCH, 3), "audio": (FRAMES_PER_AUDIO_TOKEN, MELS)}
_DTYPES: dict[str, np.dtype] = {"visual": np.dtype(np.uint8), "audio": np.dtype(np.float16)}


@dataclass(frozen=True)
class Groups:
    """Soft tokens of one encoder, in groups of P: a tile, a frame or a second of audio each.

    `values`  [N, P, F]: uint8 pixels (F = 588) or float16 log-mel (F = 320).
    `at`      int32 [N], position of the first soft token.
    `rows`    int32 [N], how many of the P rows are real; the others are zeros.
    """

    values: np.ndarray
    at: np.ndarray
    rows: np.ndarray


def group_rows(encoder: str, settings: MediaSettings) -> int:
    """P: soft tokens of a whole group."""
    return settings.image_soft if encoder == "visual" else settings.audio_rate


def no_groups(encoder: str, settings: MediaSettings, count: int, absent: int) -> Groups:
    """`count` groups without content, all `at` position `absent`."""
    shape = (count, group_rows(encoder, settings), math.prod(_ROWS[encoder]))
    return Groups(
        np.zeros(shape, _DTYPES[encoder]),
        np.full(count, absent, np.int32),
        np.zeros(count, np.int32),
    )


def media_groups(span: Span, settings: MediaSettings) -> Groups | None:
    """The groups of a media span, `at` counted from its first token; None for text and control.

    Raises:
        CorruptInput: the payload does not fit the placeholders, or other settings made it.
    """
    encoder = ENCODERS.get(span.kind)
    if encoder is None:
        return None
    soft = np.flatnonzero(span.tokens == _PLACEHOLDERS[span.kind])
    if not len(soft):
        return None
    where = f"{span.doc}: span {span.span} ({span.kind})"
    if soft[-1] - soft[0] + 1 != len(soft):
        raise CorruptInput(f"{where}: its placeholders are not one run")
    row, dtype = _ROWS[encoder], _DTYPES[encoder]
    expected = (len(soft), *row)
    if span.payload is None or span.payload.shape != expected or span.payload.dtype != dtype:
        found = span.payload
        said = "no payload" if found is None else f"a payload {found.dtype} {list(found.shape)}"
        raise CorruptInput(f"{where}: {said} for its placeholders; expected {dtype} {[*expected]}")
    size = group_rows(encoder, settings)
    count = -(-len(soft) // size)
    features = span.payload.reshape(len(soft), -1)
    if count * size == len(soft):
        values = features.reshape(count, size, -1)
    else:
        values = np.zeros((count, size, features.shape[1]), dtype)
        values.reshape(count * size, -1)[: len(soft)] = features
    first = np.arange(count, dtype=np.int32) * size
    rows = np.minimum(len(soft) - first, size).astype(np.int32)
    return Groups(values, (soft[0] + first).astype(np.int32), rows)
