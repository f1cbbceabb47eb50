"""Indexed attention: what it summarises, whom it chooses, what it learns, and what stays the same."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gemtool.errors import GemtoolError
from gemtool.model import attention, index, params, projections, stacking, transformer
from gemtool.model import cache as caches
from gemtool.model.batch import Batch
from gemtool.model.config import ModelConfig
from gemtool.model.execution import Execution
from gemtool.model.kinds import IndexConfig, LayerKind
from tests.test_index_infer import quickly_compiled  # noqa: F401 (a fixture)
from tests.test_model import TINY, TOLERANCE, WINDOW, random_params

# Blocks of 8 positions, so that few tokens are many blocks; narrow enough to leave most of them out.
INDEX = IndexConfig(
    block=8, landmarks=3, dim=6, hidden=10, local=1, select=2, growth=1, floor=32, sticky=3
)  # fmt: skip
KIND = LayerKind(
    "G", "indexed", 2, 1, 16, sink=True, index=INDEX, qk_conv=4, conv_init="spread", key_shift=1,
    tie_qk_init=True, length_scale=0.2, length_floor=16,
)  # fmt: skip
CONFIG = dataclasses.replace(TINY, kinds=(WINDOW, KIND), layers="LGL", encoders=())
LENGTH, CAPACITY = 150, 256


def with_index(**changes: Any) -> ModelConfig:
    kind = dataclasses.replace(KIND, index=dataclasses.replace(INDEX, **changes))
    return dataclasses.replace(CONFIG, kinds=(WINDOW, kind))


def tokens_of(seed: int, batch_size: int = 2, length: int = LENGTH) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, 97, (batch_size, length), np.int32))


def packed(tokens: jax.Array, segments: Any = None, documents: Any = None) -> Batch:
    shape = tokens.shape
    segments = jnp.ones(shape, jnp.int32) if segments is None else jnp.asarray(segments, jnp.int32)
    column = np.arange(shape[1])[None]
    begins = np.diff(np.asarray(segments), axis=1, prepend=-1) != 0
    positions = column - np.maximum.accumulate(np.where(begins, column, 0), axis=1)
    if documents is None:
        documents = np.arange(shape[0])[:, None] * 100 + np.asarray(segments)
    return Batch(
        tokens, segments, jnp.asarray(positions, jnp.int32), jnp.roll(tokens, -1, 1),
        jnp.ones(shape, jnp.float32), documents=jnp.asarray(documents, jnp.int32),
    )  # fmt: skip


@partial(jax.jit, static_argnums=1)
def step(p: Any, config: ModelConfig, tokens: Any, cache: Any, valid: Any) -> Any:
    return transformer.step(p, config, transformer.embed(p, config, tokens), cache, valid)


@partial(jax.jit, static_argnums=1)
def step_kv(p: Any, config: ModelConfig, tokens: Any, cache: Any, valid: Any) -> Any:
    return transformer.step_kv(p, config, transformer.embed(p, config, tokens), cache, valid)


def in_steps(
    p: Any, config: ModelConfig, tokens: jax.Array, sizes: list[int], pad: int = 0
) -> tuple[np.ndarray, Any]:
    """Hidden states of tokens cut into steps of these sizes, each padded."""
    cache, at, found = caches.init_cache(config, tokens.shape[0], CAPACITY), 0, []
    for size in sizes:
        rows = jnp.pad(tokens[:, at : at + size], ((0, 0), (0, pad)), constant_values=5)
        hidden, cache = step(p, config, rows, cache, jnp.int32(size))
        found.append(np.asarray(hidden[:, :size]))
        at += size
    return np.concatenate(found, axis=1), cache


def test_equals_dense_attention_when_every_block_is_selected() -> None:
    config = with_index(select=32)
    p, tokens = random_params(config), tokens_of(1)
    whole, _ = jax.jit(transformer.forward, static_argnums=1)(p, config, packed(tokens))
    found, _ = in_steps(p, config, tokens, [64, 64, 22])
    np.testing.assert_allclose(found, whole, atol=TOLERANCE["float32"], rtol=0)


def test_leaves_out_what_is_not_selected() -> None:
    """Otherwise none of the tests here would say anything."""
    p, tokens = random_params(CONFIG), tokens_of(1)
    whole, _ = jax.jit(transformer.forward, static_argnums=1)(p, CONFIG, packed(tokens))
    found, _ = in_steps(p, CONFIG, tokens, [LENGTH])
    difference = np.abs(found - np.asarray(whole)).max(axis=(0, 2))
    first = (INDEX.select + INDEX.local + 1) * INDEX.block
    assert difference[:first].max() < TOLERANCE["float32"]
    assert difference[first:].max() > 1e-2


@pytest.mark.parametrize(
    ("sizes", "pad"),
    [
        pytest.param([1] * LENGTH, 0, id="one by one"),
        pytest.param([7] * 21 + [3], 2, id="sevens, padded"),
        pytest.param([64, 64, 22], 9, id="padded beyond a block"),
        pytest.param([8, 100, 1, 1, 40], 0, id="uneven"),
    ],
)
def test_does_not_depend_on_how_a_sequence_is_cut(sizes: list[int], pad: int) -> None:
    p, tokens = random_params(CONFIG), tokens_of(1)
    wanted, whole = in_steps(p, CONFIG, tokens, [LENGTH])
    found, cache = in_steps(p, CONFIG, tokens, sizes, pad)
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE["float32"], rtol=0)
    for a, b in zip(cache.layers, whole.layers, strict=True):
        if a.index is not None:
            blocks, rest = divmod(LENGTH, INDEX.block)
            near = {"atol": 1e-5, "rtol": 0}
            np.testing.assert_allclose(
                a.index.landmarks[..., :blocks], b.index.landmarks[..., :blocks], **near
            )
            np.testing.assert_allclose(a.index.pending[:, :rest], b.index.pending[:, :rest], **near)
            np.testing.assert_allclose(a.index.queries, b.index.queries, **near)


def test_the_keys_alone_leave_the_same_cache() -> None:
    p, tokens = random_params(CONFIG), tokens_of(2)
    wanted, _ = in_steps(p, CONFIG, tokens, [100, LENGTH - 100])
    cache = caches.init_cache(CONFIG, 2, CAPACITY)
    reach = transformer.tail_reach(CONFIG)
    first = LENGTH - reach - 10
    cache = step_kv(p, CONFIG, tokens[:, :first], cache, jnp.int32(first))
    hidden, _ = step(p, CONFIG, tokens[:, first:], cache, jnp.int32(reach + 10))
    np.testing.assert_allclose(hidden[:, reach:], wanted[:, first + reach :], atol=1e-4, rtol=0)


def test_attends_to_the_blocks_that_score_best() -> None:
    """One layer against plain attention with a mask made by hand, from the definition."""
    p, rng = random_params(CONFIG)["layers"]["1"]["attention"], np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(1, LENGTH, 32)).astype(np.float32))
    cache = caches.init_cache(CONFIG, 1, CAPACITY).layers[1]
    zero, valid = jnp.int32(0), jnp.int32(LENGTH)
    found, _ = attention.attend_cached(p, CONFIG, KIND, x, cache, zero, valid)

    rows = jnp.pad(x, ((0, 0), (KIND.conv_tail, 0), (0, 0)))
    sources = projections.sources_of(p, KIND, rows)
    u = np.asarray(index.query_vectors(p["index"], sources[0])[0], np.float64)
    keys = np.asarray(index.key_vectors(p["index"], sources[1])[0], np.float64)
    q = projections.queries_of(p, CONFIG, KIND, sources)
    k, v = projections.keys_and_values_of(p, CONFIG, KIND, sources)
    positions = jnp.arange(LENGTH, dtype=jnp.int32)
    q = projections.sharpened(KIND, q, positions[None])
    q, k, v = (np.asarray(a[0], np.float64) for a in (q, k, v))
    landmarks = []
    for j in range(LENGTH // 8):
        e, g = keys[8 * j : 8 * j + 8, :6], keys[8 * j : 8 * j + 8, 6:]
        share = np.exp(g - g.max(axis=0)) / np.exp(g - g.max(axis=0)).sum(axis=0)
        mean = share.T @ e
        landmarks.append(mean / np.sqrt((mean**2).sum(axis=1, keepdims=True) + 1e-6))
    out = np.zeros((LENGTH, 2, 16))
    for t in range(LENGTH):
        own = t // 8
        seen = {own, max(own - 1, 0)}
        count = 2 + max(int(np.log2(max(t // 32, 1))), 0)
        recent = u[max(t - 2, 0) : t + 1]
        scores = [(recent @ landmarks[j].T).max() for j in range(max(own - 1, 0))]
        seen |= set(np.argsort([-s for s in scores], kind="stable")[:count].tolist())
        visible = np.array([i // 8 in seen for i in range(t + 1)])
        for head in range(2):
            s = k[: t + 1, 0] @ q[t, head]
            s = np.where(visible, s, -np.inf)
            sink = float(p["sink"][head])
            top = max(s.max(), sink)
            share = np.exp(s - top) / (np.exp(s - top).sum() + np.exp(sink - top))
            out[t, head] = share @ v[: t + 1, 0]
    wanted = np.einsum("thk,hkd->td", out, np.asarray(p["o"], np.float64))
    np.testing.assert_allclose(found[0], wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("position", [0, 31, 32, 63, 64, 127, 128, 1000, 10_000_000, 2**31 - 1])
def test_more_blocks_are_chosen_further_on(position: int) -> None:
    config = dataclasses.replace(INDEX, select=5, growth=3, floor=32)
    expected = 5 + 3 * int(np.log2(max(position // 32, 1)))
    assert int(index.width(config, jnp.array([position], jnp.int32))[0]) == expected
    assert config.most(position + 1) >= expected
    assert config.most(max(position, 1)) <= expected


def test_landmarks_are_means_of_length_one() -> None:
    keys = np.random.default_rng(0).normal(size=(2, 5, 8, 9)).astype(np.float32)
    found = np.asarray(index.summarise(INDEX, jnp.asarray(keys)), np.float64)
    assert found.shape == (2, 3, 6, 5)
    share = np.exp(keys[..., 6:].astype(np.float64))
    share /= share.sum(axis=2, keepdims=True)
    wanted = np.einsum("bjpi,bjpm->bmij", keys[..., :6].astype(np.float64), share)
    wanted /= np.sqrt((wanted**2).sum(axis=2, keepdims=True) + 1e-6)
    np.testing.assert_allclose(found, wanted, atol=1e-6)


# Learning


def learned(p: Any, batch: Batch, config: ModelConfig = CONFIG) -> dict[str, jax.Array]:
    loss, metrics = jax.jit(transformer.index_loss, static_argnums=1)(p, config, batch)
    return {"loss": loss, **metrics}


def test_only_the_index_learns_from_it() -> None:
    p, batch = random_params(CONFIG), packed(tokens_of(4))
    grads = jax.grad(lambda p: transformer.index_loss(p, CONFIG, batch)[0])(p)
    for path, leaf in params.flatten(grads).items():
        assert bool(jnp.isfinite(leaf).all()), path
        assert bool((leaf != 0).any()) == params.is_index(path), path


def test_it_learns_where_attention_looks() -> None:
    """Of an attention that looks for where the same was read before, as trained ones do."""
    p = params.init_params(CONFIG, jax.random.key(3))
    p["layers"]["1"]["attention"]["log_temperature"] = jnp.full(2, np.log(60.0), jnp.float32)
    phrases = np.random.default_rng(2).integers(0, 97, (2, 9, 8), np.int32)
    order = np.random.default_rng(3).integers(0, 9, (2, 19))
    batch = packed(
        jnp.asarray([rows[which].reshape(-1) for rows, which in zip(phrases, order, strict=True)])
    )
    before = learned(p, batch)
    optimizer = optax.adam(3e-3)

    @jax.jit
    def learn(p: Any, state: Any) -> Any:
        grads = jax.grad(lambda p: transformer.index_loss(p, CONFIG, batch)[0])(p)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(grads, state)
        return optax.apply_updates(p, updates), state

    state = optimizer.init(p)
    for _ in range(200):
        p, state = learn(p, state)
    after = learned(p, batch)
    assert after["loss"] < 0.7 * before["loss"]
    for name in ("index_top1", "index_topk", "index_mass"):
        assert 0 <= before[name] < after[name] <= 1, name
    assert after["index_mass"] > before["index_mass"] + 0.2


def test_a_document_is_not_its_own_negative() -> None:
    """Blocks of another row that are of one of the query's documents are no candidates."""
    tokens = tokens_of(5)
    apart = learned(random_params(CONFIG), packed(tokens))
    same = learned(random_params(CONFIG), packed(tokens, documents=np.full((2, LENGTH), 7)))
    alone = [learned(random_params(CONFIG), packed(tokens[i : i + 1])) for i in range(2)]
    low, high = sorted(float(x["loss"]) for x in alone)
    assert low - 1e-4 <= float(same["loss"]) <= high + 1e-4
    assert float(apart["loss"]) > high + 0.1  # more candidates


