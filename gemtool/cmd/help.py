"""gemtool help: the manual of a verb, of gemtool itself or of a format."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from gemtool.cmd.options import common
from gemtool.errors import GemtoolError, UsageError, did_you_mean

FORMATS = ("stream", "context")
"""Pages of section 5."""


def topics() -> list[str]:
    """What there is a manual of."""
    from gemtool.cli import VERBS

    return [*VERBS, "gemtool", *FORMATS]


@common
def help(  # noqa: A001 (the verb's name)
    topic: Annotated[
        str,
        typer.Argument(
            metavar="TOPIC",
            help=f"A verb, gemtool, or a format: {', '.join(FORMATS)}.",
            autocompletion=topics,
        ),
    ] = "gemtool",
) -> None:
    """Show the manual of a verb."""
    if topic not in topics():
        raise UsageError(f"no verb or format {topic!r}{did_you_mean(topic, topics())}")
    page = manual_page(topic)
    if page is not None and shutil.which("man"):
        arguments = ["man", str(page)]
    elif topic in FORMATS:
        where = "is not installed" if page is None else f"needs the command `man`: {page}"
        raise GemtoolError(f"the manual of {topic} {where}")
    else:
        verb = [] if topic == "gemtool" else [topic]
        arguments = [sys.executable, "-m", "gemtool", *verb, "--help"]
    if sys.stdout.isatty():
        os.execvp(arguments[0], arguments)
    sys.stdout.buffer.write(subprocess.run(arguments, stdout=subprocess.PIPE, check=True).stdout)


def manual_page(topic: str) -> Path | None:
    """Where a page is: in the checkout that gemtool runs from, whose installed pages may be of
    another day, or installed."""
    section = "5" if topic in FORMATS else "1"
    name = "gemtool" if topic == "gemtool" else f"gemtool-{topic}"
    checkout = Path(__file__).parents[2]
    for folder in (checkout / "man", Path(sys.prefix) / "share" / "man"):
        page = folder / f"man{section}" / f"{name}.{section}"
        if page.exists():
            return page
    return None
