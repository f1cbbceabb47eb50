"""gemtool view: describe or print anything gemtool writes, for a person or for jq."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemtool import log
from gemtool.cmd.options import Force, Input, Recover, common
from gemtool.errors import CorruptInput, UsageError, counted

if TYPE_CHECKING:
    from gemtool.data.vocab import Vocab
    from gemtool.stream.checked import Source
    from gemtool.stream.context import ContextReader
    from gemtool.stream.spans import Header, Span


class Mode(StrEnum):
    """What to show."""

    table = "table"
    header = "header"
    jsonl = "jsonl"
    stats = "stats"
    verify = "verify"
    frames = "frames"


@dataclass(frozen=True)
class Request:
    """What to show, and with what."""

    mode: Mode
    vocab: Path | None = None
    frames: Path | None = None
    force: bool = False

    def refuse_frames(self, name: str, what: str) -> None:
        """Raises UsageError if pictures and sound are asked of what holds none."""
        if self.mode is Mode.frames:
            raise UsageError(
                f"{name}: {what} holds no pictures and no sound; --frames is for span streams and "
                "shards"
            )


@common
def view(
    input: Input = None,
    header: Annotated[bool, typer.Option("--header", help="The header, as JSON.")] = False,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="The rows, as JSONL.")] = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="Counts, durations and waste, as JSON.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read everything and check every checksum.")
    ] = False,
    frames: Annotated[
        Path | None,
        typer.Option(
            "--frames", metavar="DIR", help="Write pictures and sound to DIR, as PNG and .npy."
        ),
    ] = None,
    vocab: Annotated[
        Path | None,
        typer.Option("--vocab", metavar="MODEL", help="The vocabulary to show tokens as text."),
    ] = None,
    force: Force = False,
    recover: Recover = False,
) -> None:
    """Describe or print streams, contexts, shards, runs and checkpoints."""
    flags = {
        Mode.header: header,
        Mode.jsonl: jsonl,
        Mode.stats: stats,
        Mode.verify: verify,
        Mode.frames: frames is not None,
    }
    chosen = [mode for mode, flag in flags.items() if flag]
    if len(chosen) > 1:
        raise UsageError(" and ".join(f"--{mode}" for mode in chosen) + " exclude each other")
    request = Request(chosen[0] if chosen else Mode.table, vocab, frames, force)
    if verify and recover:
        raise UsageError("--verify reports damage that --recover would pass over; give one of them")
    if input is not None and Path(input).is_dir():
        if recover:
            raise UsageError("--recover is for span streams; a folder has no truncated end")
        lines = view_folder(Path(input), request)
    else:
        lines = view_stream(input, request, recover)
    for line in lines:
        print(line)


def view_folder(folder: Path, request: Request) -> Iterator[str]:
    """Lines about a shard folder, a training run or a checkpoint."""
    from gemtool.data.manifest import is_shard_folder

    if (folder / "config.toml").exists():
        return view_checkpoint(folder, request)
    if is_shard_folder(folder):
        return view_shards(folder, request)
    raise CorruptInput(
        f"{folder}: neither shards (no manifest.json) nor a checkpoint (no config.toml)"
    )


def view_stream(path: str | None, request: Request, recover: bool) -> Iterator[str]:
    """Lines about a span stream or contexts, from a file or stdin."""
    from gemtool.stream.checked import Source, stream_kind
    from gemtool.stream.files import display_name, is_stdin, open_input
    from gemtool.stream.spans import read_spans

    name = display_name(path)
    with open_input(path) as file:
        source = Source(file)
        if stream_kind(source) == "context":
            if recover:
                raise UsageError("--recover is for span streams; half a context answers nothing")
            folder = Path() if is_stdin(path) else Path(str(path)).parent
            yield from view_contexts(source, name, request, folder)
            return
        reader = read_spans(source, name, recover=recover)
        yield from view_spans(reader, reader.header, request, name)


# Span streams and shards


def view_spans(spans: Iterable[Span], header: Header, request: Request, name: str) -> Iterator[str]:
    """Lines about spans, whether they come from a pipe or from shards."""
    from gemtool.stream.jsonl import span_to_dict

    mode = request.mode
    if request.frames is not None:
        from gemtool.data.frames import write_frames

        count = write_frames(spans, request.frames, force=request.force)
        log.info(f"{request.frames}: {counted(count, 'picture')}, listed in frames.jsonl")
    elif mode is Mode.header:
        yield to_json(header.to_dict())
    elif mode is Mode.jsonl:
        for span in spans:
            yield to_json(span_to_dict(span))
    elif mode is Mode.table:
        rows = span_table(spans, find_vocab(request.vocab, header))
        yield from aligned(rows) if sys.stdout.isatty() else map("\t".join, rows)
    else:
        found = span_stats(spans, header.packed)
        if mode is Mode.verify:
            tokens = counted(found["tokens"]["total"], "token")
            yield f"{name}: ok, {counted(found['spans'], 'span')}, {tokens}"
        else:
            yield to_json(found)


def span_stats(spans: Iterable[Span], packed: Mapping[str, Any] | None) -> dict[str, Any]:
    """Counts of a span stream; packed streams also have their sequences and waste."""
    from gemtool.stream.spans import KINDS

    kinds = dict.fromkeys(KINDS, 0)
    seconds = {"audio": 0.0, "video": 0.0}
    documents = rows = sequences = 0
    for span in spans:
        rows += 1
        documents += span.span == 0 and span.start == 0
        kinds[span.kind] += len(span.tokens)
        if span.time is not None and span.kind in seconds:
            seconds[span.kind] += (span.time[1] - span.time[0]) / 1e6
        sequences += span.offset == 0  # numbers repeat where packed streams were joined
    total = sum(kinds.values())
    result: dict[str, Any] = {
        "documents": documents,
        "spans": rows,
        "tokens": {**kinds, "total": total},
        "seconds": {kind: round(value, 3) for kind, value in seconds.items()},
    }
    if packed is not None:
        room = sequences * int(packed["length"])
        result["packed"] = {
            "length": packed["length"],
            "sequences": sequences,
            "waste": round(1 - total / room, 6) if room else 0.0,
        }
    return result


def span_table(spans: Iterable[Span], vocab: Vocab | None) -> Iterator[list[str]]:
    """A row a span, with what its tokens say; the first row has the names."""
    yield ["doc", "span", "kind", "tokens", "start", "time", "place", "content"]
    for span in spans:
        time = "" if span.time is None else f"{span.time[0] / 1e6:.2f}-{span.time[1] / 1e6:.2f}"
        place = "" if span.seq is None else f"{span.seq}:{span.offset}/{span.segment}"
        row = (escaped(span.doc), span.span, span.kind, len(span.tokens), span.start, time, place)
        yield [*map(str, row), preview(span, vocab)]


def aligned(rows: Iterable[list[str]], ahead: int = 50) -> Iterator[str]:
    """Rows as lines of a terminal: columns as wide as the first rows need, the last one cut.

    Args:
        rows: of equally many cells.
        ahead: rows that are looked at before the first is given.
    """
    rows = iter(rows)
    first = list(itertools.islice(rows, ahead))
    widths = [max(map(len, column)) for column in zip(*first, strict=True)]
    room = shutil.get_terminal_size().columns
    for row in itertools.chain(first, rows):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield line.rstrip()[:room]


def preview(span: Span, vocab: Vocab | None, width: int = 60) -> str:
    """The beginning of a span's text, the names of its control tokens, or its payload's shape."""
    from gemtool.control import CONTROL_COUNT, CONTROL_TOKENS

    if span.payload is not None:
        return f"{span.payload.dtype.name} {list(span.payload.shape)}"
    head = span.tokens[:width].tolist()
    if span.kind == "control":
        return " ".join(CONTROL_TOKENS[t] if t < CONTROL_COUNT else str(t) for t in head)
    if vocab is None:
        return " ".join(map(str, head))[:width]
    text = escaped(vocab.decode(head))
    return text if len(text) <= width else text[: width - 1] + "…"


def escaped(text: str) -> str:
    """Text on one line, in which nothing commands a terminal."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def find_vocab(path: Path | None, header: Header) -> Vocab | None:
    """The vocabulary named, or the shipped one if the stream was made with it."""
    from gemtool.data.vocab import Vocab

    vocab = Vocab.load(path)
    return vocab if path or vocab.fingerprint == header.vocab.get("fingerprint") else None


