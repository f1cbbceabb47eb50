"""Prefill and decode on a mesh of 8 devices: what one device gives, from buffers that stay cut."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemtool.checkpoint import write_checkpoint
from gemtool.control import BEGIN_FRAME, END_FRAME, VIDEO
from gemtool.data.settings import MediaSettings
from gemtool.data.vocab import Vocab
from gemtool.errors import UsageError
from gemtool.infer import sequence as sequences
from gemtool.infer.engine import Engine
from gemtool.infer.pieces import Piece, Tile, pieces_of
from gemtool.infer.sampling import Sampling
from gemtool.infer.sequence import Sequence
from gemtool.infer.steps import abstract_sequence, scored_step
from gemtool.kernels.attention import flash_attention
from gemtool.model import buffers
from gemtool.model.config import ModelConfig
from gemtool.model.kinds import IndexConfig
from gemtool.model.mesh import make_mesh, open_mesh, param_shardings, parse_mesh
from gemtool.model.params import abstract_params, init_params
from gemtool.stream.context import Part
from gemtool.stream.spans import Span
from tests.conftest import Command, quickly_compiled

# A window, a buffer and a chunk; sinks, soft caps; key heads that tensor divides and does not. In
# float32, where no rounding turns.
CONFIG = ModelConfig.from_dict(
    {
        "name": "mesh",
        "vocab_size": 96,
        "d_model": 32,
        "layers": "LGC",
        "d_ff": 32,
        "dense_layers": 2,
        "kv_dtype": "float32",
        "kinds": {
            "L": {
                "attention": "window", "window": 11, "heads": 4, "kv_heads": 2, "head_dim": 8,
                "rope_theta": 1e4, "qk_norm": "rms", "qk_conv": 4, "conv_init": "spread",
            },
            "G": {
                "heads": 8, "kv_heads": 2, "head_dim": 8, "rope_theta": 1e4, "sink": True,
                "soft_cap": 4.0, "qk_conv": 3, "conv_init": "spread", "key_shift": 1,
            },
            "C": {
                "attention": "chunk", "window": 10, "heads": 4, "kv_heads": 1, "head_dim": 8,
                "rope_theta": 1e4, "qk_norm": "none", "sink": True,
            },
        },
        "moe": {"experts": 8, "top_k": 3, "d_expert": 16, "shared_experts": 1},
        "encoders": {"visual": {"tokens": 4, "features": 12, "width": 16, "hidden": 16, "heads": 2}},
    }
)  # fmt: skip

# The same with an index that leaves out most of what there is, and a layer that shares its keys.
_GLOBAL = dataclasses.replace(
    CONFIG.kinds[1],
    attention="indexed",
    index=IndexConfig(block=8, landmarks=2, dim=4, hidden=8, local=1, select=3, sticky=2),
)
_SHARER = dataclasses.replace(_GLOBAL, letter="S", shares="G", key_shift=0)
INDEXED = dataclasses.replace(
    CONFIG, layers="LGSC", kinds=(CONFIG.kinds[0], _GLOBAL, _SHARER, CONFIG.kinds[2])
)
TILE = 56
PROMPTS = tuple(np.random.default_rng(5).integers(64, 96, n).astype(np.int32) for n in (9, 40))
MESHES = [
    "context=8",
    pytest.param("context=4,tensor=2", marks=pytest.mark.slow),
    "fsdp=2,expert=2,context=2",
    *(pytest.param(text, marks=pytest.mark.slow) for text in ("fsdp=8", "expert=8", "tensor=4")),
    *(pytest.param(text, marks=pytest.mark.slow) for text in ("data=2", "context=3")),
    pytest.param("data=2,context=2,tensor=2", marks=pytest.mark.slow),
]
CLOSE = {"rtol": 2e-4, "atol": 2e-4}


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Runs and blocks so small that a tile has rows for several devices; quick compilation."""
    with pytest.MonkeyPatch.context() as patch, quickly_compiled():
        patch.setattr(buffers, "RUN", 16)
        patch.setattr(sequences, "BLOCK", 64)
        patch.setattr(sequences, "PROMPT_TILE", TILE)
        yield


def make_engine(mesh: str | None, config: ModelConfig = CONFIG) -> Engine:
    params = jax.tree.map(np.asarray, init_params(config, jax.random.key(0)))
    params = jax.tree.map(lambda x: x + np.float32(0.01), params)  # sinks begin at zero
    checkpoint: Any = SimpleNamespace(
        config=config, vocab=None, load_params=lambda: params, require_as_loaded=lambda: None
    )
    return Engine(checkpoint, TILE, open_mesh(mesh, config))


