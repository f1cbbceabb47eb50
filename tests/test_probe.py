"""The text needle: cases as the protocol says, rows as they are done, resumed, summed up, drawn."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gemtool.cmd.probe import parse_lengths, read_haystack
from gemtool.data.vocab import Vocab
from gemtool.errors import GemtoolError, UsageError
from gemtool.probes.haystack import Case, sentence_ends
from gemtool.probes.needle import CITIES, NEEDLE, cases, score
from gemtool.probes.plot import grid, plot_heat_map, short_count
from tests.conftest import ROOT, Command, command_environment


@pytest.fixture(scope="module")
def vocab() -> Vocab:
    return Vocab.load()


@pytest.fixture(scope="module")
def haystack() -> str:
    return read_haystack(None)


def some_cases(vocab: Vocab, haystack: str, seed: int = 0) -> list[Case]:
    found = cases(vocab, haystack, lengths=[2000, 500], depths=3, repetitions=2, seed=seed)
    return list(found)


def test_the_grid(vocab: Vocab, haystack: str) -> None:
    found = some_cases(vocab, haystack)
    assert [(c.length, c.depth, c.case) for c in found] == [
        (length, depth, case)
        for length in (500, 2000)
        for depth in (0.0, 0.5, 1.0)
        for case in (0, 1)
    ]


def test_every_context_hides_its_needle_once(vocab: Vocab, haystack: str) -> None:
    ends = np.array(
        sorted(set(vocab.encode(haystack)[sentence_ends(vocab, vocab.encode(haystack)) - 1]))
    )
    for case in some_cases(vocab, haystack):
        assert len(case.context) == case.length
        assert case.context.dtype == np.int32
        text = vocab.decode(case.context)
        assert text.count("The special magic") == 1
        assert text.count(case.answer) == 1
        city = case.question.removeprefix("What is the special magic ").removesuffix(" number?")
        assert city in CITIES
        assert NEEDLE.format(city=city, number=case.answer) in text
        assert case.prefix == f"The special magic {city} number is:"
        # Between two sentences, near the depth that was asked for.
        place = case.needle_at / case.length
        assert abs(place - case.depth) < 0.15
        if 0 < case.needle_at < case.length - 40:
            assert case.context[case.needle_at - 1] in ends


def test_a_shared_context_hides_all_needles_of_a_length(vocab: Vocab, haystack: str) -> None:
    found = list(
        cases(vocab, haystack, lengths=[900], depths=7, repetitions=2, seed=3, shared=True)
    )
    assert [(c.depth, c.case) for c in found] == [
        (pytest.approx(row / 6), case) for case in (0, 1) for row in range(7)
    ]
    for case in (0, 1):
        same = [c for c in found if c.case == case]
        assert len({id(c.haystack) for c in same}) == 1
        context = same[0].context
        assert len(context) == 900
        text = vocab.decode(context)
        assert text.count("The special magic") == 7
        assert len({c.question for c in same}) == len({c.answer for c in same}) == 7
        for one in same:
            city = one.question.removeprefix("What is the special magic ").removesuffix(" number?")
            needle = NEEDLE.format(city=city, number=one.answer)
            assert text.count(needle) == 1
            size = len(vocab.encode(" " + needle))
            assert needle in vocab.decode(context[one.needle_at : one.needle_at + size])
        assert [c.needle_at for c in same] == sorted(c.needle_at for c in same)
    assert not np.array_equal(found[0].context, found[-1].context)
    with pytest.raises(UsageError, match="--depths: a haystack holds 101 needles here, not 200"):
        list(cases(vocab, haystack, lengths=[9000], depths=200, repetitions=1, seed=3, shared=True))


def test_a_case_depends_on_its_place_and_the_seed_only(vocab: Vocab, haystack: str) -> None:
    alone = cases(vocab, haystack, lengths=[2000], depths=3, repetitions=1, seed=0)
    known = {(c.depth, c.case): c for c in some_cases(vocab, haystack) if c.length == 2000}
    for case in alone:
        np.testing.assert_array_equal(case.context, known[case.depth, case.case].context)
    others = some_cases(vocab, haystack, seed=1)
    same = [a.answer == b.answer for a, b in zip(others, some_cases(vocab, haystack), strict=True)]
    assert not any(same)


def test_a_short_haystack_is_repeated(vocab: Vocab) -> None:
    text = "One sentence here. Another sentence there. " * 20
    (case,) = cases(vocab, text, lengths=[3000], depths=1, repetitions=1, seed=0)
    assert len(case.context) == 3000


def test_impossible_cases_are_refused(vocab: Vocab, haystack: str) -> None:
    with pytest.raises(UsageError, match=r"no room .* the shortest here is [0-9]+"):
        list(cases(vocab, haystack, lengths=[30], depths=1, repetitions=1, seed=0))
    with pytest.raises(GemtoolError, match="haystack"):
        list(cases(vocab, "short.", lengths=[500], depths=1, repetitions=1, seed=0))


def test_score(vocab: Vocab, haystack: str) -> None:
    case = some_cases(vocab, haystack)[0]
    assert score(case, f" {case.answer}. And so on") == 1.0
    assert score(case, case.answer[:-1]) == 0.0
    assert score(case, "") == 0.0


def test_parse_lengths() -> None:
    assert parse_lengths("1k,256k, 10M,5000,1.5k") == [1000, 256_000, 10_000_000, 5000, 1500]
    for bad in ("", "k", "1k,,2k", "1g", "ten", "-1k", "0", "1k,1000", "nan"):
        with pytest.raises(UsageError, match="--lengths"):
            parse_lengths(bad)


def test_grid_and_picture(tmp_path: Path) -> None:
    rows = [
        {"length": 1000, "depth": 0.0, "score": 1.0},
        {"length": 1000, "depth": 0.0, "score": 0.0},
        {"length": 4000, "depth": 1.0, "score": 1.0},
    ]
    lengths, depths, mean, count = grid(rows)
    assert (lengths, depths) == ([1000, 4000], [0.0, 1.0])
    np.testing.assert_array_equal(mean, [[0.5, np.nan], [np.nan, 1.0]])
    assert count.tolist() == [[2, 0], [0, 1]]
    plot_heat_map(rows, tmp_path / "grid.png", title="a grid")
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
    assert [short_count(n) for n in (500, 1000, 1500, 10_500_000)] == ["500", "1k", "1.5k", "10.5M"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with random parameters, through the real command."""
    folder = tmp_path_factory.mktemp("probe")
    shell = (
        "echo some text | {g} tokenize | {g} pack --length 64 | {g} shard -q -o shards && "
        "{g} train -q --data shards --model {root}/tests/tiny.toml --steps 1 --batch 1 --ckpt run"
    ).format(g=f"{sys.executable} -m gemtool", root=ROOT)
    subprocess.run(
        shell, shell=True, check=True, cwd=folder, env=command_environment(), capture_output=True
    )
    return folder / "run"


