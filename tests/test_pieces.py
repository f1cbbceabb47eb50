"""Documents cut into the tiles that a model runs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from gemtool.infer.engine import default_chunk
from gemtool.infer.pieces import Piece, tiles_of
from gemtool.model.config import PRESETS, MoEConfig, load_preset


@pytest.mark.parametrize("chunk", [1, 5, 16, 100])
@pytest.mark.parametrize("reach", [0, 3, 40])
def test_tiles_hold_every_position_once(chunk: int, reach: int) -> None:
    tokens = np.random.default_rng(0).integers(320, 16000, 97).astype(np.int32)
    pieces = [Piece(part) for part in np.split(tokens, [0, 10, 11, 60])]
    tiles = list(tiles_of(pieces, chunk, reach=reach, boundary=32))
    assert np.array_equal(np.concatenate([tile.piece.tokens for tile in tiles]), tokens)
    assert [tile.last for tile in tiles] == [False] * (len(tiles) - 1) + [True]
    at = 0
    for tile in tiles:
        assert 0 < len(tile.piece) <= chunk
        assert at // 32 == (at + len(tile.piece) - 1) // 32
        at += len(tile.piece)
        assert tile.scored == (97 - at <= reach)


def test_a_chunk_gives_experts_enough_rows() -> None:
    chunks = {name: default_chunk(load_preset(name)) for name in PRESETS}
    assert chunks == {"nano": 512, "mini": 512, "flash": 512, "pro": 2048}
    few = dataclasses.replace(load_preset("nano"), moe=MoEConfig(32, 4, 64))
    assert default_chunk(few) == 1024  # 128 rows for each of 32
