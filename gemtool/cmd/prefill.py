"""gemtool prefill: documents of span streams -> contexts, one a document."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from gemtool import log
from gemtool.cmd.options import (
    CompiledLength,
    CompiledModel,
    CompileOnly,
    Force,
    Inputs,
    Kernels,
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

if TYPE_CHECKING:
    from gemtool.infer.engine import Engine
    from gemtool.infer.resume import Left


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
    append: Annotated[
        str | None,
        typer.Option(
            "--append",
            metavar="CTX",
            help="Continue the context of a file with each document. What is written holds what is "
            "new, and names that file.",
        ),
    ] = None,
    flatten: Annotated[
        bool,
        typer.Option(
            "--flatten", help="Make contexts that continue others into files that need no other."
        ),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with an interrupted -o FILE, from its last state."),
    ] = False,
    mesh: Mesh = None,
    kernels: Kernels = None,
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
    how = {"model": model, "ckpt": ckpt, "mesh": mesh, "chunk": chunk, "kernels": kernels}
    if compiled("prefill", compile_only, topology, length, **how):
        return
    if flatten:
        given = {
            "--ckpt": ckpt,
            "--append": append,
            "--logprobs": logprobs,
            "--chunk": chunk,
            "--mesh": mesh,
            "--kernels": kernels,
        }
        needless = [option for option, value in given.items() if value is not None]
        needless += ["--dry-run"] * dry_run + ["--resume"] * resume
        if needless:
            raise UsageError(f"--flatten goes without {needless[0]}")
        _flatten(inputs, output, force=force, no_pg=no_pg)
        return
    require_given({"--ckpt": ckpt})
    assert ckpt is not None
    from gemtool.checkpoint import open_checkpoint
    from gemtool.infer.documents import documents, expected, require_settings
    from gemtool.runtime import setup_jax
    from gemtool.stream.files import display_name, is_resumable, is_stdin
    from gemtool.stream.join import open_all_spans

    if dry_run and output is not None:
        raise UsageError("--dry-run prints JSON and writes no context; leave out -o")
    if logprobs is not None and not dry_run and output in (None, "-"):
        raise UsageError(
            "--logprobs prints on standard output; write the context with -o FILE, or nowhere with "
            "-o /dev/null"
        )
    if append is not None and is_stdin(append):
        raise UsageError(
            "--append: standard input has no name by which to refer to it; name a file"
        )
    if resume and (logprobs is not None or dry_run):
        raise UsageError(f"--resume goes without {'--dry-run' if dry_run else '--logprobs'}")
    if resume and not is_resumable(output):
        raise UsageError("--resume needs -o FILE: what went elsewhere cannot be read back")
    name = display_name(inputs[0] if inputs else None)
    checkpoint = open_checkpoint(ckpt)
    coming, total = (None if dry_run else expected(inputs)) or (None, None)
    with open_all_spans(inputs, recover=recover) as spans:
        require_settings(spans.header, checkpoint, name)
        setup_jax(kernels=kernels)
        from gemtool.infer.contexts import open_base
        from gemtool.infer.engine import Engine
        from gemtool.infer.prefill import Planner, write_context
        from gemtool.infer.resume import skip_whole
        from gemtool.model.mesh import open_mesh

        engine = Engine(checkpoint, chunk, open_mesh(mesh, checkpoint.config))
        base = None if append is None else open_base(engine, append, output)
        if dry_run:
            planner, start = Planner(engine, logprobs), 0 if base is None else base.sequence.length
            for doc, document in documents(spans, name):
                plan = planner.plan(document, start).to_dict()
                print(json.dumps({"doc": doc, **plan}), flush=True)
            return
        room = total if coming == 1 and total is not None else 0
        pg = None if no_pg else spans.header.pg
        number = tokens = 0
        with (
            _opened(engine, output, force=force, resume=resume, can_resume=logprobs is None) as (
                sink,
                left,
                keep,
            ),
            log.progress("prefill", total=total, unit="tokens") as bar,
        ):
            before = 0 if base is None else base.sequence.length
            for doc, document in documents(spans, name):
                if number < len(left.whole):
                    footer = left.whole[number]
                    skip_whole(footer, doc, document, base)
                    bar.skip(footer["length"] - before)
                else:
                    begun = left.begun if number == len(left.whole) else None
                    bar.skip(0 if begun is None else begun.sequence.length - before)
                    footer = write_context(
                        engine, doc, document, sink, base=base, begun=begun, pg=pg, expected=room,
                        on_tokens=bar.update, on_state=keep, logprobs=logprobs, on_rows=_print,
                    )  # fmt: skip
                    keep()
                number, tokens = number + 1, tokens + footer["length"] - before
                log.debug(f"{doc}: {footer['length']:,} tokens", kinds=footer["kinds"])
            if not number:
                raise GemtoolError(f"{name}: no documents")
            if number < len(left.whole) + (left.begun is not None):
                raise GemtoolError(
                    f"--resume: {output} was begun with more documents than {name} has"
                )
    log.info(f"prefilled {counted(number, 'document')}, {counted(tokens, 'token')}")


@contextlib.contextmanager
def _opened(
    engine: Engine, output: str | None, *, force: bool, resume: bool, can_resume: bool
) -> Iterator[tuple[BinaryIO, Left, Callable[[], None]]]:
    """The output, what is left in it of a run before, and what to call when an interruption shall leave
    what is written, if it could be gone on with."""
    from gemtool.infer.resume import Left, read_left
    from gemtool.stream.files import is_resumable, open_output, resumable_output

    if not (can_resume and is_resumable(output)):
        with open_output(output, force=force) as sink:
            yield sink, Left(), lambda: None
        return
    with resumable_output(str(output), force=force, resume=resume) as partial:
        left = read_left(engine, partial.path) if resume else Left()
        partial.cut(left.end)
        if left.end:
            there = sum(footer["length"] for footer in left.whole)
            there += 0 if left.begun is None else left.begun.sequence.length
            log.info(f"{partial.path}: goes on after {counted(there, 'token')}")
        yield partial.file, left, partial.keep


def _flatten(inputs: list[str] | None, output: str | None, *, force: bool, no_pg: bool) -> None:
    """Contexts, a file or more or standard input, each with all that it continues -> one output."""
    from gemtool.stream.context import open_contexts
    from gemtool.stream.files import open_output
    from gemtool.stream.header import provenance
    from gemtool.stream.lineage import flatten

    number = 0
    with open_output(output, force=force) as sink:
        for path in inputs or ["-"]:
            with open_contexts(path) as contexts:
                for reader in contexts:
                    pg = reader.header.pg
                    flatten(reader, sink, () if no_pg else (*pg, provenance("prefill", pg)))
                    number += 1
    log.info(f"flattened {counted(number, 'context')}")


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
