"""Every example of the manual, the README and examples/ is run as it stands, on small real files."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from gemtool.model.config import ModelConfig
from tests.conftest import ROOT, command_environment

pytestmark = pytest.mark.skipif(shutil.which("jq") is None, reason="the examples use jq")

# What makes the examples take seconds instead of minutes; nothing else in them is changed.
SHORTER = {"--steps 200": "--steps 2", "--lengths 1k,4k --depths 5": "--lengths 1k --depths 2"}


def make_video(path: Path, seconds: int = 2) -> None:
    """A film of noise with a tone, H.264 and AAC."""
    import av

    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=10)
        video.width, video.height, video.pix_fmt = 128, 96, "yuv420p"
        audio = container.add_stream("aac", rate=16000)
        for i in range(10 * seconds):
            pixels = rng.integers(0, 256, (96, 128, 3), np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 10)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        wave = np.sin(np.arange(16000 * seconds) * 0.1).astype(np.float32)[None]
        for start in range(0, wave.shape[1], 1024):
            piece = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(wave[:, start : start + 1024]), format="fltp", layout="mono"
            )
            piece.sample_rate, piece.pts = 16000, start
            container.mux(audio.encode(piece))
        container.mux(audio.encode())


def environment() -> dict[str, str]:
    """`gemtool` and `python` on the path are those of the tests."""
    result = command_environment()
    result["PATH"] = f"{Path(sys.executable).parent}:{result['PATH']}"
    return result


def shell(command: str, folder: Path, *, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    for long, short in SHORTER.items():
        command = command.replace(long, short)
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    for word in ("error:", "Traceback"):
        assert word not in done.stderr, f"{command}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the examples name: media, text, shards, a trained run and a context."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("sample")
    make_video(folder / "talk.mp4")
    Image.effect_noise((320, 240), 60).convert("RGB").save(folder / "photo.jpg")
    (folder / "notes.md").write_text((ROOT / "LICENSE").read_text())
    (folder / "questions.jsonl").write_text('{"id": "a", "prompt": "Who?"}\n{"prompt": "Why?"}\n')
    shell(
        "gemtool tokenize talk.mp4 notes.md photo.jpg | gemtool pack --length 512 "
        "| gemtool shard -o shards/ && "
        "gemtool train --data shards/ --model nano --steps 200 --ckpt run/ > metrics.jsonl && "
        "gemtool tokenize talk.mp4 | gemtool prefill --ckpt run/ > talk.ctx",
        folder,
    )
    return folder


@pytest.fixture
def workplace(sample: Path, tmp_path: Path) -> Path:
    shutil.copytree(sample, tmp_path / "work")
    return tmp_path / "work"


def man_examples(page: Path) -> list[str]:
    """The commands of a page's EXAMPLES, unescaped."""
    text = page.read_text()
    section = text.partition(".SH EXAMPLES")[2].partition(".SH")[0]
    blocks = re.findall(r"^\.EX\n(.*?)^\.EE$", section, re.MULTILINE | re.DOTALL)
    joined = "".join(blocks).replace("\\-", "-").replace("\\e", "\\")
    return [line for line in joined.splitlines() if line]


PAGES = sorted((ROOT / "man").glob("man[0-9]/*"))


def made_by(commands: list[str]) -> set[str]:
    """Outputs the commands write without -f: what the sample folder has of them must go first."""
    joined = "\n".join(line for line in commands if " -f" not in line)
    return set(re.findall(r"(?:-o|--ckpt) (\S+?)/?(?=\s|$)", joined))


# What gemtool.1 shows is what the README does.
TESTED = [
    pytest.param(page, id=page.name, marks=[pytest.mark.slow] * (page.name == "gemtool.1"))
    for page in PAGES
]


@pytest.mark.parametrize("page", TESTED)
def test_manual(page: Path, workplace: Path) -> None:
    commands = man_examples(page)
    assert commands, "a page without examples"
    for name in made_by([c for c in commands if re.search(r"gemtool (shard|train)", c)]):
        if "--resume" not in commands[0]:
            shutil.rmtree(workplace / name, ignore_errors=True)
    for command in commands:
        shell(command, workplace)


def test_pages_exist_for_every_verb() -> None:
    from gemtool.cli import VERBS

    names = {page.name for page in PAGES}
    assert {f"gemtool-{verb}.1" for verb in VERBS} <= names
    assert {"gemtool.1", "gemtool-stream.5", "gemtool-context.5"} <= names


def test_pages_are_up_to_date_and_valid() -> None:
    subprocess.run([sys.executable, ROOT / "man" / "build.py", "--check"], check=True)
    if shutil.which("mandoc") is None:
        pytest.skip("mandoc is not installed")
    lint = subprocess.run(
        ["mandoc", "-T", "lint", "-W", "warning", *PAGES], capture_output=True, text=True
    )
    assert lint.stdout == ""


