"""Media encoders: equal to a plain formulation in torch, groups apart, absent rows without a trace."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemtool.control import AUDIO, VIDEO
from gemtool.data.settings import MediaSettings
from gemtool.infer.pieces import pieces_of, soft_positions
from gemtool.model import encoders, params, transformer
from gemtool.model.config import EncoderConfig, ModelConfig
from gemtool.stream.spans import Span
from gemtool.train.loader import build_batch
from tests.test_model import TINY, random_params

EPS = TINY.norm_eps
VISUAL = EncoderConfig("visual", 9, features=48, width=24, hidden=20, depth=2, heads=3, overlap=3)
AUDIO_TINY = EncoderConfig(
    "audio", 6, features=20, width=24, hidden=20, depth=2, heads=2, normalise="none", mels=5,
    kernels=(3, 5, 6),
)  # fmt: skip
BOTH = pytest.mark.parametrize("encoder", [VISUAL, AUDIO_TINY], ids=["visual", "audio"])


def with_encoders(*table: EncoderConfig) -> ModelConfig:
    return dataclasses.replace(TINY, encoders=table)


def weights(encoder: EncoderConfig) -> params.Tree:
    return random_params(with_encoders(encoder))["encoders"][encoder.kind]


def raw(encoder: EncoderConfig, groups: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    shape = (groups, encoder.tokens, encoder.features)
    if encoder.kind == "visual":
        return rng.integers(0, 256, shape, np.uint8)
    return rng.normal(size=shape).astype(np.float16)


def full(encoder: EncoderConfig, groups: int) -> np.ndarray:
    return np.full(groups, encoder.tokens, np.int32)


@partial(jax.jit, static_argnums=1)
def encode(p: params.Tree, encoder: EncoderConfig, values: Any, rows: Any) -> jax.Array:
    return encoders.encode(p, encoder, values, rows, EPS)


# --- the same in torch ----------------------------------------------------------------------------


def in_torch(encoder: EncoderConfig, p: params.Tree, values: np.ndarray, rows: int) -> np.ndarray:
    """One group of which only the real rows are there: nothing is masked, nothing in chunks."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    p = jax.tree.map(lambda leaf: torch.tensor(np.asarray(leaf)), p)
    x = torch.tensor(values[:rows].astype(np.float32))
    grid = torch.arange(rows)
    if encoder.kind == "visual":
        side, patch = encoder.side, encoder.patch
        there = (torch.arange(side**2) < rows).float()
        frame = torch.zeros(side**2, encoder.features)
        frame[:rows] = x

        def image(x: Any, channels: int) -> Any:
            x = x.reshape(side, side, patch, patch, channels).permute(4, 0, 2, 1, 3)
            return x.reshape(1, channels, side * patch, side * patch)

        def windows(x: Any) -> Any:
            reach = patch + 2 * encoder.overlap
            return functional.unfold(x, reach, stride=patch, padding=encoder.overlap)[0].T[:rows]

        seen = windows(image(frame, 3))
        inside = windows(image(there[:, None].expand(-1, encoder.features), 3)).bool()
        for i in range(rows):
            pixels = seen[i][inside[i]]
            seen[i][inside[i]] = (pixels - pixels.mean()) / pixels.std(correction=0)
        # unfold gives channel by channel, our kernels are stored pixel by pixel
        kernel = p["patch"].reshape(-1, 3, encoder.width).permute(1, 0, 2)
        x = seen @ kernel.reshape(-1, encoder.width) + p["patch_bias"]
        x = x + p["row"][grid // side] + p["column"][grid % side]
        places = [grid // side, grid % side]
    else:
        x = x.reshape(1, -1, encoder.mels).transpose(1, 2)
        for i, (frames, stride) in enumerate(zip(encoder.kernels, encoder.strides, strict=True)):
            stage = p["stem"][str(i)]
            kernel = stage["kernel"].permute(2, 1, 0)
            padding = (frames - stride) // 2
            x = functional.conv1d(x, kernel, stage["bias"], stride=stride, padding=padding)
            x = functional.gelu(x, approximate="tanh")
        x = x[0].T + p["position"][:rows]
        places = [grid]

    def rotated(x: Any) -> Any:
        """Pairs of values as complex numbers, multiplied by e^(i angle)."""
        half = encoder.head_dim // 2
        pairs = half // len(places)
        speed = 100.0 ** (-torch.arange(pairs) / pairs)
        angle = torch.cat([place[:, None] * speed for place in places], dim=1)
        turn = torch.polar(torch.ones_like(angle), angle)
        z = torch.complex(x[..., :half], x[..., half:]) * turn[:, None]
        return torch.cat([z.real, z.imag], dim=-1)

    def norm(x: Any, scale: Any) -> Any:
        return functional.rms_norm(x, scale.shape, scale, EPS)

    for layer in (p["layers"][str(i)] for i in range(encoder.depth)):
        own, h = layer["attention"], norm(x, layer["attention_norm"])
        q, k, v = (torch.einsum("pw,whk->phk", h, own[name]) for name in "qkv")
        q, k = rotated(norm(q, own["q_norm"])), rotated(norm(k, own["k_norm"]))
        y = functional.scaled_dot_product_attention(*(a.transpose(0, 1)[None] for a in (q, k, v)))
        x = x + torch.einsum("hpk,hkw->pw", y[0], own["o"])
        h = norm(x, layer["mlp_norm"]) @ layer["mlp"]["in"]
        x = x + functional.gelu(h, approximate="tanh") @ layer["mlp"]["out"]
    return (norm(x, p["norm"]) @ p["out"]).numpy()


@pytest.mark.parametrize(
    "encoder",
    [
        VISUAL,
        dataclasses.replace(VISUAL, overlap=0),
        dataclasses.replace(VISUAL, overlap=4, depth=0),
        AUDIO_TINY,
        dataclasses.replace(AUDIO_TINY, kernels=(4,), depth=1),
    ],
    ids=["visual", "apart", "stem", "audio", "one kernel"],
)
def test_equals_torch(encoder: EncoderConfig) -> None:
    p, values = weights(encoder), raw(encoder, 4)
    rows = np.array([encoder.tokens, 5, 0, 1], np.int32)
    found = encode(p, encoder, values, rows)
    for group, count in enumerate(rows):
        if count:
            expected = in_torch(encoder, p, values[group], int(count))
            assert np.abs(expected).max() > 0.1
            np.testing.assert_allclose(found[group, :count], expected, rtol=0, atol=1e-4)


# --- what sees what -------------------------------------------------------------------------------


@BOTH
def test_groups_do_not_see_each_other(encoder: EncoderConfig) -> None:
    p, values, rows = weights(encoder), raw(encoder, 4), full(encoder, 4)
    found = encode(p, encoder, values, rows)
    other = values.copy()
    other[2] = raw(encoder, 1, seed=1)[0]
    changed = encode(p, encoder, other, rows)
    kept = np.array([0, 1, 3])
    np.testing.assert_allclose(changed[kept], found[kept], rtol=0, atol=1e-6)
    assert float(jnp.abs(changed[2] - found[2]).max()) > 0.01
    order = np.array([2, 0, 3, 1])
    np.testing.assert_allclose(
        encode(p, encoder, values[order], rows), found[order], rtol=0, atol=1e-6
    )


@BOTH
def test_a_group_sees_all_of_itself(encoder: EncoderConfig) -> None:
    """The first token depends on the last, and the last on the first, by attention alone."""
    for depth in (encoder.depth, 0):
        own = dataclasses.replace(encoder, depth=depth)
        p, values, rows = weights(own), raw(own, 1), full(own, 1)
        found = encode(p, own, values, rows)
        for here, there in ((0, own.tokens - 1), (own.tokens - 1, 0)):
            other = values.copy()
            other[0, there] = values[0, there, ::-1]
            change = float(jnp.abs(encode(p, own, other, rows)[0, here] - found[0, here]).max())
            assert change > 1e-3 if depth else change == 0


@BOTH
def test_absent_rows_leave_no_trace(encoder: EncoderConfig) -> None:
    p, values = weights(encoder), raw(encoder, 3)
    rows = np.array([encoder.tokens, 4, 1], np.int32)
    found = encode(p, encoder, values, rows)
    other = values.copy()
    for group, count in enumerate(rows):
        other[group, count:] = 255 if encoder.kind == "visual" else np.nan
    changed = encode(p, encoder, other, rows)
    for group, count in enumerate(rows):
        np.testing.assert_array_equal(changed[group, :count], found[group, :count])


def test_places_are_told_apart() -> None:
    """Equal patches give different tokens: each place has its embedding."""
    p = weights(dataclasses.replace(VISUAL, overlap=0))
    same = np.tile(raw(VISUAL, 1)[:, :1], (1, VISUAL.tokens, 1))
    soft = encode(p, dataclasses.replace(VISUAL, overlap=0), same, full(VISUAL, 1))[0]
    distance = jnp.abs(soft[:, None] - soft[None]).max(axis=-1)
    assert float(distance[~np.eye(VISUAL.tokens, dtype=bool)].min()) > 0.01


def test_windows_are_cuts_of_the_frame() -> None:
    """Any overlap: what a patch sees is the padded frame around it."""
    side, patch = VISUAL.side, VISUAL.patch
    frame = np.random.default_rng(0).integers(1, 256, (side * patch, side * patch, 3), np.uint8)
    patches = frame.reshape(side, patch, side, patch, 3).swapaxes(1, 2).reshape(1, -1, patch**2, 3)
    for overlap in range(patch + 1):
        found = encoders.windows(dataclasses.replace(VISUAL, overlap=overlap), jnp.asarray(patches))
        padded = np.pad(frame, ((overlap, overlap), (overlap, overlap), (0, 0)))
        reach = patch + 2 * overlap
        for place in range(side**2):
            top, left = patch * (place // side), patch * (place % side)
            expected = padded[top : top + reach, left : left + reach]
            np.testing.assert_array_equal(found[0, place].reshape(reach, reach, 3), expected)


def test_an_overlap_that_weighs_nothing_is_none() -> None:
    narrow = dataclasses.replace(VISUAL, overlap=0, normalise="pixel")
    wide = dataclasses.replace(narrow, overlap=2)
    p, values, rows = weights(narrow), raw(narrow, 2), full(narrow, 2)
    kernel = p["patch"].reshape(4, 4, 3, -1)
    padded = jnp.pad(kernel, ((2, 2), (2, 2), (0, 0), (0, 0))).reshape(-1, narrow.width)
    np.testing.assert_allclose(
        encode({**p, "patch": padded}, wide, values, rows),
        encode(p, narrow, values, rows),
        rtol=0,
        atol=1e-5,
    )


# --- many groups, other dtypes --------------------------------------------------------------------


@BOTH
def test_chunks_change_nothing(encoder: EncoderConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients; chunks without real rows are zeros, and give no gradient."""
    encoder = dataclasses.replace(encoder, depth=1)
    p, values, rows = weights(encoder), raw(encoder, 7), full(encoder, 7)
    rows[2:6], rows[6] = 0, 2
    real, scale = np.arange(encoder.tokens)[None] < rows[:, None], np.arange(7, dtype=np.float32)

    def loss(p: params.Tree) -> tuple[jax.Array, jax.Array]:
        soft = encoders.encode(p, encoder, values, rows, EPS)
        soft = jnp.where(real[..., None], soft, 0)
        return jnp.sum(jnp.square(soft) * scale[:, None, None]), soft

    results = []
    for size in (encoders.CHUNK, 2 * encoder.tokens):
        monkeypatch.setattr(encoders, "CHUNK", size)
        results.append(jax.jit(jax.grad(loss, has_aux=True))(p))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), *results)
    skipped = encoders.encode(p, encoder, values, rows, EPS)[2:6]
    assert not np.asarray(skipped).any()


@BOTH
def test_flat_patches_and_silence_have_finite_gradients(encoder: EncoderConfig) -> None:
    encoder = dataclasses.replace(encoder, normalise="row", depth=1)
    p, values = weights(encoder), raw(encoder, 3)
    values[:] = 255 if encoder.kind == "visual" else -1.5
    rows = np.array([encoder.tokens, 2, 0], np.int32)

    def loss(p: params.Tree) -> jax.Array:
        return jnp.sum(jnp.square(encoders.encode(p, encoder, values, rows, EPS)[:, :2]))

    value, gradient = jax.jit(jax.value_and_grad(loss))(p)
    assert bool(jnp.isfinite(value))
    for path, leaf in params.flatten(gradient).items():
        assert bool(jnp.isfinite(leaf).all()), path


@BOTH
def test_computes_in_the_dtype_of_its_parameters(encoder: EncoderConfig) -> None:
    encoder = dataclasses.replace(encoder, depth=1)
    p, values, rows = weights(encoder), raw(encoder, 2), full(encoder, 2)
    exact = encode(p, encoder, values, rows)
    short = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), p)
    found = encode(short, encoder, values, rows)
    assert exact.dtype == jnp.float32
    assert found.dtype == jnp.bfloat16
    error = jnp.linalg.norm(found.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
    assert float(error) < 0.03


# --- training and prefill -------------------------------------------------------------------------


def test_prefill_encodes_what_training_encodes() -> None:
    """Short seconds too: the same vectors stand at soft positions, batched and grouped otherwise."""
    settings = MediaSettings(image_tokens=66)
    config = with_encoders(
        EncoderConfig("visual", 64, features=588, width=16, hidden=16, heads=2, overlap=7),
        EncoderConfig("audio", 25, features=320, width=16, hidden=16, kernels=(3, 6)),
    )
    config = dataclasses.replace(config, vocab_size=max(VIDEO, AUDIO) + 1)
    p, rng = random_params(config), np.random.default_rng(0)
    spans, at = [], 0
    for index, soft in enumerate([25, 64, 11, 1, 64, 24]):
        kind, token, row = (
            ("video", VIDEO, (14, 14, 3)) if soft == 64 else ("audio", AUDIO, (4, 80))
        )
        payload = rng.integers(0, 256, (soft, *row))
        payload = (
            payload.astype(np.uint8) if kind == "video" else (payload / 256).astype(np.float16)
        )
        tokens = np.array([1, *[token] * soft, 2], np.int32)
        spans.append(
            Span(
                "film", index, kind, tokens, start=at, payload=payload, offset=at, segment=1, seq=0
            )
        )
        at += len(tokens)

    batch = build_batch([spans], at, settings, frozenset({"video", "audio"}))
    training = jax.jit(partial(transformer.embed, config=config))
    expected = training(p, tokens=batch.tokens, media=batch.media)[0]

    @partial(jax.jit, static_argnums=0)
    def prefill(kind: str, values: Any, rows: Any) -> jax.Array:
        return transformer.encode_media(p, config, kind, values, rows)

    pieces = list(pieces_of(spans, config, lambda *group: np.asarray(prefill(*group))))
    found = np.concatenate([piece.soft for piece in pieces])
    soft = soft_positions(batch.tokens[0])
    assert soft.sum() == 25 + 64 + 11 + 1 + 64 + 24
    np.testing.assert_allclose(found[soft], expected[soft], rtol=0, atol=1e-5)
