"""The folder of a training run: one writer at a time, states that survive any kill.

    state/STEP/        orbax: parameters, optimizer; as JSON data order, token count, settings
    config.toml, ...   the checkpoint of the last save, as prefill and decode read it

A state counts only once orbax has renamed it into place. Resuming takes the last one, and because a
step depends on nothing else, repeats bit for bit what an uninterrupted run would have done.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gemtool import log
from gemtool.checkpoint import CARD, CONFIG, VOCAB, WEIGHTS
from gemtool.errors import CorruptInput, GemtoolError, UsageError, reason
from gemtool.stream.files import LOCK, locked, printable
from gemtool.stream.folders import output_folder

STATE = "state"
_UNFINISHED = ".orbax-checkpoint-tmp"
_FILES = (WEIGHTS, CARD, CONFIG, VOCAB)


class RunFolder:
    """States of a run in a folder that this process has locked. Made by `open_run`."""

    def __init__(self, path: Path, keep: int) -> None:
        self.path = path
        self._keep = keep
        self._opened: Any = None

    @property
    def _manager(self) -> Any:
        if self._opened is None:
            import orbax.checkpoint as ocp

            self._opened = ocp.CheckpointManager(
                (self.path / STATE).absolute(),
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=self._keep,
                    cleanup_tmp_directories=True,
                    enable_async_checkpointing=True,
                ),
            )
        return self._opened

    def latest(self) -> int | None:
        """Step of the last state that is whole, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
        """Saves a pytree of arrays and a JSON record; returns once their values are copied, and
        writes in the background. Older states than the last `keep` are removed.
        """
        import jax
        import jax.numpy as jnp
        import orbax.checkpoint as ocp

        if jax.default_backend() == "cpu":
            # There the host's view of an array is the array, which the next step overwrites.
            state = jax.tree.map(jnp.copy, state)
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record)
        )
        with self._writing():
            self._manager.save(step, args=arguments)

    def record(self, step: int) -> dict[str, Any]:
        """The JSON record of a state."""
        import orbax.checkpoint as ocp

        with _damage(self.path / STATE / str(step)):
            arguments = ocp.args.Composite(record=ocp.args.JsonRestore())
            return self._manager.restore(step, args=arguments)["record"]

    def restore(self, step: int, like: Any) -> Any:
        """A saved pytree. `like` gives structure, shapes and dtypes, as arrays or abstractly."""
        import orbax.checkpoint as ocp

        with _damage(self.path / STATE / str(step)):
            arguments = ocp.args.Composite(state=ocp.args.StandardRestore(like))
            return self._manager.restore(step, args=arguments)["state"]

    def finish(self) -> None:
        """Waits until what was saved is on disk."""
        if self._opened is not None:
            with self._writing():
                self._opened.wait_until_finished()

    def close(self) -> None:
        if self._opened is not None:
            with self._writing():
                self._opened.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """A save that failed in the background shows at the next call; orbax has no type for it."""
        try:
            yield
        except Exception as problem:
            raise GemtoolError(
                f"{self.path / STATE}: cannot be written: {_cause(problem)}"
            ) from problem


@contextlib.contextmanager
def open_run(
    path: str | Path, *, resume: bool, force: bool = False, keep: int = 2
) -> Iterator[RunFolder]:
    """Locks the folder of a run, which is made if it does not exist.

    Args:
        path: the folder.
        resume: go on with the run that is there, if any.
        force: remove the run that is there.
        keep: how many states to keep.

    Raises:
        UsageError: the folder holds a run and neither `resume` nor `force` is given, a checkpoint
            that is no run, or other things.
        GemtoolError: another process has locked it.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: is a file; name a folder for the run")
    if printable(folder.absolute()) != str(folder.absolute()):
        raise UsageError(f"{folder}: is no UTF-8 text, which the files of a run need; rename it")
    with (
        output_folder(folder, STATE),
        _hushed(),
        _locked_run(folder, resume=resume, force=force, keep=keep) as run,
    ):
        yield run


@contextlib.contextmanager
def _locked_run(folder: Path, *, resume: bool, force: bool, keep: int) -> Iterator[RunFolder]:
    names = {entry.name for entry in folder.iterdir()}
    if names and not names & {CONFIG, STATE, LOCK}:
        raise UsageError(f"{folder}: holds other files; name a new or an empty folder")
    with locked(folder):
        for entry in _entries(folder):
            if entry.name.startswith(tuple(f".{name}." for name in _FILES)):
                entry.unlink()  # half-written when an earlier process was killed
        has_state = any(entry.name.isdigit() for entry in _entries(folder / STATE))
        if has_state and not (resume or force):
            raise UsageError(
                f"{folder}: holds a training run; continue it with --resume or replace it with -f"
            )
        # A run that was killed in its first save may have a checkpoint and no state: it begins anew.
        is_run = has_state or (resume and (folder / STATE).exists())
        if (folder / CONFIG).exists() and not (is_run or force):
            raise UsageError(
                f"{folder}: holds a checkpoint without the state of a run; train on from it with "
                "--init into another folder, or replace it with -f"
            )
        if not resume:
            # The weights go first: what is left of a checkpoint must not look like one.
            for name in _FILES:
                (folder / name).unlink(missing_ok=True)
            if (folder / STATE).exists():
                shutil.rmtree(folder / STATE)
        run = RunFolder(folder, keep)
        try:
            yield run
        except BaseException:
            with contextlib.suppress(GemtoolError):  # what failed first is what is told
                run.close()
            for entry in _entries(folder / STATE):
                if _UNFINISHED in entry.name:  # a full disk stays full otherwise
                    shutil.rmtree(entry, ignore_errors=True)
            raise
        run.close()


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """What fails in callbacks of orbax's native code goes to the debug log: it fails as a save.

    So do coroutines that a failed save leaves behind: Python tells of them when it ends, so that this
    stays in force.
    """
    warnings.filterwarnings("ignore", r"coroutine .* was never awaited", RuntimeWarning)
    before = sys.unraisablehook
    sys.unraisablehook = lambda found: log.debug(f"in a callback: {found.exc_value!r}")
    try:
        yield
    finally:
        sys.unraisablehook = before


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


@contextlib.contextmanager
def _damage(folder: Path) -> Iterator[None]:
    """Whatever orbax raises while it reads a state that is there means that it is damaged."""
    try:
        yield
    except Exception as problem:
        raise CorruptInput(
            f"{folder}: the state cannot be restored ({_cause(problem)}); remove this folder "
            "to resume from the one before"
        ) from problem


def _cause(problem: Exception) -> str:
    """Why orbax failed: what the system said, if it did, else the beginning of the message."""
    if isinstance(problem, OSError):
        return reason(problem)
    text = (str(problem).splitlines() or [type(problem).__name__])[0]
    code = re.search(r"os_error_code='(\d+)'", str(problem))
    if code:
        return os.strerror(int(code[1])).lower()
    return text if len(text) <= 200 else text[:200] + "..."
