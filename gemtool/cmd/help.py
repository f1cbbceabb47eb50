"""gemtool help: the manual page of a verb, or its --help where no manual is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from gemtool.cmd.options import common
from gemtool.errors import UsageError, did_you_mean


@common
def help(  # noqa: A001 (the verb's name)
    verb: Annotated[
        str | None, typer.Argument(metavar="VERB", help="A verb; none is gemtool itself.")
    ] = None,
) -> None:
    """Show the manual of a verb."""
    from gemtool.cli import VERBS

    if verb is not None and verb not in VERBS:
        raise UsageError(f"no verb {verb!r}{did_you_mean(verb, VERBS)}")
    page = "gemtool" if verb in (None, "help") else f"gemtool-{verb}"
    installed = Path(sys.prefix) / "share" / "man" / "man1" / f"{page}.1"
    if installed.exists() and shutil.which("man") and sys.stdout.isatty():
        os.execvp("man", ["man", str(installed)])
    arguments = [] if verb is None else [verb]
    shown = subprocess.run(
        [sys.executable, "-m", "gemtool", *arguments, "--help"], capture_output=True, check=True
    )
    sys.stdout.buffer.write(shown.stdout)