def test_weighs_what_candidates_get_of_the_attention() -> None:
    """Whole blocks of the query's document before its own, and how much one of them gets; by hand, of
    one layer."""
    p = random_params(CONFIG)["layers"]["1"]["attention"]
    segments = np.repeat([[1, 2, 0]], [36, 20, 8], axis=1)  # block 4 is of both
    batch = packed(tokens_of(6, 1, 64), segments)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 64, 32)).astype(np.float32))
    *_, sums = attention.attend_packed(p, CONFIG, KIND, x, batch, learn_index=True)

    rows = jnp.pad(x, ((0, 0), (KIND.conv_tail, 0), (0, 0)))
    padded = jnp.pad(batch.segments, ((0, 0), (KIND.conv_tail, 0)), constant_values=-1)
    sources = projections.sources_of(p, KIND, rows, padded)
    q = projections.queries_of(p, CONFIG, KIND, sources)
    k, _ = projections.keys_and_values_of(p, CONFIG, KIND, sources)
    q = projections.sharpened(KIND, q, jnp.full((1, 1), 1_000_000, jnp.int32))  # `horizon`
    q, k = (np.asarray(a[0], np.float64) for a in (q, k))
    weight = 0.0
    for t in range(56):
        seen = [i for i in range(t + 1) if segments[0, i] == segments[0, t]]
        share = np.zeros(8)
        for head in range(2):
            mass = {i: np.exp(k[i, 0] @ q[t, head]) for i in seen}
            total = sum(mass.values()) + np.exp(float(p["sink"][head]))
            for i in seen:
                if i // 8 < t // 8 and i // 8 != 4:
                    share[i // 8] += mass[i] / total / 2
        if share.any():
            weight += (share**2).sum() / share.sum()
    np.testing.assert_allclose(sums["weight"].sum(), weight, rtol=1e-4)


def test_quality_is_told_by_the_position_of_queries() -> None:
    """Each doubling is what a sequence cut there has more than one cut before it; other rows are no
    candidates."""
    p, tokens = random_params(CONFIG), tokens_of(6)

    def quality(tokens: jax.Array) -> dict[str, np.ndarray]:
        found = jax.jit(transformer.index_quality, static_argnums=1)(p, CONFIG, packed(tokens))
        return {name: np.asarray(x) for name, x in found.items()}

    whole = quality(tokens)
    assert np.flatnonzero(whole["weight"]).tolist() == [4, 5, 6, 7, 8]  # from position 8 to LENGTH
    alone = [quality(tokens[i : i + 1]) for i in range(2)]
    for name, x in whole.items():
        np.testing.assert_allclose(x, alone[0][name] + alone[1][name], rtol=1e-5, err_msg=name)
    before = quality(tokens[:, :64])
    after = quality(tokens[:, :128])
    for name, x in whole.items():
        np.testing.assert_allclose(x[:7], before[name][:7], rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(x[:8], after[name][:8], rtol=1e-5, err_msg=name)
        assert not before[name][7:].any()


def test_quality_counts_the_blocks_that_are_chosen_at_a_position() -> None:
    p, batch = random_params(CONFIG), packed(tokens_of(6))
    assert KIND.index is not None

    def mass(**change: int) -> np.ndarray:
        index = dataclasses.replace(KIND.index, **change)
        kinds = tuple(
            dataclasses.replace(kind, index=index) if kind.index else kind for kind in CONFIG.kinds
        )
        config = dataclasses.replace(CONFIG, kinds=kinds)
        found = transformer.index_quality(p, config, batch)
        return np.asarray(found["mass"] / np.maximum(found["weight"], 1e-9))

    few, grown, all_of_them = (
        mass(select=1, growth=0),
        mass(select=1, growth=2, floor=64),
        mass(select=99),
    )
    np.testing.assert_array_equal(few[:8], grown[:8])  # up to 128: one block
    assert (few[8] + 0.02 < grown[8] < 1).all()  # then three
    np.testing.assert_allclose(all_of_them[4:9], 1, atol=1e-5)


def test_learns_from_what_is_a_target_alone() -> None:
    p, batch = random_params(CONFIG), packed(tokens_of(5))
    late = np.zeros((2, LENGTH), np.float32)
    late[:, 64:] = 0.5
    found, whole = (
        transformer.index_quality(p, CONFIG, dataclasses.replace(batch, weights=jnp.asarray(w)))
        for w in (late, np.ones_like(late))
    )
    for name, x in whole.items():
        np.testing.assert_allclose(found[name][7:], 0.5 * x[7:], rtol=1e-5, err_msg=name)
        assert float(x[:7].sum()) > 0, name
        assert not np.asarray(found[name][:7]).any(), name


@pytest.mark.parametrize("length", [64, 60, 5])
def test_short_and_ragged_sequences_are_fine(length: int) -> None:
    found = learned(random_params(CONFIG), packed(tokens_of(7, 2, length)))
    assert all(bool(jnp.isfinite(v)) for v in found.values())
    assert (float(found["loss"]) == 0) == (length == 5)  # no block is before another


def test_padding_changes_nothing() -> None:
    tokens = tokens_of(8, 1, 96)
    segments = np.repeat([[1, 0]], [80, 16], axis=1)
    found = learned(random_params(CONFIG), packed(tokens, segments, segments))
    wanted = learned(random_params(CONFIG), packed(tokens[:, :80]))
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5, err_msg=name)


# Negatives


def hidden(p: Any, batch: Batch, negatives: int) -> np.ndarray:
    run = jax.jit(transformer.forward, static_argnums=1, static_argnames="negatives")
    return np.asarray(run(p, CONFIG, batch, negatives=negatives)[0])


def test_negatives_are_the_keys_of_other_rows() -> None:
    """One layer, against attention to all keys of both rows made by hand."""
    p = random_params(CONFIG)["layers"]["1"]["attention"]
    batch = packed(tokens_of(9, 2, 24), np.repeat([[1, 2, 0]], [10, 8, 6], axis=1).repeat(2, 0))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 24, 32)).astype(np.float32))
    found, *_ = attention.attend_packed(p, CONFIG, KIND, x, batch, negatives=1)
    segments = np.asarray(batch.segments)
    rows = jnp.pad(x, ((0, 0), (KIND.conv_tail, 0), (0, 0)))
    seg = jnp.pad(batch.segments, ((0, 0), (KIND.conv_tail, 0)), constant_values=-1)
    sources = projections.sources_of(p, KIND, rows, seg)
    q = projections.queries_of(p, CONFIG, KIND, sources)
    k, v = projections.keys_and_values_of(p, CONFIG, KIND, sources)
    q = projections.sharpened(KIND, q, batch.positions)
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    for b in range(2):
        for t in range(18):
            own = [(b, i) for i in range(t + 1) if segments[b, i] == segments[b, t]]
            seen = own + [(1 - b, i) for i in range(18)]
            wanted = np.zeros(32)
            for head in range(2):
                s = np.array([k[r, i, 0] @ q[b, t, head] for r, i in seen])
                total = np.exp(s).sum() + np.exp(float(p["sink"][head]))
                y = sum(e * v[r, i, 0] for e, (r, i) in zip(np.exp(s), seen, strict=True)) / total
                wanted = wanted + y @ np.asarray(p["o"][head], np.float64)
            np.testing.assert_allclose(found[b, t], wanted, atol=1e-4)


