"""Operations that a model needs: against pairs counted one by one, and against XLA's own count."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemtool.model.config import load_preset
from gemtool.model.flops import forward_flops, keys_flops, visible_pairs
from gemtool.model.kinds import IndexConfig, LayerKind
from gemtool.model.params import abstract_params, count_params
from gemtool.model.transformer import forward, logits
from tests.test_mesh import CONFIG, make_batch


@pytest.mark.parametrize("attention", ["full", "window", "chunk"])
@pytest.mark.parametrize(("length", "start"), [(1, 0), (7, 0), (30, 0), (1, 29), (12, 17)])
def test_visible_pairs(attention: str, length: int, start: int) -> None:
    kind = LayerKind("X", attention, 2, 1, 8, 0 if attention == "full" else 10)
    seen = 0
    for query in range(start, start + length):
        for key in range(query + 1):
            window = attention != "window" or key > query - 10
            chunk = attention != "chunk" or key // 10 == query // 10
            seen += window and chunk
    assert visible_pairs(kind, length, start) == seen


def test_xla_counts_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a program that computes every pair and expert: what it computes in vain is taken off."""
    monkeypatch.setenv("GEMTOOL_KERNELS", "reference")
    config = dataclasses.replace(CONFIG, encoders=(), layers="GGG", moe=None)
    batch = dataclasses.replace(make_batch(), media={})
    B, T = batch.tokens.shape

    def run(params: dict, batch: object) -> jax.Array:
        return logits(params, config, forward(params, config, batch)[0])  # type: ignore[arg-type]

    program = (
        jax.jit(run).lower(abstract_params(config), jax.tree.map(jnp.asarray, batch)).compile()
    )
    counted = program.cost_analysis()["flops"]
    hidden = sum(
        4 * k.heads * k.head_dim * (T * T - visible_pairs(k, T)) for k in config.layer_kinds
    )
    needed = B * forward_flops(config, T, scored=T)
    # XLA counts norms, softmax, gates and masks too.
    np.testing.assert_allclose(counted - B * hidden, needed, rtol=0.25)
    assert counted - B * hidden >= needed


def test_only_chosen_experts_count() -> None:
    config = load_preset("pro")
    _, active = count_params(config)
    table = config.vocab_size * config.d_model
    of_token = forward_flops(config, 1)
    # Nearly all active parameters but the two tables and the encoders are multiplied, once.
    assert 0.9 < of_token / (2 * (active - 2 * table)) < 1.01


@pytest.mark.parametrize(("length", "start"), [(1, 0), (40, 0), (1, 300), (70, 190)])
def test_only_chosen_blocks_count(length: int, start: int) -> None:
    index = IndexConfig(block=8, landmarks=3, dim=4, local=1, select=2, growth=1, floor=64)
    dense = dataclasses.replace(load_preset("nano"), encoders=())
    window, kind = dense.kinds
    kind = dataclasses.replace(kind, attention="indexed", index=index)
    config = dataclasses.replace(dense, kinds=(window, kind))
    expected = 0.0
    for query in range(start, start + length):
        far = max(query // 8 - 1, 0)
        width = 2 + sum(query // 64 >= 2**n for n in range(1, 20))
        keys = query + 1 - 8 * far + 8 * min(far, width)
        expected += 4 * kind.heads * kind.head_dim * keys + 2 * far * 3 * 4
    found = forward_flops(config, length, start, chosen=True) - forward_flops(config, length, start)
    everything = 4 * kind.heads * kind.head_dim * visible_pairs(kind, length, start)
    np.testing.assert_allclose(found, expected - everything, rtol=1e-6, atol=1.0)


def test_keys_take_what_is_below_them() -> None:
    """All of the layers below, the projections of the keys and values, and nothing of what is above."""
    config = dataclasses.replace(load_preset("nano"), encoders=(), vocab_size=512, moe=None)
    T = 256
    below = dataclasses.replace(config, layers="LL")
    window, kind = config.kinds
    keys = 2 * config.d_model * kind.kv_heads * kind.head_dim
    assert keys_flops(config, T) == forward_flops(below, T) + 2 * keys * T
    assert keys_flops(dataclasses.replace(config, layers="LLGLLLL"), T) == keys_flops(config, T)
    assert window.bounded