def view_shards(folder: Path, request: Request) -> Iterator[str]:
    """Lines about a shard folder; the header is its manifest."""
    from gemtool.data.shards import ShardFolder
    from gemtool.stream.spans import Header

    shards = ShardFolder(folder)
    if request.mode is Mode.header:
        yield to_json(shards.manifest)
        return
    if request.mode is Mode.verify:
        shards.verify()
    header = Header.from_dict({**shards.manifest, "packed": {"length": shards.length}})
    spans = (span for i in range(len(shards)) for span in shards[i])
    yield from view_spans(spans, header, request, str(folder))


# Contexts


def view_contexts(source: Source, name: str, request: Request, folder: Path) -> Iterator[str]:
    """Lines about the contexts of a file in `folder`, one document each."""
    from gemtool.stream.context import read_contexts
    from gemtool.stream.lineage import whole_parts

    request.refuse_frames(name, "a context")
    mode = request.mode
    for context in read_contexts(source, name, folder):
        if mode is Mode.header:
            yield to_json(context.header.to_dict())
            continue
        if mode is Mode.jsonl:
            for row in context.rows():
                yield to_json(row.describe())
            continue
        if mode is Mode.verify:
            for _ in whole_parts(context):
                pass
            yield (
                f"{name}: {escaped(context.footer['doc'])}: ok, {context.footer['length']:,} tokens, "
                f"id {context.id}"
            )
            continue
        found = context_stats(context)
        if mode is Mode.stats:
            yield to_json(found)
        else:
            yield from pairs(found)


