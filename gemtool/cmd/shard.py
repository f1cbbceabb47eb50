"""gemtool shard: packed span streams -> a folder of shards."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from gemtool import log
from gemtool.cmd.options import Force, Inputs, NoPg, Part, Recover, common, parse_part
from gemtool.errors import UsageError, counted

if TYPE_CHECKING:
    from gemtool.data.sharding import ShardWriter

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}


class FileFormat(StrEnum):
    """Of the files of the folder."""

    arrow = "arrow"
    array_record = "array_record"


@common
def shard(
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="DIR", help="The folder to write.")
    ],
    inputs: Inputs = None,
    shard_size: Annotated[
        str,
        typer.Option(
            "--shard-size",
            metavar="SIZE",
            help="End a file with the sequence that reaches SIZE, as 512MiB, 2GB or plain bytes.",
        ),
    ] = "1GiB",
    chunk: Annotated[
        int | None,
        typer.Option(
            "--chunk",
            metavar="N",
            min=1,
            help="Positions that are stored, and can be read, as one: 4096, at most a sequence.",
        ),
    ] = None,
    media: Annotated[
        str,
        typer.Option(
            "--media",
            metavar="raw|png|jpeg:Q",
            help="Store pixels as they are, or as pictures: PNG (exact), JPEG of quality Q (small).",
        ),
    ] = "raw",
    to: Annotated[
        FileFormat,
        typer.Option("--to", help="Files to train from here, or ArrayRecord for other trainers."),
    ] = FileFormat.arrow,
    part: Part = None,
    force: Force = False,
    recover: Recover = False,
    no_pg: NoPg = False,
) -> None:
    """Write packed sequences as a folder of shards for training.

    The folder is complete once it has a manifest.json. Run again, the command continues where it
    was stopped, and leaves a complete folder as it is if it holds the same sequences; -f replaces
    one that holds others, once the new shards are whole.
    """
    from gemtool.data.pixels import PixelFormat
    from gemtool.data.shardfile import require_array_record
    from gemtool.data.sharding import create_shards
    from gemtool.stream.files import display_name
    from gemtool.stream.join import open_all_spans

    if output == "-":
        raise UsageError("shards are a folder and cannot go to standard output; use -o DIR")
    size = parse_size(shard_size)
    which = None if part is None else parse_part(part)
    pixels = PixelFormat.parse(media)
    if to is FileFormat.array_record:
        if chunk is not None:
            raise UsageError("--chunk is for --to arrow; an ArrayRecord record is a whole sequence")
        require_array_record()
    with open_all_spans(inputs, recover=recover) as spans:
        header = spans.header.derive("shard", pg=not no_pg)
        name = display_name(inputs[0] if inputs else None)
        with (
            create_shards(
                output,
                header,
                shard_size=size,
                chunk=chunk,
                part=which,
                pixels=pixels,
                file_format=to.value,
                force=force,
                name=name,
            ) as writer,
            log.progress("shard", unit="tokens") as bar,
        ):
            for span in spans:
                writer.append(span)
                bar.update(len(span.tokens))
    log.info(f"{output}{f', part {part}' if part else ''}: {summary(writer)}")


def summary(writer: ShardWriter) -> str:
    """What was written, or found to be there."""
    size = sum(file["bytes"] for file in writer.files)
    text = (
        f"{counted(writer.sequences, 'sequence')}, "
        f"{counted(sum(writer.tokens.values()), 'token')}, {counted(len(writer.files), 'file')}, "
        f"{size:,} bytes"
    )
    if writer.was_complete:
        return f"complete already: the same {text}"
    return f"{text}; {writer.kept} of them kept from before" if writer.kept else text


def parse_size(text: str) -> int:
    """Bytes of `512MiB`, `2 GB`, `1000000`.

    Raises:
        UsageError: not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise UsageError(f"--shard-size {text!r} is no size; write it as 512MiB, 2GB or 1000000")
    return int(float(match[1]) * unit)
