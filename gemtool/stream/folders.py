"""Folders that a verb makes for its output, and takes away again where nothing came of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from gemtool.errors import GemtoolError, reason
from gemtool.signals import removed_on_signal


@contextlib.contextmanager
def output_folder(folder: Path, *inside: str) -> Iterator[None]:
    """Makes a folder and its parents; those that were made and are empty in the end are removed.

    Args:
        folder: the folder; may exist.
        inside: names of folders in it that may be removed before it, if they are empty.

    Raises:
        GemtoolError: it cannot be made.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]

    def remove() -> None:
        if made:
            with contextlib.suppress(OSError):
                for path in [folder / name for name in inside if (folder / name).is_dir()] + made:
                    path.rmdir()

    try:
        with removed_on_signal(remove):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as problem:
                raise GemtoolError(f"{folder}: cannot be made: {reason(problem)}") from None
            yield
    finally:
        remove()
