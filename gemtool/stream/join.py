"""Several span streams read as one: what `pack` and `shard` take as inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gemtool.errors import GemtoolError
from gemtool.stream.files import display_name, is_stdin
from gemtool.stream.header import Header, require_same
from gemtool.stream.spans import Span, SpanReader, open_spans


class JoinedSpans:
    """The spans of all inputs, one after the other; the header is the first one's."""

    def __init__(self, first: SpanReader, paths: list[str | None], recover: bool) -> None:
        self.header: Header = first.header
        self.footer: dict[str, Any] = {}
        self._first, self._paths, self._recover = first, paths, recover

    def __iter__(self) -> Iterator[Span]:
        yield from self._first
        for path in self._paths[1:]:
            with open_spans(path, recover=self._recover) as reader:
                require_same(self.header, reader.header, display_name(path))
                yield from reader


@contextlib.contextmanager
def open_all_spans(inputs: list[str] | None, *, recover: bool = False) -> Iterator[JoinedSpans]:
    """Opens span streams (none given: stdin) to be read in order, each when its turn comes.

    Raises:
        GemtoolError: a file is missing, or a stream has another vocabulary, media settings or
            packed length than the first.
        CorruptInput: as `open_spans`.
    """
    paths: list[str | None] = [*inputs] if inputs else [None]
    for path in paths:
        if path is not None and not is_stdin(path) and not Path(path).exists():
            raise GemtoolError(f"{path}: no such file")
    with open_spans(paths[0], recover=recover) as first:
        yield JoinedSpans(first, paths, recover)
