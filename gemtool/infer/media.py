"""What a prompt shows besides its text: files of images, sound and video -> spans, as they stand in a
document."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from gemtool.checkpoint import Checkpoint
from gemtool.data.documents import spans_of_documents
from gemtool.data.inputs import list_inputs, read_documents
from gemtool.data.sniff import Modality
from gemtool.errors import UsageError
from gemtool.infer.documents import documents, require_settings
from gemtool.stream.checked import ARROW_MAGIC
from gemtool.stream.files import is_stdin
from gemtool.stream.spans import Span, open_spans


def media_files(paths: Sequence[str]) -> tuple[str, ...]:
    """Files to show, folders replaced by the files in them.

    Raises:
        UsageError: standard input is among them.
        GemtoolError: a file does not exist, or a folder holds nothing.
    """
    if any(map(is_stdin, paths)):
        raise UsageError("media cannot come from standard input; name a file")
    return tuple(list_inputs(paths, Modality.auto))


def read_media(paths: Iterable[str], checkpoint: Checkpoint) -> Iterator[Span]:
    """The spans of what `gemtool tokenize` reads, or wrote as Arrow, one file after the other and
    without the ends of documents; settings and vocabulary are the checkpoint's.

    Raises:
        GemtoolError: a file cannot be read, or a span stream was made for another checkpoint.
        CorruptInput: a file is damaged or of no known kind.
    """
    for path in paths:
        if _is_arrow(path):
            with open_spans(path) as spans:
                require_settings(spans.header, checkpoint, path)
                for _, document in documents(spans, path):
                    yield from document
        else:
            read = read_documents([path], checkpoint.settings)
            for _, document in documents(spans_of_documents(read, checkpoint.vocab), path):
                yield from document


def _is_arrow(path: str) -> bool:
    if not Path(path).is_file():
        return False  # a FIFO can be opened once
    with Path(path).open("rb") as file:
        return file.read(len(ARROW_MAGIC)) == ARROW_MAGIC
