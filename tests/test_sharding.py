"""Shards written again, after a stop, and in parts: always the folder of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gemtool.data.manifest import Names, encode_manifest, staged_name
from gemtool.data.sharding import create_shards
from gemtool.data.shards import ShardFolder
from gemtool.errors import CorruptInput, GemtoolError
from tests.conftest import ROOT, Command, command_environment
from tests.test_shard import HEADER, assert_same, packed_spans, stream

ARGUMENTS = ("--shard-size", "100kB", "--no-pg")


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def times(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}


# Run again


def test_a_finished_job_is_found_finished(gemtool: Command, tmp_path: Path) -> None:
    packed = stream(packed_spans(30))
    gemtool("shard", "-o", "s", *ARGUMENTS, input=packed)
    before, bytes_before = times(tmp_path / "s"), content(tmp_path / "s")
    again = gemtool("shard", "-o", "s", "--shard-size", "100kB", input=packed)  # other provenance
    assert b"complete already" in again.stderr
    assert times(tmp_path / "s") == before
    assert content(tmp_path / "s") == bytes_before
    gemtool("shard", "-o", "s", *ARGUMENTS, "-f", input=packed)
    assert content(tmp_path / "s") == bytes_before
    assert times(tmp_path / "s") != before


class Killed(BaseException):
    """Nothing changes in the folder any more."""


def killed_at(step: int, write: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Calls `write`, but stops it for good before its `step`-th renaming or removal of a file.

    Returns whether it came to its end before.
    """
    left = step

    def counting(original):
        def changed(*arguments, **options):
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return original(*arguments, **options)

        return changed

    with monkeypatch.context() as patched:
        for name in ("replace", "unlink"):
            patched.setattr(Path, name, counting(getattr(Path, name)))
        try:
            write()
        except Killed:
            return False
    return True


