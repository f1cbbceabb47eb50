"""Spans as columns: what reads many of them at once needs no Python object for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, overload

import numpy as np
import pyarrow as pa

from gemtool.stream.columns import fixed_view, list_view
from gemtool.stream.spans import (
    KINDS,
    SPAN_SCHEMA,
    Decoder,
    Span,
    batch_of,
    default_weights,
    spans_of,
)

_TOKENS = SPAN_SCHEMA.get_field_index("tokens")
_TEXT = KINDS.index("text")
_MEDIA = np.array([kind in ("image", "video", "audio") for kind in KINDS])


class Rows(Sequence[Span]):
    """The spans of one packed sequence: as columns, or one by one as a sequence of `Span`.

    Columns are made when they are asked for. They are views of the memory of the batches where
    there is one batch, and copies where there are several.

    Args:
        batches: of SPAN_SCHEMA, checked; whole as they were read or made, not slices.
        seq: the number that the spans get, if not their own.
        decoder: turns stored payloads into arrays; see `spans_of`.
    """

    def __init__(
        self,
        batches: Sequence[pa.RecordBatch],
        *,
        seq: int | None = None,
        decoder: Decoder | None = None,
    ) -> None:
        self._batches = [batch for batch in batches if batch.num_rows]
        self._seq, self._decoder = seq, decoder

    def __len__(self) -> int:
        return sum(batch.num_rows for batch in self._batches)

    def __iter__(self) -> Iterator[Span]:
        for batch in self._batches:
            for span in spans_of(batch, self._decoder):
                if self._seq is not None:
                    span.seq = self._seq
                yield span

    @overload
    def __getitem__(self, index: int) -> Span: ...
    @overload
    def __getitem__(self, index: slice) -> list[Span]: ...
    def __getitem__(self, index: int | slice) -> Span | list[Span]:
        return list(self)[index]

    @cached_property
    def tokens(self) -> np.ndarray:
        """int32 [n]: the tokens of all spans, one after the other."""
        return _join([_values(b.column(_TOKENS)) for b in self._batches], np.int32)

    def documents(self) -> Iterator[pa.DictionaryArray]:
        """The document of each span, batch by batch."""
        for batch in self._batches:
            yield batch.column("doc").dictionary_encode()

    @cached_property
    def counts(self) -> np.ndarray:
        """int64 [rows]: tokens of each span."""
        return _join([_counts(batch.column(_TOKENS)) for batch in self._batches], np.int64)

    @cached_property
    def positions(self) -> np.ndarray:
        """int64 [n]: the place of each token in its packed sequence."""
        ends = np.cumsum(self.counts)
        shift = self._fixed("offset", np.int64) - (ends - self.counts)
        return np.arange(ends[-1] if len(ends) else 0) + np.repeat(shift, self.counts)

    @cached_property
    def segments(self) -> np.ndarray:
        """int32 [n]: the segment of each token."""
        return np.repeat(self._fixed("segment", np.int32), self.counts)

    def weights(self) -> np.ndarray:
        """float32 [n]: the weight of each token as a target, as `Span.weights`."""
        is_text = np.repeat(self._kinds == _TEXT, self.counts)
        weights = np.where(is_text, np.float32(1), default_weights(self.tokens))
        if any(batch.column("loss").null_count < batch.num_rows for batch in self._batches):
            columns = [batch.column("loss") for batch in self._batches]
            given = _join([np.asarray(column.is_valid()) for column in columns], np.bool_)
            weights[np.repeat(given, self.counts)] = _join([*map(_values, columns)], np.float32)
        return weights

    def media(self) -> Iterator[Span]:
        """The spans of images, video and audio."""
        if _MEDIA[self._kinds].any():
            for span in self:
                if _MEDIA[KINDS.index(span.kind)]:
                    yield span

    @cached_property
    def _kinds(self) -> np.ndarray:
        return _join(
            [fixed_view(b.column("kind").indices, np.int8) for b in self._batches], np.int8
        )

    def _fixed(self, name: str, dtype: Any) -> np.ndarray:
        return _join([fixed_view(batch.column(name), dtype) for batch in self._batches], dtype)


def rows_of(spans: Sequence[Span]) -> Rows:
    """Spans as `Rows`, which they may be already."""
    return spans if isinstance(spans, Rows) else Rows([batch_of([*spans])])


def _values(column: pa.Array) -> np.ndarray:
    return column.values.to_numpy()


def _counts(column: pa.Array) -> np.ndarray:
    return np.diff(list_view(column, np.int32)[1])


def _join(arrays: list[np.ndarray], dtype: Any) -> np.ndarray:
    if len(arrays) == 1:
        return arrays[0]
    return np.concatenate(arrays) if arrays else np.empty(0, dtype)
