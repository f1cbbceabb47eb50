"""gemtool tokenize: text, images, audio and video -> a span stream."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemtool import log
from gemtool.cmd.options import (
    Force,
    Format,
    Inputs,
    NoPg,
    Output,
    Part,
    StreamFormat,
    Threads,
    common,
    parse_part,
)
from gemtool.data.sniff import Modality
from gemtool.errors import GemtoolError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from gemtool.data.documents import Document
    from gemtool.data.settings import MediaSettings
    from gemtool.stream.spans import Span


class Engine(StrEnum):
    """Who runs the work."""

    local = "local"
    ray = "ray"


@common
def tokenize(
    inputs: Inputs = None,
    modality: Annotated[
        Modality, typer.Option("--modality", help="What the inputs are; auto looks at each.")
    ] = Modality.auto,
    vocab: Annotated[
        Path | None,
        typer.Option("--vocab", metavar="MODEL", help="Vocabulary [default: the shipped one]."),
    ] = None,
    image_tokens: Annotated[
        int | None,
        typer.Option(
            "--image-tokens",
            metavar="258|66",
            help="Tokens of an image tile or video frame [default: 258].",
        ),
    ] = None,
    tiles: Annotated[
        bool | None,
        typer.Option("--tiles/--no-tiles", help="Cut large images into tiles [default: tiles]."),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option("--fps", metavar="X", help="Video frames a second [default: 1]."),
    ] = None,
    audio_rate: Annotated[
        int | None,
        typer.Option("--audio-rate", metavar="25|32", help="Audio tokens a second [default: 25]."),
    ] = None,
    audio: Annotated[
        bool | None,
        typer.Option("--audio/--no-audio", help="Take the sound of videos [default: audio]."),
    ] = None,
    timestamps: Annotated[
        bool | None,
        typer.Option(
            "--timestamps/--no-timestamps",
            help="Write the time before each video frame [default: timestamps].",
        ),
    ] = None,
    subtitles: Annotated[
        bool | None,
        typer.Option(
            "--subtitles/--no-subtitles",
            help="Take the text of subtitles of videos [default: no-subtitles].",
        ),
    ] = None,
    for_: Annotated[
        str | None,
        typer.Option(
            "--for", metavar="CKPT", help="Take vocabulary and media settings of a checkpoint."
        ),
    ] = None,
    one_document: Annotated[
        bool, typer.Option("--one-document", help="All inputs form one document.")
    ] = False,
    files_from: Annotated[
        str | None,
        typer.Option(
            "--files-from", metavar="FILE", help="Read more inputs from FILE, one a line."
        ),
    ] = None,
    follow_symlinks: Annotated[
        bool,
        typer.Option("--follow-symlinks", help="Go after symbolic links in folders."),
    ] = False,
    part: Part = None,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Leave out bad inputs; exit 1 at the end.")
    ] = False,
    engine: Annotated[
        Engine,
        typer.Option("--engine", help="Where the work is done: this machine, or a Ray cluster."),
    ] = Engine.local,
    count: Annotated[
        bool, typer.Option("--count", help="Write no stream but counts of tokens, as JSONL.")
    ] = False,
    format: Format = StreamFormat.arrow,
    output: Output = None,
    force: Force = False,
    threads: Threads = 1,
    no_pg: NoPg = False,
) -> None:
    """Turn text, images, audio and video into a span stream.

    An input is a file, a folder or - (standard input). What it holds is found from its content. A
    JSONL file holds a document a line: {"text": ...}, {"parts": [{"text": ...}, {"image": PATH},
    {"audio": PATH}, {"video": PATH}]} or {"messages": [{"role": "user", "content": ...}]}.
    """
    from gemtool.data.documents import as_one, left_out, skip_bad, spans_of_documents
    from gemtool.data.inputs import list_inputs, read_documents, read_list
    from gemtool.data.vocab import Vocab
    from gemtool.stream.files import is_stdin, open_input, open_output
    from gemtool.stream.spans import Header, create_spans

    media = {
        "image_tokens": image_tokens,
        "tiles": tiles,
        "fps": fps,
        "audio_rate": audio_rate,
        "audio": audio,
        "timestamps": timestamps,
        "subtitles": subtitles,
    }
    settings, model = settings_for(
        for_, {key: value for key, value in media.items() if value is not None}, vocab
    )
    if part is not None and one_document:
        raise UsageError("--part takes the inputs apart, --one-document joins them: choose one")
    paths = list(inputs or [])
    if files_from is not None:
        if is_stdin(files_from) and any(map(is_stdin, paths)):
            raise UsageError("standard input (-) can be given only once")
        paths += read_list(files_from)
    elif not paths:
        paths = ["-"]
    files = list_inputs(paths, modality, check=not keep_going, follow=follow_symlinks)
    if part is not None:
        files = take_part(files, part)

    if engine == Engine.ray and (one_document or any(map(is_stdin, files))):
        raise UsageError("--engine ray takes neither standard input nor --one-document")

    problems = 0

    def report(problem: GemtoolError, kept: bool) -> None:
        nonlocal problems
        problems += 1
        log.error(f"{problem}; " + ("its document ends there" if kept else "left out"))

    with contextlib.ExitStack() as stack:
        if any(map(is_stdin, files)):
            stack.enter_context(open_input(None))  # a terminal is noticed before the output
        used = Vocab.load(model)
        identity = {"fingerprint": used.fingerprint, "size": used.size}
        header = Header(vocab=identity, settings=settings.to_dict())
        if engine == Engine.ray:
            from gemtool.data.cluster import Cluster

            options = [*plain_options(settings, modality, model), "-@", str(threads)]
            options += ["--keep-going"] if keep_going else []
            cluster = stack.enter_context(Cluster(options, threads, header))
            made = cluster.spans(files)
        else:
            documents: Iterator[Document] = read_documents(
                files, settings, modality, workers=threads
            )
            if keep_going:
                documents = skip_bad(documents, report)
            if one_document:
                documents = as_one(documents)
            made = spans_of_documents(documents, used, threads=threads)
        bar = stack.enter_context(log.progress("tokenize", unit="tokens"))
        spans = counted(made, bar)
        if count:
            sink = stack.enter_context(open_output(output, force=force, binary=False))
            for line in count_documents(spans):
                sink.write(line)
                sink.flush()
        else:
            header = header.derive("tokenize", pg=not no_pg)
            writer = stack.enter_context(create_spans(output, header, format=format, force=force))
            for span in spans:
                writer.append(span)
        if engine == Engine.ray:
            problems = cluster.problems
    if problems:
        raise GemtoolError(left_out(problems))


def settings_for(
    checkpoint: str | None, given: dict[str, Any], vocab: Path | None
) -> tuple[MediaSettings, Path | None]:
    """Media settings and vocabulary file: those on the command line over those of a checkpoint.

    Raises:
        UsageError: an option contradicts what the checkpoint's model depends on.
    """
    from gemtool.data.settings import MediaSettings

    if checkpoint is None:
        return checked_settings(MediaSettings(), given), vocab
    from gemtool.checkpoint import read_settings

    if vocab is not None:
        raise UsageError("--for brings the vocabulary of its checkpoint: leave out --vocab")
    base, model = read_settings(checkpoint)
    for key, fixed in base.structural().items():
        if given.get(key, fixed) != fixed:
            option = "--" + key.replace("_", "-")
            raise UsageError(
                f"{option} {given[key]} contradicts --for {checkpoint}, whose model was made for "
                f"{fixed}: leave out one of them"
            )
    return checked_settings(base, given), model


def checked_settings(base: MediaSettings, given: dict[str, Any]) -> MediaSettings:
    """`base` with the given options in place of its own."""
    try:
        return replace(base, **given)
    except GemtoolError as problem:
        raise UsageError(f"--{str(problem).replace('_', '-')}") from None


def plain_options(settings: MediaSettings, modality: Modality, vocab: Path | None) -> list[str]:
    """The command line that says the same: for a run of this verb elsewhere."""
    options = ["--modality", modality.value]
    if vocab is not None:
        options += ["--vocab", str(vocab)]
    for key, setting in settings.to_dict().items():
        name = key.replace("_", "-")
        if isinstance(setting, bool):
            options.append(f"--{name}" if setting else f"--no-{name}")
        else:
            options += [f"--{name}", str(setting)]
    return options


def take_part(files: list[str], part: str) -> list[str]:
    """The i-th of n runs of the inputs, for `part` "i/n": together the runs are all inputs."""
    index, parts = parse_part(part)
    return files[len(files) * (index - 1) // parts : len(files) * index // parts]


def counted(spans: Iterable[Span], bar: log.progress) -> Iterator[Span]:
    """Moves the progress bar as spans pass."""
    for span in spans:
        bar.update(len(span.tokens), span.doc)
        yield span


def count_documents(spans: Iterable[Span]) -> Iterator[bytes]:
    """A JSON line a document, and one of all."""
    from gemtool.data.documents import Tally

    tally = Tally()
    for span in spans:
        if done := tally.add(span):
            yield json.dumps(done, ensure_ascii=False).encode() + b"\n"
    if done := tally.finish():
        yield json.dumps(done, ensure_ascii=False).encode() + b"\n"
    yield json.dumps(tally.summary()).encode() + b"\n"
