"""gemtool prefill: documents of span streams -> contexts, one a document."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import typer

from gemtool import log
from gemtool.cmd.options import (
    CompiledLength,
    CompiledModel,
    CompileOnly,
    Force,
    Inputs,
    Mesh,
    NoPg,
    Output,
    Recover,
    Topology,
    common,
    compiled,
    require_given,
)
from gemtool.errors import GemtoolError, UsageError, counted, reason


@common
def prefill(
    inputs: Inputs = None,
    ckpt: Annotated[
        str | None, typer.Option("--ckpt", metavar="CKPT", help="Checkpoint folder of the model.")
    ] = None,
    chunk: Annotated[
        int | None,
        typer.Option(
            "--chunk",
            metavar="N",
            min=1,
            help="Tokens computed at a time: memory and speed, not results, depend on it. "
            "Default: 512 to 2048, by what suits the model.",
        ),
    ] = None,
    logprobs: Annotated[
        int | None,
        typer.Option(
            "--logprobs",
            metavar="K",
            min=0,
            help="Print a JSON object a token, with its log-probability and the K most likely tokens "
            "in its place; 0 is its own alone. Goes with -o.",
        ),
    ] = None,
    mesh: Mesh = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Read the input and print the tokens, memory, disk and time it takes, as JSON.",
        ),
    ] = False,
    output: Output = None,
    force: Force = False,
    recover: Recover = False,
    no_pg: NoPg = False,
    compile_only: CompileOnly = False,
    topology: Topology = None,
    model: CompiledModel = None,
    length: CompiledLength = None,
) -> None:
    """Run documents through a model and save its context as a file.

    Each document becomes one context, in the order of the input: everything the model keeps of it,
    so that `gemtool decode --cache` can ask about it at any time, without reading it again.
    """
    if logprobs is not None and compile_only:
        raise UsageError("--logprobs goes without --compile-only")
    how = {"model": model, "ckpt": ckpt, "mesh": mesh, "chunk": chunk}
    if compiled("prefill", compile_only, topology, length, **how):
        return
    require_given({"--ckpt": ckpt})
    assert ckpt is not None
    from gemtool.checkpoint import open_checkpoint
    from gemtool.infer.documents import documents, expected, require_settings
    from gemtool.runtime import setup_jax
    from gemtool.stream.files import display_name, open_output
    from gemtool.stream.join import open_all_spans

    if dry_run and output is not None:
        raise UsageError("--dry-run prints JSON and writes no context; leave out -o")
    if logprobs is not None and not dry_run and output in (None, "-"):
        raise UsageError(
            "--logprobs prints on standard output; write the context with -o FILE, or nowhere with "
            "-o /dev/null"
        )
    name = display_name(inputs[0] if inputs else None)
    checkpoint = open_checkpoint(ckpt)
    with open_all_spans(inputs, recover=recover) as spans:
        require_settings(spans.header, checkpoint, name)
        setup_jax()
        from gemtool.infer.engine import Engine
        from gemtool.infer.prefill import Planner, write_context
        from gemtool.model.mesh import open_mesh

        engine = Engine(checkpoint, chunk, open_mesh(mesh, checkpoint.config))
        if dry_run:
            planner = Planner(engine, logprobs)
            for doc, document in documents(spans, name):
                print(json.dumps({"doc": doc, **planner.plan(document).to_dict()}), flush=True)
            return
        coming, total = expected(inputs) or (None, None)
        room = total if coming == 1 and total is not None else 0
        pg = None if no_pg else spans.header.pg
        number = tokens = 0
        with (
            open_output(output, force=force) as sink,
            log.progress("prefill", total=total, unit="tokens") as bar,
        ):
            for doc, document in documents(spans, name):
                footer = write_context(
                    engine, doc, document, sink, pg=pg, expected=room, on_tokens=bar.update,
                    logprobs=logprobs, on_rows=_print,
                )  # fmt: skip
                number, tokens = number + 1, tokens + footer["length"]
                log.debug(f"{doc}: {footer['length']:,} tokens", kinds=footer["kinds"])
            if not number:
                raise GemtoolError(f"{name}: no documents")
    log.info(f"prefilled {counted(number, 'document')}, {counted(tokens, 'token')}")


_encode = json.JSONEncoder(ensure_ascii=False).encode


def _print(rows: Iterable[Mapping[str, Any]]) -> None:
    """Prints rows, a line each, all at once."""
    lines = "".join([_encode(row) + "\n" for row in rows])
    try:
        print(lines, end="", flush=True)
    except BrokenPipeError:
        raise
    except OSError as problem:  # of standard output, not of the context's file
        raise GemtoolError(f"<stdout>: {reason(problem)}") from None
