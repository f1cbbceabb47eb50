"""Training: whole runs through the command, killed and resumed."""

from __future__ import annotations

import json
import random
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemtool.checkpoint import open_checkpoint
from gemtool.data.packing import Packer
from gemtool.data.settings import MediaSettings
from gemtool.data.sharding import create_shards
from gemtool.data.vocab import Vocab, train_vocab
from gemtool.errors import GemtoolError, UsageError
from gemtool.model.params import flatten, is_balance_bias
from gemtool.stream.spans import Header, Span
from gemtool.train.extend import extend_params
from gemtool.train.loop import TrainOptions, train
from gemtool.train.state import open_run
from tests.conftest import Command, command_environment
from tests.test_train_step import LENGTH, MODEL, VOCAB_SIZE


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    """A folder with shards, a vocabulary and a model, and a cache of compiled programs."""
    folder = tmp_path_factory.mktemp("workshop")
    lines = Path(__file__).read_text().splitlines()
    (folder / "vocab.model").write_bytes(train_vocab(lines, size=VOCAB_SIZE))
    (folder / "model.toml").write_text(MODEL)
    vocab = Vocab.load(folder / "vocab.model")
    write_shards(folder / "shards", vocab, lines)
    write_shards(folder / "held-out", vocab, lines[:40])
    return folder


def write_shards(
    path: Path, vocab: Vocab, lines: list[str], weight: float = 1.0, **settings: Any
) -> None:
    header = Header(
        vocab={"fingerprint": vocab.fingerprint, "size": vocab.size},
        settings=MediaSettings(**settings).to_dict(),
        packed={"length": LENGTH},
    )
    spans = (
        Span(str(i), 0, "text", tokens, loss=np.full(len(tokens), weight, np.float32))
        for i, tokens in enumerate(map(vocab.encode, filter(None, lines)))
    )
    with create_shards(path, header) as writer:
        for span in Packer(LENGTH).pack(spans):
            writer.append(span)


def arguments(workshop: Path, run: str | Path, *more: object) -> list[object]:
    return [
        *("train", "--data", workshop / "shards", "--model", workshop / "model.toml"),
        *("--vocab", workshop / "vocab.model", "--ckpt", run, *more),
    ]


def environment(workshop: Path) -> dict[str, str]:
    return {"GEMTOOL_CACHE": str(workshop / "cache")}