def test_rows_of_one_document_do_not_see_each_other() -> None:
    p, tokens = random_params(CONFIG), tokens_of(10, 3)
    documents = np.full((3, LENGTH), 4)
    documents[1, 50:] = 9  # the second row has another document too
    batch = packed(tokens, documents=documents)
    apart = hidden(p, batch, 0)
    together = hidden(p, batch, 2)
    # Rows 0 and 2 see what is the second's only; row 1 has all their documents.
    assert np.abs(together[1] - apart[1]).max() < 1e-5
    assert np.abs(together[0] - apart[0]).max() > 1e-2
    assert (
        np.abs(hidden(p, packed(tokens, documents=np.full((3, LENGTH), 4)), 2) - apart).max() < 1e-5
    )


def test_negatives_need_to_know_the_documents() -> None:
    batch = dataclasses.replace(packed(tokens_of(11)), documents=None)
    with pytest.raises(ValueError, match="which documents"):
        transformer.forward(random_params(CONFIG), CONFIG, batch, negatives=1)


# Layers that share another's keys and values


def sharing(attention: str = "indexed", layers: str = "LGLSSL", **changes: Any) -> ModelConfig:
    index = dataclasses.replace(INDEX, **changes) if attention == "indexed" else None
    source = dataclasses.replace(KIND, attention=attention, index=index)
    own = {"tie_qk_init": False, "key_shift": 0, "qk_conv": 3, "length_scale": 0.1}
    sharer = dataclasses.replace(source, letter="S", shares="G", heads=4, **own)
    return dataclasses.replace(CONFIG, kinds=(WINDOW, source, sharer), layers=layers)


