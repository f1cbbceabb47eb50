"""Training: the objective and the step as functions, then whole runs, killed and resumed."""

from __future__ import annotations

import json
import math
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemtool.checkpoint import open_checkpoint
from gemtool.data.packing import Packer
from gemtool.data.settings import MediaSettings
from gemtool.data.sharding import create_shards
from gemtool.data.vocab import Vocab, train_vocab
from gemtool.errors import GemtoolError, UsageError
from gemtool.model.batch import Batch, MediaGroups
from gemtool.model.config import ModelConfig
from gemtool.model.params import flatten, init_params
from gemtool.model.transformer import logits
from gemtool.stream.spans import Header, Span
from gemtool.train.extend import extend_params
from gemtool.train.loop import TrainOptions, to_json, train
from gemtool.train.objectives import next_token_loss
from gemtool.train.optimizer import FLOOR, Schedule, decayed, make_optimizer
from gemtool.train.state import open_run
from gemtool.train.step import init_state, make_train_step, stack
from tests.conftest import Command, command_environment

MODEL = """
name = "tiny"
vocab_size = 1
d_model = 32
layers = "LG"
d_ff = 48

[kinds.L]
attention = "window"
heads = 2
kv_heads = 2
head_dim = 8
window = 8
rope_theta = 10000.0

[kinds.G]
heads = 2
kv_heads = 1
head_dim = 16
qk_conv = 2
sink = true

[moe]
experts = 4
top_k = 2
d_expert = 16
"""
VOCAB_SIZE = 500
CONFIG = ModelConfig.from_dict({**tomllib.loads(MODEL), "vocab_size": VOCAB_SIZE})
LENGTH = 32


# Functions


