"""What every verb must do. Verbs are found in the help itself, so a new one cannot skip this."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gemtool.cli import VERBS
from tests.conftest import ROOT, Command, command_environment

VERB_NAMES = sorted(VERBS)
STREAM_READERS = ["pack", "prefill", "shard", "tokenize", "view"]
ARGUMENTS = {"pack": ["--length", "64"], "shard": ["-o", "shards"], "prefill": ["--ckpt", "x"]}


def shown_verbs() -> list[str]:
    help_text = subprocess.run(
        [sys.executable, "-m", "gemtool", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env=command_environment(),
    ).stdout
    section = help_text.split("Verbs:")[1]
    return re.findall(r"^  (\w+) ", section, re.MULTILINE)


def test_help_lists_every_verb() -> None:
    assert shown_verbs() == list(VERBS)
    files = {p.stem for p in (ROOT / "gemtool" / "cmd").glob("*.py")} - {"__init__", "options"}
    assert files == set(VERBS)


@pytest.mark.parametrize("verb", VERB_NAMES)
def test_help(gemtool: Command, verb: str) -> None:
    shown = gemtool(verb, "--help").stdout.decode()
    assert shown == gemtool(verb, "-h").stdout.decode()
    assert shown == gemtool("help", verb).stdout.decode()
    assert " ".join(VERBS[verb].split()) in " ".join(shown.split()), "table and docstring differ"
    for option in ("--quiet", "--verbose", "--log-json", "--no-color", "--config", "--help"):
        assert option in shown


@pytest.mark.parametrize("verb", VERB_NAMES)
def test_every_option_has_a_help_text(verb: str) -> None:
    from gemtool.cli import build_command

    names: set[str] = set()
    for parameter in build_command(verb).params:
        if parameter.param_type_name == "option":
            assert parameter.help, parameter.name
            assert not names & set(parameter.opts), "an option twice"
            names |= set(parameter.opts)


@pytest.mark.parametrize("verb", VERB_NAMES)
def test_unknown_option(gemtool: Command, verb: str) -> None:
    done = gemtool(verb, "--no-such-option", check=False)
    assert done.returncode == 2
    assert b"--no-such-option" in done.stderr
    assert b"Traceback" not in done.stderr


def test_mistyped_verb(gemtool: Command) -> None:
    done = gemtool("tokenise", check=False)
    assert done.returncode == 2
    assert b"'tokenize'" in done.stderr


@pytest.mark.parametrize("verb", STREAM_READERS)
def test_missing_file(gemtool: Command, verb: str) -> None:
    done = gemtool(verb, *ARGUMENTS.get(verb, []), "no/such/file", check=False)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    if verb != "prefill":  # which looks for its checkpoint first
        assert b"no/such/file" in done.stderr


@pytest.mark.parametrize("verb", ["pack", "shard", "view"])
def test_empty_input_is_no_stream(gemtool: Command, verb: str, tmp_path: Path) -> None:
    done = gemtool(verb, *ARGUMENTS.get(verb, []), check=False)
    assert done.returncode == 3
    assert b"empty input" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", STREAM_READERS)
def test_a_terminal_as_input_shows_the_help(verb: str, tmp_path: Path) -> None:
    """Instead of hanging until Ctrl-D."""
    if verb == "prefill":
        pytest.skip("needs a checkpoint; tests/test_prefill_decode.py has it")
    leader, follower = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "gemtool", verb, *ARGUMENTS.get(verb, [])],
        stdin=follower,
        capture_output=True,
        timeout=60,
        cwd=tmp_path,
        env=command_environment(),
    )
    os.close(leader)
    os.close(follower)
    assert done.returncode == 2
    assert b"Usage: gemtool" in done.stderr


def test_config_file(gemtool: Command, tmp_path: Path) -> None:
    (tmp_path / "good.toml").write_text('[tokenize]\nformat = "jsonl"\nno-pg = true\n')
    rows = gemtool("tokenize", "--config", "good.toml", input=b"text").stdout
    assert rows.startswith(b'{"gemtool"')
    assert b"tokenize" not in rows.splitlines()[0], "no-pg was not applied"
    over = gemtool("tokenize", "--config", "good.toml", "--format", "arrow", input=b"text").stdout
    assert over.startswith(b"\xff\xff\xff\xff"), "the command line goes first"
    env = gemtool("tokenize", input=b"text", env={"GEMTOOL_TOKENIZE_FORMAT": "jsonl"}).stdout
    assert env.startswith(b'{"gemtool"')
    for text, message in (
        ("[tokenize]\nformatt = 'jsonl'\n", "did you mean 'format'"),
        ("[tokenise]\n", "did you mean 'tokenize'"),
        ("format = 'jsonl'\n", "[tokenize]"),
        ("[tokenize", "not TOML"),
    ):
        (tmp_path / "bad.toml").write_text(text)
        done = gemtool("tokenize", "--config", "bad.toml", input=b"text", check=False)
        assert done.returncode == 2
        assert message in done.stderr.decode()
    assert gemtool("tokenize", "--config", "missing.toml", check=False).returncode == 2


def test_log_json(gemtool: Command) -> None:
    import json

    done = gemtool("view", "--log-json", "missing", check=False)
    (line,) = done.stderr.splitlines()
    assert json.loads(line)["level"] == "error"


def test_interrupt_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gemtool", "tokenize", "-o", "out.spans"]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env=command_environment(),
    )
    assert process.stdin is not None
    process.stdin.write(b"some text\n" * 1000)
    process.stdin.flush()
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob(".out.spans.*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"interrupted" in errors
    assert b"Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_read_only_folder(gemtool: Command, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        target = "/proc/out.spans"  # root writes anywhere else
    else:
        (tmp_path / "locked").mkdir(mode=0o500)
        target = str(tmp_path / "locked" / "out.spans")
    done = gemtool("tokenize", "-o", target, input=b"text", check=False)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1


def test_completion(gemtool: Command) -> None:
    done = gemtool(
        env={"_GEMTOOL_COMPLETE": "complete_bash", "COMP_WORDS": "gemtool to", "COMP_CWORD": "1"}
    )
    assert done.stdout.split() == [b"tokenize"]