GRID = ("--lengths", "200,300", "--depths", "2", "--cases", "2")


def test_a_row_a_case(gemtool: Command, checkpoint: Path, tmp_path: Path) -> None:
    done = gemtool("probe", "needle", "--ckpt", checkpoint, *GRID, "--plot", "grid.png")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 8
    wanted = {"probe", "length", "depth", "case", "answer", "text", "score", "seed", "model"}
    assert all(wanted <= set(row) for row in rows)
    assert (tmp_path / "grid.png").exists()

    summary = gemtool("probe", "needle", "--ckpt", checkpoint, *GRID, "--summary")
    cells = [json.loads(line) for line in summary.stdout.splitlines()]
    assert [(c["length"], c["depth"], c["cases"]) for c in cells] == [
        (200, 0.0, 2),
        (200, 1.0, 2),
        (300, 0.0, 2),
        (300, 1.0, 2),
    ]


def test_one_prefill_for_a_shared_context(
    gemtool: Command, checkpoint: Path, tmp_path: Path
) -> None:
    options = "--ckpt", checkpoint, "--lengths", "400", "--depths", "3", "--cases", "2", "--shared"
    done = gemtool("probe", "needle", *options)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["case"], row["depth"]) for row in rows] == [
        (case, depth) for case in (0, 1) for depth in (0.0, 0.5, 1.0)
    ]
    assert all(row["shared"] for row in rows)
    assert len({row["prefill_seconds"] for row in rows}) == 2
    # Each is asked of the context as it was, whoever was asked before.
    (tmp_path / "rows.jsonl.partial").write_bytes(b"".join(done.stdout.splitlines(True)[:2]))
    gemtool("probe", "needle", *options, "-o", "rows.jsonl", "--resume")
    assert without_time((tmp_path / "rows.jsonl").read_bytes()) == without_time(done.stdout)


