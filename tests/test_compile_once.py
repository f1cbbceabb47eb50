"""Nothing compiles twice: not within a process, and not in the next one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gemtool.data.vocab import Vocab, train_vocab
from gemtool.infer.engine import CHUNKS
from gemtool.infer.sequence import PROMPT_TILE, capacity_for
from gemtool.stream.context import BLOCK
from gemtool.train.loop import TrainOptions, train
from tests.conftest import Command
from tests.test_prefill_decode import make_engine, tiny
from tests.test_train import arguments, write_shards
from tests.test_train_step import MODEL, VOCAB_SIZE

COMPILED, TRACED = "backend_compile", "jaxpr_trace"


SHORTEST = CHUNKS[0]  # of a document's tiles


class Watch:
    """Counts programs that JAX traces and compiles, by name; `forget` begins anew."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.seen: Counter[tuple[str, str]] = Counter()

    def __call__(self, event: str, seconds: float, **about: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            what = event.rsplit("/", 1)[1].removesuffix("_duration")
            name = re.sub(r"jit\((.*)\)", r"\1", about["fun_name"])
            self.seen[what, name] += 1

    def counts(self, *names: str) -> dict[str, tuple[int, int]]:
        """How often each was traced, and compiled."""
        return {name: (self.seen[TRACED, name], self.seen[COMPILED, name]) for name in names}


@pytest.fixture
def watch() -> Iterator[Watch]:
    watch = Watch()
    jax.monitoring.register_event_duration_secs_listener(watch)
    yield watch
    jax.monitoring.unregister_event_duration_listener(watch)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards, a vocabulary and a model, as `tests.test_train.arguments` names them."""
    folder = tmp_path_factory.mktemp("workshop")
    lines = Path(__file__).read_text().splitlines()
    (folder / "vocab.model").write_bytes(train_vocab(lines, size=VOCAB_SIZE))
    (folder / "model.toml").write_text(MODEL)
    vocab = Vocab.load(folder / "vocab.model")
    write_shards(folder / "shards", vocab, lines)
    write_shards(folder / "held-out", vocab, lines[:40])
    return folder


@pytest.mark.parametrize("mesh", [None, pytest.param("data=2,fsdp=2", marks=pytest.mark.slow)])
def test_a_run_compiles_its_programs_once(
    mesh: str | None, workshop: Path, tmp_path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step, and the evaluation; once both were done and saved, nothing at all."""
    monkeypatch.setenv("GEMTOOL_CACHE", "off")
    watched = []

    def emit(row: dict[str, Any]) -> None:
        if row["step"] == 3:
            watched.append(watch.counts("train_step", "eval_step"))
            watch.forget()

    options = TrainOptions(
        data=(str(workshop / "shards"),), ckpt=str(tmp_path / "run"), batch=4, steps=7, mesh=mesh,
        model=str(workshop / "model.toml"), vocab=str(workshop / "vocab.model"),
        eval=str(workshop / "held-out"), eval_every=2, save_every=2,
    )  # fmt: skip
    train(options, emit)
    assert watched == [{"train_step": (1, 1), "eval_step": (1, 1)}]
    assert not watch.seen


def test_documents_and_prompts_of_any_length_share_programs(tmp_path: Path, watch: Watch) -> None:
    """As many as there are sizes of tiles times powers of two of room, whatever is read and asked."""
    config = replace(tiny(16384, layers="LG"), name="once")
    engine = make_engine(tmp_path / "checkpoint", config, Vocab.load(), 2 * SHORTEST)
    rng = np.random.default_rng(0)

    def tokens(length: int) -> np.ndarray:
        return rng.integers(64, 16384, length).astype(np.int32)

    def read_and_ask(document: int, *prompts: int) -> None:
        context = engine.prefill(tokens(document))
        for length in prompts:
            assert len(list(engine.generate(context, tokens(length), max_tokens=2))) >= 1

    def grow(length: int) -> None:
        context = engine.begin()
        for _ in range(2):
            context.extend(tokens(length))  # the second time beyond the room that there was

    watch.forget()
    for document in (SHORTEST + 1, 3 * SHORTEST - 1, BLOCK + 1):
        read_and_ask(document, 7, PROMPT_TILE + 1, SHORTEST + 1)
    grow(BLOCK - SHORTEST)
    tiles = {1, PROMPT_TILE} | {engine.tile_size(n) for n in range(1, 2 * SHORTEST + 1)}
    rooms = {capacity_for(n) for n in range(1, 2 * BLOCK)}
    assert (len(tiles), rooms) == (4, {BLOCK, 2 * BLOCK})
    counts = watch.counts("scored_step", "kv_step", "grown")
    for name, most in {"scored_step": 8, "kv_step": 2, "grown": 1}.items():
        traced, compiled = counts[name]
        assert 1 <= traced == compiled <= most, name
    watch.forget()
    for document in (1, 513, 1025, 2500, 5000):
        read_and_ask(document, 1, 2, 64, 65, 1000)
    grow(BLOCK - SHORTEST + 1)
    assert not watch.seen


def programs(stderr: bytes) -> tuple[set[str], set[str]]:
    """Names of those that a command with -v compiled, and of those that it had from the cache."""
    told = re.findall(r"debug: jit\((\w+)\): (compiled|from the cache) in", stderr.decode())
    compiled, cached = ({n for n, how in told if how == h} for h in ("compiled", "from the cache"))
    return compiled, cached


def test_the_next_process_compiles_nothing(
    gemtool: Command, workshop: Path, tmp_path: Path
) -> None:
    run, more = tmp_path / "run", ("--eval", workshop / "held-out", "-v")
    gemtool(*arguments(workshop, run, "--steps", 2, *more))
    other = gemtool(*arguments(workshop, tmp_path / "other", "--steps", 3, "--seed", 1, *more))
    resumed = gemtool(*arguments(workshop, run, "--steps", 4, "--resume", *more))
    for done in (other, resumed):
        compiled, cached = programs(done.stderr)
        assert not compiled
        assert {"train_step", "eval_step"} <= cached
    for turn, text in enumerate(("A short text.", "Another text, which is somewhat longer. " * 9)):
        spans = gemtool("tokenize", "--vocab", workshop / "vocab.model", input=text.encode())
        prefill = gemtool("prefill", "--ckpt", run, "-o", f"{turn}.ctx", "-v", input=spans.stdout)
        ask = ("--cache", f"{turn}.ctx", "--prompt", text[:20], "--max-tokens", 2 + turn, "-v")
        decode = gemtool("decode", "--ckpt", run, *ask)
        if turn:
            for done in (prefill, decode):
                compiled, cached = programs(done.stderr)
                assert not compiled
                assert "scored_step" in cached
