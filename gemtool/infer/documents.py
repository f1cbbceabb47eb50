"""What prefill and scoring read: the documents of span streams, checked against a checkpoint."""

from __future__ import annotations

import itertools
import json
import mmap
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from gemtool import log
from gemtool.checkpoint import Checkpoint
from gemtool.control import EOD
from gemtool.errors import CorruptInput, GemtoolError
from gemtool.stream.checked import ARROW_MAGIC
from gemtool.stream.files import is_stdin
from gemtool.stream.jsonl import FOOTER_LINE
from gemtool.stream.spans import Header, Span


def require_settings(header: Header, checkpoint: Checkpoint, name: str) -> None:
    """Refuses a stream that was not tokenized for this checkpoint, or that is packed.

    Raises:
        CorruptInput: it is packed.
        GemtoolError: naming what differs and how to get it right.
    """
    if header.packed is not None:
        raise CorruptInput(
            f"{name}: packed (length {header.packed['length']:,}); a context is made of whole "
            "documents, so give prefill the output of `gemtool tokenize`"
        )
    again = f"tokenize again with --for {checkpoint.path}"
    fingerprint = header.vocab.get("fingerprint")
    if fingerprint is None:
        log.warning(
            f"{name}: does not say which vocabulary made its tokens; taken to be the checkpoint's"
        )
    elif fingerprint != checkpoint.vocab.fingerprint:
        raise GemtoolError(
            f"{name}: its vocabulary is {fingerprint}, the checkpoint's "
            f"{checkpoint.vocab.fingerprint}; {again}"
        )
    for key, wanted in checkpoint.settings.structural().items():
        found = header.settings.get(key, wanted)
        if found != wanted:
            raise GemtoolError(f"{name}: its {key} is {found}, the checkpoint's {wanted}; {again}")


def documents(spans: Iterable[Span], name: str) -> Iterator[tuple[str, Iterator[Span]]]:
    """Document ids and their spans, without the end-of-document token; empty documents are skipped.

    A document's spans must be used up before the next one is asked for.

    Raises:
        CorruptInput: a span belongs to a packed sequence.
    """
    number = 0

    def key(span: Span) -> tuple[int, str]:
        nonlocal number
        if span.seq is not None:
            raise CorruptInput(
                f"{name}: document {span.doc!r} is packed; give prefill the output of "
                "`gemtool tokenize`"
            )
        number += span.span == 0 and span.start == 0
        return number, span.doc

    for (_, doc), group in itertools.groupby(spans, key):
        document = _without_end(group)
        first = next(document, None)
        if first is None:
            log.warning(f"{name}: document {doc!r} is empty; skipped")
        else:
            yield doc, itertools.chain([first], document)


def _without_end(spans: Iterable[Span]) -> Iterator[Span]:
    held: Span | None = None
    for span in spans:
        if held is not None:
            yield held
        held = span
    if held is not None and len(held.tokens) and held.tokens[-1] == EOD:
        held = replace(held, tokens=held.tokens[:-1], loss=None)
    if held is not None and len(held.tokens):
        yield held


def expected(paths: list[str] | None) -> tuple[int, int] | None:
    """Documents and tokens of span streams by their footers, without reading their data.

    None where that cannot be known: pipes, JSONL without footers, damage, which the reader will report.
    With this, progress has an end.
    """
    counts = [_expected(path) for path in paths or ["-"]]
    known = [count for count in counts if count is not None]
    if len(known) < len(counts):
        return None
    return sum(documents for documents, _ in known), sum(tokens for _, tokens in known)


def _expected(path: str) -> tuple[int, int] | None:
    file = Path("/dev/stdin" if is_stdin(path) else path)  # which may be redirected
    if not file.is_file():
        return None
    found = tokens = 0
    try:
        for footer in _footers(file):
            found, tokens = found + footer["documents"], tokens + footer["tokens"]
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError):
        return None
    return (found, tokens) if found else None


def _footers(path: Path) -> Iterator[dict[str, Any]]:
    """Of the streams in a file; raises ValueError, and what Arrow does, of damage."""
    with pa.memory_map(os.fsencode(path)) as file:
        is_arrow = file.read(4) == ARROW_MAGIC
        file.seek(0)
        while is_arrow and file.tell() < file.size():
            for _, metadata in pa.ipc.open_stream(file).iter_batches_with_custom_metadata():
                encoded = None if metadata is None else metadata.get(b"gemtool.footer")
                if encoded is not None:
                    if str(zlib.crc32(encoded)).encode() != metadata.get(b"crc32"):
                        raise ValueError("damaged")
                    yield json.loads(encoded)
    if is_arrow:
        return
    with path.open("rb") as lines, mmap.mmap(lines.fileno(), 0, access=mmap.ACCESS_READ) as text:
        at = text.find(FOOTER_LINE)
        while at >= 0:
            text.seek(at + 1)
            yield json.loads(text.readline())["footer"]
            at = text.find(FOOTER_LINE, at + 1)