def document() -> list[Span]:
    """Text, frames of a film, text: 130 tokens, for which buffers grow on one device."""
    rng = np.random.default_rng(1)
    spans: list[Span] = []
    for kind, count in (("text", 50), ("video", 4), ("text", 21), ("video", 3), ("text", 48)):
        payload = None
        tokens = rng.integers(64, 96, count).astype(np.int32)
        if kind == "video":
            tokens = np.array([BEGIN_FRAME, *[VIDEO] * count, END_FRAME], np.int32)
            payload = rng.integers(0, 256, (count, 2, 2, 3)).astype(np.uint8)
        start = spans[-1].start + len(spans[-1].tokens) if spans else 0
        spans.append(Span("film", len(spans), kind, tokens, start=start, payload=payload))
    return spans


def saved(sequence: Sequence) -> tuple[list[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """What a context file holds of it."""
    starts = range(0, sequence.length, 64)
    return [sequence.block(i, min(i + 64, sequence.length)) for i in starts], sequence.state()


def restored(engine: Engine, sequence: Sequence) -> Sequence:
    blocks, state = saved(sequence)
    assert sequence.logits is not None
    parts = [Part("block", 64 * i, 64 * i + 64, arrays) for i, arrays in enumerate(blocks)]
    return engine.restore(sequence.length, parts, state, sequence.logits)


def answers(engine: Engine, context: Sequence) -> list[list[Any]]:
    """The steps of answers to all prompts, each asked of the context as it was."""
    return [
        list(engine.generate(context, prompt, sampling=Sampling(), max_tokens=4))
        for prompt in PROMPTS
    ]


def require_equal_answers(found: list[list[Any]], expected: list[list[Any]]) -> None:
    for some, wanted in zip(found, expected, strict=True):
        assert [step.token for step in some] == [step.token for step in wanted]
        for a, b in zip(some, wanted, strict=True):
            np.testing.assert_allclose(a.logits, b.logits, **CLOSE)


@pytest.fixture(scope="module")
def alone() -> tuple[Engine, Sequence, list[list[Any]]]:
    """One device: the engine, the document that it read, and its answers."""
    engine = make_engine(None)
    context = engine.prefill(document())
    return engine, context, answers(engine, context)


@pytest.mark.parametrize("text", MESHES)
def test_a_mesh_gives_what_one_device_gives(
    text: str, alone: tuple[Engine, Sequence, list[list[Any]]]
) -> None:
    require_same_on_a_mesh(text, alone)


@pytest.fixture(scope="module")
def indexed_alone() -> tuple[Engine, Sequence, list[list[Any]]]:
    engine = make_engine(None, INDEXED)
    context = engine.prefill(document())
    return engine, context, answers(engine, context)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("context=8", marks=pytest.mark.slow),
        pytest.param("context=2,tensor=4", marks=pytest.mark.slow),
        "fsdp=2,expert=2,context=2",
    ],
)
def test_a_mesh_chooses_what_one_device_chooses(
    text: str,
    alone: tuple[Engine, Sequence, list[list[Any]]],
    indexed_alone: tuple[Engine, Sequence, list[list[Any]]],
) -> None:
    require_same_on_a_mesh(text, indexed_alone)
    dense, chosen = (np.asarray(found[2][1][0].logits) for found in (alone, indexed_alone))
    assert np.abs(dense - chosen).max() > 1e-3  # something is left out


def require_same_on_a_mesh(text: str, alone: tuple[Engine, Sequence, list[list[Any]]]) -> None:
    one, context, expected = alone
    engine = make_engine(text, one.config)
    spread = engine.prefill(document())
    assert spread.length == context.length == 130
    np.testing.assert_allclose(spread.logits, context.logits, **CLOSE)
    require_equal_answers(answers(engine, spread), expected)
    found, wanted = saved(spread), saved(context)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)
    # A context that one made is read by the other.
    require_equal_answers(answers(engine, restored(engine, context)), expected)
    require_equal_answers(answers(one, restored(one, spread)), expected)


def likelihoods(engine: Engine) -> list[np.ndarray]:
    """Of the document's tokens, and of the three most likely in the place of each."""
    sequence, found = engine.begin(), []
    for tile in engine.tiles(pieces_of(document(), engine.config, engine.encode)):
        scores = sequence.score(tile, TILE, 3)
        found.append([np.asarray(x)[: len(tile.piece)] for x in scores])
    return [np.concatenate(parts)[1:] for parts in zip(*found, strict=True)]


