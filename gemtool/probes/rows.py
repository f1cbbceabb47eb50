"""The rows of a probe: printed, or gathered in a file that can be resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from gemtool.errors import CorruptInput, GemtoolError, reason
from gemtool.probes import probe_options
from gemtool.stream.files import (
    atomic_write,
    named_by,
    open_locked,
    partial_name,
    sync_folder,
)

Row = dict[str, Any]
Key = tuple[int, float, int]
"""Length, depth, case."""


class Case(Protocol):
    """What is compared of a case when its row is there already."""

    @property
    def length(self) -> int: ...
    @property
    def depth(self) -> float: ...
    @property
    def case(self) -> int: ...
    @property
    def needle_at(self) -> int: ...
    @property
    def answer(self) -> str: ...


class RowLog:
    """The rows of a run: printed, or gathered in FILE.partial until FILE is whole.

    The partial file is locked: one process at a time gathers rows for FILE.

    Args:
        target: FILE; None is standard output.
        run: what all rows say of the run.
        wanted: the cases of the run.
        resume: take over the rows of an interrupted run.
        force: replace FILE.

    Attributes:
        done: rows by (length, depth, case), those of an interrupted run included.
        summary: if set, the rows that are written in the end instead.

    Raises:
        GemtoolError: the rows to take over are of another run, another process gathers rows for
            FILE, or it cannot be written.
    """

    def __init__(
        self,
        target: Path | None,
        run: Row,
        wanted: Iterable[Case],
        *,
        resume: bool,
        force: bool = False,
    ) -> None:
        self._target = target
        self.done: dict[Key, Row] = {}
        self.summary: list[Row] | None = None
        if target is None:
            return
        self._partial = partial_name(target)
        try:
            self._file = open_locked(self._partial)
        except OSError as problem:
            raise self._unwritable(problem) from None
        try:
            if target.exists() and not force:
                raise GemtoolError(f"{target}: another process has just written it")
            if resume:
                self._take_over(run, wanted)
            else:
                self._file.truncate(0)
        except BaseException:
            self._file.close()
            raise

    def _unwritable(self, problem: OSError) -> GemtoolError:
        return GemtoolError(f"{self._target}: cannot be written: {reason(problem)}")

    def _take_over(self, run: Row, wanted: Iterable[Case]) -> None:
        """Reads the whole rows of an interrupted run, and cuts off what is left of another."""
        self._file.seek(0)
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        again = "finish that run as it was begun, or remove the file"
        rows = read_rows(self._partial, data[:whole])
        if rows and "cases" in rows[0]:
            raise CorruptInput(f"{self._partial}: holds rows of cells; {again}")
        require_same(self._partial, rows, run, wanted, again)
        self.done = {_key(row): row for row in rows}
        self._file.truncate(whole)

    def __enter__(self) -> RowLog:
        return self

    def add(self, row: Row, *, shown: bool) -> None:
        """Records a row at once; without a file, prints it if it is to be shown."""
        self.done[_key(row)] = row
        if self._target is None:
            if shown:
                print(json.dumps(row, ensure_ascii=False), flush=True)
            return
        try:
            self._file.write(to_lines([row]))
            self._file.flush()
        except OSError as problem:
            raise self._unwritable(problem) from None

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> None:
        if self._target is None:
            if kind is None and self.summary is not None:
                print(to_lines(self.summary).decode(), end="", flush=True)
            return
        try:
            with self._file:
                os.fsync(self._file.fileno())
                if kind is not None:
                    if os.fstat(self._file.fileno()).st_size == 0:
                        self._partial.unlink()
                elif self.summary is None:
                    self._partial.replace(named_by(self._partial))
                    sync_folder(self._target.parent)
                else:
                    atomic_write(self._target, to_lines(self.summary))
                    self._partial.unlink()
        except OSError as problem:
            if kind is None:
                raise self._unwritable(problem) from None


def require_same(
    path: Path, rows: Iterable[Row], run: Row, wanted: Iterable[Case], again: str
) -> None:
    """Refuses rows that this run would not have written.

    Raises:
        GemtoolError: naming what differs, and `again`, what to do.
    """
    cases = {(case.length, case.depth, case.case): case for case in wanted}
    for row in rows:
        _require_fields(path, row, run, again)
        case = cases.get(_key(row))
        if case is None:
            raise GemtoolError(
                f"{path}: case {row['case']} at length {row['length']} and depth {row['depth']} is "
                f"none of this run; {again}"
            )
        if (row.get("needle_at"), row.get("answer")) != (case.needle_at, case.answer):
            raise GemtoolError(
                f"{path}: its rows are of a run with other --lengths, --depths or --cases; {again}"
            )


def _require_fields(path: Path, row: Row, fields: Row, again: str) -> None:
    # Rows written before an option was there are of its default.
    unsaid = probe_options(fields["probe"])
    for name, value in fields.items():
        found = row.get(name, unsaid.get(name))
        if found != value:
            raise GemtoolError(
                f"{path}: its rows have {name} {found!r}, this run {value!r}; {again}"
            )


def require_finished(path: Path, run: Row, wanted: Sequence[Case], *, summary: bool) -> list[Row]:
    """The rows of a file, which are all that this run would write, whatever the model answered.

    Raises:
        GemtoolError: they are of another run; naming what differs.
        CorruptInput: the file holds no rows of a probe.
    """
    again = "name another file, or replace this one with -f"
    rows = read_rows(path, path.read_bytes())
    is_summary = bool(rows) and "cases" in rows[0]
    if is_summary != summary:
        kinds = "a row a case", "a row a cell (--summary)"
        raise GemtoolError(
            f"{path}: holds {kinds[is_summary]}, this run writes {kinds[summary]}; {again}"
        )
    if not summary:
        require_same(path, rows, run, wanted, again)
        expected = {(case.length, case.depth, case.case) for case in wanted}
        found = {_key(row) for row in rows}
    else:
        counts: dict[tuple[int, float], int] = {}
        for case in wanted:
            counts[case.length, case.depth] = counts.get((case.length, case.depth), 0) + 1
        expected = {(*cell, count) for cell, count in counts.items()}
        found = {(row["length"], row["depth"], row["cases"]) for row in rows}
        for row in rows:
            _require_fields(path, row, run, again)
    if found != expected:
        what = "cases" if summary else "case"
        names = "length", "depth", what
        number, side = (
            (min(expected - found), "lacks") if expected - found else (min(found - expected), "has")
        )
        place = ", ".join(f"{name} {value}" for name, value in zip(names, number, strict=True))
        raise GemtoolError(f"{path}: {side} a row of {place}, unlike this run; {again}")
    return rows


def _key(row: Row) -> Key:
    return row["length"], row["depth"], row["case"]


def to_lines(rows: Iterable[Row]) -> bytes:
    """JSONL."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def read_rows(path: Path, data: bytes) -> list[Row]:
    """Rows from JSONL: all of cases ("case"), or all of cells ("cases").

    Raises:
        CorruptInput: a line is no row of a probe, or not of the kind of the first.
    """
    rows: list[Row] = []
    for number, line in enumerate(data.splitlines(), 1):
        try:
            row = json.loads(line)
            float(row["length"]), float(row["depth"])
            row["cases" if "cases" in (rows or [row])[0] else "case"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise CorruptInput(f"{path}: line {number} is no row of a probe") from None
        rows.append(row)
    return rows


def cells(rows: Iterable[Row]) -> Iterator[Row]:
    """One row for each length and depth: how many cases, and their mean score."""
    grouped: dict[tuple[int, float], list[float]] = {}
    for row in rows:
        grouped.setdefault((row["length"], row["depth"]), []).append(row["score"])
    for (length, depth), scores in grouped.items():
        mean = sum(scores) / len(scores)
        yield {"length": length, "depth": depth, "cases": len(scores), "score": mean}
