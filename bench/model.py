"""Whole models on one core: `python bench/model.py`.

A training step of `mini` against this machine's own matmul (operations that are needed: those of
`prefill.operations` and the scores over the vocabulary, times three for forward and backward).

A Qwen3-MoE of 408 million parameters, random weights, float32, against transformers on torch with
its fastest settings (sdpa; experts as measured here first): prefill, decoding after 512 tokens,
training steps (loss, gradients, clipping, AdamW). Ours is what the verbs run: the steps of
`gemtool.infer.engine` and `gemtool.train.step`. Each has a process of its own, as a user would run
them. Logits and losses have to agree.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from measure import OwnProcess, Row, call, compare, keep_to_one_core, report
from peers import Transformers
from prefill import operations

from gemtool.model.config import LayerKind, ModelConfig, MoEConfig, load_preset
from gemtool.runtime import setup_jax
from tests.families import ATTENTION, QK_NORM, Family, convert, experts

TOLERANCE = 1e-4
"""Of logits and losses, whose own size is about 1 and 10."""
HALF_TOLERANCE = 0.2
"""Of logits after keys and values that are rounded to float16, the peer's being float32."""
PREFILL = ((512, 7), (2048, 5), (8192, 3))
"""Lengths, and turns of each."""
CONTEXT, TOKENS = 512, 32
"""Of decoding: what goes before, and tokens of a turn."""
BATCH, LENGTH, STEPS, RATE = 2, 1024, 5, 1e-4
"""Of training: sequences and their length, turns, and the learning rate."""


def qwen3_moe(
    layers: int = 12,
    width: int = 768,
    heads: tuple[int, int] = (12, 4),
    hidden: int = 384,
    choices: tuple[int, int] = (4, 32),
    vocab: int = 32000,
) -> Family:
    """The shape of the benchmark, 408 million parameters, or one like it."""
    top_k, count = choices
    theirs = {
        "vocab_size": vocab,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": 64,
        "intermediate_size": hidden,
        "moe_intermediate_size": hidden,
        "num_experts": count,
        "num_experts_per_tok": top_k,
        "norm_topk_prob": True,
        "max_position_embeddings": 16384,
        "tie_word_embeddings": False,
        "pad_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }
    kind = LayerKind("G", "full", *heads, head_dim=64, rope_theta=1e6, qk_norm="rms")
    ours = ModelConfig(
        "qwen3-moe",
        vocab,
        width,
        "G" * layers,
        (kind,),
        hidden,
        dense_layers=0,
        moe=MoEConfig(count, top_k, hidden, balance="auxiliary", auxiliary_loss=0.0, z_loss=0.0),
        tie_embeddings=False,
        kv_dtype="float32",
    )
    table = ATTENTION | QK_NORM | {"layers/{i}/moe/router": "model.layers.{i}.mlp.gate.weight"}
    gate, up = slice(0, hidden), slice(hidden, None)
    table |= experts("model.layers.{i}.mlp.experts", gate, up, transposed=True)
    return Family("Qwen3Moe", theirs, ours, table)


def rows(_: Path) -> Iterator[Row]:
    setup_jax()
    yield mini_row(load_preset("mini"))
    family = qwen3_moe()
    try:
        params = convert(family, random_model(family.theirs))
        peer = OwnProcess(Peer, family.theirs)
    except ImportError as missing:
        print(f"{missing.name} is not installed: not compared", file=sys.stderr)
        return
    yield from inference_rows(family, params, peer)
    gc.collect()  # our caches
    yield training_row(family, params, peer)
    peer.close()


# The peer, in its own process


def random_model(settings: dict[str, Any]) -> Any:
    """The model of transformers, as it is initialised there, on one thread."""
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**settings, attn_implementation="sdpa")
    return transformers.Qwen3MoeForCausalLM(config).float().eval()


