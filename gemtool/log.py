"""Messages and progress on stderr; data never goes there, messages never go to stdout.

`configure` is called once by the command line. Without it, warnings and errors are printed plainly.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

_ERASE_BAR = "\r\x1b[2K\x1b[?25h"
"""Clears the line and shows the cursor, which a progress bar hides."""

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


@dataclass
class _Settings:
    threshold: int = 20
    as_json: bool = False
    color: bool = False
    progress: bool = True
    bar: bool = False  # whether one is on the terminal now


_settings = _Settings()


def configure(
    *, quiet: bool = False, verbose: int = 0, as_json: bool = False, color: bool = True
) -> None:
    """Sets what is shown: `quiet` errors only, `verbose` more, `as_json` one object a line."""
    _settings.threshold = 40 if quiet else 10 if verbose else 20
    _settings.as_json = as_json
    _settings.progress = not quiet
    _settings.color = (
        color
        and not os.environ.get("NO_COLOR")
        and os.environ.get("TERM") != "dumb"
        and sys.stderr.isatty()
    )


def _emit(level: str, message: str, fields: dict[str, Any]) -> None:
    if _LEVELS[level] < _settings.threshold:
        return
    with contextlib.suppress(OSError):  # a closed stderr must not change the outcome of the work
        print(_line(level, message, fields), file=sys.stderr, flush=True)


def _line(level: str, message: str, fields: dict[str, Any]) -> str:
    if _settings.as_json:
        record = {"time": round(time.time(), 3), "level": level, "message": message, **fields}
        return json.dumps(record, ensure_ascii=False, default=str)
    tail = "".join(f" {key}={value}" for key, value in fields.items())
    prefix = "" if level == "info" else f"{level}: "
    line = f"gemtool: {prefix}{message}{tail}"
    if _settings.color and level in ("warning", "error"):
        line = f"\x1b[{31 if level == 'error' else 33}m{line}\x1b[0m"
    return line


def debug(message: str, **fields: Any) -> None:
    _emit("debug", message, fields)


def info(message: str, **fields: Any) -> None:
    _emit("info", message, fields)


def warning(message: str, **fields: Any) -> None:
    _emit("warning", message, fields)


def error(message: str, **fields: Any) -> None:
    _emit("error", message, fields)


def last_words(message: str, level: str = "info") -> None:
    """Says why the process is about to end. Safe in a signal handler, whatever is being printed."""
    line = _line(level, message, {}) + "\n"
    if _settings.bar:
        line = _ERASE_BAR + line
    elif os.isatty(2) and not _settings.as_json:
        line = "\n" + line  # behind the ^C
    with contextlib.suppress(OSError):
        os.write(2, line.encode(errors="backslashreplace"))


def _human(seconds: float) -> str:
    minutes, secs = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"


def _pace(rate: float, unit: str) -> str:
    return f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.2f} {unit}/s"


class progress:  # noqa: N801 (used as a function: `with progress(...) as bar`)
    """Shows how far a long job is: a bar on a terminal, else a log line now and then.

    Args:
        what: what is being done, one or two words.
        total: how many units there are, if known.
        unit: name of what is counted, in the plural.
        every: seconds between log lines where there is no terminal.
        start: how many units were done before.
    """

    def __init__(
        self,
        what: str,
        total: float | None = None,
        unit: str = "items",
        every: float = 30.0,
        start: float = 0,
    ) -> None:
        self.what, self.total, self.unit, self.every = what, total, unit, every
        self.count = float(start)
        self._first: tuple[float, float] | None = None
        self._rich: Any = None

    def __enter__(self) -> progress:
        self._last = time.monotonic()
        if _settings.progress and not _settings.as_json and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                Progress,
                SpinnerColumn,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )

            # Rows that a verb prints meanwhile go above the bar, at any width, if both share the
            # terminal; otherwise stdout is none of its business.
            console = Console(stderr=True, no_color=not _settings.color, soft_wrap=True)
            self._rich = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=console,
                transient=True,
                redirect_stdout=sys.stdout.isatty(),
            )
            self._task = self._rich.add_task(
                self.what, total=self.total, completed=self.count, note=""
            )
            self._rich.start()
            _settings.bar = True
        return self

    def skip(self, amount: float) -> None:
        """Counts units that were done before: no work of now, by which the rate is measured."""
        self.count += amount
        if self._first is not None:
            self._first = (self._first[0], self._first[1] + amount)
        if self._rich is not None and amount:
            task = next(task for task in self._rich.tasks if task.id == self._task)
            began = task.start_time
            self._rich.reset(self._task, completed=self.count)
            task.start_time = began

    def update(self, amount: float = 1, note: str = "") -> None:
        """Counts `amount` more units; `note` replaces the text beside the rate."""
        self.count += amount
        now = time.monotonic()
        if self._first is None:
            # The first unit's time is also that of loading and compiling.
            self._first = (now, self.count)
        rate = (self.count - self._first[1]) / max(now - self._first[0], 1e-9)
        pace = [_pace(rate, self.unit)] if rate else []
        if self._rich is not None:
            self._rich.update(self._task, completed=self.count, note=" ".join([*pace, note]))
        elif _settings.progress and now - self._last >= self.every:
            self._last = now
            total = f" of {self.total:,.0f}" if self.total else ""
            if self.total and rate:
                total += f", {_human(max(self.total - self.count, 0) / rate)} left"
            said = ", ".join([f"{self.what}: {self.count:,.0f}{total}", *pace])
            info(f"{said} {note}".rstrip())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._rich is not None:
            self._rich.stop()
            _settings.bar = False