@pytest.mark.parametrize("attention", [pytest.param("full", marks=pytest.mark.slow), "indexed"])
def test_shared_keys_in_steps_equal_the_whole(attention: str) -> None:
    config = sharing(attention, **({"select": 32} if attention == "indexed" else {}))
    p, tokens = random_params(config), tokens_of(1)
    whole, _ = jax.jit(transformer.forward, static_argnums=1)(p, config, packed(tokens))
    found, cache = in_steps(p, config, tokens, [64, 1, 63, 22], 3)
    np.testing.assert_allclose(found, whole, atol=TOLERANCE["float32"], rtol=0)
    assert caches.full_layers(config) == (1,)
    assert [layer.k is None for layer in cache.layers] == [False, False, False, True, True, False]
    assert not {"k", "v"} & set(p["layers"]["3"]["attention"])


def test_shared_keys_do_not_depend_on_how_a_sequence_is_cut() -> None:
    p, tokens = random_params(sharing()), tokens_of(1)
    wanted, _ = in_steps(p, sharing(), tokens, [LENGTH])
    found, _ = in_steps(p, sharing(), tokens, [7] * 21 + [3], 2)
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE["float32"], rtol=0)
    dense = sharing(select=32)
    assert np.abs(in_steps(p, dense, tokens, [LENGTH])[0] - wanted).max() > 1e-2


