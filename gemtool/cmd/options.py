"""Options that verbs share, declared once, and the decorator that gives them to a verb."""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import os
import re
import tomllib
import typing
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from gemtool import log
from gemtool.cmd.exits import close_stdout, exit_codes, fail
from gemtool.errors import UsageError, did_you_mean, reason

Inputs = Annotated[
    list[str] | None,
    typer.Argument(metavar="INPUT", help="Files; - or none is standard input."),
]
Input = Annotated[
    str | None, typer.Argument(metavar="INPUT", help="A file; - or none is standard input.")
]
Output = Annotated[
    str | None,
    typer.Option("-o", "--output", metavar="FILE", help="Write to FILE, not standard output."),
]
Force = Annotated[bool, typer.Option("-f", "--force", help="Replace an existing output.")]
NoPg = Annotated[
    bool, typer.Option("--no-pg", help="Leave the provenance out, for identical bytes.")
]
Recover = Annotated[
    bool, typer.Option("--recover", help="Of a damaged input, use what is whole before the damage.")
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Seed of everything random.")]
Threads = Annotated[
    int,
    typer.Option(
        "-@", "--threads", metavar="N", min=1, help="Threads; the output is the same for any N."
    ),
]
Mesh = Annotated[
    str | None,
    typer.Option(
        "--mesh",
        metavar="AXIS=N,...",
        help="Spread the work over devices along data, fsdp, expert, context and tensor.",
    ),
]


class KernelName(StrEnum):
    """Implementations, as `gemtool.kernels.dispatch` knows them."""

    reference = "reference"
    xla = "xla"
    pallas_tpu = "pallas_tpu"
    gpu = "gpu"


Kernels = Annotated[
    KernelName | None,
    typer.Option(
        "--kernels",
        help="Attend and mix experts by these kernels, whatever the platform; by default by the "
        "fastest that it has.",
    ),
]
CompileOnly = Annotated[
    bool,
    typer.Option(
        "--compile-only",
        help="Only compile the program for a slice of TPUs, and say what it takes and whether it fits.",
    ),
]
Topology = Annotated[
    str | None,
    typer.Option(
        "--topology",
        metavar="CHIP:SHAPE",
        help="With --compile-only: the slice, as v5p:4x4x4, of v4, v5e, v5p or v6e.",
    ),
]
CompiledModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="PRESET|FILE",
        help="With --compile-only: an architecture, instead of --ckpt.",
    ),
]
CompiledLength = Annotated[
    str | None,
    typer.Option(
        "--length",
        metavar="N",
        help="With --compile-only: positions of the context (1M), or of a training sequence (4,096); "
        "k is 1,000, M 1,000,000.",
    ),
]
Part = Annotated[
    str | None,
    typer.Option("--part", metavar="I/N", help="Only the I-th of N parts of the job."),
]


def parse_part(text: str) -> tuple[int, int]:
    """(i, n) of `i/n`.

    Raises:
        UsageError: not of this form, or i is not from 1 to n.
    """
    numbers = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    index, parts = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    if not 1 <= index <= parts:
        raise UsageError(f"--part {text}: expected i/n with i from 1 to n, as in 2/8")
    return index, parts


def parse_length(option: str, text: str, example: str = "256k") -> int:
    """A token count as `1k` (1,000), `10M` (10,000,000) or `5000`.

    Raises:
        UsageError: it is none.
    """
    sizes = {"": 1, "k": 1_000, "K": 1_000, "m": 1_000_000, "M": 1_000_000}
    number, unit = text.strip(), ""
    if number[-1:].isalpha():
        number, unit = number[:-1], number[-1]
    try:
        length = round(float(number) * sizes[unit])
    except (ValueError, KeyError, OverflowError):
        raise UsageError(f"{option}: {text!r} is no length; write {example}") from None
    if length < 1:
        raise UsageError(f"{option}: {text!r} is no length; expected at least 1 token")
    return length


def require_given(options: Mapping[str, object]) -> None:
    """Refuses a call that lacks one of these options.

    Raises:
        UsageError: naming the first.
    """
    for option, value in options.items():
        if not value:
            raise UsageError(f"Missing option '{option}'")


def compiled(
    verb: Literal["train", "prefill", "decode"],
    wanted: bool,
    topology: str | None,
    length: str | None,
    **options: Any,
) -> bool:
    """Does what --compile-only asks for, and tells whether it did; `options` are other fields of
    `gemtool.aot.run.CompileOptions`.

    Raises:
        UsageError: a model is named twice; without --compile-only, an option that goes with it only.
    """
    if not wanted:
        theirs = {"--topology": topology, "--length": length}
        if verb != "train":
            theirs["--model"] = options["model"]
        for option, value in theirs.items():
            if value is not None:
                raise UsageError(f"{option} goes with --compile-only")
        return False
    from gemtool.aot.run import CompileOptions, compile_only

    if options["model"] and options["ckpt"]:
        raise UsageError("the checkpoint brings its own model; leave out --model")
    positions = None if length is None else parse_length("--length", length, "256k")
    compile_only(verb, CompileOptions(topology, length=positions, **options))
    return True


class StreamFormat(StrEnum):
    """How a span stream is written."""

    arrow = "arrow"
    jsonl = "jsonl"


Format = Annotated[
    StreamFormat, typer.Option("--format", help="Arrow for programs, JSONL for people.")
]