def test_replacing_never_loses_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between any two changes of the folder: the old shards, the new ones, or one run more."""
    old, new = packed_spans(30), packed_spans(25, 1)

    def write(folder: Path, spans: list, force: bool = False) -> None:
        with create_shards(folder, HEADER, shard_size=100_000, force=force) as writer:
            for span in spans:
                writer.append(span)

    write(tmp_path / "old", old)
    write(tmp_path / "new", new)
    before, after = content(tmp_path / "old"), content(tmp_path / "new")
    assert before.keys() != after.keys()
    seen = set()
    for step in range(100):
        shutil.copytree(tmp_path / "old", tmp_path / f"{step}-before")
        finished = killed_at(
            step, lambda at=tmp_path / f"{step}-before": write(at, new, True), monkeypatch
        )
        # This process still holds the lock of the one that it plays.
        folder = shutil.copytree(tmp_path / f"{step}-before", tmp_path / str(step))
        visible = {name: held for name, held in content(folder).items() if name[0] != "."}
        if (folder / "manifest.json").exists():
            assert visible in (before, after)
            ShardFolder(folder).verify()
            seen.add("old" if visible == before else "new")
        else:  # all the new files are there, under one name or the other
            seen.add("between")
            for name, held in after.items():
                here = folder / name
                there = folder / staged_name(name)
                assert held == (there if there.exists() else here).read_bytes()
        write(folder, new, force=not step % 2 or visible == before)
        assert content(folder) == after
        if finished:
            break
    assert finished
    assert seen == {"old", "between", "new"}


def test_what_replaces_is_continued(gemtool: Command, tmp_path: Path) -> None:
    gemtool("shard", "-o", "s", *ARGUMENTS, input=stream(packed_spans(30)))
    gemtool("shard", "-o", "other", *ARGUMENTS, input=stream(packed_spans(40, 1)))
    before, other = content(tmp_path / "s"), stream(packed_spans(40, 1))
    done = gemtool("shard", "-o", "s", *ARGUMENTS, "-f", input=other[:-30], check=False)
    assert done.returncode == 3
    waiting = {n: held for n, held in content(tmp_path / "s").items() if n not in before}
    assert waiting.keys() > {staged_name(Names().file(0))}
    assert {**content(tmp_path / "s")} == {**before, **waiting}
    ShardFolder(tmp_path / "s").verify()  # meanwhile, they can be read
    again = gemtool("shard", "-o", "s", *ARGUMENTS, "-f", input=other)
    assert b"of them kept from before" in again.stderr
    assert content(tmp_path / "s") == content(tmp_path / "other")


@pytest.mark.parametrize("force", [False, True])
def test_a_damaged_staged_manifest_stops_nobody(
    gemtool: Command, tmp_path: Path, force: bool
) -> None:
    packed = stream(packed_spans(30))
    gemtool("shard", "-o", "s", *ARGUMENTS, input=packed)
    before = content(tmp_path / "s")
    (tmp_path / "s" / staged_name("manifest.json")).write_bytes(before["manifest.json"][:-50])
    gemtool("shard", "-o", "s", *ARGUMENTS, *["-f"][: int(force)], input=packed)
    assert content(tmp_path / "s") == before


@pytest.mark.parametrize(("documents", "seed"), [(5, 0), (40, 0), (30, 1)])
def test_another_job_needs_force(
    gemtool: Command, tmp_path: Path, documents: int, seed: int
) -> None:
    """Fewer sequences, more, and different ones."""
    gemtool("shard", "-o", "s", *ARGUMENTS, input=stream(packed_spans(30)))
    before = content(tmp_path / "s")
    other = stream(packed_spans(documents, seed))
    done = gemtool("shard", "-o", "s", *ARGUMENTS, input=other, check=False)
    assert done.returncode == 2
    assert b"holds other sequences" in done.stderr
    assert b"add -f" in done.stderr
    assert content(tmp_path / "s") == before
    gemtool("shard", "-o", "s", *ARGUMENTS, "-f", input=other)
    gemtool("shard", "-o", "afresh", *ARGUMENTS, input=other)
    assert content(tmp_path / "s") == content(tmp_path / "afresh")  # nothing is left of the first


def test_other_settings_are_named(gemtool: Command, tmp_path: Path) -> None:
    packed = stream(packed_spans(10))
    gemtool("shard", "-o", "s", *ARGUMENTS, input=packed)
    for option, value, named in (
        ("--chunk", "64", b"another chunk (300, not 64)"),
        ("--shard-size", "1MB", b"another shard size"),
        ("--media", "png", b"another media (raw, not png)"),
    ):
        done = gemtool("shard", "-o", "s", *ARGUMENTS, option, value, input=packed, check=False)
        assert done.returncode == 2
        assert named in done.stderr


def test_what_a_failure_leaves_is_used(gemtool: Command, tmp_path: Path) -> None:
    """The stream before it broke off; then what is left of another job is replaced."""
    packed = stream(packed_spans(60))
    gemtool("shard", "-o", "whole", *ARGUMENTS, input=packed)
    cut = stream(packed_spans(40))[:-20]
    done = gemtool("shard", "-o", "s", *ARGUMENTS, input=cut, check=False)
    assert done.returncode == 3
    with pytest.raises(GemtoolError, match="did not finish"):
        ShardFolder(tmp_path / "s")
    kept = times(tmp_path / "s")
    assert "part-00001.arrow" in kept
    damaged = tmp_path / "s" / "part-00001.arrow"
    damaged.write_bytes(damaged.read_bytes()[:-1000] + bytes(1000))
    again = gemtool("shard", "-o", "s", *ARGUMENTS, input=packed)
    assert b"kept from before" in again.stderr
    assert times(tmp_path / "s")["part-00000.arrow"] == kept["part-00000.arrow"]
    assert content(tmp_path / "s") == content(tmp_path / "whole")

    (tmp_path / "s" / "manifest.json").unlink()
    small = stream(packed_spans(5, seed=9))
    gemtool("shard", "-o", "s", *ARGUMENTS, input=small)
    gemtool("shard", "-o", "small", *ARGUMENTS, input=small)
    assert content(tmp_path / "s") == content(tmp_path / "small")


# Where tests run in the background, SIGINT is ignored, also by what they start; and a preexec_fn
# would fork a process that jax may live in.
START = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from gemtool.__main__ import main
main()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_run_again(
    gemtool: Command, tmp_path: Path, number: signal.Signals
) -> None:
    first, rest = stream(packed_spans(20, 1)), stream(packed_spans(20, 2))
    running = subprocess.Popen(
        [sys.executable, "-c", START, "shard", "-o", "s", *ARGUMENTS],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env=command_environment(),
    )
    with running:
        assert running.stdin is not None
        running.stdin.write(first)  # and then the rest is awaited
        running.stdin.flush()
        waited = time.monotonic() + 60
        while not (tmp_path / "s" / "part-00001.arrow").exists() and time.monotonic() < waited:
            time.sleep(0.02)
        running.send_signal(number)
        said = running.communicate(timeout=30)[1].decode()
        assert running.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    assert all(line.startswith("gemtool: ") for line in said.splitlines() if line), said
    with pytest.raises(GemtoolError, match="did not finish"):
        ShardFolder(tmp_path / "s")
    again = gemtool("shard", "-o", "s", *ARGUMENTS, input=first + rest)
    assert b"of them kept from before" in again.stderr
    gemtool("shard", "-o", "undisturbed", *ARGUMENTS, input=first + rest)
    assert content(tmp_path / "s") == content(tmp_path / "undisturbed")


def kill_pipelines(tmp_path: Path, kills: int, each: int) -> None:
    """Kills tokenize | pack | shard at random moments, `each` times before it may finish."""
    rng = np.random.default_rng(0)
    words = rng.integers(97, 123, (3000, 6), np.uint8)
    text = b" ".join(map(bytes, words))
    for i in range(40):
        (tmp_path / f"{i}.txt").write_bytes(text[: int(rng.integers(1, len(text)))])
        pixels = rng.integers(0, 256, (224, 224, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    inputs = " ".join(sorted(path.name for path in tmp_path.iterdir()))
    command = (
        f"gemtool tokenize -q --no-pg {inputs} | gemtool pack -q --no-pg --length 1024 "
        "| gemtool shard -q --no-pg --shard-size 500kB -o "
    ).replace("gemtool", f"{sys.executable} -m gemtool")

    def start(folder: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", "-c", f"set -o pipefail; {command} {folder}"],
            cwd=tmp_path,
            env=command_environment(),
            start_new_session=True,
        )

    began = time.monotonic()
    with start("undisturbed") as running:
        assert running.wait(100) == 0
    whole = time.monotonic() - began
    expected = content(tmp_path / "undisturbed")
    assert len(expected) > 10
    moments = random.Random(0)
    for _ in range(kills // each):
        for _ in range(each):
            with start("s") as running:
                # Most of the time goes into starting three processes.
                time.sleep(moments.uniform(0.2, 1.05) * whole)
                os.killpg(running.pid, signal.SIGKILL)
        with start("s") as running:
            assert running.wait(100) == 0
        assert content(tmp_path / "s") == expected
        shutil.rmtree(tmp_path / "s")


def test_killed_pipelines_run_again(tmp_path: Path) -> None:
    kill_pipelines(tmp_path, 4, each=4)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_many_killed_pipelines_run_again(tmp_path: Path) -> None:
    kill_pipelines(tmp_path, 50, each=1)


# Parts


def test_parts_make_one_folder(gemtool: Command, tmp_path: Path) -> None:
    runs = [packed_spans(20, seed) for seed in (1, 2, 3)]
    with pytest.raises(GemtoolError, match="no such folder"):
        ShardFolder(tmp_path / "s")
    for i in (2, 1):
        done = gemtool(
            *("shard", "-o", "s", "--part", f"{i}/4", *ARGUMENTS), input=stream(runs[i - 1])
        )
        assert f"part {i}/4".encode() in done.stderr
    with pytest.raises(GemtoolError, match=r"of its 4 parts, 2 have not finished \(3, 4\)"):
        ShardFolder(tmp_path / "s")
    gemtool("shard", "-o", "s", "--part", "3/4", *ARGUMENTS, input=stream(runs[2]))
    gemtool("shard", "-o", "s", "--part", "4/4", *ARGUMENTS, input=stream([]))  # nothing was left
    folder = ShardFolder(tmp_path / "s")
    folder.verify()
    expected: list[list] = []
    for spans in runs:
        for span in spans:
            if span.offset == 0:
                expected.append([])
            span.seq = len(expected) - 1
            expected[-1].append(span)
    assert len(folder) == len(expected)
    for index in range(len(folder)):
        assert_same([*folder[index]], expected[index])
    stats = json.loads(gemtool("view", "--stats", "s").stdout)
    assert stats["packed"]["sequences"] == len(expected)
    assert json.loads(gemtool("view", "--header", "s").stdout)["parts"] == 4
    assert folder.manifest["tokens"]["text"] == stats["tokens"]["text"]

    # Each is found finished, or replaced, by itself.
    before = times(tmp_path / "s")
    again = gemtool("shard", "-o", "s", "--part", "2/4", *ARGUMENTS, input=stream(runs[1]))
    assert b"complete already" in again.stderr
    refused = gemtool(
        *("shard", "-o", "s", "--part", "2/4", *ARGUMENTS), input=stream(runs[0]), check=False
    )
    assert refused.returncode == 2
    assert times(tmp_path / "s") == before
    gemtool("shard", "-f", "-o", "s", "--part", "2/4", *ARGUMENTS, input=stream(runs[0]))
    changed = {name for name, at in times(tmp_path / "s").items() if before.get(name) != at}
    assert changed
    assert all("00002-of-00004" in name for name in changed)
    assert len(ShardFolder(tmp_path / "s")) == len(expected) - len(
        {span.seq for span in runs[1]}
    ) + len({span.seq for span in packed_spans(20, 1)})


def test_divisions_do_not_mix(gemtool: Command, tmp_path: Path) -> None:
    packed = stream(packed_spans(5))
    gemtool("shard", "-o", "s", "--part", "1/2", input=packed)
    for arguments, named in (
        (("--part", "2/3"), b"holds parts of 2; part 2 of 3 cannot be added"),
        ((), b"holds parts of 2; shards that are no parts cannot be added"),
        (("-f",), b"holds parts of 2"),
    ):
        done = gemtool("shard", "-o", "s", *arguments, input=packed, check=False)
        assert done.returncode == 2
        assert named in done.stderr
    gemtool("shard", "-o", "one", input=packed)
    done = gemtool("shard", "-o", "one", "--part", "1/1", input=packed, check=False)
    assert done.returncode == 2
    shutil.copy(tmp_path / "one" / "manifest.json", tmp_path / "s")
    with pytest.raises(GemtoolError, match="do not belong together"):
        ShardFolder(tmp_path / "s")
    for wrong in ("0/2", "3/2", "2", "a/b", "-1/2"):
        done = gemtool("shard", "-o", "t", f"--part={wrong}", input=packed, check=False)
        assert done.returncode == 2
        assert b"--part" in done.stderr


def test_parts_must_be_made_alike(gemtool: Command, tmp_path: Path) -> None:
    for i, chunk in ((1, "100"), (2, "50")):
        gemtool(
            *("shard", "-o", "s", "--part", f"{i}/2", "--chunk", chunk),
            input=stream(packed_spans(3, i)),
        )
    with pytest.raises(GemtoolError, match=r"manifest-00002-of-00002\.json: its chunk is 50"):
        ShardFolder(tmp_path / "s")
    file = tmp_path / "s" / "manifest-00002-of-00002.json"
    manifest = json.loads(file.read_bytes())
    file.write_bytes(encode_manifest({**manifest, "chunk": 100, "tokens": None}))
    with pytest.raises(CorruptInput, match="malformed"):
        ShardFolder(tmp_path / "s")


@pytest.mark.parametrize("numbers", ["argument", "slurm"])
def test_parts_are_written_side_by_side(tmp_path: Path, numbers: str) -> None:
    """By the script of the examples; some parts have no input."""
    (tmp_path / "texts").mkdir()
    for i in range(3):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"Text number {i}. " * 200)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gemtool").symlink_to(Path(sys.executable).parent / "gemtool")
    script = [str(ROOT / "examples" / "parts" / "shard.sh"), "texts", "s"]
    if numbers == "argument":
        task = [*script, "{}", "4"]
    else:
        task = ["env", "SLURM_ARRAY_TASK_ID={}", "SLURM_ARRAY_TASK_COUNT=4", *script]
    environment = command_environment()
    done = subprocess.run(
        ["xargs", "-P", "4", "-I{}", *task],
        input=b"1\n2\n3\n4\n",
        cwd=tmp_path,
        env={**environment, "PATH": f"{tmp_path / 'bin'}:{environment['PATH']}", "LENGTH": "256"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()
    folder = ShardFolder(tmp_path / "s")
    docs = {span.doc for spans in folder for span in spans}
    assert docs == {f"texts/{i}.txt" for i in range(3)}
    assert folder.length == 256