def readme_blocks() -> list[str]:
    """The shell blocks of the README (indented by four, commands of gemtool)."""
    text = (ROOT / "README.md").read_text()
    return re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_readme(workplace: Path) -> None:
    """All shell blocks but the make commands, which CI and `make demo` are, and the TPU compiler's."""
    blocks = [b for b in readme_blocks() if "gemtool" in b and "--topology" not in b]
    assert blocks
    for name in ("shards", "run", "talk.ctx"):
        path = workplace / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for block in blocks:
        shell("set -e\n" + block, workplace)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs gemtool[tpu]")
def test_readme_with_the_tpu_compiler(tmp_path: Path) -> None:
    """What `make test` leaves out: minutes each, and an extra of 1 GB."""
    (block,) = [b for b in readme_blocks() if "--topology" in b]
    shell("set -eo pipefail\n" + block, tmp_path, timeout=3600)


TINY = {
    "STEPS": "2",
    "LENGTH": "256",
    "SHARES": "4",
    "MODEL": str(ROOT / "tests" / "tiny.toml"),
}


def test_recall(tmp_path: Path) -> None:
    """The recipe of examples/recall as it stands, with fewer steps and short contexts."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    folder = tmp_path / "examples" / "recall"
    stages = (folder / "stages.toml").read_text()
    (folder / "few.toml").write_text(re.sub(r"steps = \d+", "steps = 2", stages))
    small = (
        "DOCUMENTS='--documents 24' HELD_OUT='--documents 2 --words 600 --needles 4' BATCH=3 "
        "LENGTH=512 HELD_OUT_LENGTH=2048 STAGES=few.toml LENGTHS=400,600 NEEDLES=3 CASES=2 "
        "BEYOND_LENGTHS=600"
    )
    command = f"make -C {folder} BUILD={tmp_path}/build {small} PYTHON={sys.executable}"
    shown = shell(command, tmp_path).stdout
    assert (tmp_path / "build" / "recall.png").stat().st_size > 1000
    rows, steps = (
        [json.loads(line) for line in (tmp_path / "build" / name).read_text().splitlines()]
        for name in ("recall.jsonl", "metrics.jsonl")
    )
    assert [(row["length"], row["case"]) for row in rows] == [
        (length, case) for length in (400, 600) for case in (0, 1) for _ in range(3)
    ]
    assert [row["stage"] for row in steps] == ["trunk"] * 2 + ["index"] * 2
    assert {"128", "1024"} < steps[-1]["eval_index"].keys()
    for length in (400, 600):
        found = sum(row["score"] for row in rows if row["length"] == length)
        assert re.search(rf"{length}  +{found:.0f}/ +6 ", shown)
    made = (tmp_path / "build" / "run" / "weights.safetensors").stat().st_mtime_ns
    assert re.search(r"600  +\d/ +6 ", shell(command, tmp_path).stdout)
    assert (tmp_path / "build" / "run" / "weights.safetensors").stat().st_mtime_ns == made
    seeds = shell(command.replace("recall ", "recall seeds ", 1), tmp_path).stdout
    found = [line for line in shown.splitlines() if re.search(r"tokens|\d/ ", line)]
    assert [line for line in seeds.splitlines() if line in found] == found
    assert (tmp_path / "seeds.png").stat().st_size > 1000
    some = "beyond BEYOND='german distractors1 absent-no-prefix multi-5'"
    lines = shell(command.replace("recall ", f"recall {some} ", 1), tmp_path).stdout.splitlines()
    names = [re.match(r"(.*?)  +600  ", line) for line in lines]
    assert [found[1] for found in names if found] == [
        "german", "1 distractors", "absent, no prefix", "multi-needle 5",
    ]  # fmt: skip


def test_ablations_change_what_they_say() -> None:
    """Each is another model that can be made, or other stages."""
    path = ROOT / "examples" / "recall" / "ablations.py"
    spec = importlib.util.spec_from_file_location("ablations", path)
    assert spec is not None
    ablations = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ablations)  # type: ignore[union-attr]
    base = ModelConfig.from_dict(tomllib.loads(ablations.MODEL.read_text()))
    for name, (_, changes) in ablations.VARIANTS.items():
        model, stages = (
            ablations.changed(path.read_text(), changes)
            for path in (ablations.MODEL, ablations.STAGES)
        )
        config = ModelConfig.from_dict(tomllib.loads(model))
        is_new = config != base or stages != ablations.STAGES.read_text()
        assert is_new == (name != "base"), name
        for old, _ in changes:
            assert old in ablations.MODEL.read_text() + ablations.STAGES.read_text(), (name, old)


def test_intervals_of_recall() -> None:
    """Against scipy, and the extremes of the design effect."""
    path = ROOT / "examples" / "recall" / "table.py"
    spec = importlib.util.spec_from_file_location("table", path)
    assert spec is not None
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)  # type: ignore[union-attr]
    for found, count in ((0, 10), (99, 100), (100, 100), (37, 40)):
        result = scipy.stats.binomtest(found, count).proportion_ci(method="wilson")
        np.testing.assert_allclose(table.wilson(found / count, count), result, atol=1e-6)
    assert table.effective_count([[1, 0, 1, 1], [1, 1, 0, 1]]) == 8  # no more alike than by chance
    assert table.effective_count([[1, 1, 1, 1], [0, 0, 0, 0]]) == 2  # a context is one case
    assert table.effective_count([[1, 1], [1, 1]]) == 4


def test_experiment(tmp_path: Path) -> None:
    """The Makefile builds its table, and a second run has nothing to do."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    folder = tmp_path / "examples" / "experiment"
    settings = " ".join(f"{key}={value}" for key, value in TINY.items())
    shell(f"make {settings} PYTHON={sys.executable}", folder)
    table = (folder / "build" / "table.jsonl").read_text().splitlines()
    assert len(table) == 3
    assert "Nothing to be done" in shell(f"make {settings}", folder).stdout


