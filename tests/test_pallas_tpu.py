"""What is particular to attention on TPUs: which blocks are visited, and keys copied by pieces."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemtool.kernels.attention import pallas_tpu, partial_attention
from gemtool.kernels.attention.tpu_blocks import Blocks, visible_blocks
from gemtool.kernels.attention.xla import Options

BLOCKS = Blocks(
    options=Options(scale=1.0, causal=True, window=None, soft_cap=None),
    apart=1,
    per_query=2,
    side_by_side=2,
    keys_minor=False,
    rows=16,
    keys=10,
    dtype=jnp.float32,
    interpret=True,
)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize(
    "span", [(0, 0, 40), (13, 0, 40), (13, 0, 33), (20, 12, 17), (3, 0, 0), (-9, 4, 40)]
)
def test_blocks_are_visited_if_something_is_seen(
    causal: bool, window: int | None, span: tuple[int, int, int]
) -> None:
    """All of those, and where all keys exist no other."""
    options = Options(scale=1.0, causal=causal, window=window, soft_cap=None)
    blocks = dataclasses.replace(BLOCKS, options=options)
    start, first, end = span
    at, of = np.arange(start, start + 24)[:, None], np.arange(40)[None, :]
    mask = (of >= first) & (of < end) & np.full((24, 1), True)
    if causal:
        mask &= of <= at
    if window is not None:
        mask &= of > at - window
    expected = mask.reshape(3, 8, 8, 5).any(axis=(1, 3))
    got = visible_blocks(blocks, jnp.asarray(span, jnp.int32), (1, 3, 8), None, None)
    assert not (expected & ~np.asarray(got[0])).any()
    if (first, end) == (0, 40):
        np.testing.assert_array_equal(got[0], expected)


def test_blocks_of_other_segments_are_not_visited() -> None:
    segments = np.repeat([1, 1, 2, 2, 2, 3, 0, 0], 8).astype(np.int32)[None]  # a row or key each
    blocks = dataclasses.replace(BLOCKS, rows=8, keys=8)
    span = jnp.asarray([0, 0, 32], jnp.int32)
    got = visible_blocks(blocks, span, (1, 8, 8), jnp.asarray(segments), jnp.asarray(segments))
    kinds = segments[0, ::8]
    same = (kinds[:, None] == kinds[None, :]) & (kinds[:, None] > 0)
    np.testing.assert_array_equal(got[0], same & np.tri(8, dtype=bool))


# (B, T, S, H, KV, D), type of keys, options: what is converted, or rearranged because heads of whole
# vectors have many queries.
PIECES: dict[str, tuple[tuple[int, ...], Any, dict[str, Any]]] = {
    "converted": ((2, 20, 700, 4, 2, 8), np.float16, {"q_start": 600, "kv_length": 620}),
    "window": ((1, 9, 700, 2, 2, 8), np.float16, {"q_start": 560, "window": 100}),
    "rearranged": ((1, 140, 400, 4, 2, 128), np.float32, {"q_start": 230, "soft_cap": 2.0}),
    "all to all": ((1, 5, 300, 2, 1, 8), np.float16, {"causal": False, "kv_length": 290}),
    "nothing": ((1, 5, 300, 2, 1, 8), np.float16, {"kv_length": 0}),
}


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("name", PIECES)
def test_pieces_of_keys_are_all_keys(
    name: str, segmented: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pallas_tpu, "PIECE", 256)
    (B, T, S, H, KV, D), dtype, options = PIECES[name]
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {"q": rng.standard_normal((B, T, H, D)).astype(np.float32)}
    arrays |= {x: rng.standard_normal((B, S, KV, D)).astype(dtype) for x in "kv"}
    arrays["sink"] = rng.standard_normal(H).astype(np.float32)
    options = dict(options)
    start = options.pop("q_start", 0)
    arrays |= {"q_start": np.int32(start), "kv_length": np.int32(options.pop("kv_length", S))}
    if segmented:
        segments = (1 + np.arange(S) // 150).astype(np.int32)
        arrays["kv_segments"] = np.broadcast_to(segments, (B, S))
        arrays["q_segments"] = arrays["kv_segments"][:, start : start + T]
    results = [
        jax.jit(lambda arrays, impl=impl: partial_attention(**arrays, **options, impl=impl))(arrays)
        for impl in ("pallas_tpu", "reference")
    ]
    for got, want in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