@pytest.mark.parametrize(
    "text", [pytest.param("tensor=4", marks=pytest.mark.slow), "fsdp=2,expert=2,context=2"]
)
def test_a_mesh_scores_every_token_as_one_device_does(
    text: str, indexed_alone: tuple[Engine, Sequence, list[list[Any]]]
) -> None:
    wanted, found = likelihoods(indexed_alone[0]), likelihoods(make_engine(text, INDEXED))
    assert [x.shape for x in wanted] == [(129,), (129, 3), (129, 3)]
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)


@pytest.mark.parametrize(
    ("text", "shape", "share"),
    [
        # By position over context; over tensor by heads or, where it does not divide, by position.
        ("context=2,tensor=2", (1, 8, 32, 2, 8), (1, 8, 16, 1, 8)),
        ("context=2,tensor=4", (1, 2, 128, 2, 8), (1, 2, 16, 2, 8)),
    ],
)
def test_keys_are_spread_and_stay_where_they_are(
    text: str, shape: tuple[int, ...], share: tuple[int, ...]
) -> None:
    engine = make_engine(text)
    sequence, tile = engine.begin(), Tile(Piece(PROMPTS[0]), scored=False, last=False)
    sequence.run(tile, TILE)
    sequence.reserve(256)  # grows
    for _ in range(2):
        buffers_ = [x for own in sequence._taken() for x in own.values()]
        assert [x.shape for x in buffers_] == [shape] * 2
        assert [x.addressable_shards[0].data.shape for x in buffers_] == [share] * 2
        sequence.run(tile, TILE)
    assert all(x.is_deleted() for x in buffers_)  # donated
    count = math.prod(parse_mesh(text).values())
    assert engine.bytes_for(900) - engine.bytes_for(400) == 512 * engine.row_bytes() // count


@pytest.mark.parametrize("text", ["context=3", "context=2,tensor=4"])
@pytest.mark.parametrize("steps", [1, 7, 20, 150])
def test_rows_come_back_from_where_they_were_written(text: str, steps: int) -> None:
    mesh = make_mesh(parse_mesh(text))
    expected = np.zeros((1, 384, 2, 4), np.float16)
    shape = buffers.buffer_shape(1, 384, 2, 4, mesh)
    rng = np.random.default_rng(0)
    with jax.set_mesh(mesh):
        write, read = jax.jit(buffers.write_rows), jax.jit(buffers.read_rows, static_argnums=2)
        buffer = jnp.zeros(shape, jnp.float16)
        for start in (0, 3, 16, 95, 200, 384 - steps):
            rows = rng.standard_normal((1, steps, 2, 4)).astype(np.float16)
            buffer = write(buffer, rows, np.int32(start))
            expected[:, start : start + steps] = rows
            np.testing.assert_array_equal(np.asarray(buffer).reshape(expected.shape), expected)
        for start in (0, 41, 320):
            np.testing.assert_array_equal(
                read(buffer, np.int32(start), 64), expected[:, start : start + 64]
            )


@pytest.mark.parametrize(
    ("text", "kv_heads"), [("context=2,tensor=2", 4), ("context=2,tensor=4", 2)]
)
@pytest.mark.parametrize("steps", [1, 21])
def test_attention_to_a_buffer(text: str, kv_heads: int, steps: int) -> None:
    mesh, rng = make_mesh(parse_mesh(text)), np.random.default_rng(3)
    q = rng.standard_normal((1, steps, 8, 4)).astype(np.float32)
    k, v = (rng.standard_normal((1, 256, kv_heads, 4)).astype(np.float16) for _ in "kv")
    options: dict[str, Any] = {"sink": jnp.arange(8.0), "soft_cap": 2.0, "scale": 0.7}

    @jax.jit
    def attend(*qkv: jax.Array, new: Any, length: jax.Array) -> jax.Array:
        return buffers.buffer_attention(*qkv, new=new, length=length, **options)

    @jax.jit
    def expected(*qkv: jax.Array, length: jax.Array) -> jax.Array:
        return flash_attention(*qkv, q_start=length, kv_length=length + steps, **options)

    with jax.set_mesh(mesh):
        cut = [x.reshape(buffers.buffer_shape(1, 256, kv_heads, 4, mesh)) for x in (k, v)]
        for length in (0, 5, 32, 100, 256 - steps):
            new = tuple(x[:, length : length + steps] for x in (k, v))
            found = attend(q, *cut, new=new, length=np.int32(length))
            wanted = expected(q, k, v, length=np.int32(length))
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("text", "steps"), [("context=4,tensor=2", 64), ("context=2,tensor=4", 1)])
@pytest.mark.parametrize("config", [CONFIG, INDEXED], ids=["full", "indexed"])
def test_a_step_neither_sends_nor_copies_buffers(
    text: str, steps: int, config: ModelConfig
) -> None:
    mesh, capacity = make_mesh(parse_mesh(text)), 1 << 16
    config = dataclasses.replace(config, kv_dtype="float16")
    state = abstract_sequence(config, capacity, mesh)
    params = jax.tree.map(
        lambda x, where: x.update(sharding=where),
        abstract_params(config),
        param_shardings(config, mesh),
    )
    tokens, valid = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((steps,), ()))
    with jax.set_mesh(mesh):
        step = scored_step.lower(params, config, tokens, None, valid, *state, {}).compile()
    shares = [
        {name: math.prod(x.sharding.shard_shape(x.shape)) for name, x in own.items()}
        for own in state[0]
    ]
    share = [own[name] for own in shares for name in "kv"]
    landmarks = sum(own.get("landmarks", 0) for own in shares)
    memory = step.memory_analysis()
    assert memory.alias_size_in_bytes == 2 * sum(share) + 4 * landmarks
    # Of scores of a group of queries there are as many as of landmarks at most, and their maxima.
    assert memory.temp_size_in_bytes < 2 * min(share) + 3 * landmarks * steps
    sent = re.findall(
        r"= (.*) (?:all-gather|all-reduce|all-to-all|collective-permute)(?:-start)?\(",
        step.as_text(),
    )
    sizes = [
        math.prod(map(int, dims.split(",")))
        for line in sent
        for dims in re.findall(r"\[([\d,]+)\]", line)
    ]
    assert len(sizes) > 10
    assert max(sizes) < min(share) / 8