def without_time(data: bytes) -> list[dict[str, object]]:
    rows = [json.loads(line) for line in data.splitlines()]
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in rows]


def test_killed_and_resumed(gemtool: Command, checkpoint: Path, tmp_path: Path) -> None:
    """Rows of the killed run are kept, the file appears when all are there, then nothing is done."""
    arguments = ["probe", "needle", "--ckpt", str(checkpoint), *GRID, "-o", "rows.jsonl"]
    process = subprocess.Popen(
        [sys.executable, "-m", "gemtool", *arguments],
        cwd=tmp_path,
        env=command_environment(),
        stderr=subprocess.DEVNULL,
    )
    partial = tmp_path / "rows.jsonl.partial"
    deadline = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "rows.jsonl").exists()
    kept = partial.read_bytes()
    partial.write_bytes(kept + b'{"cut off')

    gemtool(*arguments, "--resume")
    assert not partial.exists()
    resumed = (tmp_path / "rows.jsonl").read_bytes()
    assert resumed.startswith(kept)
    whole = gemtool(*arguments[:-2]).stdout
    assert without_time(resumed) == without_time(whole)

    before = (tmp_path / "rows.jsonl").stat().st_mtime_ns
    gemtool(*arguments, "--resume")
    assert (tmp_path / "rows.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize("summary", [(), ("--summary",)])
def test_a_finished_file_must_be_of_the_same_run(
    gemtool: Command, checkpoint: Path, tmp_path: Path, summary: tuple[str, ...]
) -> None:
    """Or the rows of another model, grid or text would pass as the answer."""
    (tmp_path / "hay.txt").write_text("Another sentence stands here. And there. " * 40)
    probe = ("probe", "needle", "--ckpt", checkpoint, "-o", "rows.jsonl", *summary)
    gemtool(*probe, *GRID)
    made = (tmp_path / "rows.jsonl").read_bytes()
    assert b"complete already" in gemtool(*probe, *GRID, "--resume").stderr
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    weights = bytearray((other / "weights.safetensors").read_bytes())
    at = weights.index(b'fingerprint\\": \\"') + len(b'fingerprint\\": \\"')
    weights[at : at + 4] = b"beef"
    (other / "weights.safetensors").write_bytes(weights)
    for change, message in (
        (("--seed", "1"), "seed"),
        (("--ckpt", other), "model"),
        (("--no-prefix",), "prefix"),
        (("--haystack", "hay.txt"), "haystack"),
        (("--lengths", "200"), "length 300"),
        (("--lengths", "200,250,300"), "length 250"),
        (("--depths", "3"), "depth 0.5" if summary else "--depths"),
        (("--cases", "3"), "cases 3" if summary else "case 2"),
        (() if summary else ("--summary",), "a row a"),
    ):
        arguments = [*probe, *GRID, "--resume", *change]
        if not change:
            arguments.remove("--summary")
        done = gemtool(*arguments, check=False)
        assert done.returncode == 1, (change, done.stderr)
        assert message in done.stderr.decode(), done.stderr
        assert b"-f" in done.stderr
    assert (tmp_path / "rows.jsonl").read_bytes() == made

    # The picture that an interrupted run still owes.
    gemtool(*probe, *GRID, "--resume", "--plot", "grid.png")
    assert (tmp_path / "grid.png").exists()


def test_two_probes_do_not_share_a_file(gemtool: Command, checkpoint: Path, tmp_path: Path) -> None:
    with (tmp_path / "rows.jsonl.partial").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        held.write("theirs")
        held.flush()
        for more in ((), ("--resume",)):
            arguments = ("--ckpt", checkpoint, *GRID, "-o", "rows.jsonl", *more)
            done = gemtool("probe", "needle", *arguments, check=False)
            assert done.returncode == 1
            assert b"another process is writing it" in done.stderr
        assert (tmp_path / "rows.jsonl.partial").read_text() == "theirs"


def test_impossible_outputs_and_lengths_are_refused_at_once(
    gemtool: Command, checkpoint: Path, tmp_path: Path
) -> None:
    for arguments, code, message in (
        (("--plot", "no/such/grid.png"), 1, "no/such/grid.png: cannot be written: no folder"),
        (("-o", "no/such/rows.jsonl"), 1, "no/such/rows.jsonl: cannot be written: no folder"),
        (("--lengths", "5"), 2, "no room"),
        (("--lengths", "1000000M"), 2, "GB with this model, the device has"),
    ):
        done = gemtool("probe", "needle", "--ckpt", checkpoint, *GRID, *arguments, check=False)
        assert (done.returncode, done.stdout) == (code, b""), done.stderr
        assert message in done.stderr.decode()
        assert list(tmp_path.iterdir()) == []


def test_resuming_another_run_is_refused(
    gemtool: Command, checkpoint: Path, tmp_path: Path
) -> None:
    row = {"probe": "needle", "model": "other", "seed": 0, "prefix": True}
    row |= {"length": 200, "depth": 0.0, "case": 0}
    (tmp_path / "rows.jsonl.partial").write_text(json.dumps(row) + "\n")
    arguments = ("probe", "needle", "--ckpt", checkpoint, *GRID, "--resume")
    done = gemtool(*arguments, "-o", "rows.jsonl", check=False)
    assert done.returncode == 1
    assert b"model" in done.stderr
    assert gemtool(*arguments, check=False).returncode == 2, "--resume without a file"


def test_resuming_with_other_cases_is_refused(
    gemtool: Command, checkpoint: Path, tmp_path: Path
) -> None:
    """The same place of another grid or haystack is another case."""
    row = json.loads(
        gemtool("probe", "needle", "--ckpt", checkpoint, "--lengths", 200).stdout.splitlines()[0]
    )
    partial = tmp_path / "rows.jsonl.partial"
    for change, message in (
        ({"answer": "1"}, b"other --lengths, --depths or --cases"),
        ({"length": 201}, b"length 201"),
    ):
        partial.write_text(json.dumps({**row, **change}) + "\n")
        arguments = ("--lengths", 200, "--resume", "-o", "rows.jsonl")
        done = gemtool("probe", "needle", "--ckpt", checkpoint, *arguments, check=False)
        assert done.returncode == 1
        assert message in done.stderr


def test_rows_of_variants(gemtool: Command, checkpoint: Path, tmp_path: Path) -> None:
    """They say what they are of, and do not mix with others."""
    probe = ("probe", "needle", "--ckpt", checkpoint, "--lengths", 800, "--depths", 2, "--shared")
    variant = ("--wording", "german", "--distractors", 2, "--values", 2, "--no-prefix")
    gemtool(*probe, *variant, "-o", "rows.jsonl", "--plot", "grid.png")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    for row in rows:
        assert [row[name] for name in ("shared", "wording", "distractors", "values", "absent")] == [
            *(True, "german", 2, 2, False)
        ]
        assert row["question"].startswith("Wie lauten alle")
        assert len(row["answer"].split()) == 2
        assert row["score"] in (0.0, 0.5, 1.0)
    assert len({row["prefill_seconds"] for row in rows}) == 1
    assert (tmp_path / "grid.png").exists()
    done = gemtool(*probe, *variant, "-o", "rows.jsonl", "--resume")
    assert b"complete already" in done.stderr
    made = (tmp_path / "rows.jsonl").read_bytes()
    (tmp_path / "part.jsonl.partial").write_bytes(made.splitlines(True)[0])
    for change, file, name in (
        (("--wording", "report"), "rows.jsonl", "wording"),
        (("--distractors", 1), "rows.jsonl", "distractors"),
        (("--values", 3), "rows.jsonl", "values"),
        (("--values", 1, "--absent"), "rows.jsonl", "values"),
        (("--no-shared",), "rows.jsonl", "shared"),
        (("--wording", "french"), "part.jsonl", "wording"),
    ):
        done = gemtool(*probe, *variant, *change, "-o", file, "--resume", check=False)
        assert done.returncode == 1
        assert f"its rows have {name}" in done.stderr.decode()
    assert (tmp_path / "rows.jsonl").read_bytes() == made


def test_rows_from_before_there_were_variants(
    gemtool: Command, checkpoint: Path, tmp_path: Path
) -> None:
    """They are of the defaults, whole files and partial ones."""
    probe = ("probe", "needle", "--ckpt", checkpoint, *GRID, "-o", "rows.jsonl", "--resume")
    gemtool(*probe)
    whole = (tmp_path / "rows.jsonl").read_bytes()
    rows = [json.loads(line) for line in whole.splitlines()]
    for row in rows:
        for name in ("wording", "distractors", "values", "absent"):
            del row[name]
    old = [json.dumps(row) + "\n" for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(old))
    assert b"complete already" in gemtool(*probe).stderr
    done = gemtool(*probe, "--distractors", 1, check=False)
    assert b"its rows have distractors 0, this run 1" in done.stderr
    (tmp_path / "rows.jsonl").unlink()
    (tmp_path / "rows.jsonl.partial").write_text("".join(old[:7]))
    gemtool(*probe)
    made = (tmp_path / "rows.jsonl").read_bytes()
    assert made.startswith("".join(old[:7]).encode())
    assert without_time(made)[7:] == without_time(whole)[7:]


def test_many_needles_and_one_question(gemtool: Command, checkpoint: Path, tmp_path: Path) -> None:
    options = ("--ckpt", checkpoint, "--lengths", 400, "--depths", 4, "--cases", 2)
    probe = ("probe", "multi-needle", *options, "-o", "rows.jsonl")
    gemtool(*probe)
    made = (tmp_path / "rows.jsonl").read_bytes()
    rows = [json.loads(line) for line in made.splitlines()]
    assert [(row["case"], row["depth"]) for row in rows] == [
        (case, pytest.approx(depth / 3)) for case in (0, 1) for depth in range(4)
    ]
    assert {(row["probe"], row["question"]) for row in rows} == {
        ("multi-needle", "What are all the special magic numbers?")
    }
    for case in (0, 1):
        same = [row for row in rows if row["case"] == case]
        assert len({(row["text"], row["seconds"]) for row in same}) == 1
        assert len({row["answer"] for row in same}) == 4
    assert b"complete already" in gemtool(*probe, "--resume").stderr
    # A context whose rows are there is not asked again, the rest of another is as it was.
    kept = [{**row, "text": "kept"} for row in rows[:4]] + rows[4:6]
    (tmp_path / "rows.jsonl").unlink()
    (tmp_path / "rows.jsonl.partial").write_text("".join(json.dumps(r) + "\n" for r in kept))
    gemtool(*probe, "--resume")
    resumed = (tmp_path / "rows.jsonl").read_bytes()
    assert [row["text"] for row in without_time(resumed)[:4]] == ["kept"] * 4
    assert without_time(resumed)[4:] == without_time(made)[4:]

    cells = gemtool("probe", "multi-needle", *options, "--summary").stdout
    assert [json.loads(line)["cases"] for line in cells.splitlines()] == [2] * 4


def test_impossible_variants_are_refused(gemtool: Command, checkpoint: Path) -> None:
    for arguments, message in (
        (("needle", "--absent", "--values", 2), "--absent"),
        (("needle", "--wording", "germann"), "did you mean 'german'"),
        (("needle", "--values", 0), "--values"),
        (("needle", "--distractors", -1), "--distractors"),
        (("needle", "--shared", "--depths", 60, "--absent"), "a haystack holds 50 needles"),
        (("multi-needle", "--depths", 200), "a haystack holds 101 needles"),
        (("multi-needle", "--shared"), "probe multi-needle has no --shared"),
        (("multi-needle", "--wording", "german"), "probe multi-needle has no --wording"),
        (("multi-needle", "--distractors", 2), "probe multi-needle has no --distractors"),
        (("multi-needle", "--values", 2), "probe multi-needle has no --values"),
        (("multi-needle", "--absent"), "probe multi-needle has no --absent"),
    ):
        done = gemtool("probe", *arguments, "--ckpt", checkpoint, check=False)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr.decode()
        assert len(done.stderr.splitlines()) == 1


def test_mistakes(gemtool: Command, tmp_path: Path) -> None:
    for arguments, code, message in (
        (("nedle", "--ckpt", "x"), 2, "did you mean 'needle'"),
        (("needle", "--ckpt", "x", "--lengths", "1q"), 2, "--lengths"),
        (("needle", "--ckpt", "x", "--plot", "a.txt"), 2, "--plot"),
        (("needle", "--ckpt", "missing"), 1, "missing"),
        (("needle", "--ckpt", "x", "--haystack", "missing.txt"), 1, "missing.txt"),
    ):
        done = gemtool("probe", *arguments, check=False)
        assert done.returncode == code, done.stderr
        assert message in done.stderr.decode()
        assert b"Traceback" not in done.stderr