def test_the_keys_alone_suffice_for_all_that_share_them() -> None:
    """The part of a document that nobody scores runs up to the first global layer only."""
    config = sharing()
    p, tokens = random_params(config), tokens_of(2)
    wanted, _ = in_steps(p, config, tokens, [LENGTH])
    reach = transformer.tail_reach(config)
    # Two windows, and what each sharer's convolution and its last queries look back to.
    assert reach == 2 * (15 + 3) + 2 * (2 + 2)
    first = LENGTH - reach - 1
    cache = step_kv(
        p, config, tokens[:, :first], caches.init_cache(config, 2, CAPACITY), jnp.int32(first)
    )
    hidden, _ = step(p, config, tokens[:, first:], cache, jnp.int32(reach + 1))
    np.testing.assert_allclose(hidden[:, -1], wanted[:, -1], atol=1e-4, rtol=0)
    skipped = {
        **p,
        "layers": {
            i: layer if int(i) < 2 else jax.tree.map(jnp.zeros_like, layer)
            for i, layer in p["layers"].items()
        },
    }
    again = step_kv(
        skipped, config, tokens[:, :first], caches.init_cache(config, 2, CAPACITY), jnp.int32(first)
    )
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(a, b)


def test_indices_of_all_layers_learn_together() -> None:
    config = sharing()
    p, batch = random_params(config), packed(tokens_of(4))
    grads = params.flatten(jax.grad(lambda p: transformer.index_loss(p, config, batch)[0])(p))
    moved = {path for path, leaf in grads.items() if bool((leaf != 0).any())}
    assert moved == {path for path in grads if params.is_index(path)}
    assert "layers/4/attention/index/q" in moved
    assert "layers/4/attention/index/k" not in grads


