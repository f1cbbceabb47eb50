"""The command: a table of verbs, each imported only when it is called.

From here to the mathematics: `cmd/VERB.py` (arguments and core loop), `train/` or `infer/`,
`model/transformer.py`, `model/attention.py`, `kernels/attention`.
"""

from __future__ import annotations

import importlib
import io
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from gemtool import __version__
from gemtool.cmd.exits import close_stdout, exit_codes
from gemtool.errors import NoInput
from gemtool.stream.files import guard_standard_streams

# Verb -> the line that `gemtool --help` shows. The function is gemtool.cmd.VERB.VERB.
VERBS = {
    "tokenize": "Turn text, images, audio and video into a span stream.",
    "pack": "Pack the documents of span streams into sequences of one length.",
    "shard": "Write packed sequences as a folder of shards for training.",
    "train": "Train a model on shards; metrics as JSONL, checkpoints in a folder.",
    "prefill": "Run documents through a model and save its context as a file.",
    "decode": "Generate text from prompts, with or without a saved context.",
    "probe": "Measure what a model finds in long contexts.",
    "view": "Describe or print streams, contexts, shards, runs and checkpoints.",
    "vocab": "Learn a vocabulary from text or JSONL.",
    "help": "Show the manual of a verb.",
}


class VerbGroup(TyperGroup):
    """A group whose commands are built when asked for, so that start-up imports no verb."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return build_command(cmd_name) if cmd_name in VERBS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        # The suggestion for a mistyped verb looks at `commands`, which is empty here.
        self.commands = dict.fromkeys(VERBS)  # type: ignore[assignment]
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


class VerbCommand(TyperCommand):
    """A verb whose help names its arguments plainly, as the manual does."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [piece.strip("{}") for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        arguments: list[Any] = [p for p in self.params if p.param_type_name == "argument"]
        options = [p.get_help_record(ctx) for p in self.get_params(ctx) if p not in arguments]
        if arguments:
            with formatter.section("Arguments"):
                formatter.write_dl([(str(p.metavar), p.help or "") for p in arguments])
        with formatter.section("Options"):
            formatter.write_dl([record for record in options if record])


def build_command(verb: str) -> Any:
    """Imports a verb and returns its command."""
    module = importlib.import_module(f"gemtool.cmd.{verb}")
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(verb, cls=VerbCommand, context_settings={"help_option_names": ["-h", "--help"]})(
        getattr(module, verb)
    )
    return prepared(typer.main.get_command(single))


def prepared(command: Any) -> Any:
    """A command whose options can be set by GEMTOOL_VERB_OPTION, as the manual says once."""
    for parameter in command.params:
        parameter.show_envvar = False
        parameter.envvar_list_splitter = "\n"  # a stop text may hold spaces
    return command


def _version(ctx: typer.Context, value: bool) -> None:
    if value:
        print(f"gemtool {__version__}")
        if ctx.params.get("verbose"):
            from gemtool.cmd.options import component_versions

            for line in component_versions():
                print(line)
        raise typer.Exit


app = typer.Typer(
    cls=VerbGroup,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "GEMTOOL"},
    epilog="`gemtool VERB --help` shows a verb's options, `gemtool help VERB` its manual.",
)


@app.callback()
def gemtool(
    ctx: typer.Context,
    verbose: Annotated[
        bool,
        typer.Option("-v", is_eager=True, help="With --version: libraries, devices and codecs."),
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, help="Show the version and exit."),
    ] = False,
) -> None:
    """Long multimodal contexts as files: tokenize, pack, shard, train, prefill, decode, probe."""
    if ctx.invoked_subcommand is None:
        with exit_codes(ctx):
            raise NoInput("no verb; name one of those above")


def main() -> None:
    """Runs the command line and ends the process with its exit code."""
    guard_standard_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Data is UTF-8, whatever the locale; names of files may be anything.
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    command = prepared(typer.main.get_command(app))
    try:
        with exit_codes():
            code = command(prog_name="gemtool", standalone_mode=False)
            close_stdout()
    except typer.Exit as end:
        code = end.exit_code
    sys.exit(code)