def _load_config(ctx: typer.Context, value: Path | None) -> Path | None:
    """Makes the verb's table of a TOML file the defaults of its options."""
    if value is None:
        return None
    try:
        tables = tomllib.loads(value.read_text("utf-8"))
    except OSError as problem:
        fail(UsageError(f"{value}: cannot be read: {reason(problem)}"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        fail(UsageError(f"{value}: not TOML: {problem}"))
    from gemtool.cli import VERBS, build_command

    defaults: dict[str, Any] = {}
    for name, table in tables.items():
        if name not in VERBS or not isinstance(table, dict):
            close = "" if name in VERBS else did_you_mean(name, VERBS)
            fail(
                UsageError(
                    f"{value}: {name!r} is no table of a verb{close}; "
                    f"write options under a heading, as in [{ctx.info_name}]"
                )
            )
        command = ctx.command if name == ctx.info_name else build_command(name)
        found = _read_table(command, table, f"{value}: [{name}]")
        if name == ctx.info_name:
            defaults = found
    ctx.default_map = {**(ctx.default_map or {}), **defaults}
    return value


def _read_table(command: Any, table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Values by parameter from a verb's table of a configuration file; an unknown key fails."""
    known = {p.name for p in command.params if p.name and p.param_type_name == "option"}
    known -= {"config", "help"}
    # The command's parameters may be named otherwise than the option: --max-tokens, max_tokens.
    spelled = {
        option.lstrip("-").replace("-", "_"): p.name
        for p in command.params
        for option in p.opts
        if option.startswith("--") and p.name in known
    }
    repeatable = {p.name for p in command.params if getattr(p, "multiple", False)}
    values = {}
    for key, setting in table.items():
        parameter = spelled.get(key.replace("-", "_"))
        if parameter is None:
            fail(UsageError(f"{where} has no option {key!r}{did_you_mean(key, spelled)}"))
        is_one = parameter in repeatable and not isinstance(setting, list)
        values[parameter] = [setting] if is_one else setting
    return values


_COMMON: dict[str, Any] = {
    "quiet": (bool, typer.Option("-q", "--quiet", help="Errors only."), False),
    "verbose": (
        int,
        typer.Option("-v", "--verbose", count=True, show_default=False, help="Say more."),
        0,
    ),
    "log_json": (
        bool,
        typer.Option("--log-json", help="Messages as one JSON object a line."),
        False,
    ),
    "no_color": (bool, typer.Option("--no-color", help="No colour in messages."), False),
    "config": (
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE.toml",
            is_eager=True,
            callback=_load_config,
            help="Take defaults from the verb's table in FILE.",
        ),
        None,
    ),
}


def common(function: Callable[..., None]) -> Callable[..., None]:
    """Decorates a verb: adds the common options, sets up logging, maps failures to exit codes."""
    signature = inspect.signature(function)
    hints = typing.get_type_hints(function, include_extras=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        parameter.replace(annotation=hints[name], kind=keyword)
        for name, parameter in signature.parameters.items()
    ]
    parameters += [
        inspect.Parameter(name, keyword, default=default, annotation=Annotated[kind, option])
        for name, (kind, option, default) in _COMMON.items()
    ]
    parameters.append(inspect.Parameter("ctx", keyword, annotation=typer.Context))

    @functools.wraps(function)
    def run(**values: Any) -> None:
        ctx = values.pop("ctx")
        common_values = {name: values.pop(name) for name in _COMMON}
        log.configure(
            quiet=common_values["quiet"],
            verbose=common_values["verbose"],
            as_json=common_values["log_json"],
            color=not common_values["no_color"],
        )
        with exit_codes(ctx):
            if common_values["quiet"] and common_values["verbose"]:
                raise UsageError("-q and -v exclude each other")
            require_known_variables(ctx)
            require_sound_names(values)
            function(**values)
            close_stdout()

    del run.__wrapped__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def require_known_variables(ctx: typer.Context) -> None:
    """Refuses a variable GEMTOOL_VERB_... that sets no option of the verb: it was mistyped."""
    prefix = f"{ctx.auto_envvar_prefix}_"
    known = [f"{prefix}{p.name.upper()}" for p in ctx.command.params if p.name]
    for name in os.environ:
        if name.startswith(prefix) and name not in known:
            raise UsageError(
                f"{name}: {ctx.info_name} has no such option{did_you_mean(name, known)}"
            )


_INPUTS = ("input", "inputs", "files_from", "cache", "prompts", "prompt_file", "grammar", "media")


def require_sound_names(values: Mapping[str, Any]) -> None:
    """Refuses empty names, and an output that is an input: it would be lost.

    Raises:
        UsageError: saying which.
    """
    output = values.get("output")
    given = [values.get(name) for name in _INPUTS]
    inputs = [path for one in given for path in (one if isinstance(one, list) else [one])]
    if "" in (output, *inputs):
        raise UsageError("the name of a file is empty (an unset variable?)")
    if output is None or not Path(output).is_file():
        return
    for path in inputs:
        if path is not None and Path(path).is_file() and Path(path).samefile(output):
            raise UsageError(f"{output}: is an input too; name another output")


def component_versions() -> Iterator[str]:
    """Lines for `gemtool --version -v`: libraries, devices, codecs."""
    for name in ("jax", "jaxlib", "numpy", "pyarrow", "sentencepiece", "av", "orbax-checkpoint"):
        yield f"{name} {importlib.metadata.version(name)}"
    import av
    import jax

    devices = ", ".join(f"{device.platform}:{device.device_kind}" for device in jax.devices())
    yield f"devices {devices}"
    libraries = ", ".join(
        f"{name} {'.'.join(map(str, version))}" for name, version in av.library_versions.items()
    )
    yield f"ffmpeg libraries {libraries}; {len(av.codecs_available)} codecs"