def random_batch(seed: int, rows: int = 2, **changes: Any) -> Batch:
    rng = np.random.default_rng(seed)
    shape = (rows, LENGTH)
    tokens = rng.integers(64, VOCAB_SIZE, shape).astype(np.int32)
    segments = np.repeat([[1, 2]], LENGTH // 2, axis=1).repeat(rows, 0).astype(np.int32)
    positions = np.tile(np.arange(LENGTH // 2, dtype=np.int32), (rows, 2))
    weights = (rng.random(shape) < 0.7).astype(np.float32)
    return Batch(tokens, segments, positions, np.roll(tokens, -1, 1), weights, **changes)


def plain_loss(params, hidden, targets, weights):
    scores = jax.nn.log_softmax(logits(params, CONFIG, hidden))
    return -jnp.sum(weights * jnp.take_along_axis(scores, targets[..., None], -1)[..., 0])


@pytest.mark.parametrize(("chunk", "density"), [(7, 0.0), (7, 0.3), (64, 1.0), (100, 0.3)])
def test_the_loss_is_cross_entropy(chunk, density):
    rng = np.random.default_rng(0)
    params = {"embedding": init_params(CONFIG, jax.random.key(0))["embedding"]}
    hidden = jnp.asarray(rng.standard_normal((2, LENGTH, CONFIG.d_model)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, VOCAB_SIZE, (2, LENGTH)), jnp.int32)
    weights = rng.random((2, LENGTH)) * (rng.random((2, LENGTH)) < density)
    weights = jnp.asarray(weights, jnp.float32)

    def ours(params, hidden):
        return 2.5 * next_token_loss(params, CONFIG, hidden, targets, weights, chunk)

    def plain(params, hidden):
        return 2.5 * plain_loss(params, hidden, targets, weights)

    np.testing.assert_allclose(ours(params, hidden), plain(params, hidden), rtol=1e-5)
    found = jax.grad(ours, (0, 1))(params, hidden)
    expected = jax.grad(plain, (0, 1))(params, hidden)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


@pytest.fixture(scope="module")
def one_step():
    """The state before a step (numpy), the step, its batch, and what came of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEMTOOL_KERNELS", "reference")  # compiles in less time
        yield from make_one_step()


def make_one_step():
    optimizer = make_optimizer(CONFIG)
    step = make_train_step(CONFIG, optimizer)
    batch = random_batch(0)
    before = jax.tree.map(np.array, init_state(CONFIG, optimizer, 0))
    after, metrics = step(init_state(CONFIG, optimizer, 0), stack([batch]), 0.01)
    yield before, step, batch, jax.tree.map(np.array, after), metrics


def test_a_step_improves_every_parameter_it_should(one_step):
    before, step, batch, after, metrics = one_step
    assert math.isclose(float(metrics["loss"]), math.log(VOCAB_SIZE), rel_tol=0.25)
    assert 1 <= float(metrics["expert_load"]) <= 4
    for path, value in flatten(after.params).items():
        assert np.any(value != flatten(before.params)[path]), f"{path} did not change"
    again, state = [], after
    for _ in range(5):
        state, metrics = step(state, stack([batch]), 0.01)
        again.append(float(metrics["loss"]))
    assert again == sorted(again, reverse=True)


def test_balance_biases_move_by_load_alone(one_step):
    before, _, _, after, _ = one_step
    moved = after.params["layers"]["1"]["moe"]["bias"] - before.params["layers"]["1"]["moe"]["bias"]
    assert set(np.round(np.abs(moved), 9)) <= {np.float32(0), np.float32(0.001)}
    for moments in jax.tree.leaves(
        after.optimizer, is_leaf=lambda x: isinstance(x, dict) and "layers" in x
    ):
        if isinstance(moments, dict):
            assert not np.any(moments["layers"]["1"]["moe"]["bias"]), "a gradient reached the bias"


def test_micro_batches_give_the_same_step(one_step):
    before, step, batch, after, metrics = one_step
    halves = [jax.tree.map(lambda x, i=i: x[i : i + 1], batch) for i in range(2)]
    state, halved = step(jax.tree.map(jnp.asarray, before), stack(halves), 0.01)
    np.testing.assert_allclose(halved["loss"], metrics["loss"], rtol=1e-5)
    # Adam divides by the gradient's size, so that rounding shows where a gradient is tiny.
    for path, value in flatten(state.params).items():
        if not path.endswith("/bias"):
            np.testing.assert_allclose(value, flatten(after.params)[path], atol=2e-3, err_msg=path)


def test_stacked_batches_have_room_for_all_media():
    def media(count: int) -> dict[str, MediaGroups]:
        ones = np.ones(count, np.int32)
        return {"audio": MediaGroups(np.ones((count, 25, 320), np.float16), ones, ones)}

    both = stack([random_batch(0, media=media(3)), random_batch(1, media=media(1))])
    assert both.tokens.shape == (2, 2, LENGTH)
    assert both.media["audio"].values.shape == (2, 3, 25, 320)
    assert both.media["audio"].rows.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_the_schedule():
    schedule = Schedule(steps=100, peak=1.0, warmup=10)
    rates = [schedule.rate(step) for step in range(1, 101)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert math.isclose(rates[-1], FLOOR)
    assert Schedule(steps=1, peak=0.5, warmup=1).rate(1) == 0.5
    assert math.isclose(Schedule(steps=3, peak=0.5, warmup=0).rate(3), 0.5 * FLOOR)


def test_matrices_decay_and_nothing_else():
    chosen = flatten(decayed(CONFIG))
    assert chosen["layers/1/moe/gate"]
    assert chosen["embedding"]
    kept = {path.rpartition("/")[2] for path, decays in chosen.items() if not decays}
    names = {"norm", "attention_norm", "mlp_norm", "bias", "conv", "sink", "log_temperature"}
    assert kept == names


def test_numbers_that_are_not_finite_are_null_with_a_reason():
    row = json.loads(to_json({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 0.1}))
    assert row == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
        "lr": 0.1,
        "reason": "loss is nan, grad_norm is inf",
    }


def test_a_state_is_saved_as_it_was_when_saved(tmp_path):
    """Steps reuse the memory of the state that is still being written."""
    increment = jax.jit(lambda x: x + 1.0, donate_argnums=0)
    state = {"x": jnp.arange(3_000_000, dtype=jnp.float32)}
    with open_run(tmp_path / "run", resume=False) as run:
        run.save(1, state, {"tokens": 5})
        for _ in range(20):
            state = {"x": increment(state["x"])}
        jax.block_until_ready(state)
        run.finish()
        restored = run.restore(1, jax.eval_shape(lambda: {"x": jnp.zeros(3_000_000)}))
        assert run.record(1) == {"tokens": 5}
    np.testing.assert_array_equal(restored["x"], np.arange(3_000_000, dtype=np.float32))


# Runs


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
        ({"init": "nowhere"}, "--model", 2),
        ({"init": "nowhere", "model": None}, "nowhere", 1),
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