@pytest.mark.slow
def test_repeated_layers_share_keys_in_a_scan() -> None:
    config = sharing(layers="LGLSLSLS")
    p, batch = random_params(config), packed(tokens_of(3))
    run = jax.jit(
        transformer.forward, static_argnums=(1, 3), static_argnames=("negatives", "learn_index")
    )
    options = {"negatives": 1, "learn_index": True}
    wanted, summary = run(p, config, batch, Execution(), **options)
    stacked = stacking.stack_layers(config, p, lambda *same: jnp.stack(same))
    assert stacking.STACK in stacked["layers"]
    for execution in (Execution(stacked=True), Execution(stacked=True, remat=True)):
        found, other = run(stacked, config, batch, execution, **options)
        np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0)
        for name, value in summary["index"].items():
            np.testing.assert_allclose(other["index"][name], value, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("layers", "change", "says"),
    [
        ("LSG", {}, "one layer, before"),
        ("LGGS", {}, "one layer, before"),
        ("LS", {}, "one layer, before"),
        ("LGS", {"shares": "L"}, "keeps no keys"),
        ("LGS", {"kv_heads": 2}, "its kv_heads must be that of 'G'"),
        ("LGS", {"attention": "full", "index": None}, "its attention must be that of 'G'"),
        ("LGS", {"index": dataclasses.replace(INDEX, sticky=5)}, "its index must be that of 'G'"),
        ("LGS", {"rope_theta": 1e4}, "its rope_theta must be that of 'G'"),
        ("LGS", {"key_shift": 1}, "has no keys of its own"),
        ("LGS", {"attention": "window", "window": 8, "index": None}, "has no keys of its own"),
    ],
)
def test_keys_that_cannot_be_shared(layers: str, change: dict[str, Any], says: str) -> None:
    config = sharing()
    with pytest.raises(GemtoolError, match=says):
        sharer = dataclasses.replace(config.kinds[2], **change)
        dataclasses.replace(config, layers=layers, kinds=(*config.kinds[:2], sharer))


