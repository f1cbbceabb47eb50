"""The folder of a training run: one writer at a time, states that survive any kill.

    state/STEP/        orbax: parameters, optimizer; as JSON data order, token count, settings
    config.toml, ...   the checkpoint of the last save, as prefill and decode read it

A state counts only once orbax has renamed it into place. Resuming takes the last one, and because a
step depends on nothing else, repeats bit for bit what an uninterrupted run would have done.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gemtool.checkpoint import CARD, CONFIG, VOCAB, WEIGHTS
from gemtool.errors import CorruptInput, GemtoolError, UsageError

STATE = "state"
LOCK = ".gemtool-lock"
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
            self._opened.wait_until_finished()

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()


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
        GemtoolError: another process trains in it.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: is a file; name a folder for the run")
    folder.mkdir(parents=True, exist_ok=True)
    names = {entry.name for entry in folder.iterdir()}
    if names and not names & {CONFIG, STATE, LOCK}:
        raise UsageError(f"{folder}: holds other files; name a new or an empty folder")
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise GemtoolError(f"{folder}: another process is training in it") from None
        for entry in _entries(folder):
            if entry.name.startswith(tuple(f".{name}." for name in _FILES)):
                entry.unlink()  # half-written when an earlier process was killed
        has_state = any(entry.name.isdigit() for entry in _entries(folder / STATE))
        has_checkpoint = (folder / CONFIG).exists()
        if has_state and not (resume or force):
            raise UsageError(
                f"{folder}: holds a training run; continue it with --resume or replace it with -f"
            )
        if has_checkpoint and not has_state and not force:
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
        finally:
            run.close()
    finally:
        # This unlocks. The file stays: had it another life, two runs might lock different ones.
        os.close(descriptor)


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


@contextlib.contextmanager
def _damage(folder: Path) -> Iterator[None]:
    """Whatever orbax raises while it reads a state that is there means that it is damaged."""
    try:
        yield
    except Exception as problem:
        reason = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise CorruptInput(
            f"{folder}: the state cannot be restored ({reason}); remove this folder to resume from "
            "the one before"
        ) from problem
