"""Builds the manual pages: fills the @NAMES@ in `*.in` from the command itself.

`python man/build.py` writes the pages into man1/ and man5/ beside this file; with `--check` it
writes nothing and fails if a committed page differs.
"""

from __future__ import annotations

import enum
import inspect
import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
os.environ["TERM"] = "dumb"

from gemtool import __version__  # noqa: E402
from gemtool.cli import VERBS, app, build_command, prepared  # noqa: E402

EXIT_STATUS = """\
.TP
.B 0
Success.
.TP
.B 1
The work could not be done: a file is missing or unreadable, a disk is full, parts do not fit
together. One line on standard error says what to do.
.TP
.B 2
The command line, a configuration file or an environment variable is wrong; or an output exists
already and
.B \\-f
is not given.
.TP
.B 3
An input is damaged, truncated, or not of the kind that was expected.
.TP
.B 129
The terminal went away (SIGHUP).
.TP
.B 130
Interrupted (SIGINT). A second one skips the clean-up.
.TP
.B 141
The reader of standard output went away.
.TP
.B 143
Terminated (SIGTERM).
"""

ENVIRONMENT = """\
.TP
.BI GEMTOOL_ VERB _ OPTION
The default of an option, in capitals with underscores:
.BR GEMTOOL_TRAIN_STEPS=500 ;
of one that may be repeated, a value a line.
A variable that names no option of the verb that runs is an error.
The command line goes before the environment, and that before
.BR \\-\\-config .
.TP
.BR NO_COLOR ", " TERM=dumb
No colour in messages.
"""


def roff(text: str) -> str:
    """Escapes plain text for roff."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return "\n".join("\\&" + line if line[:1] in ".'" else line for line in text.splitlines())


def option_names(parameter: Any) -> str:
    names = ", ".join(f"\\fB{roff(name)}\\fR" for name in parameter.opts)
    if parameter.secondary_opts:
        names += ", " + ", ".join(f"\\fB{roff(name)}\\fR" for name in parameter.secondary_opts)
    return names


def value_name(parameter: Any) -> str:
    if getattr(parameter, "is_flag", False) or getattr(parameter, "count", False):
        return ""
    if parameter.metavar:
        return str(parameter.metavar)
    kind = parameter.type_descriptor.annotation
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return "|".join(choice.value for choice in kind)
    return {int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT")


def default_text(parameter: Any) -> str:
    default = parameter.default
    if default is None or isinstance(default, bool) or callable(default) or default in ("", 0, []):
        return ""
    if getattr(parameter, "is_flag", False) or not parameter.show_default:
        return ""
    if isinstance(default, (list, tuple)):
        default = " ".join(map(str, default))
    return f" Default: {roff(str(getattr(default, 'value', default)))}."


def options(command: Any) -> str:
    """The options of a command as roff."""
    lines = []
    for parameter in command.params:
        if parameter.param_type_name != "option" or parameter.hidden:
            continue
        value = value_name(parameter)
        lines.append(".TP")
        lines.append(option_names(parameter) + (f" \\fI{roff(value)}\\fR" if value else ""))
        lines.append(roff(inspect.cleandoc(parameter.help or "")) + default_text(parameter))
    lines += [".TP", "\\fB\\-h\\fR, \\fB\\-\\-help\\fR", "Show the options and exit."]
    return "\n".join(lines)


def synopsis(verb: str | None, command: Any) -> str:
    if verb is None:
        return ".B gemtool\n\\fIVERB\\fR [\\fIOPTIONS\\fR] [\\fIINPUT\\fR]..."
    arguments = []
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            name = f"\\fI{roff(parameter.metavar or parameter.name.upper())}\\fR"
            name = name if parameter.required else f"[{name}]"
            arguments.append(name + ("..." if parameter.nargs == -1 else ""))
    return f".B gemtool {verb}\n" + " ".join(["[\\fIOPTIONS\\fR]", *arguments])


def verbs() -> str:
    return "\n".join(f".TP\n.B {verb}\n{roff(line)}" for verb, line in VERBS.items())


def build() -> dict[Path, str]:
    """Path below man/ -> text of the page."""
    import typer

    pages = {}
    for source in sorted(HERE.glob("*.in")):
        name = source.name.removesuffix(".in")
        verb = name.rpartition(".")[0].partition("-")[2] or None
        command = None
        if verb in VERBS:
            command = build_command(verb)
        elif name == "gemtool.1":
            command = prepared(typer.main.get_command(app))
        text = source.read_text()
        fill = {
            "@VERSION@": __version__,
            "@VERBS@": verbs(),
            "@EXIT@": EXIT_STATUS.rstrip(),
            "@ENVIRONMENT@": ENVIRONMENT.rstrip(),
        }
        if command is not None:
            fill["@SYNOPSIS@"] = synopsis(verb, command)
            fill["@OPTIONS@"] = options(command)
        for key, value in fill.items():
            text = text.replace(key, value)
        section = name.rpartition(".")[2]
        pages[HERE / f"man{section}" / name] = text
    return pages


def main() -> int:
    check = sys.argv[1:] == ["--check"]
    different = []
    pages = build()
    for path, text in pages.items():
        if path.exists() and path.read_text() == text:
            continue
        different.append(path)
        if not check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    stale = [p for p in HERE.glob("man[0-9]/*") if p not in pages]
    if check and (different or stale):
        names = ", ".join(str(path.relative_to(HERE.parent)) for path in different + stale)
        print(f"manual pages differ from their sources: {names}; run `make man`", file=sys.stderr)
        return 1
    for path in [] if check else stale:
        path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