def rows_of(output: bytes) -> list[dict[str, Any]]:
    """Metrics without what the clock says."""
    rows = [json.loads(line) for line in output.splitlines()]
    return [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_s")} for r in rows]


EVALUATED = ("--steps", 12, "--save-every", 4, "--eval-every", 5)


@pytest.fixture(scope="module")
def whole(workshop) -> tuple[list[dict[str, Any]], Path]:
    """Metrics and folder of an uninterrupted run of 12 steps."""
    run = workshop / "whole"
    more = (*EVALUATED, "--eval", workshop / "held-out")
    done = subprocess.run(
        [sys.executable, "-m", "gemtool", *map(str, arguments(workshop, run, *more))],
        capture_output=True,
        check=True,
        env={**command_environment(), **environment(workshop)},
    )
    for line in done.stderr.decode().splitlines():
        assert line.startswith("gemtool: "), "a library talks to the user"
    return rows_of(done.stdout), run


def test_metrics(whole):
    rows, run = whole
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert all({"loss", "tokens", "lr", "grad_norm", "expert_load"} <= row.keys() for row in rows)
    assert np.all(np.diff([row["tokens"] for row in rows]) > 0)
    assert [row["step"] for row in rows if "eval_loss" in row] == [5, 10, 12]
    assert rows[-1]["eval_loss"] < rows[4]["eval_loss"] < rows[0]["loss"]
    assert sorted(p.name for p in (run / "state").iterdir()) == ["12", "8"]


def test_a_run_is_a_checkpoint(gemtool: Command, whole):
    rows, run = whole
    checkpoint = open_checkpoint(run)
    checkpoint.verify()
    checkpoint.load_params()
    assert checkpoint.step == 12
    assert checkpoint.config.vocab_size == VOCAB_SIZE
    assert checkpoint.card["metrics"] == rows[-1]
    assert "--steps 12" in checkpoint.card["pg"][-1]["command"]
    shown = gemtool("view", run).stdout.decode().splitlines()
    assert "model\ttiny" in shown
    assert "step\t12" in shown
    assert "states\t[8, 12]" in shown  # from which it can go on
    refused = gemtool("view", "--frames", "d", run, check=False)
    assert refused.returncode == 2
    assert b"a checkpoint holds no pictures" in refused.stderr


def weights(run: Path) -> bytes:
    return (run / "weights.safetensors").read_bytes()


class Interrupted:
    """A run that gets a signal once it has told of a step."""

    def __init__(self, workshop: Path, run: Path, step: int, number: int) -> None:
        more = (*EVALUATED, "--eval", workshop / "held-out")
        process = subprocess.Popen(
            [sys.executable, "-m", "gemtool", *map(str, arguments(workshop, run, *more))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,  # what a buffer of lines has read ahead, communicate() would not return
            env={**command_environment(), **environment(workshop)},
        )
        lines = []
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if json.loads(line)["step"] == step:
                process.send_signal(number)
                break
        rest, self.stderr = process.communicate(timeout=60)
        self.rows = rows_of(b"".join(lines) + rest)
        self.returncode = process.returncode


def assert_resumes_to(
    whole: tuple[list[dict[str, Any]], Path],
    gemtool: Command,
    workshop: Path,
    run: Path,
    seen: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Resumes a run, and compares its metrics and weights with those of the whole one, exactly."""
    expected, folder = whole
    more = (*EVALUATED, "--eval", workshop / "held-out", "--resume")
    done = gemtool(*arguments(workshop, run, *more), env=environment(workshop))
    rows = rows_of(done.stdout)
    assert seen == expected[: len(seen)]
    assert rows == expected[12 - len(rows) :]
    assert weights(run) == weights(folder)
    return rows


def test_killed_and_resumed_is_as_if_never_killed(gemtool, workshop, whole, tmp_path):
    run = tmp_path / "run"
    killed = Interrupted(workshop, run, 7, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    (run / ".weights.safetensors.123").write_bytes(b"half of the weights")
    rows = assert_resumes_to(whole, gemtool, workshop, run, killed.rows)
    assert rows[0]["step"] in (5, 9)  # the state of step 4 or, if it went on for long, of step 8
    assert {p.name for p in run.iterdir()} == {p.name for p in whole[1].iterdir()}


def test_a_run_on_a_mesh_is_the_run_on_one_device(gemtool, workshop, whole, tmp_path):
    """Up to rounding, from the first step to the last."""
    rows = losses_on_a_mesh(gemtool, workshop, tmp_path / "run", "fsdp=2,expert=2", 12)
    np.testing.assert_allclose(rows, [row["loss"] for row in whole[0]], rtol=2e-3)


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(gemtool, workshop, tmp_path):
    losses_on_a_mesh(gemtool, workshop, tmp_path / "a", "context=2,tensor=2", 4)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    meshes = {"a": "data=4", "b": None}
    rows = [losses_on_a_mesh(gemtool, workshop, tmp_path / k, meshes[k], 7) for k in meshes]
    assert len(rows[0]) == 3
    np.testing.assert_allclose(*rows, rtol=2e-3)


def losses_on_a_mesh(gemtool, workshop, run, mesh: str | None, steps: int) -> list[float]:
    more = () if mesh is None else ("--mesh", mesh)
    done = gemtool(
        *arguments(workshop, run, "--steps", steps, "--resume", *more),
        env={**environment(workshop), "XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
    )
    return [row["loss"] for row in rows_of(done.stdout)]


@pytest.mark.slow
def test_a_loop_over_layers_is_the_same_run(gemtool, workshop, tmp_path):
    """Begun with a loop, resumed with one on a mesh and without: states hold either form."""
    deep = MODEL.replace('"LG"', '"LGLG"').replace("d_ff = 48", "d_ff = 48\ndense_layers = 0")
    (tmp_path / "deep.toml").write_text(deep)

    def losses(run: str, steps: int, *more: object, **environ: str) -> list[float]:
        command = [*arguments(workshop, tmp_path / run, "--steps", steps, "--resume", *more)]
        command[command.index(workshop / "model.toml")] = tmp_path / "deep.toml"
        done = gemtool(*command, env={**environment(workshop), **environ})
        return [row["loss"] for row in rows_of(done.stdout)]

    begun = losses("apart", 2)
    np.testing.assert_allclose(losses("a", 2, "--scan", "--remat"), begun, rtol=1e-4)
    apart = losses("apart", 4)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    np.testing.assert_allclose(losses("a", 4), apart, rtol=2e-3)
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    on_a_mesh = losses("b", 4, "--scan", "--mesh", "fsdp=2,expert=2", **devices)
    np.testing.assert_allclose(on_a_mesh, apart, rtol=2e-3)
    first, second = (open_checkpoint(tmp_path / run).load_params() for run in ("a", "b"))
    assert first["layers"].keys() == second["layers"].keys() == set("0123")


def test_bfloat16_trains_and_belongs_to_the_run(gemtool, workshop, whole, tmp_path):
    run = arguments(workshop, tmp_path / "run")
    done = gemtool(*run, "--steps", 3, "--dtype", "bfloat16", env=environment(workshop))
    losses = [row["loss"] for row in rows_of(done.stdout)]
    wanted = [row["loss"] for row in whole[0][:3]]
    np.testing.assert_allclose(losses, wanted, rtol=0.02)
    assert losses != wanted
    weights = open_checkpoint(tmp_path / "run").load_params()
    assert weights["embedding"].dtype == np.float32
    done = gemtool(*run, "--steps", 4, "--resume", env=environment(workshop), check=False)
    assert done.returncode == 2
    assert b"was begun with --dtype bfloat16, not float32" in done.stderr


def test_a_mesh_that_does_not_fit_is_refused(gemtool, workshop, tmp_path):
    for mesh, message in (
        ("data=2", b"takes 2 devices; there is 1"),
        ("dat=2", b"no axis 'dat'; did you mean 'data'?"),
    ):
        done = gemtool(*arguments(workshop, tmp_path / "r", "--mesh", mesh), check=False)
        assert (done.returncode, message in done.stderr) == (2, True)
        assert not (tmp_path / "r").exists()


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 4, 8, 9, 11])
def test_killed_at_any_moment(gemtool, workshop, whole, tmp_path, step):
    run = tmp_path / "run"
    killed = Interrupted(workshop, run, step, signal.SIGKILL)
    assert_resumes_to(whole, gemtool, workshop, run, killed.rows)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_interrupted_saves_the_last_step(gemtool, workshop, whole, tmp_path, number, code):
    run = tmp_path / "run"
    stopped = Interrupted(workshop, run, 2, number)
    assert stopped.returncode == code
    assert b"interrupted" in stopped.stderr
    assert b"Traceback" not in stopped.stderr
    last = stopped.rows[-1]["step"]
    assert open_checkpoint(run).step == last < 12
    if number == signal.SIGINT:
        rows = assert_resumes_to(whole, gemtool, workshop, run, stopped.rows)
        assert rows[0]["step"] == last + 1


def test_resuming_a_finished_run_changes_nothing(gemtool, workshop, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole[1], run)
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in run.rglob("*") if p.is_file()}
    more = ("--steps", 12, "--resume")
    done = gemtool(*arguments(workshop, run, *more), env=environment(workshop))
    assert done.stdout == b""
    assert b"finished already" in done.stderr
    after = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in run.rglob("*") if p.is_file()}
    assert after == before

    # A kill between the last state and the checkpoint made from it is made good.
    (run / "weights.safetensors").unlink()
    gemtool(*arguments(workshop, run, *more), env=environment(workshop))
    assert weights(run) == weights(whole[1])


def refused(monkeypatch, workshop: Path, run: Path, **options: Any) -> tuple[str, int]:
    """The message and exit code with which training is refused, in this process."""
    monkeypatch.setenv("GEMTOOL_CACHE", "off")
    given = {
        "data": (str(workshop / "shards"),),
        "model": str(workshop / "model.toml"),
        "vocab": str(workshop / "vocab.model"),
        **options,
    }
    rows: list[dict[str, Any]] = []
    with pytest.raises(GemtoolError) as raised:
        train(TrainOptions(ckpt=str(run), **given), rows.append)
    assert rows == []
    assert "\n" not in str(raised.value)
    return str(raised.value), raised.value.exit_code


@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        ({"batch": 8}, "--batch 4, not 8", 2),
        ({"lr": 0.5}, "--lr 0.003, not 0.5", 2),
        ({"seed": 1}, "--seed 0, not 1", 2),
        ({"model": "nano"}, "--model nano", 2),
        ({"data": "held-out"}, "other --data", 1),
    ],
)
def test_resume_refuses_what_would_change_the_run(
    monkeypatch, workshop, whole, tmp_path, options, message, code
):
    run = tmp_path / "run"
    shutil.copytree(whole[1], run)
    if "data" in options:
        options = {"data": (str(workshop / options["data"]),)}
    found = refused(monkeypatch, workshop, run, steps=20, resume=True, **options)
    assert (message in found[0], found[1]) == (True, code), found
    assert weights(run) == weights(whole[1])


def test_an_existing_run_is_not_overwritten(gemtool, workshop, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole[1], run)
    done = gemtool(*arguments(workshop, run), env=environment(workshop), check=False)
    assert done.returncode == 2
    assert b"--resume" in done.stderr
    assert weights(run) == weights(whole[1])
    gemtool(*arguments(workshop, run, "--steps", 1, "-f"), env=environment(workshop))
    assert open_checkpoint(run).step == 1
    assert [p.name for p in (run / "state").iterdir()] == ["1"]

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    done = gemtool(*arguments(workshop, "mine", "-f"), env=environment(workshop), check=False)
    assert done.returncode == 2
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "precious"


def test_a_run_killed_in_its_first_save_begins_anew(whole, tmp_path):
    """Its checkpoint is there, its state, which is written in the background, not yet."""
    run = tmp_path / "run"
    shutil.copytree(whole[1], run)
    for state in (run / "state").iterdir():
        shutil.rmtree(state)
    with open_run(run, resume=True) as folder:
        assert folder.latest() is None
    (run / "state").rmdir()
    with pytest.raises(UsageError, match="--init"), open_run(run, resume=True):
        pass


def test_two_trainers_cannot_share_a_folder(monkeypatch, workshop, tmp_path):
    with open_run(tmp_path / "run", resume=True):
        message, code = refused(monkeypatch, workshop, tmp_path / "run", resume=True)
    assert "another process" in message
    assert code == 1


def test_a_loss_that_is_not_finite_ends_the_run(gemtool, workshop, tmp_path):
    more = ("--steps", 9, "--lr", 1e30, "--warmup", 0, "--save-every", 1)
    done = gemtool(*arguments(workshop, "run", *more), env=environment(workshop), check=False)
    assert done.returncode == 1
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["loss"] is None or last["grad_norm"] is None
    assert "nan" in last["reason"] or "inf" in last["reason"]
    assert f"the state of step {last['step'] - 1} is kept".encode() in done.stderr
    assert open_checkpoint(tmp_path / "run").step == last["step"] - 1


@pytest.mark.parametrize("blocks", [20, 60])
def test_a_full_disk_is_one_line(workshop, tmp_path, blocks):
    """For whatever cannot be written: a file of the checkpoint, or one of orbax in its threads."""
    command = [sys.executable, "-m", "gemtool", *map(str, arguments(workshop, "run"))]
    done = subprocess.run(
        ["bash", "-c", f"ulimit -f {blocks}; exec {shlex.join([*command, '-q', '--steps', '1'])}"],
        capture_output=True,
        cwd=tmp_path,
        env={**command_environment(), "GEMTOOL_CACHE": "off", "GEMTOOL_KERNELS": "reference"},
    )
    assert done.returncode == 1
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("gemtool: error: run/")
    assert line.endswith("cannot be written: file too large")


def test_batches_without_targets(gemtool, workshop, tmp_path):
    """No number is invented for them, and the card stays strict JSON."""
    write_shards(tmp_path / "mute", Vocab.load(workshop / "vocab.model"), ["a"] * 9, weight=0)
    done = gemtool(
        *("train", "--data", "mute", "--eval", "mute", "--model", workshop / "model.toml"),
        *("--vocab", workshop / "vocab.model", "--steps", 1, "--ckpt", "run"),
        env=environment(workshop),
    )
    (row,) = rows_of(done.stdout)
    assert row["loss"] is row["eval_loss"] is None
    assert row["reason"] == "loss: the batch has no target, eval_loss is nan"
    card = (tmp_path / "run" / "card.json").read_text()
    assert json.loads(card, parse_constant=pytest.fail)["metrics"] == row


def test_a_run_that_does_not_begin_leaves_no_folder(gemtool, workshop, tmp_path):
    more = ("--data", workshop / "shards", "--ckpt", "new/run")
    done = gemtool("train", *more, env=environment(workshop), check=False)
    assert done.returncode == 1
    assert b"--vocab" in done.stderr, "not the vocabulary that ships"
    assert list(tmp_path.iterdir()) == []


def test_init_starts_from_other_weights(gemtool, monkeypatch, workshop, whole, tmp_path):
    done = gemtool(
        *("train", "--data", workshop / "shards", "--init", whole[1], "--steps", 1),
        *("--ckpt", "next"),
        env=environment(workshop),
    )
    (row,) = rows_of(done.stdout)
    assert row["loss"] < whole[0][0]["loss"] - 0.1
    write_shards(
        tmp_path / "low", Vocab.load(workshop / "vocab.model"), ["text"] * 9, image_tokens=66
    )
    new = {"model": None, "vocab": None, "init": str(whole[1]), "data": (str(tmp_path / "low"),)}
    assert "media settings" in refused(monkeypatch, workshop, tmp_path / "new", **new)[0]


def test_init_with_a_model_that_has_more(gemtool, monkeypatch, workshop, whole, tmp_path):
    """What the checkpoint has begins as it is there, the rest afresh."""
    encoder = """
[encoders.visual]
tokens = 256
features = 588
width = 16
hidden = 16
"""
    (tmp_path / "seeing.toml").write_text(MODEL + encoder)
    gemtool(
        *("train", "--data", workshop / "shards", "--init", whole[1], "--vocab"),
        *(workshop / "vocab.model", "--model", "seeing.toml", "--steps", 1, "--lr", 0),
        *("--ckpt", "next"),
        env=environment(workshop),
    )
    before = flatten(open_checkpoint(whole[1]).load_params())
    after = flatten(open_checkpoint(tmp_path / "next").load_params())
    new = after.keys() - before.keys()
    assert new
    assert all(path.startswith("encoders/visual/") for path in new)
    assert any(np.std(np.asarray(after[path])) > 0 for path in new)
    for path in before.keys() - {p for p in before if is_balance_bias(p)}:
        np.testing.assert_array_equal(after[path], before[path], path)

    wider = tmp_path / "wider.toml"
    wider.write_text(MODEL.replace("d_ff = ", "d_ff = 1"))
    less = tmp_path / "less.toml"
    less.write_text(MODEL.replace("sink = true", "sink = false"))
    for model, message in (
        (wider, "layers/0/mlp/down is [48, 32], in the model"),
        (less, "is not in the model"),
    ):
        new = {"model": str(model), "init": str(whole[1])}
        assert message in refused(monkeypatch, workshop, tmp_path / "new", **new)[0]


def test_init_with_an_extended_vocabulary(gemtool, monkeypatch, workshop, whole, tmp_path):
    """New rows are the means of the rows that spelled the new pieces; the old ones stay."""
    old = Vocab.load(workshop / "vocab.model")
    words = [chr(0x10D0 + i) + chr(0x10D1 + i) + chr(0x10D2 + i) for i in range(25)]
    random.Random(0).shuffle(words)
    lines = [" ".join(words[i % 20 : i % 20 + 5]) for i in range(200)]
    more = tmp_path / "more.model"
    more.write_bytes(train_vocab(lines, size=old.size + 8, extend=old))
    new = Vocab.load(more)
    assert new.extends(old)
    assert not old.extends(new)
    config = open_checkpoint(whole[1]).config
    params = open_checkpoint(whole[1]).load_params()
    grown = extend_params(params, config, old, new)
    table, before = grown["embedding"], np.asarray(params["embedding"])
    np.testing.assert_array_equal(table[: old.size], before)
    for i in range(old.size, new.size):
        spelled = old.encode(new.piece_bytes(i))
        np.testing.assert_allclose(table[i], before[spelled].mean(0, dtype=np.float64), rtol=1e-6)

    write_shards(tmp_path / "shards", new, lines[:9] * 9)
    gemtool(
        *("train", "--data", "shards", "--init", whole[1], "--vocab", more, "--steps", 1),
        *("--ckpt", "next"),
        env=environment(workshop),
    )
    assert open_checkpoint(tmp_path / "next").config.vocab_size == new.size
    changes = {"model": None, "init": str(whole[1]), "data": (str(tmp_path / "shards"),)}
    found = refused(monkeypatch, workshop, tmp_path / "new", **changes, vocab=None)
    assert "name its file with --vocab" in found[0]


@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        ({"data": ("no/such",)}, "no/such", 1),
        ({"data": ("{shards}:-1",)}, "weight", 2),
        ({"vocab": None}, "--vocab", 1),  # not the vocabulary that ships
        ({"model": "nanoo"}, "did you mean 'nano'", 2),
        ({"model": "{bad}"}, "did you mean 'd_ff'", 1),
        ({"batch": 3, "accumulate": 2}, "--accumulate", 2),
        ({"model": "pro"}, "pro: to train its 22", 2),
        ({"batch": 10**9}, "--batch 1000000000: a step of so many sequences of 32 takes more", 2),
        ({"resume": True, "force": True}, "--resume", 2),
        ({"init": "nowhere"}, "nowhere", 1),
        ({"eval": "nowhere"}, "nowhere", 1),
        ({"eval": "{empty}"}, "holds no sequences", 1),
    ],
)
def test_mistakes(monkeypatch, workshop, tmp_path, options, message, code):
    bad = tmp_path / "bad.toml"
    bad.write_text(MODEL.replace("d_ff", "dff"))
    write_shards(tmp_path / "empty", Vocab.load(workshop / "vocab.model"), [])

    def fill(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(fill, value))
        if isinstance(value, str):
            return value.format(shards=workshop / "shards", bad=bad, empty=tmp_path / "empty")
        return value

    given = {name: fill(value) for name, value in options.items()}
    found = refused(monkeypatch, workshop, tmp_path / "run", **given)
    assert (message in found[0], found[1]) == (True, code), found


def test_a_closed_pipe_ends_training(workshop, tmp_path):
    command = [sys.executable, "-m", "gemtool", *map(str, arguments(workshop, "run"))]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env={**command_environment(), **environment(workshop)},
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr is not None
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()
