"""Every benchmark, one after the other: `python bench`, or the subjects wanted: `python bench text`.

Each runs in a process of its own. JSON, an object a line, on stdout; a table of all on stderr at
the end.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

from measure import ROOT, Row, table

SUBJECTS = (
    "kernels",
    "model",
    "prefill",
    "answers",
    "contexts",
    "text",
    "media",
    "packing",
    "shards",
)


def rows(subject: str) -> Iterator[Row]:
    """The rows of a subject, passed on to stdout.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    command = [sys.executable, str(ROOT / "bench" / f"{subject}.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for text in process.stdout:
            print(text, end="", flush=True)
            yield json.loads(text)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def main() -> None:
    wanted = sys.argv[1:] or SUBJECTS
    if unknown := [subject for subject in wanted if subject not in SUBJECTS]:
        sys.exit(f"no benchmark of {unknown[0]!r}; there are {', '.join(SUBJECTS)}")
    found: list[Row] = []
    failed = []
    for subject in wanted:
        print(f"\n{subject}", file=sys.stderr)
        try:
            found.extend(rows(subject))
        except subprocess.CalledProcessError:
            failed.append(subject)
    print("\nall", file=sys.stderr)
    table(found)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
