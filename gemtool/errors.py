"""Failures that a person can act on. Each carries the exit code of the process."""

from __future__ import annotations

import difflib
import errno
import json
from collections.abc import Iterable


class GemtoolError(Exception):
    """The work cannot be done; the message is one line that says what to do about it."""

    exit_code = 1


class UsageError(GemtoolError):
    """The command line, a configuration file or the environment asks for something impossible."""

    exit_code = 2


class NoInput(UsageError):
    """A verb was called without an input on a terminal: it shows its help instead of hanging."""


class CorruptInput(GemtoolError):
    """An input is damaged, truncated or not of the kind that was expected."""

    exit_code = 3


def reason(problem: OSError) -> str:
    """Why a system call failed, in the words of the system: "no such file or directory"."""
    return (problem.strerror or str(problem)).lower()


def no_room(problem: OSError) -> bool:
    """Whether something cannot be written for want of room: a full disk, a quota, a limit of sizes.
    Reading never fails so."""
    return problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def counted(number: int, what: str) -> str:
    """A number of things in a message: "1 file", "2,000 files"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def not_json(problem: ValueError) -> str:
    """Why a line is no JSON, from what `json.loads` raised: "not JSON: ... at column 7"."""
    if isinstance(problem, json.JSONDecodeError):
        return f"not JSON: {problem.msg.lower()}, at column {problem.colno}"
    if isinstance(problem, UnicodeDecodeError):
        return f"not UTF-8 text, at byte {problem.start + 1} of the line"
    return f"not JSON: {problem}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'length'?"` when one of `known` is close to `word`, else an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
