"""Prefill and decode: equal to the full forward pass however they are cut; the commands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gemtool.checkpoint import Checkpoint, open_checkpoint, write_checkpoint
from gemtool.control import AUDIO as AUDIO_TOKEN
from gemtool.control import (
    BEGIN_AUDIO,
    BEGIN_FRAME,
    END_AUDIO,
    END_FRAME,
    END_TURN,
    EOD,
    MODEL,
    USER,
)
from gemtool.control import VIDEO as VIDEO_TOKEN
from gemtool.data.settings import MediaSettings
from gemtool.data.vocab import Vocab
from gemtool.errors import CorruptInput, GemtoolError
from gemtool.infer.contexts import load_context
from gemtool.infer.decode import Request, answers
from gemtool.infer.engine import Engine
from gemtool.infer.generate import Step
from gemtool.infer.prefill import write_context
from gemtool.infer.sampling import Sampling
from gemtool.infer.text import Prompt
from gemtool.model import transformer
from gemtool.model.batch import Batch, MediaGroups
from gemtool.model.config import ModelConfig
from gemtool.model.params import init_params
from gemtool.stream.context import STATE_EVERY, open_contexts
from gemtool.stream.spans import Header, Span, create_spans

Command = Callable[..., Any]
SETTINGS = MediaSettings(image_tokens=66)


def tiny(vocab_size: int, layers: str = "LGL", kv_dtype: str = "float16") -> ModelConfig:
    window = {
        "attention": "window", "heads": 2, "kv_heads": 1, "head_dim": 8, "window": 8,
        "rope_theta": 10000.0, "qk_conv": 3, "conv_init": "spread",
    }  # fmt: skip
    full = {
        "attention": "full", "heads": 2, "kv_heads": 1, "head_dim": 8, "sink": True,
        "qk_conv": 4, "conv_init": "spread", "key_shift": 1,
    }  # fmt: skip
    return ModelConfig.from_dict(
        {
            "name": "tiny", "vocab_size": vocab_size, "d_model": 32, "layers": layers, "d_ff": 32,
            "dense_layers": len(layers) - 1, "kv_dtype": kv_dtype,
            "kinds": {"L": window, "G": full},
            "moe": {"experts": 4, "top_k": 2, "d_expert": 16},
            "encoders": {
                "visual": {
                    "tokens": 64, "features": 588, "width": 16, "hidden": 16, "overlap": 3,
                },
                "audio": {
                    "tokens": 25, "features": 320, "width": 16, "hidden": 16, "kernels": [3, 6],
                },
            },
        }
    )  # fmt: skip


def make_engine(path: Path, config: ModelConfig, vocab: Vocab, chunk: int, seed: int = 1) -> Engine:
    """Writes a checkpoint of random weights, and opens it."""
    params = init_params(config, jax.random.key(seed))
    write_checkpoint(path, config, params, vocab, SETTINGS, {}, 0)
    return Engine(open_checkpoint(path), chunk)


@pytest.fixture(scope="module")
def vocab() -> Vocab:
    return Vocab.load()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, vocab: Vocab) -> Path:
    path = tmp_path_factory.mktemp("model") / "run"
    make_engine(path, tiny(vocab.size), vocab, 64)
    return path


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def engine(checkpoint: Checkpoint) -> Engine:
    return Engine(checkpoint, 64)


def text_tokens(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(320, 16000, count).astype(np.int32)


def control(*ids: int) -> np.ndarray:
    return np.array(ids, np.int32)


def media_document(doc: str = "film", seconds: int = 3, seed: int = 0) -> list[Span]:
    """Text, then seconds of video with sound, then text and the end of the document."""
    rng = np.random.default_rng(seed)
    runs: list[tuple[str, np.ndarray, np.ndarray | None]] = [("text", text_tokens(20, seed), None)]
    for second in range(seconds):
        frame = rng.integers(0, 256, (64, 14, 14, 3)).astype(np.uint8)
        sound = rng.normal(size=(25 - second, 4, 80)).astype(np.float16)
        tokens = [BEGIN_FRAME, *[VIDEO_TOKEN] * 64, END_FRAME]
        runs += [("text", text_tokens(4, second), None), ("video", control(*tokens), frame)]
        tokens = [BEGIN_AUDIO, *[AUDIO_TOKEN] * len(sound), END_AUDIO]
        runs += [("audio", control(*tokens), sound)]
    runs += [("text", text_tokens(9, seed + 1), None), ("control", control(EOD), None)]
    start, spans = 0, []
    for index, (kind, tokens_, payload) in enumerate(runs):
        spans.append(Span(doc, index, kind, tokens_, start=start, payload=payload))
        start += len(tokens_)
    return spans


def text_document(doc: str, tokens: np.ndarray) -> list[Span]:
    end = Span(doc, 1, "control", control(EOD), start=len(tokens))
    return [Span(doc, 0, "text", tokens), end]


def full_logits(engine: Engine, spans: list[Span]) -> np.ndarray:
    """Scores [T, V] at every position, by the forward pass that training uses."""
    config, tokens = engine.config, np.concatenate([span.tokens for span in spans])[None]
    groups: dict[str, list[Span]] = {"visual": [], "audio": []}
    for span in spans:
        if span.payload is not None:
            groups["audio" if span.kind == "audio" else "visual"].append(span)
    media = {}
    for kind, members in groups.items():
        if members:
            encoder = config.encoder(kind)
            shape = (len(members), encoder.tokens, encoder.features)
            values = np.zeros(shape, members[0].payload.dtype)  # type: ignore[union-attr]
            for i, span in enumerate(members):
                assert span.payload is not None
                values[i, : len(span.payload)] = span.payload.reshape(len(span.payload), -1)
            at = np.array([span.start + 1 for span in members], np.int32)
            rows = np.array([len(span.tokens) - 2 for span in members], np.int32)
            media[kind] = MediaGroups(values, at, rows)
    ones, positions = np.ones_like(tokens), np.arange(tokens.size, dtype=np.int32)[None]
    batch = Batch(tokens, ones, positions, tokens, ones.astype(np.float32), media)

    @jax.jit
    def scores(params: Any, batch: Batch) -> jax.Array:
        hidden, _ = transformer.forward(params, config, batch)
        return transformer.logits(params, config, hidden[0])

    return np.asarray(scores(engine.params, batch))


# The model, cut in any way


# In float16, the last bit of one key may turn with the order of a sum; float32 shows that nothing
# else differs.
@pytest.mark.parametrize(
    ("chunk", "kv_dtype", "seconds", "tolerance"),
    [(1, "float16", 0, 3e-3), (7, "float32", 3, 1e-4), (64, "float16", 3, 3e-3),
     (512, "float32", 0, 1e-4)],
)  # fmt: skip
def test_prefill_and_decode_equal_the_full_forward_pass(
    vocab: Vocab, tmp_path: Path, chunk: int, kv_dtype: str, seconds: int, tolerance: float
) -> None:
    engine = make_engine(tmp_path / "run", tiny(vocab.size, kv_dtype=kv_dtype), vocab, chunk)
    spans = media_document(seconds=seconds)[:-1]
    if not seconds:
        spans[0].tokens = text_tokens(150)
        spans[1].start = 150
    sequence = engine.prefill(spans)
    length = sum(len(span.tokens) for span in spans)
    assert sequence.length == length
    new = text_tokens(5, 7)
    tail = Span("film", len(spans), "text", new, start=length)
    expected = full_logits(engine, [*spans, tail])[length - 1 :]
    with sequence.fork() as live:
        found = [live.logits]
        for token in new:
            live.extend(np.array([token], np.int32))
            found.append(live.logits)
    for a, b in zip(found, expected, strict=True):
        assert a is not None
        np.testing.assert_allclose(a, b, atol=tolerance)
        top = np.sort(b)[-2:]
        assert np.argmax(a) == np.argmax(b) or top[1] - top[0] < tolerance


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["LL", "GLL", "GLGL"])
def test_other_layer_patterns(vocab: Vocab, tmp_path: Path, layers: str) -> None:
    engine = make_engine(tmp_path / "run", tiny(vocab.size, layers, "float32"), vocab, 64)
    tokens = text_tokens(150)
    expected = full_logits(engine, text_document("a", tokens)[:1])[-1]
    np.testing.assert_allclose(engine.prefill(tokens).logits, expected, atol=1e-4)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 600])
def test_prompts_of_any_length(engine: Engine, length: int) -> None:
    tokens, question = text_tokens(30), text_tokens(length, 3)
    (step,) = engine.generate(engine.prefill(tokens), question, max_tokens=1)
    both = engine.prefill(np.concatenate([tokens, question]))
    np.testing.assert_allclose(step.logits, both.logits, atol=3e-3)


def test_a_context_is_as_before_after_it_was_asked(engine: Engine) -> None:
    context = engine.prefill(text_tokens(100))
    before = context.logits
    first = [s.token for s in engine.generate(context, text_tokens(9, 1), max_tokens=8)]
    for _ in engine.generate(context, text_tokens(70, 2), max_tokens=20):
        break  # left in the middle
    assert context.length == 100
    assert np.array_equal(context.logits, before)
    again = [s.token for s in engine.generate(context, text_tokens(9, 1), max_tokens=8)]
    assert first == again


def test_a_chunk_longer_than_the_document_costs_nothing(
    checkpoint: Checkpoint, engine: Engine
) -> None:
    long, tokens = Engine(checkpoint, 100_000), text_tokens(100)
    assert [long.tile_size(n) for n in (1, 512, 513, 65_536, 99_999)] == [
        512, 512, 1024, 65_536, 100_000
    ]  # fmt: skip
    assert long.bytes_for(100) == engine.bytes_for(100)
    context = long.prefill(tokens)
    np.testing.assert_allclose(context.logits, engine.prefill(tokens).logits, atol=3e-3)


def test_buffers_grow(engine: Engine) -> None:
    tokens = text_tokens(4090)
    context = engine.prefill(tokens)
    steps = [s.token for s in engine.generate(context, tokens[:40], max_tokens=3)]
    fresh = engine.prefill(np.concatenate([tokens, tokens[:40]]))
    assert steps == [s.token for s in engine.generate(fresh, tokens[:0], max_tokens=3)]


def test_greedy_is_the_best_token(engine: Engine) -> None:
    for step in engine.generate(None, text_tokens(10), max_tokens=5):
        assert step.token == int(np.argmax(step.logits))


def test_samples_can_be_repeated(engine: Engine) -> None:
    def draw(seed: tuple[int, int]) -> list[int]:
        sampling = Sampling(temperature=3.0, top_k=500)
        steps = engine.generate(None, text_tokens(9), sampling=sampling, seed=seed, max_tokens=6)
        return [step.token for step in steps]

    assert draw((1, 0)) == draw((1, 0))
    assert len({tuple(draw(seed)) for seed in ((1, 0), (1, 1), (2, 0))}) == 3


def test_nothing_to_continue(engine: Engine) -> None:
    with pytest.raises(GemtoolError, match="nothing to continue"):
        list(engine.generate(None, np.empty(0, np.int32)))


def test_bfloat16_weights_answer_nearly_the_same(checkpoint: Checkpoint, engine: Engine) -> None:
    """As on accelerators. What is kept of the context has the types of a context file in any case."""
    narrow = Engine(checkpoint, 64, dtype="bfloat16")
    assert narrow.params["embedding"].dtype == "bfloat16"
    contexts = [e.prefill(iter(media_document())) for e in (engine, narrow)]
    states = [{k: v.dtype for k, v in c.state().items()} for c in contexts]
    assert states[0] == states[1]
    wide, found = (np.asarray(c.logits) for c in contexts)
    assert found.dtype == np.float32
    assert 1e-4 < np.linalg.norm(found - wide) / np.linalg.norm(wide) < 0.1


# Answers


def test_prompts_are_turns(vocab: Vocab) -> None:
    tokens = Prompt("Hi", prefix="It").tokens(vocab).tolist()
    turn = [USER, *vocab.encode("Hi").tolist(), END_TURN, MODEL, *vocab.encode("It").tolist()]
    assert tokens == turn
    assert np.array_equal(Prompt("Hi", raw=True).tokens(vocab), vocab.encode("Hi"))


@pytest.mark.parametrize(
    ("said", "stop", "text", "finish"),
    [
        ("good<end>", (), "good", "stop"),
        ("good", (), "good", "length"),
        ("naïve 🤖 – ok", (), "naïve 🤖 – ok", "length"),
        ("one two three", ("two",), "one ", "stop"),
        ("one two three", ("zzz", "e t"), "on", "stop"),
        ("one tw", ("two",), "one tw", "length"),
    ],
)
def test_answers_end(
    engine: Engine, said: str, stop: tuple[str, ...], text: str, finish: str
) -> None:
    tokens = [64 + byte for byte in said.removesuffix("<end>").encode()]
    if said.endswith("<end>"):
        tokens.append(END_TURN)
    parts: list[str] = []
    answering, _ = engine.answering(Prompt("?", stop=stop), 5, 0, parts.append)
    for token in tokens:
        if answering.take(Step(token, np.empty(0, np.float32))):
            break
    answer = answering.end()
    assert (answer.text, answer.finish) == (text, finish)
    assert "".join(parts) == text
    assert "\ufffd" not in answer.text


def test_log_probabilities(engine: Engine) -> None:
    answer = engine.answer(None, Prompt("?", max_tokens=3, logprobs=4))
    assert len(answer.logprobs) == len(answer.tokens)
    for token, entry in zip(answer.tokens, answer.logprobs, strict=True):
        top = [item["logprob"] for item in entry["top"]]
        assert (len(top), entry["token"], entry["logprob"]) == (4, token, top[0])
        assert top == sorted(top, reverse=True)
        assert sum(np.exp(top)) <= 1


# Context files


def save(engine: Engine, path: Path, spans: list[Span]) -> dict[str, Any]:
    with path.open("wb") as sink:
        return write_context(engine, spans[0].doc, spans, sink)


def test_a_saved_context_answers_as_the_one_in_memory(engine: Engine, tmp_path: Path) -> None:
    spans = media_document()[:-1]
    footer = save(engine, tmp_path / "film.ctx", spans)
    assert footer["kinds"] == {"text": 41, "video": 198, "audio": 78}
    assert footer["media_sha256"].keys() == {"video", "audio"}
    live = engine.prefill(spans)
    with open_contexts(str(tmp_path / "film.ctx")) as contexts:
        restored = load_context(engine, next(contexts)).sequence
    assert restored.length == live.length == footer["length"]
    assert np.array_equal(restored.logits, live.logits)
    for name, array in restored.state().items():
        assert np.array_equal(array, live.state()[name])
    for name, array in restored.block(0, live.length).items():
        assert array.dtype == np.float16
        assert np.array_equal(array, live.block(0, live.length)[name])
    question = Prompt("And then?", max_tokens=12)
    assert engine.answer(restored, question).tokens == engine.answer(live, question).tokens


def test_chunked_layers_keep_no_more_than_a_chunk(vocab: Vocab, tmp_path: Path) -> None:
    table = tiny(vocab.size, "LGL", kv_dtype="float32").to_dict()
    table["kinds"]["C"] = table["kinds"].pop("L") | {"attention": "chunk", "soft_cap": 2.0}
    table |= {"layers": "CGC", "parallel": True, "post_norms": True, "norm_offset": True}
    engine = make_engine(tmp_path / "run", ModelConfig.from_dict(table), vocab, 64)
    spans = text_document("a", text_tokens(150))[:1]
    save(engine, tmp_path / "a.ctx", spans)
    with open_contexts(str(tmp_path / "a.ctx")) as contexts:
        context = next(contexts)
        kept = [(layer["attention"], layer["window"]) for layer in context.header.layout]
        assert kept == [("chunk", 8), ("full", 0), ("chunk", 8)]
        restored = load_context(engine, context).sequence
    assert restored.state()["layers/0/k"].shape == (1, 8, 1, 8)
    new = text_tokens(11, 7)  # beyond the end of the chunk that the context ends in
    expected = full_logits(engine, [*spans, Span("a", 1, "text", new, start=150)])
    np.testing.assert_allclose(restored.logits, expected[149], atol=1e-4)
    with restored.fork() as live:
        for token, scores in zip(new, expected[150:], strict=True):
            live.extend(np.array([token], np.int32))
            np.testing.assert_allclose(live.logits, scores, atol=1e-4)


def test_blocks_and_states(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemtool.infer.prefill.STATE_EVERY", 4096)
    assert STATE_EVERY % 4096 == 0
    save(engine, tmp_path / "a.ctx", text_document("a", text_tokens(9000))[:1])
    with open_contexts(str(tmp_path / "a.ctx")) as contexts:
        parts = [(p.part, p.start, p.stop) for p in next(contexts).parts()]
    assert parts == [
        ("block", 0, 4096),
        ("state", 4096, 4096),
        ("block", 4096, 8192),
        ("state", 8192, 8192),
        ("block", 8192, 9000),
        ("state", 9000, 9000),
        ("end", 9000, 9000),
    ]


def test_payloads_must_fit(engine: Engine) -> None:
    spans = media_document()[:-1]
    assert spans[2].payload is not None
    spans[2].payload = spans[2].payload[:-1]
    with pytest.raises(
        CorruptInput, match=r"document 'film', span 2: 64 soft positions, but .* 63"
    ):
        engine.prefill(spans)
    spans[2].payload, spans[0].tokens = None, control(99999)
    with pytest.raises(CorruptInput, match="token ids from 99999"):
        engine.prefill(spans)


# The commands


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Commands of this file share compiled programs."""
    return {"GEMTOOL_CACHE": str(tmp_path_factory.mktemp("cache"))}