# The configuration


def test_is_part_of_the_configuration() -> None:
    table = CONFIG.to_dict()
    assert table["kinds"]["G"]["index"]["block"] == 8
    assert ModelConfig.from_dict(table) == CONFIG
    assert CONFIG.has_index
    assert not TINY.has_index
    paths = [path for path in params.flatten(params.param_specs(CONFIG)) if params.is_index(path)]
    assert {path.rpartition("/")[2] for path in paths} == {
        "hidden",
        "q",
        "k",
        "gate",
        "log_temperature",
    }
    fresh = params.flatten(params.init_params(CONFIG, jax.random.key(0)))
    where = "layers/1/attention/index/"
    np.testing.assert_array_equal(fresh[where + "q"], fresh[where + "k"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"block": 12}, "power of two"),
        ({"block": 8192}, "power of two of at most 4096"),
        ({"select": 0}, "select"),
        ({"local": -1}, "local"),
        ({"sticky": 0}, "sticky"),
    ],
)
def test_what_makes_no_sense_is_refused(change: dict[str, int], says: str) -> None:
    with pytest.raises(GemtoolError, match=says):
        dataclasses.replace(INDEX, **change)


def test_an_index_belongs_to_indexed_attention() -> None:
    with pytest.raises(GemtoolError, match="has a table `index`"):
        dataclasses.replace(KIND, index=None)
    with pytest.raises(GemtoolError, match="has a table `index`"):
        dataclasses.replace(KIND, attention="full")
    table = CONFIG.to_dict()
    table["kinds"]["G"]["index"]["blok"] = 3
    with pytest.raises(GemtoolError, match="did you mean 'block'"):
        ModelConfig.from_dict(table)
