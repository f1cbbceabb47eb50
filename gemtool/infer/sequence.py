"""A sequence of tokens that goes through a model: what is kept of it, and how it goes on.

The keys and values of full-attention layers lie in buffers that are donated from step to step, never
copied; only rows beyond a context's length are written when it is asked, so going back to the context
takes its length and its small state, nothing else. What a file holds of a sequence may stay there
(`gemtool.infer.mapped`): buffers then have what comes behind it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import numpy as np

from gemtool.infer.mapped import MappedPages
from gemtool.infer.pieces import Piece, Tile, soft_positions, tiles_of
from gemtool.infer.steps import (
    Buffers,
    PageTables,
    Scores,
    each_scored_step,
    grown,
    has_room,
    kv_step,
    logprobs_step,
    read_block,
    scored_step,
)
from gemtool.model.cache import Cache, full_layers, state_arrays, touched_pages, untouched
from gemtool.stream.context import BLOCK, Part

if TYPE_CHECKING:
    from gemtool.infer.engine import Engine

T = TypeVar("T")

PROMPT_TILE = 64
"""Positions of a short prompt's tile."""


def capacity_for(length: int) -> int:
    """Positions that buffers have room for: a power of two, so that few shapes are ever compiled."""
    return max(BLOCK, 1 << (length - 1).bit_length())


