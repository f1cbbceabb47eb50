"""The command: a table of verbs, each imported only when it is called.

From here to the mathematics: `cmd/VERB.py` (arguments and core loop), `train/` or `infer/`,
`model/transformer.py`, `model/attention.py`, `kernels/attention`.
"""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from gemtool import __version__

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


def build_command(verb: str) -> Any:
    """Imports a verb and returns its command."""
    module = importlib.import_module(f"gemtool.cmd.{verb}")
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(verb, context_settings={"help_option_names": ["-h", "--help"]})(
        getattr(module, verb)
    )
    return without_variables(typer.main.get_command(single))


def without_variables(command: Any) -> Any:
    """GEMTOOL_VERB_OPTION sets any option: said once in the manual, not at each option."""
    for parameter in command.params:
        parameter.show_envvar = False
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
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "GEMTOOL"},
    epilog="`gemtool VERB --help` shows a verb's options, `gemtool help VERB` its manual.",
)


@app.callback()
def gemtool(
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


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # a second one skips the clean-up
    print("\ngemtool: interrupted, cleaning up (again to skip that)", file=sys.stderr, flush=True)
    raise KeyboardInterrupt


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)  # unwinds, so that temporary files are removed


def main() -> None:
    """Entry point of the `gemtool` command."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _terminate)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # data is, whatever the locale
    without_variables(typer.main.get_command(app))(prog_name="gemtool")
