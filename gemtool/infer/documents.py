"""What prefill and scoring read: the documents of span streams, checked against a checkpoint."""

from __future__ import annotations

import itertools
import json
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


JSONL_BYTES = 1 << 30
"""Of JSONL, at most, that is gone through to know how much there is: a quarter of a second."""


def expected(paths: list[str] | None) -> tuple[int, int] | None:
    """Documents and tokens of span streams as their footers say, which nobody has verified: for
    progress, and to make room.

    None where that cannot be known: pipes, JSONL without footers or of over `JSONL_BYTES`, damage,
    which the reader will report. To be called before anything is read of standard input.
    """
    counts = [_expected(path) for path in paths or ["-"]]
    known = [count for count in counts if count is not None]
    if len(known) < len(counts):
        return None
    return sum(documents for documents, _ in known), sum(tokens for _, tokens in known)


def _expected(path: str) -> tuple[int, int] | None:
    file = Path("/dev/stdin" if is_stdin(path) else path)  # which may be redirected
    found = tokens = 0
    try:
        if not file.is_file() or (is_stdin(path) and os.lseek(0, 0, os.SEEK_CUR)):
            return None
        size = file.stat().st_size
        for footer in _footers(file, size):
            found, tokens = found + footer["documents"], tokens + footer["tokens"]
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    # A token takes more than a byte in any format.
    return (found, tokens) if isinstance(tokens, int) and 0 < found <= tokens < size else None


def _footers(path: Path, size: int) -> Iterator[dict[str, Any]]:
    """Of the streams in a file; raises ValueError, and what Arrow does, of damage."""
    with path.open("rb") as lines:
        if lines.read(4) != ARROW_MAGIC:
            lines.seek(0)
            for line in lines if size <= JSONL_BYTES else ():
                if line.startswith(FOOTER_LINE):
                    yield json.loads(line)["footer"]
            return
    with pa.memory_map(os.fsencode(path)) as file:
        while file.tell() < file.size():
            for _, metadata in pa.ipc.open_stream(file).iter_batches_with_custom_metadata():
                encoded = None if metadata is None else metadata.get(b"gemtool.footer")
                if encoded is not None:
                    if str(zlib.crc32(encoded)).encode() != metadata.get(b"crc32"):
                        raise ValueError("damaged")
                    yield json.loads(encoded)
