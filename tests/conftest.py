"""Shared fixtures: the real command in a process of its own, strict JAX, real media."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest

ROOT = Path(__file__).parent.parent

# Before anything imports jax: several CPU devices, and no silent widening.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")

# Programs that one test's command compiled need not be compiled by the next. Made by the first
# process of a run (its pytest-xdist workers inherit the variable), removed by it.
_CACHE = "GEMTOOL_TEST_CACHE"


def pytest_configure(config: pytest.Config) -> None:
    if _CACHE not in os.environ:
        os.environ[_CACHE] = tempfile.mkdtemp(prefix="gemtool-tests-")
        os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", os.environ[_CACHE])
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop(_CACHE), ignore_errors=True))


hypothesis.settings.register_profile("shared-machine", deadline=None, database=None)
hypothesis.settings.load_profile("shared-machine")

Command = Callable[..., subprocess.CompletedProcess[bytes]]


@pytest.fixture(scope="module", autouse=True)
def released_programs() -> Iterator[None]:
    """Lets go of what a module compiled: a process may map 65,530 areas of memory, and each program
    takes some. Beyond that the compiler crashes."""
    yield
    if "jax" in sys.modules:
        import jax

        jax.clear_caches()
        gc.collect()


@contextlib.contextmanager
def quickly_compiled() -> Iterator[None]:
    """What is compiled within it is hardly optimised: for programs that run a few times."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def gemtool(tmp_path: Path) -> Command:
    """Runs the command in an empty folder; with `check`, a failure fails the test and shows why."""

    def run(
        *arguments: object,
        input: bytes = b"",
        check: bool = True,
        env: dict[str, str] | None = None,
        timeout: float = 120,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[bytes]:
        done = subprocess.run(
            [sys.executable, "-m", "gemtool", *map(str, arguments)],
            input=input,
            capture_output=True,
            timeout=timeout,
            cwd=cwd or tmp_path,
            env={**command_environment(), **(env or {})},
            check=False,
        )
        if check and done.returncode != 0:
            shown = done.stderr.decode(errors="replace")
            raise AssertionError(f"gemtool {arguments[0]} exited {done.returncode}: {shown}")
        return done

    return run


@dataclass
class Done:
    """A verb that has ended."""

    code: int
    out: bytes
    err: str


Verb = Callable[..., Done]


class Kept(io.BytesIO):
    """What was written can be read behind `close`."""

    def close(self) -> None:
        """Keeps everything."""


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Verb:
    """Runs a verb in this process, which has compiled its programs, in an empty folder."""
    from gemtool import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gemtool.runtime.setup_jax", lambda **_: None)
    monkeypatch.setattr("gemtool.cmd.exits._abandon_stdout", lambda: None)

    def run(*arguments: object, stdin: bytes = b"", stdout: Any = None) -> Done:
        out, err = Kept(), io.StringIO()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["gemtool", *map(str, arguments)])
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
            patch.setattr(sys, "stdout", io.TextIOWrapper(stdout or out))
            patch.setattr(sys, "stderr", err)
            with pytest.raises(SystemExit) as end:
                cli.main()
        return Done(int(end.value.code or 0), out.getvalue(), err.getvalue())

    return run


def command_environment() -> dict[str, str]:
    """The environment of a user's shell, with this checkout importable."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("GEMTOOL_", "JAX_", "XLA_"))}
    return {
        **kept,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "NO_COLOR": "1",
        "GEMTOOL_CACHE": os.environ[_CACHE],
    }


@pytest.fixture
def real_media() -> Path:
    """The folder of media that were not made here (`make media`); the test is skipped without."""
    folder = Path(os.environ.get("GEMTOOL_MEDIA") or ROOT / "build" / "media")
    if not folder.is_dir():
        pytest.skip(f"no real media in {folder}: run `make media`")
    return folder
