"""How a process is set up for JAX."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGE_FAULTS = """
import resource, jax, jax.numpy as jnp, numpy as np
if {set_up}:
    from gemtool.runtime import setup_jax
    setup_jax()
def with_temporaries(x):
    return jnp.sort(x * 2, axis=0).sum()
run, x = jax.jit(with_temporaries), np.ones((2**22, 4), np.float32)
for _ in range(3):
    run(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    run(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(set_up: bool) -> int:
    """Of ten more runs of a program with temporaries of 64 MiB."""
    script = PAGE_FAULTS.format(set_up=set_up)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def huge_pages() -> bool:
    """Whether the kernel gives them unasked, so that faults are few in any case."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.exists() and "[always]" in setting.read_text()


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is set up")
@pytest.mark.skipif(huge_pages(), reason="faults are of huge pages here")
def test_a_program_runs_again_in_the_pages_it_had() -> None:
    # A few remain: a run may ask for more before the last one's is free.
    assert page_faults(set_up=True) < page_faults(set_up=False) / 4


@pytest.mark.parametrize(
    ("given", "used"),
    [
        (None, "--xla_cpu_prefer_vector_width=512"),
        ("--xla_foo=1", "--xla_foo=1 --xla_cpu_prefer_vector_width=512"),
        ("--xla_cpu_prefer_vector_width=128", "--xla_cpu_prefer_vector_width=128"),
    ],
)
def test_xla_compiles_for_whole_vectors_unless_told_else(given: str | None, used: str) -> None:
    script = "import os; from gemtool.runtime import setup_jax as set_up; set_up(); set_up()"
    script += "; print(os.environ['XLA_FLAGS'])"
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    if given is not None:
        environment["XLA_FLAGS"] = given
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == used + "\n"


def test_the_cache_is_bounded(tmp_path: Path) -> None:
    """Programs that were not used for longest go, until a quarter of the room is free."""
    folder = tmp_path / "xla"
    folder.mkdir()
    # Number, when it was made, and when it was last read.
    for name, made, read in ((0, 100, 900), (1, 200, 200), (2, 300, 300), (3, 400, 400)):
        (folder / f"{name}-cache").write_bytes(bytes(300))
        os.utime(folder / f"{name}-cache", (read, made))

    def left(most: int) -> set[str]:
        script = f"from gemtool import runtime as r; r.CACHE_BYTES = {most}; r.setup_jax()"
        environment = {**os.environ, "GEMTOOL_CACHE": str(tmp_path)}
        subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, check=True)
        return {path.name[0] for path in folder.iterdir()}

    assert left(1200) == {"0", "1", "2", "3"}
    assert left(1199) == {"0", "3"}


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, "home/.cache/gemtool/xla"),
        ({"XDG_CACHE_HOME": "shared"}, "shared/gemtool/xla"),
        ({"XDG_CACHE_HOME": "shared", "GEMTOOL_CACHE": "own"}, "own/xla"),
        ({"XDG_CACHE_HOME": "shared", "GEMTOOL_CACHE": "off"}, None),
    ],
)
def test_where_the_cache_is(tmp_path: Path, variables: dict[str, str], place: str | None) -> None:
    """As the manual says, and nowhere else."""
    kept = {k: v for k, v in os.environ.items() if k not in ("GEMTOOL_CACHE", "XDG_CACHE_HOME")}
    named = {k: v if v == "off" else str(tmp_path / v) for k, v in variables.items()}
    script = (
        "from gemtool.runtime import setup_jax; setup_jax(); import jax; "
        "jax.jit(lambda x: x * 3 + 1)(2.0)"
    )
    subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**kept, **named, "HOME": str(tmp_path / "home")},
        check=True,
    )
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert bool(files) is (place is not None)
    assert all(file.is_relative_to(tmp_path / str(place)) for file in files), files