@pytest.mark.skipif(shutil.which("flock") is None, reason="the cron job uses flock")
def test_cron(tmp_path: Path) -> None:
    """Runs twice; the second time does nothing."""
    (tmp_path / "inbox").mkdir()
    (tmp_path / "inbox" / "notes.md").write_text((ROOT / "LICENSE").read_text())
    script = ROOT / "examples" / "cron" / "nightly.sh"
    settings = " ".join(f"{key}={value}" for key, value in TINY.items() if key != "SHARES")
    first = shell(f"{settings} {script} inbox home", tmp_path)
    assert first.stdout == first.stderr == ""
    weights = tmp_path / "home" / "current" / "weights.safetensors"
    made = weights.stat().st_mtime_ns
    shell(f"{settings} {script} inbox home", tmp_path)
    assert weights.stat().st_mtime_ns == made
    (tmp_path / "inbox" / "notes.md").write_text("The same name, other words.")
    shell(f"{settings} {script} inbox home", tmp_path)
    assert weights.stat().st_mtime_ns != made


def test_pipeline(workplace: Path) -> None:
    """Every question is asked of every document; contexts are reused."""
    (workplace / "papers").mkdir()
    for name in ("notes.md", "photo.jpg"):
        shutil.copy(workplace / name, workplace / "papers" / name)
    (workplace / "asked.txt").write_text("Who wrote this?\nWhat about?\n")
    script = ROOT / "examples" / "pipeline" / "ask.sh"
    done = shell(f"MAX_TOKENS=4 {script} run papers asked.txt", workplace)
    assert len(done.stdout.splitlines()) == 4
    assert {p.suffix for p in (workplace / "papers").iterdir()} == {".md", ".jpg", ".ctx"}
    made = (workplace / "papers" / "notes.md.ctx").stat().st_mtime_ns
    shell(f"MAX_TOKENS=4 {script} run papers asked.txt", workplace)
    assert (workplace / "papers" / "notes.md.ctx").stat().st_mtime_ns == made


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_long(workplace: Path) -> None:
    """What `make long` measures, on short contexts of text and of video."""
    script = f"python {ROOT}/examples/long/measure.py"
    rows = []
    for name, source, tokens in (
        ("text", "--tokens 2k", (1900, 2500)),
        ("video", "--video talk.mp4", (5000, 7000)),
    ):
        shell(f"{script} document {source} > {name}.jsonl", workplace)
        row = json.loads(shell(f"{script} run --ckpt run {name}.jsonl", workplace).stdout)
        assert tokens[0] < row["tokens"] < tokens[1]
        assert row["file"] == (workplace / f"{name}.ctx").stat().st_size
        assert 1e8 < row["decode_anonymous"] < row["prefill_resident"] < 4e9
        assert 0 < row["first_token_seconds"] < 60
        assert 0 <= row["right"] <= row["asked"] == 9
        (workplace / f"{name}.row").write_text(json.dumps(row))
        rows.append(row)
    shown = shell(f"{script} table text.row video.row", workplace).stdout.splitlines()
    cells = [(line.split(" | ")[1], line.split(" | ")[-1]) for line in shown[2:]]
    assert cells == [(f"{row['tokens']:,}", f"{row['right']} of 9 |") for row in rows]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_demo(tmp_path: Path) -> None:
    """`make demo` with fewer steps, on the real media."""
    if "GEMTOOL_MEDIA" not in os.environ and not (ROOT / "build" / "media").exists():
        pytest.skip("no real media; run `make media`")
    media = os.environ.get("GEMTOOL_MEDIA", ROOT / "build" / "media")
    shell(
        f"make -C {ROOT}/examples/demo BUILD={tmp_path} MEDIA={media} STEPS=3 "
        f"PYTHON={sys.executable}",
        tmp_path,
    )
    assert (tmp_path / "needle.png").stat().st_size > 10_000
