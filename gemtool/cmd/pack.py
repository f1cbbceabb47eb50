"""gemtool pack: documents of span streams -> sequences of one length."""

from __future__ import annotations

from typing import Annotated

import typer

from gemtool import log
from gemtool.cmd.options import Force, Format, Inputs, NoPg, Output, Recover, StreamFormat, common


@common
def pack(
    inputs: Inputs = None,
    length: Annotated[
        int, typer.Option("--length", metavar="N", min=1, max=1 << 27, help="Tokens in a sequence.")
    ] = 8192,
    open_bins: Annotated[
        int,
        typer.Option(
            "--open-bins",
            metavar="N",
            min=1,
            help="Sequences that wait for documents: more waste less and take more memory or disk.",
        ),
    ] = 16,
    format: Format = StreamFormat.arrow,
    output: Output = None,
    force: Force = False,
    recover: Recover = False,
    no_pg: NoPg = False,
) -> None:
    """Pack the documents of span streams into sequences of one length.

    No token is lost: documents longer than a sequence are cut where sequences end, shorter ones
    go whole into the open sequence that they fill best. Images, video frames and audio are never
    cut. Attention does not cross from one document of a sequence to another.
    """
    from gemtool.data.packing import Packer
    from gemtool.errors import CorruptInput
    from gemtool.stream.files import display_name
    from gemtool.stream.join import open_all_spans
    from gemtool.stream.spans import create_spans

    with open_all_spans(inputs, recover=recover) as spans:
        if spans.header.packed is not None:
            name = display_name(inputs[0] if inputs else None)
            raise CorruptInput(
                f"{name}: packed already (length {spans.header.packed['length']:,}); "
                "pack the output of `gemtool tokenize`"
            )
        header = spans.header.derive("pack", pg=not no_pg, packed={"length": length})
        packer = Packer(length, open_bins)
        with (
            create_spans(output, header, format=format, force=force) as writer,
            log.progress("pack", unit="tokens") as bar,
        ):
            for span in packer.pack(spans):
                writer.append(span)
                bar.update(len(span.tokens))
    log.info(
        f"packed {packer.documents:,} documents, {packer.tokens:,} tokens into "
        f"{packer.sequences:,} sequences of {length:,}; {packer.waste:.2%} of positions empty"
    )
