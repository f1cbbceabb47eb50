"""The layers of the architecture: imports go downwards only, and data verbs stay free of jax."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from gemtool.cli import VERBS

PACKAGE = Path(__file__).parent.parent / "gemtool"

# Lowest first. A module may import its own layer and those below.
LAYERS = (
    ("errors", "control", "__init__"),
    ("log",),
    ("signals",),
    ("stream",),
    ("data",),
    ("kernels",),
    ("model",),
    ("runtime", "checkpoint"),
    ("train", "infer"),
    ("aot",),
    ("probes",),
    ("cmd",),
    ("cli", "__main__"),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# Found by the command line, which shows the verb table it holds.
ALLOWED_UPWARDS = {("cmd", "cli")}
# Outside libraries that a layer never imports, not even inside a function.
FORBIDDEN = {
    "stream": {"jax", "typer"},
    "data": {"jax", "typer"},
    "kernels": {"pyarrow", "typer"},
    "model": {"pyarrow", "typer", "safetensors", "orbax"},
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Every module named by an import statement in a file, at the top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_downwards(path: Path) -> None:
    here = part(path)
    for name in imported(path):
        root, _, rest = name.partition(".")
        assert root not in FORBIDDEN.get(here, set()), f"{here} must not import {root}"
        if root != "gemtool" or not rest:
            continue
        there = rest.split(".")[0]
        if there not in RANK:  # `from gemtool import __version__`
            there = "__init__"
        downwards = RANK[there] <= RANK[here] or (here, there) in ALLOWED_UPWARDS
        assert downwards, f"{path.name} ({here}) imports {name}, which is above it"


@pytest.mark.parametrize("folder", ["gemtool", "tests", "bench", "examples", "man"])
def test_no_file_is_longer_than_600_lines(folder: str) -> None:
    for path in (PACKAGE.parent / folder).rglob("*"):
        ours = (
            path.suffix in (".py", ".toml", ".txt", ".md", ".in", ".sh") or path.name == "Makefile"
        )
        if ours and path.is_file() and "build" not in path.parts:
            assert path.read_bytes().count(b"\n") <= 600, path


def test_verbs_do_not_import_one_another() -> None:
    for path in sorted((PACKAGE / "cmd").glob("*.py")):
        for name in imported(path):
            if name.startswith("gemtool.cmd."):
                assert name.split(".")[2] in ("options", "exits"), f"{path.name} imports {name}"


def loaded_by(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*sys.modules)"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    return set(done.stdout.split())


@pytest.mark.parametrize("verb", VERBS)
def test_a_verbs_options_need_nothing_heavy(verb: str) -> None:
    """Help, completion and mistakes on the command line answer at once."""
    loaded = loaded_by(f"from gemtool.cli import build_command; build_command({verb!r})")
    heavy = {
        "jax",
        "pyarrow",
        "av",
        "sentencepiece",
        "matplotlib",
        "grain",
        "orbax",
        "PIL",
        "llguidance",
    }
    assert not loaded & heavy


def test_reading_a_checkpoints_settings_needs_no_jax() -> None:
    assert "jax" not in loaded_by("import gemtool.checkpoint")
