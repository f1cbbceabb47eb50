"""gemtool decode: prompts, with or without a saved context -> text or JSONL."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from gemtool.cmd.options import (
    CompiledLength,
    CompiledModel,
    CompileOnly,
    Force,
    Kernels,
    Mesh,
    Output,
    Seed,
    Topology,
    common,
    compiled,
    require_given,
)
from gemtool.errors import CorruptInput, GemtoolError, NoInput, UsageError, reason

if TYPE_CHECKING:
    from gemtool.infer.answer import Answer
    from gemtool.infer.decode import Request
    from gemtool.infer.engine import Engine
    from gemtool.infer.grammar import Grammar
    from gemtool.infer.text import Prompt

OnText = Callable[[str], None]


class AnswerFormat(StrEnum):
    """How answers are written."""

    auto = "auto"
    text = "text"
    jsonl = "jsonl"


class Draft(StrEnum):
    """How what comes next is guessed."""

    ngram = "ngram"


@common
def decode(
    ckpt: Annotated[
        str | None, typer.Option("--ckpt", metavar="CKPT", help="Checkpoint folder of the model.")
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            "--cache", metavar="CTX", help="Contexts of `gemtool prefill`; - is standard input."
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="What to ask.")
    ] = None,
    prompt_file: Annotated[
        str | None,
        typer.Option("--prompt-file", metavar="FILE", help="A file that holds what to ask."),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            metavar="FILE.jsonl",
            help="Many prompts, an object a line: prompt, and if wanted id, doc, prefix, "
            "max_tokens, stop, seed, temperature, top_k, top_p, min_p, json_schema, regex, grammar, "
            "media.",
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", metavar="N", min=1, help="Longest answer.")
    ] = 256,
    temperature: Annotated[
        float, typer.Option("--temperature", help="Divides scores; 0 takes the best token always.")
    ] = 0.0,
    top_k: Annotated[
        int, typer.Option("--top-k", metavar="K", help="Draw from the K best tokens; 0 is all.")
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option(
            "--top-p", metavar="P", help="Draw from the best tokens that together reach P."
        ),
    ] = 1.0,
    min_p: Annotated[
        float,
        typer.Option(
            "--min-p", metavar="P", help="Draw from tokens at least P as probable as the best."
        ),
    ] = 0.0,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", metavar="TEXT", help="End before TEXT; repeat for more."),
    ] = None,
    json_schema: Annotated[
        str | None,
        typer.Option(
            "--json-schema", metavar="FILE|JSON", help="The answer is JSON that follows a schema."
        ),
    ] = None,
    regex: Annotated[
        str | None,
        typer.Option("--regex", metavar="PATTERN", help="The whole answer matches a pattern."),
    ] = None,
    grammar: Annotated[
        str | None,
        typer.Option("--grammar", metavar="FILE", help="The answer follows a grammar (Lark)."),
    ] = None,
    draft: Annotated[
        Draft | None,
        typer.Option(
            "--draft",
            help="Guess what comes next from what went before: faster where answers repeat it.",
        ),
    ] = None,
    media: Annotated[
        list[str] | None,
        typer.Option(
            "--media",
            metavar="FILE",
            help="Show an image, sound, a video, or a span stream before the prompt; repeat for more.",
        ),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it is, not as a conversation.")
    ] = False,
    logprobs: Annotated[
        int,
        typer.Option(
            "--logprobs", metavar="K", min=0, help="Report the K best tokens at each step (JSONL)."
        ),
    ] = 0,
    format: Annotated[
        AnswerFormat,
        typer.Option("--format", help="auto: text on a terminal, else one JSON object an answer."),
    ] = AnswerFormat.auto,
    save: Annotated[
        str | None,
        typer.Option(
            "--save",
            metavar="CTX",
            help="Write the context with question and answer, for the next.",
        ),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Talk in a terminal, a line a turn, until the end of input."),
    ] = False,
    mesh: Mesh = None,
    kernels: Kernels = None,
    output: Output = None,
    force: Force = False,
    compile_only: CompileOnly = False,
    topology: Topology = None,
    model: CompiledModel = None,
    length: CompiledLength = None,
    seed: Seed = 0,
) -> None:
    """Generate text from prompts, with or without a saved context.

    The prompt is taken from --prompt, --prompt-file, --prompts, or, without these, from standard
    input. Every prompt is asked of every context by itself, or of the document that it names; with
    several contexts, answers come context by context. Without --cache, prompts are answered alone.
    Prompts of a file are answered several at a time, in order; those of a pipe each as it comes.
    """
    how = {"model": model, "ckpt": ckpt, "mesh": mesh, "kernels": kernels}
    if compiled("decode", compile_only, topology, length, **how):
        return
    require_given({"--ckpt": ckpt})
    assert ckpt is not None
    as_text = format is AnswerFormat.text
    if format is AnswerFormat.auto:
        as_text = output in (None, "-") and sys.stdout.isatty() and not logprobs
    if as_text and logprobs:
        raise UsageError("--logprobs needs --format jsonl")
    if save is not None and prompts is not None:
        raise UsageError(
            "--save keeps one conversation, --prompts asks each by itself; use one of them"
        )
    same = None not in (save, output) and Path(str(save)).resolve() == Path(str(output)).resolve()
    if same and not Path(str(save)).is_char_device():
        raise UsageError("--save and -o are the same file; name two")
    if chat:
        _require_chat(prompt, prompt_file, prompts, cache, output)
    source = None if chat else _source(prompt, prompt_file, prompts, cache)
    if prompt == "" and not (raw and cache):
        raise UsageError("--prompt is empty; give a question, or with --cache and --raw go on")

    constraint = _grammar(json_schema, regex, grammar)
    from gemtool.checkpoint import open_checkpoint
    from gemtool.infer.media import media_files
    from gemtool.infer.sampling import Sampling
    from gemtool.infer.text import Prompt
    from gemtool.runtime import setup_jax
    from gemtool.stream.files import open_output

    default = Prompt(
        text=prompt or "",
        raw=raw,
        max_tokens=max_tokens,
        sampling=Sampling(temperature, top_k, top_p, min_p),
        stop=tuple(stop or ()),
        seed=seed,
        logprobs=logprobs,
        grammar=constraint,
        draft=draft is not None,
        media=media_files(media or []),
    )
    setup_jax(kernels=kernels)
    with (
        _requests(source, prompts, default, cache is not None) as requests,
        open_output(output, force=force, binary=False) as sink,
        contextlib.nullcontext() if save is None else open_output(save, force=force) as kept,
    ):
        from gemtool.infer.decode import answers, to_row
        from gemtool.infer.engine import Engine
        from gemtool.model.mesh import open_mesh

        checkpoint = open_checkpoint(ckpt)
        engine = Engine(checkpoint, mesh=open_mesh(mesh, checkpoint.config))
        write = _writing(sink, output)
        on_text = write if as_text else None
        if chat or kept is not None:
            said = _lines(default) if chat else (request.prompt for request in requests)
            found = _conversation(engine, cache, said, save, kept, on_text)
        else:
            found = answers(engine, cache, requests, on_text)
        for request, doc, answer in found:
            row = to_row(request, doc, answer)
            write("\n" if as_text else json.dumps(row, ensure_ascii=False) + "\n")


def _writing(sink: BinaryIO, output: str | None) -> OnText:
    """Writes text to `sink`, which `output` names, so that a reader has it at once. What goes wrong is
    told of it here: --save is open too."""
    where = "<stdout>" if output in (None, "-") else f"{output}: cannot be written"

    def write(text: str) -> None:
        try:
            sink.write(text.encode())
            sink.flush()
        except BrokenPipeError:
            raise
        except OSError as problem:
            raise GemtoolError(f"{where}: {reason(problem)}") from None

    return write


def _grammar(json_schema: str | None, regex: str | None, grammar: str | None) -> Grammar | None:
    """What answers must match, if anything.

    Raises:
        UsageError: more than one is given, a file cannot be read, or it is no grammar.
    """
    given = {"json_schema": json_schema, "regex": regex, "grammar": grammar}
    found = [(kind, text) for kind, text in given.items() if text is not None]
    if not found:
        return None
    if len(found) > 1:
        options = " and ".join(f"--{kind.replace('_', '-')}" for kind, _ in found)
        raise UsageError(f"{options} exclude each other")
    from gemtool.infer.grammar import Grammar

    ((kind, text),) = found
    option = f"--{kind.replace('_', '-')}"
    if kind == "grammar" or (kind == "json_schema" and not text.lstrip().startswith("{")):
        try:
            text = Path(text).read_text("utf-8")
        except OSError as problem:
            raise UsageError(f"{option}: {text!r} cannot be read: {reason(problem)}") from None
        except UnicodeDecodeError as problem:
            raise UsageError(f"{option}: {text}: not UTF-8, at byte {problem.start}") from None
    return Grammar.parse(kind, text)


def _source(
    prompt: str | None, prompt_file: str | None, prompts: str | None, cache: str | None
) -> str | None:
    """Where prompts are read from: a path, "-" for stdin, or None if the command line has it.

    Raises:
        UsageError: more than one place is named, or none is left.
    """
    given = {"--prompt": prompt, "--prompt-file": prompt_file, "--prompts": prompts}
    named = [option for option, value in given.items() if value is not None]
    if len(named) > 1:
        raise UsageError(f"{' and '.join(named)} exclude each other")
    if prompt is not None:
        return None
    source = prompt_file or prompts or "-"
    if source == "-":
        if cache == "-":
            raise UsageError(
                "standard input holds the context; give the prompt with --prompt, --prompt-file "
                "or --prompts"
            )
        if not named and sys.stdin is not None and sys.stdin.isatty():
            raise NoInput("no prompt: give --prompt, --prompt-file or --prompts, or pipe one in")
    return source


@contextlib.contextmanager
def _requests(
    source: str | None, prompts: str | None, default: Prompt, has_context: bool
) -> Iterator[Iterable[Request]]:
    """The requests of the command line, a prompt's file, or JSONL.

    Those of a regular file come as a list: a mistake in it shows before the first answer.
    """
    from dataclasses import replace

    from gemtool.infer.decode import Request, asks_nothing, read_requests
    from gemtool.stream.files import display_name, is_stdin, open_input

    if source is None:
        yield [Request("0", default)]
        return
    with open_input(source) as file:
        if prompts is not None:
            found = read_requests(
                file,
                display_name(source),
                default,
                has_context=has_context,
                folder=None if is_stdin(source) else Path(source).parent,
            )
            yield list(found) if Path(source).is_file() else found
            return
        try:
            text = file.read().decode()
        except UnicodeDecodeError as problem:
            raise CorruptInput(
                f"{display_name(source)}: not UTF-8 text, at byte {problem.start}"
            ) from None
        # An editor or echo ends the last line; the question does not.
        request = Request("0", replace(default, text=text.removesuffix("\n")))
        if asks_nothing(request.prompt, has_context):
            raise CorruptInput(f"{display_name(source)}: empty; expected a question")
        yield [request]


def _require_chat(
    prompt: str | None,
    prompt_file: str | None,
    prompts: str | None,
    cache: str | None,
    output: str | None,
) -> None:
    given = {"--prompt": prompt, "--prompt-file": prompt_file, "--prompts": prompts, "-o": output}
    for option, value in given.items():
        if value is not None:
            raise UsageError(f"--chat asks for what to say; leave out {option}")
    if cache == "-":
        raise UsageError(
            "--chat: standard input cannot be the context and what you say; name a file"
        )


def _lines(default: Prompt) -> Iterator[Prompt]:
    """What is said on standard input, a line a turn; empty lines say nothing. The first turn shows
    the media."""
    from dataclasses import replace

    # Where answers go through a pipe, "> " would be among them.
    asks = sys.stdin.isatty() and sys.stdout.isatty()
    if asks:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (input() edits lines with it)
    index = 0
    while True:
        try:
            line = input("> " if asks else "")
        except EOFError:
            if asks:
                print(file=sys.stderr)
            return
        except UnicodeDecodeError:
            raise CorruptInput("<stdin>: not UTF-8 text") from None
        if line.strip():
            shown = () if index else default.media
            yield replace(default, text=line, index=index, media=shown)
            index += 1


def _conversation(
    engine: Engine,
    cache: str | None,
    prompts: Iterable[Prompt],
    save: str | None,
    kept: BinaryIO | None,
    on_text: OnText | None,
) -> Iterator[tuple[Request, str | None, Answer]]:
    """Prompts as the turns of one conversation, with document and answer as `answers` gives them; at
    the end it is saved in `kept`, the file `save`."""
    from gemtool.infer.chat import Conversation
    from gemtool.infer.contexts import open_base
    from gemtool.infer.decode import Request

    base = None if cache is None else open_base(engine, cache, save)
    doc = None if base is None else base.doc
    talk = Conversation(engine, base)
    for number, (prompt, answer) in enumerate(talk.turns(prompts, on_text)):
        yield Request(str(number), prompt), doc, answer
    if kept is not None:
        if not len(talk.tokens):
            raise GemtoolError("--save: nothing was said")
        talk.save(kept)