def context_stats(context: ContextReader) -> dict[str, Any]:
    """Length, kinds, identity and the bytes of each part of a context, all of it verified."""
    sizes: dict[str, int] = {}
    for row in context.rows():
        key = f"{row.part}/{row.name}"
        sizes[key] = sizes.get(key, 0) + row.data.nbytes
    return {
        "doc": context.footer["doc"],
        "id": context.id,
        "length": context.footer["length"],
        "kinds": context.footer["kinds"],
        "model": context.header.model,
        "parent": context.header.to_dict()["parent"],
        "start": context.header.start,
        "bytes": sizes,
    }


# Checkpoints


def view_checkpoint(folder: Path, request: Request) -> Iterator[str]:
    """Lines about a checkpoint or a training run."""
    from gemtool.checkpoint import open_checkpoint

    request.refuse_frames(str(folder), "a checkpoint")
    mode = request.mode
    checkpoint = open_checkpoint(str(folder))
    if mode is Mode.header:
        yield (folder / "config.toml").read_text("utf-8").rstrip()
    elif mode is Mode.jsonl:
        for name, tensor in sorted(checkpoint.tensors().items()):
            yield to_json({"name": name, "shape": list(tensor.shape), "dtype": tensor.dtype.name})
    elif mode is Mode.verify:
        checkpoint.verify()
        if not checkpoint.card:
            raise CorruptInput(
                f"{folder / 'card.json'}: missing, or of another save than the weights; copy the "
                "checkpoint again"
            )
        yield f"{folder}: ok, fingerprint {checkpoint.fingerprint}"
    else:
        total = sum(tensor.size for tensor in checkpoint.tensors().values())
        found = {
            "model": checkpoint.config.name,
            "parameters": total,
            "fingerprint": checkpoint.fingerprint,
            "step": checkpoint.step,
            **checkpoint.card,
        }
        if (states := saved_states(folder)) is not None:
            found["states"] = states
        if mode is Mode.stats:
            yield to_json(found)
        else:
            yield from pairs(found)


def saved_states(folder: Path) -> list[int] | None:
    """Steps from which a training run can go on; None if the folder is no run."""
    state = folder / "state"
    if not state.is_dir():
        return None
    return sorted(int(entry.name) for entry in state.iterdir() if entry.name.isdecimal())


def pairs(values: Mapping[str, Any]) -> Iterator[str]:
    """A line a value, behind its name and a tab."""
    for key, value in values.items():
        yield f"{key}\t{escaped(value) if isinstance(value, str) else to_json(value)}"


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
