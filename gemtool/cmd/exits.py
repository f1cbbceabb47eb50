"""How a verb ends: failures become one line on stderr and the documented exit code."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

import typer

from gemtool import log
from gemtool.errors import GemtoolError, NoInput, UsageError, no_room, reason


def close_stdout() -> None:
    """Flushes and closes stdout: a full disk may show only here."""
    if sys.stdout is not None and not sys.stdout.closed:
        sys.stdout.flush()
        sys.stdout.close()


@contextlib.contextmanager
def exit_codes(ctx: typer.Context | None = None) -> Iterator[None]:
    """Failures become one line on stderr and the documented exit code, as typer.Exit.

    `ctx` is the verb's; None is the command line before there is one.
    """
    try:
        yield
    except NoInput as problem:
        assert ctx is not None
        print(ctx.get_help(), file=sys.stderr)
        fail(problem)
    except UsageError as problem:
        fail(UsageError(f"{problem}{_sources(ctx, str(problem))}"))
    except GemtoolError as problem:
        fail(problem)
    except typer.TyperException as problem:
        log.configure(as_json="--log-json" in sys.argv)
        fail(UsageError(parse_problem(problem)))
    except BrokenPipeError:
        _abandon_stdout()
        raise typer.Exit(141) from None
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # typer's end of a help nobody reads
            _abandon_stdout()
            raise typer.Exit(141) from None
        raise
    except MemoryError:
        fail(GemtoolError("out of memory"))
    except OSError as problem:
        if problem.errno is None:
            raise
        of_stdout = no_room(problem) or problem.errno == errno.EBADF
        where = problem.filename or ("<stdout>" if of_stdout else None)
        fail(GemtoolError(f"{where}: {reason(problem)}" if where else reason(problem)))


def parse_problem(problem: Any) -> str:
    """What is wrong with a command line, a variable or a configuration, on one line."""
    ctx, parameter = problem.ctx, getattr(problem, "param", None)
    source = _source(ctx, parameter) if parameter is not None else None
    text = problem.format_message()
    text = f"{source}: {problem.message}" if source else text[:1].lower() + text[1:]
    text = re.sub("Value error, |, unable to (parse|interpret) .*", "", text)
    text = re.sub("Input should be an? valid (?=[aeiou])", "expected an ", text)
    text = text.replace("Input should be a valid", "expected a")
    text = text.replace("Input should be", "expected").rstrip(".")
    if ctx is None:
        return text
    see = " See" if text.endswith("?") else "; see"
    return f"{text}{see} `{ctx.command_path} --help`"


def _source(ctx: typer.Context, parameter: Any) -> str | None:
    """The variable or the place in --config that set a parameter; None for the command line."""
    found = ctx.get_parameter_source(parameter.name)
    if found is None or found.name not in ("ENVIRONMENT", "DEFAULT_MAP"):
        return None
    if found.name == "ENVIRONMENT":
        return f"{ctx.auto_envvar_prefix}_{parameter.name.rstrip('_').upper()}"
    spelled = max(parameter.opts, key=len).lstrip("-")
    return f"{ctx.params.get('config')}: [{ctx.info_name}] {spelled}"


def _sources(ctx: typer.Context | None, message: str) -> str:
    """For each option that a message names and the command line did not set, what did."""
    if ctx is None:
        return ""
    named = [p for p in ctx.command.params if set(p.opts) & set(re.findall(r"--?[\w@-]+", message))]
    sources = [source for p in named if (source := _source(ctx, p)) is not None]
    return f" (set by {', '.join(sources)})" if sources else ""


def fail(problem: GemtoolError) -> NoReturn:
    """Says what is wrong, on one line, and ends the command with the exit code of `problem`."""
    log.error(" ".join(str(problem).split()))
    _abandon_stdout()
    raise typer.Exit(problem.exit_code) from None


def _abandon_stdout() -> None:
    """Whatever stdout still holds goes nowhere: no second failure when the interpreter ends."""
    with contextlib.suppress(OSError, ValueError):
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        os.close(devnull)