# Through the command


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights."""
    folder, vocab = tmp_path_factory.mktemp("mesh") / "run", Vocab.load()
    config = dataclasses.replace(CONFIG, vocab_size=vocab.size, encoders=())
    params = init_params(config, jax.random.key(0))
    write_checkpoint(folder, config, params, vocab, MediaSettings(), {}, 0)
    return folder


DEVICES = {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
}


def test_contexts_are_the_same_wherever_they_were_made(
    gemtool: Command, run: Path, tmp_path: Path
) -> None:
    words = np.random.default_rng(2).choice(["seven", "rain", "Kyoto", "and", "why", "."], 5000)
    (tmp_path / "doc.txt").write_text(" ".join(words))
    gemtool("tokenize", "doc.txt", "-o", "doc.spans")
    ask = ("--prompt", "Which?", "--max-tokens", 6, "--logprobs", 1, "--ckpt", run)
    found = {}
    for name, wrote, reads in (
        ("one", (), ("--mesh", "context=2,tensor=4")),
        ("mesh", ("--mesh", "context=3,tensor=2"), ()),
    ):
        gemtool("prefill", "--ckpt", run, "doc.spans", "-o", f"{name}.ctx", *wrote, env=DEVICES)
        done = gemtool("decode", "--cache", f"{name}.ctx", *ask, *reads, env=DEVICES)
        found[name] = json.loads(done.stdout)
    assert found["one"]["usage"]["cached"] > 4096  # more than one run
    assert found["one"]["tokens"] == found["mesh"]["tokens"]
    for a, b in zip(found["one"]["logprobs"], found["mesh"]["logprobs"], strict=True):
        assert a["logprob"] == pytest.approx(b["logprob"], abs=1e-3)


@pytest.mark.slow
def test_a_probe_on_a_mesh(gemtool: Command, run: Path) -> None:
    probe = ("probe", "needle", "--ckpt", run, "--lengths", "200", "--depths", 1)
    rows = [
        json.loads(gemtool(*probe, *more, env=DEVICES).stdout)
        for more in ((), ("--mesh", "expert=2,context=2"))
    ]
    assert [row.pop("seconds") > 0 for row in rows] == [True, True]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    "verb", [("prefill",), ("decode", "--prompt", "x"), ("probe", "needle", "-o", "rows.jsonl")]
)
def test_a_mesh_that_does_not_fit_is_refused(
    gemtool: Command, run: Path, tmp_path: Path, verb: tuple[str, ...]
) -> None:
    gemtool("tokenize", "-o", "doc.spans", input=b"Some text")
    inputs = ("doc.spans",) if verb[0] == "prefill" else ()
    done = gemtool(*verb, *inputs, "--ckpt", run, "--mesh", "tensor=3", check=False, env=DEVICES)
    assert done.returncode == 2
    (line,) = done.stderr.decode().splitlines()
    assert "tensor = 3 does not divide 4 heads" in line
    assert {path.name for path in tmp_path.iterdir()} == {"doc.spans"}


def test_only_heads_and_experts_must_divide() -> None:
    assert open_mesh(None, CONFIG) is None
    assert open_mesh("data=3,context=2", CONFIG).shape["data"] == 3  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="expert = 3 does not divide 8 experts"):
        open_mesh("expert=3", CONFIG)