class Peer(Transformers):
    """A model of transformers that reads, continues and learns tokens int32 [n]."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(random_model(settings))
        self.optimizer: Any = None

    def fastest(self, method: str, *given: Any) -> str:
        """Sets and returns the implementation of the experts with which a method takes least."""
        seconds = {}
        for name in ("eager", "grouped_mm"):
            self.model.set_experts_implementation(name)
            getattr(self, method)(*given)
            seconds[name] = call(lambda: getattr(self, method)(*given)).cpu
        best = min(seconds, key=lambda name: seconds[name])
        self.model.set_experts_implementation(best)
        return best

    def gradients(self, tokens: np.ndarray) -> float:
        """Those of a batch [B, T], and its loss."""
        import torch

        self.model.train().zero_grad()
        ids = torch.from_numpy(tokens.astype(np.int64))
        loss = self.model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.item()

    def learn(self, tokens: np.ndarray) -> float:
        """A step on a batch [B, T]; its loss before."""
        import torch

        from gemtool.train.optimizer import B1, B2, CLIP, WEIGHT_DECAY

        parameters = list(self.model.parameters())
        if self.optimizer is None:
            self.cache = None
            groups = [
                {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
                {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
            ]
            self.optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(B1, B2), fused=True)
        loss = self.gradients(tokens)
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        self.optimizer.step()
        return loss


# Inference


def engine_of(config: ModelConfig, params: Any) -> Any:
    """An `Engine` of parameters that no folder holds."""
    from gemtool.data.vocab import Vocab
    from gemtool.infer.engine import Engine

    checkpoint = SimpleNamespace(
        config=config,
        vocab=Vocab.load(),
        load_params=lambda: params,
        require_as_loaded=lambda: None,
    )
    return Engine(cast("Any", checkpoint))


def inference_rows(family: Family, params: Any, peer: OwnProcess) -> Iterator[Row]:
    from gemtool.model.params import count_params

    engine = engine_of(family.ours, params)
    size = f"{count_params(family.ours)[0] / 1e6:.0f}M"
    tokens = np.random.default_rng(0).integers(0, family.ours.vocab_size, 8192, np.int32)

    for length, turns in PREFILL:
        prompt = tokens[:length]

        def ours(prompt: np.ndarray = prompt) -> np.ndarray:
            return engine.prefill(prompt).logits

        implementation = peer.result("fastest", "prefill", prompt)
        difference = assert_close(ours(), peer.result("prefill", prompt))
        row = compare(
            f"prefill of {length}, Qwen3-MoE {size}, against transformers ({implementation})",
            partial(call, ours),
            partial(peer.cost, "prefill", prompt),
            repeats=turns,
            unit="tokens/CPU-s",
            work=(length, length),
            warm_up=False,
        )
        yield {**row, "difference": difference}
    for dtype in ("float32", "float16"):
        config = dataclasses.replace(family.ours, kv_dtype=dtype)
        yield decode_row(engine_of(config, params), peer, tokens, size)


def decode_row(engine: Any, peer: OwnProcess, tokens: np.ndarray, size: str) -> Row:
    """Both are given the same tokens, one by one, and their logits fetched each time."""
    dtype = engine.config.kv_dtype
    prompt, given = tokens[:CONTEXT], tokens[CONTEXT : CONTEXT + TOKENS]
    context = engine.prefill(prompt)
    peer.result("prefill", prompt)

    def ours() -> list[np.ndarray]:
        found = []
        with context.fork() as live:
            for token in given:
                live.extend(token[None])
                found.append(live.logits)
        return found

    implementation = peer.result("fastest", "decode", given)
    tolerance = TOLERANCE if dtype == "float32" else HALF_TOLERANCE
    difference = assert_close(ours(), peer.result("decode", given), tolerance)
    row = compare(
        f"decoding after {CONTEXT}, Qwen3-MoE {size}, {dtype} keys and values, against "
        f"transformers ({implementation})",
        partial(call, ours),
        partial(peer.cost, "decode", given),
        repeats=7,
        unit="tokens/CPU-s",
        work=(TOKENS, TOKENS),
        warm_up=False,
    )
    return {**row, "difference": difference}


def assert_close(ours: Any, theirs: Any, tolerance: float = TOLERANCE) -> float:
    """The largest difference, which must not exceed the tolerance."""
    difference = float(np.max(np.abs(np.asarray(ours) - np.asarray(theirs))))
    if not difference <= tolerance:
        sys.exit(f"ours and the peer's differ by {difference:.2g}; expected {tolerance:g} at most")
    return difference


# Training


class Trainer:
    """Our training steps on one batch of random tokens."""

    def __init__(self, config: ModelConfig, batch: int, length: int, params: Any = None) -> None:
        import jax

        from gemtool.model.batch import Batch
        from gemtool.train import step
        from gemtool.train.optimizer import make_optimizer

        optimizer = make_optimizer(config)
        self.tokens = np.random.default_rng(0).integers(
            0, config.vocab_size, (batch, length), np.int32
        )
        ones = np.ones((1, batch, length), np.int32)
        self.batch = jax.device_put(
            Batch(
                tokens=self.tokens[None],
                segments=ones,
                positions=ones.cumsum(axis=-1, dtype=np.int32) - 1,
                targets=np.roll(self.tokens, -1, axis=1)[None],
                weights=np.where(np.arange(length) < length - 1, ones, 0).astype(np.float32),
            )
        )
        self.state = step.init_state(config, optimizer, 0, params)
        self.step = step.make_train_step(config, optimizer)

    def run(self, rate: float = RATE) -> float:
        """One step; its loss."""
        self.state, metrics = self.step(self.state, self.batch, rate)
        return float(metrics["loss"])


def mini_row(config: ModelConfig, batch: int = BATCH, length: int = LENGTH) -> Row:
    import jax
    import jax.numpy as jnp

    trainer = Trainer(config, batch, length)
    square = jnp.ones((2048, 2048), jnp.float32)
    multiply = jax.jit(lambda a: a @ a)

    def matmul() -> None:
        for _ in range(10):
            jax.block_until_ready(multiply(square))

    scores = 2 * config.vocab_size * config.d_model * (length - 1)
    work = 3 * batch * (operations(config, length) + scores)
    row = compare(
        f"training step of {config.name}, {batch} x {length}, against matmul",
        lambda: call(trainer.run),
        lambda: call(matmul),
        repeats=STEPS,
        unit="GFLOP/s",
        work=(work / 1e9, 10 * 2 * 2048**3 / 1e9),
    )
    return {**row, "tokens_s": batch * length * row["ours"] / (work / 1e9)}


def training_row(
    family: Family, params: Any, peer: OwnProcess, batch: int = 1, length: int = LENGTH
) -> Row:
    trainer = Trainer(family.ours, batch, length, params)
    tokens = trainer.tokens
    implementation = peer.result("fastest", "gradients", tokens)
    # The second loss is that after the first step of both.
    losses = [(trainer.run(), peer.result("learn", tokens)) for _ in range(2)]
    difference = max(assert_close(*pair) for pair in losses)
    row = compare(
        f"training step of Qwen3-MoE, {batch} x {length}, against torch ({implementation})",
        lambda: call(trainer.run),
        partial(peer.cost, "learn", tokens),
        repeats=STEPS,
        unit="tokens/CPU-s",
        work=(batch * length, batch * length),
        warm_up=False,
    )
    return {**row, "difference": difference}


if __name__ == "__main__":
    keep_to_one_core()
    report(rows)
