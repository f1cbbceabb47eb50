"""What every verb must do. Verbs are found in the help itself, so a new one cannot skip this."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gemtool.cli import VERBS
from gemtool.cmd.help import manual_page
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
    files = {p.stem for p in (ROOT / "gemtool" / "cmd").glob("*.py")} - {
        "__init__",
        "exits",
        "options",
    }
    assert files == set(VERBS)


@pytest.mark.parametrize("verb", VERB_NAMES)
def test_help(gemtool: Command, verb: str) -> None:
    shown = gemtool(verb, "--help").stdout.decode()
    assert shown == gemtool(verb, "-h").stdout.decode()
    manual = gemtool("help", verb).stdout.decode()
    assert "EXIT STATUS" in manual if shutil.which("man") else manual == shown
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
    assert len(done.stderr.splitlines()) == 1


def test_mistyped_verb(gemtool: Command) -> None:
    done = gemtool("tokenise", check=False)
    assert done.returncode == 2
    assert b"Did you mean 'tokenize'? See `gemtool --help`" in done.stderr


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
        ("tokenize = 3\n", "'tokenize' is no table of a verb; write"),
        ("[tokenize", "not TOML"),
        ("[train]\nstepz = 3\n", "[train] has no option 'stepz'; did you mean 'steps'"),
    ):
        (tmp_path / "bad.toml").write_text(text)
        done = gemtool("tokenize", "--config", "bad.toml", input=b"text", check=False)
        assert done.returncode == 2
        assert message in done.stderr.decode()
    assert gemtool("tokenize", "--config", "missing.toml", check=False).returncode == 2


@pytest.mark.parametrize("arguments", [["missing"], ["--no-such-option"]])
def test_log_json(gemtool: Command, arguments: list[str]) -> None:
    done = gemtool("view", "--log-json", *arguments, check=False)
    (line,) = done.stderr.splitlines()
    assert json.loads(line)["level"] == "error"


def test_a_bad_value_names_its_source(gemtool: Command, tmp_path: Path) -> None:
    def error(*arguments: str, **env: str) -> str:
        done = gemtool(*arguments, input=b"text", env=env, check=False)
        assert done.returncode == 2
        (line,) = done.stderr.decode().splitlines()
        return line

    (tmp_path / "c.toml").write_text('[pack]\nlength = "many"\n')
    assert "c.toml: [pack] length: " in error("pack", "--config", "c.toml")
    assert "'--length': expected an integer; see" in error("pack", "--length", "many")
    assert "expected greater than or equal to 1" in error("pack", "--length", "0")
    assert "GEMTOOL_PACK_FORCE: expected a boolean; see" in error("pack", GEMTOOL_PACK_FORCE="x")
    assert "GEMTOOL_PACK_LENGTH: " in error("pack", GEMTOOL_PACK_LENGTH="many")
    assert "set by GEMTOOL_TOKENIZE_FPS" in error("tokenize", GEMTOOL_TOKENIZE_FPS="-1")
    assert "set by" not in error("tokenize", "--fps", "-1")
    mistyped = error("pack", GEMTOOL_PACK_LENGHT="64")
    assert "did you mean 'GEMTOOL_PACK_LENGTH'" in mistyped


def test_a_variable_holds_a_value_a_line(gemtool: Command) -> None:
    env = {"GEMTOOL_TRAIN_DATA": "my shards\nothers"}
    done = gemtool("train", "--ckpt", "run", env=env, check=False)
    assert b"my shards: no such folder" in done.stderr


def test_quiet_and_verbose_exclude_each_other(gemtool: Command) -> None:
    assert gemtool("tokenize", "-q", "-v", input=b"text", check=False).returncode == 2


@pytest.mark.parametrize("arguments", [[""], ["a", ""], ["-o", ""]])
def test_empty_names(gemtool: Command, arguments: list[str]) -> None:
    done = gemtool("tokenize", *arguments, input=b"text", check=False)
    assert done.returncode == 2
    assert b"empty" in done.stderr


def test_an_output_that_is_an_input_is_refused(gemtool: Command, tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("text")
    (tmp_path / "link.md").symlink_to("notes.md")
    for output in ("notes.md", "link.md", "./notes.md"):
        done = gemtool("tokenize", "notes.md", "-f", "-o", output, check=False)
        assert done.returncode == 2
    assert (tmp_path / "notes.md").read_text() == "text"


def test_an_output_goes_where_a_symbolic_link_points(gemtool: Command, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "out.spans").touch()
    (tmp_path / "out.spans").symlink_to("there/out.spans")
    gemtool("tokenize", "-f", "-o", "out.spans", input=b"text")
    assert (tmp_path / "out.spans").is_symlink()
    gemtool("view", "--verify", "there/out.spans")
    assert [p.name for p in (tmp_path / "there").iterdir()] == ["out.spans"]


def test_names_that_are_not_utf8(gemtool: Command, tmp_path: Path) -> None:
    name = os.fsdecode(b"bad\xff.txt")
    (tmp_path / name).write_text("text")
    spans = gemtool("tokenize", name).stdout
    rows = gemtool("view", input=spans).stdout.decode()
    assert r"bad\xff.txt" in rows.replace("\\\\", "\\")
    assert "bad" in gemtool("view", "--header", input=spans).stdout.decode()
    gemtool("tokenize", "--format", "jsonl", "-o", os.fsdecode(b"o\xfe"), name)
    gemtool("view", "--verify", os.fsdecode(b"o\xfe"))


def closed(descriptor: int, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[bytes]:
    """The command with a standard stream closed, as by `>&-`."""
    shell = f'"$@" {descriptor}{"<" if descriptor == 0 else ">"}&-'
    command = ["sh", "-c", shell, "sh", sys.executable, "-m", "gemtool", *arguments]
    return subprocess.run(
        command, capture_output=True, timeout=60, cwd=cwd, env=command_environment()
    )


def test_closed_standard_streams(gemtool: Command, tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("text")
    gemtool("tokenize", "notes.md", "-o", "notes.spans")
    for arguments in (["tokenize", "notes.md"], ["view", "notes.spans"], ["--version"]):
        done = closed(1, *arguments, cwd=tmp_path)
        assert done.returncode == 1
        assert done.stderr.decode().splitlines() == [
            "gemtool: error: <stdout>: bad file descriptor"
        ]
    assert closed(1, "tokenize", "notes.md", "-o", "a.spans", cwd=tmp_path).returncode == 0
    assert closed(2, "tokenize", "notes.md", "-o", "b.spans", cwd=tmp_path).returncode == 0
    for name in ("a.spans", "b.spans"):
        gemtool("view", "--verify", name)
    failed = closed(2, "view", "missing", cwd=tmp_path)
    assert (failed.returncode, failed.stdout) == (1, b"")
    assert closed(0, "tokenize", cwd=tmp_path).returncode == 1
    assert (tmp_path / "notes.md").read_text() == "text"


@pytest.mark.parametrize("arguments", ["--version", "--help", "pack -h"])
def test_full_disk_on_stdout(arguments: str, tmp_path: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "gemtool", *arguments.split()],
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=60,
            cwd=tmp_path,
            env=command_environment(),
        )
    assert done.returncode == 1
    assert done.stderr.decode() == "gemtool: error: <stdout>: no space left on device\n"


@pytest.mark.parametrize("arguments", ["--version", "--help", "pack -h", "help pack"])
def test_nobody_reads_stdout(arguments: str, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "gemtool", *arguments.split()],
        stdout=writer,
        stderr=subprocess.PIPE,
        timeout=60,
        cwd=tmp_path,
        env=command_environment(),
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_one_process_writes_a_file(gemtool: Command, tmp_path: Path) -> None:
    """A second one is refused, also with -f; what a killed one left is removed by the next, and nothing
    else is, whatever it is called."""
    command = [sys.executable, "-m", "gemtool", "tokenize", "-o", "out.spans"]
    environment = command_environment()
    others = {".out.spans.backup", "out.spans.partial"}
    for name in others:
        (tmp_path / name).write_text("mine")
    tool = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=tmp_path, env=environment)
    try:
        deadline = time.monotonic() + 60
        while not (left := list(tmp_path.glob(".out.spans.????????"))):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.2)  # for its lock
        for options in ([], ["-f"]):
            done = gemtool("tokenize", "-o", "out.spans", *options, input=b"text", check=False)
            says = b"gemtool: error: out.spans: another process is writing it\n"
            assert (done.returncode, done.stdout, done.stderr) == (1, b"", says)
        assert left[0].exists()
    finally:
        tool.kill()
        tool.communicate()
    assert gemtool("tokenize", "nosuch", "-o", "out.spans", check=False).returncode == 1
    gemtool("tokenize", "-o", "out.spans", input=b"text")
    assert {path.name for path in tmp_path.iterdir()} == {"out.spans", *others}
    assert {(tmp_path / name).read_text() for name in others} == {"mine"}


def test_help_of_formats(gemtool: Command) -> None:
    if shutil.which("man") is None:
        pytest.skip("needs man")
    for topic in ("stream", "context", "gemtool"):
        assert b"NAME" in gemtool("help", topic).stdout
    assert b"gemtool-help - show" in gemtool("help", "help").stdout
    assert manual_page("shard") == ROOT / "man" / "man1" / "gemtool-shard.1"
    done = gemtool("help", "streem", check=False)
    assert done.returncode == 2
    assert b"'stream'" in done.stderr


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
    for words, last, completed in (
        ("gemtool probe n", "2", [b"needle"]),
        ("gemtool probe needle --wording ger", "4", [b"german"]),
        ("gemtool help con", "2", [b"context"]),
        ("gemtool train --model na", "3", [b"nano"]),
    ):
        done = gemtool(
            env={"_GEMTOOL_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": last}
        )
        assert done.stdout.split() == completed