def spans_file(
    path: Path,
    documents: list[list[Span]],
    fingerprint: str,
    settings: MediaSettings = SETTINGS,
    packed: dict[str, Any] | None = None,
) -> Path:
    header = Header({"fingerprint": fingerprint}, settings.to_dict(), packed=packed)
    with create_spans(str(path), header) as writer:
        for document in documents:
            for span in document:
                writer.append(span)
    return path


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, vocab: Vocab) -> Path:
    folder = tmp_path_factory.mktemp("spans")
    documents = [media_document(), text_document("b", text_tokens(50, 5))]
    return spans_file(folder / "two.arrow", documents, vocab.fingerprint)


def rows(done: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_commands(
    gemtool: Command, compiled: dict[str, str], folder: Path, two: Path, tmp_path: Path,
    engine: Engine,
) -> None:  # fmt: skip
    """From file to file, through pipes, with one and several contexts and prompts."""
    gemtool("prefill", two, "--ckpt", folder, "-o", "two.ctx", "--no-pg", env=compiled)
    piped = gemtool(
        "prefill", "--ckpt", folder, "--no-pg", input=two.read_bytes(), env=compiled
    ).stdout
    assert piped == (tmp_path / "two.ctx").read_bytes()
    with open_contexts(str(tmp_path / "two.ctx")) as contexts:
        lengths = {reader.header.doc: len(list(reader.parts())) and reader.footer["length"]
                   for reader in contexts}  # fmt: skip
    assert lengths == {"film": 317, "b": 50}

    ask = ("decode", "--ckpt", folder, "--max-tokens", 6)
    both = rows(gemtool(*ask, "--cache", "-", "--prompt", "What?", input=piped, env=compiled))
    assert [row["doc"] for row in both] == ["film", "b"]
    expected = engine.answer(engine.prefill(media_document()[:-1]), Prompt("What?", max_tokens=6))
    assert both[0]["tokens"] == expected.tokens
    usage = both[0]["usage"]
    assert (usage["cached"], usage["generated"]) == (317, len(expected.tokens))

    lines = [
        {"id": "x", "prompt": "What?"},
        {"prompt": "Who?", "doc": "b", "max_tokens": 2},
        {"id": 7, "prompt": "Go on", "doc": "film", "prefix": "It"},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    many = rows(gemtool(*ask, "--cache", "two.ctx", "--prompts", "p.jsonl", env=compiled))
    assert [(row["id"], row["doc"]) for row in many] == [
        ("x", "film"), ("7", "film"), ("x", "b"), ("1", "b")
    ]  # fmt: skip
    assert {**many[0], "usage": 0, "id": 0} == {**both[0], "usage": 0, "id": 0}
    assert len(many[3]["tokens"]) <= 2

    # Without a cache, from stdin; in order; text for a person.
    alone = rows(gemtool(*ask, input=b"What?\n", env=compiled))
    named = rows(gemtool(*ask, "--prompt", "What?", "--logprobs", 2, env=compiled))
    assert alone[0]["tokens"] == named[0]["tokens"]
    assert len(named[0]["logprobs"]) == len(named[0]["tokens"])
    assert "doc" not in alone[0]
    text = gemtool(*ask, "--prompt", "What?", "--format", "text", env=compiled).stdout.decode()
    assert text == alone[0]["text"] + "\n"

    # To a file, which appears whole or not at all.
    assert gemtool(*ask, "-o", "a.jsonl", input=b"What?\n", env=compiled).stdout == b""
    answers = (tmp_path / "a.jsonl").read_bytes()
    assert json.loads(answers)["tokens"] == alone[0]["tokens"]
    again = ("--prompts", "p.jsonl", "-o", "a.jsonl")
    assert gemtool(*ask, *again, env=compiled, check=False).returncode == 2, "without -f"
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n{"promt": "y"}\n')
    assert gemtool(*ask, *again, "-f", env=compiled, check=False).returncode == 3
    assert (tmp_path / "a.jsonl").read_bytes() == answers


def test_command_refusals(
    gemtool: Command, compiled: dict[str, str], folder: Path, two: Path, tmp_path: Path,
    vocab: Vocab, engine: Engine,
) -> None:  # fmt: skip
    document = text_document("b", text_tokens(5))

    def refused(code: int, message: str, *arguments: object, input: bytes = b"") -> None:
        done = gemtool(*arguments, input=input, check=False, env=compiled)
        shown = done.stderr.decode()
        assert (done.returncode, done.stdout) == (code, b""), shown
        assert message in " ".join(shown.split()), shown

    ckpt = ("--ckpt", folder)
    other = spans_file(tmp_path / "v", [document], "other")
    refused(1, "its vocabulary is other", "prefill", other, *ckpt)
    high = spans_file(tmp_path / "s", [document], vocab.fingerprint, MediaSettings())
    refused(1, "its image_tokens is 258, the checkpoint's 66", "prefill", high, *ckpt)
    packed = spans_file(tmp_path / "p", [document], vocab.fingerprint, packed={"length": 64})
    refused(3, "packed (length 64)", "prefill", packed, *ckpt)
    refused(3, "near byte", "prefill", *ckpt, "-o", "x", input=two.read_bytes()[:-500])
    assert not (tmp_path / "x").exists()

    save(engine, tmp_path / "b.ctx", document[:1])
    data = (tmp_path / "b.ctx").read_bytes()
    ask = ("decode", *ckpt, "--cache")
    refused(3, "near byte", *ask, "-", "--prompt", "x", input=data[:-500])
    refused(2, "standard input holds the context", *ask, "-", input=data)
    refused(2, "exclude each other", *ask, "b.ctx", "--prompt", "x", "--prompt-file", "y")
    refused(2, "--prompt is empty", *ask, "b.ctx", "--prompt", "")
    refused(2, "--prompt is empty", "decode", *ckpt, "--raw", "--prompt", "")
    refused(3, "<stdin>: empty; expected a question", *ask, "b.ctx", input=b"\n")
    refused(2, "leave out -o", "prefill", two, *ckpt, "--dry-run", "-o", "x")
    lines = '{"prompt": "Who?"}\n{"prompt": "Why?", "doc": "c"}\n'
    (tmp_path / "p.jsonl").write_text(lines)  # nothing is answered before the mistake is told
    refused(1, "no context of document 'c'", *ask, "b.ctx", "--prompts", "p.jsonl")
    refused(1, "no --cache", "decode", *ckpt, "--prompts", "p.jsonl")
    (tmp_path / "p.jsonl").write_text(lines + "{")
    refused(3, "p.jsonl: line 3: not JSON", *ask, "b.ctx", "--prompts", "p.jsonl")
    going_on = gemtool(*ask, "b.ctx", "--raw", "--prompt", "", "--max-tokens", 2, env=compiled)
    assert rows(going_on)[0]["usage"]["prompt"] == 0
    refused(2, "--logprobs needs", *ask, "b.ctx", "--prompt", "x", "--logprobs", 1,
            "--format", "text")  # fmt: skip
    refused(2, "top-p is 0", *ask, "b.ctx", "--prompt", "x", "--top-p", 0)
    (tmp_path / "film.mp4").write_bytes(b"\0\0\0 ftypisom")
    for reader in (("pack", "--length", 9), ("shard", "-o", "x"), ("prefill", *ckpt)):
        refused(3, "b.ctx: a context where a span stream is needed; make one with `gemtool tokenize`",
                *reader, "b.ctx")  # fmt: skip
        refused(3, "film.mp4: not a span stream", *reader, "film.mp4")
    for file in (two, "film.mp4"):
        refused(3, "make one with `gemtool prefill`", *ask, file, "--prompt", "x")
    shutil.copytree(folder, tmp_path / "altered")
    weights = bytearray((folder / "weights.safetensors").read_bytes())
    weights[-7] ^= 1
    (tmp_path / "altered" / "weights.safetensors").write_bytes(weights)
    altered = ("--ckpt", "altered")
    refused(3, "altered: damaged", "decode", *altered, "--prompt", "x")
    refused(3, "altered: damaged", "prefill", two, *altered)
    make_engine(tmp_path / "run2", engine.config, vocab, 64, seed=9)
    refused(1, "its model is", "decode", "--ckpt", "run2", "--cache", "b.ctx", "--prompt", "x")


def test_a_prompt_may_name_its_document(engine: Engine, tmp_path: Path) -> None:
    save(engine, tmp_path / "b.ctx", text_document("b", text_tokens(5))[:1])
    request = Request("first", Prompt("x", max_tokens=1), doc="c")
    with pytest.raises(GemtoolError, match="prompt 'first': no context of document 'c'"):
        list(answers(engine, str(tmp_path / "b.ctx"), [request]))
    with pytest.raises(GemtoolError, match="names document 'c', but there is no --cache"):
        list(answers(engine, None, [request]))


def test_hand_written_spans_and_dry_run(
    gemtool: Command, compiled: dict[str, str], folder: Path
) -> None:
    lines = [
        {"doc": "a", "span": 0, "kind": "text", "tokens": [400, 401, 402]},
        {"doc": "a", "span": 1, "kind": "control", "tokens": [EOD]},
        {"doc": "b", "span": 0, "kind": "control", "tokens": [EOD]},
    ]
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    done = gemtool("prefill", "--ckpt", folder, "--dry-run", input=data, env=compiled)
    (plan,) = rows(done)
    assert (plan["doc"], plan["tokens"]) == ("a", 3)
    assert b"does not say which vocabulary" in done.stderr
    assert b"'b' is empty; skipped" in done.stderr
    written = gemtool("prefill", "--ckpt", folder, "--no-pg", input=data, env=compiled).stdout
    assert abs(len(written) - plan["disk"]) < 6000
    unusable = {"GEMTOOL_CACHE": "/proc/nowhere"}
    done = gemtool("prefill", "--ckpt", folder, "--dry-run", input=data, env=unusable)
    assert done.stderr.count(b"/proc/nowhere/xla: compiled programs are not kept: ") == 1