class Sequence:
    """A sequence of tokens that went through a model, and what continues it.

    Attributes:
        length: positions so far.
        tokens: int32 [n], those that an answer may repeat, where somebody told them.
    """

    def __init__(
        self,
        engine: Engine,
        buffers: Buffers,
        state: Cache,
        length: int,
        pages: MappedPages | None = None,
    ) -> None:
        self._engine = engine
        self._pages = pages
        self._buffers: Buffers | None = buffers
        self._state = state
        self._logits: Any = None
        self.length = length
        self.tokens = np.empty(0, np.int32)

    @property
    def logits(self) -> np.ndarray | None:
        """Scores float32 [V] of the next token; None where the last tile was not scored.

        Raises:
            CorruptInput: what they come of is damaged; so do all that give what was computed.
        """
        self._verify()
        return None if self._logits is None else np.asarray(self._logits)

    @property
    def first(self) -> int:
        """Position of the first row of buffers of layers that are paged."""
        return 0 if self._pages is None else self._pages.length

    def go_on_with(self, parts: list[Part]) -> None:
        """Lets go of keys and values that are in blocks of files, which are `mappable` and hold all
        positions so far. No fork: that writes in the buffers of another."""
        self._verify()
        config = self._engine.config
        self._pages = MappedPages(config, parts, self._pages)
        self._state = untouched(config, self._state, self._pages.room)

    def _verify(self) -> None:
        """Compares with their checksums the pages that anything so far has looked at."""
        self.verify(self._state)

    def verify(self, state: Cache) -> None:
        """Compares those that a state says were looked at, and the weights, if their file was written
        to; raises as `logits`."""
        self._engine.checkpoint.require_as_loaded()
        if self._pages is not None:
            self._pages.verify(touched_pages(self._engine.config, state))

    def with_buffers(self, program: Callable[[Buffers, PageTables], tuple[T, Buffers]]) -> T:
        """What a program returns that takes the buffers and gives them back."""
        tables = {} if self._pages is None else self._pages.tables
        with self._engine.on_mesh():
            found, self._buffers = program(self._taken(), tables)
        return found

    def run(self, tile: Tile, size: int) -> None:
        """Appends the positions of a tile, padded to `size`. Returns before they are computed."""
        arguments = self._arguments(tile.piece, size)
        with self._engine.on_mesh():
            if tile.scored:
                self._logits, self._buffers, self._state = scored_step(*arguments)
            else:
                self._logits = None
                self._buffers, self._state = kv_step(*arguments)
        self.length += len(tile.piece)

    def score(self, tile: Tile, size: int, top: int) -> Scores:
        """Appends them as `run` does, all of them through the whole model, and says how likely each
        was after all before it, and the `top` most likely in its place. Of the first token of an
        empty sequence, and from the tile's length on, this means nothing.
        """
        engine, before = self._engine, self._logits
        if before is None:
            assert self.length == 0, "the tile before was not scored"
            before = engine.put(np.zeros(engine.config.vocab_size, np.float32))
        top = min(top, engine.config.vocab_size)
        arguments = self._arguments(tile.piece, size)
        with engine.on_mesh():
            found = logprobs_step(*arguments, before, top)
        scores, self._logits, self._buffers, self._state = found
        self.length += len(tile.piece)
        self._verify()
        return scores

    def extend_scored(self, tokens: np.ndarray, size: int, count: int) -> np.ndarray:
        """Appends tokens int32 [n], at most `size`; the scores float32 [min(n, count), V] after each of
        the last `count`."""
        arguments = self._arguments(Piece(tokens), size)
        with self._engine.on_mesh():
            scores, self._buffers, self._state = each_scored_step(*arguments, count)
        self.length += len(tokens)
        self._verify()
        found = np.asarray(scores)[: min(len(tokens), count)]
        self._logits = found[-1]
        return found

    def mark(self) -> tuple[Any, ...]:
        """Where the sequence is now, for `back_to`."""
        return self._state, self._logits, self.length

    def back_to(self, mark: tuple[Any, ...]) -> None:
        """As if what was appended since the mark had never been: of the buffers, only rows beyond the
        length were written."""
        self._state, self._logits, self.length = mark

    def _arguments(self, piece: Piece, size: int) -> tuple[Any, ...]:
        """What steps take for a piece that is padded to `size`, once there is room for it."""
        self.reserve(self.length + size)
        padding = size - len(piece)
        tokens = np.pad(piece.tokens.astype(np.int32, copy=False), (0, padding))
        soft = None
        if piece.soft is not None:
            present = np.pad(soft_positions(piece.tokens), (0, padding))
            soft = np.pad(piece.soft, ((0, padding), (0, 0))), present
        engine, valid = self._engine, np.int32(len(piece))
        tables = {} if self._pages is None else self._pages.tables
        return engine.params, engine.config, tokens, soft, valid, self._taken(), self._state, tables

    def extend(self, prompt: np.ndarray | list[Piece]) -> None:
        """Appends tokens int32 [n], a prompt or one that was just chosen, or pieces."""
        engine, longest = self._engine, max(self._engine.chunk, PROMPT_TILE)
        pieces = [Piece(prompt)] if isinstance(prompt, np.ndarray) else prompt
        count = sum(map(len, pieces))
        for tile in tiles_of(pieces, longest, reach=engine.reach):
            if len(tile.piece) <= PROMPT_TILE:
                self.run(tile, 1 if count == 1 else PROMPT_TILE)
            else:
                self.run(tile, engine.tile_size(len(tile.piece)))

    def reserve(self, length: int) -> None:
        """Makes room for `length` positions in all."""
        config, buffers = self._engine.config, self._taken()
        if not has_room(config, buffers, length, self.first):
            with self._engine.on_mesh():
                room = capacity_for(length), capacity_for(length - self.first)
                buffers = grown(config, buffers, *room)
        self._buffers = buffers

    @contextlib.contextmanager
    def fork(self) -> Iterator[Sequence]:
        """A sequence that begins as this one, for the time of the block.

        It writes its keys and values behind this one's in the same buffers, where nobody sees them
        once the block has ended. One fork can be open at a time, and this sequence not be extended.
        """
        child = Sequence(self._engine, self._taken(), self._state, self.length, self._pages)
        child._logits, self._buffers = self._logits, None
        child.tokens = self.tokens
        try:
            yield child
        finally:
            self._buffers, child._buffers = child._buffers, None

    def _taken(self) -> Buffers:
        if self._buffers is None:
            raise RuntimeError("the sequence is forked: end that generation before the next")
        return self._buffers

    # For measuring

    def skip_to(self, length: int) -> None:
        """Pretends that `length` positions went before, whatever the buffers hold there."""
        self._state = replace(self._state, length=self._engine.put(np.int32(length)))
        self.length = length

    def wait(self) -> None:
        """Returns when everything appended so far is computed."""
        jax.block_until_ready((self._buffers, self._state))

    # For context files

    def block(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """What grows with the context, of the positions of one block of its file: "layers/2/k"
        [1, stop - start, N, K], and "layers/2/landmarks" [1, M, I, J] of the index's whole blocks.

        `start` is a multiple of BLOCK, `stop - start` at most BLOCK.
        """
        self._verify()
        config, where = self._engine.config, (np.int32(start), np.int32(self.first))
        with self._engine.on_mesh():
            found = read_block(config, self._taken(), *where, BLOCK)
        arrays = {}
        for at, own in zip(full_layers(config), found, strict=True):
            index = config.layer_kinds[at].index
            for name in "kv":
                arrays[f"layers/{at}/{name}"] = np.asarray(own[name])[:, : stop - start]
            if index is not None:
                whole = (stop - start) // index.block
                landmarks = np.asarray(own["landmarks"])
                arrays[f"layers/{at}/landmarks"] = landmarks[..., :whole]
        if self._pages is not None and start < self.first:
            arrays |= self._pages.block(start)
        return arrays

    def state(self) -> dict[str, np.ndarray]:
        """What the next position needs besides blocks, the length aside: "layers/0/tail"."""
        self._verify()
        arrays = state_arrays(self._engine.config, self._state)
        del arrays["length"]
        return arrays
