"""Several continuations of one context at a time: each with its own prompt, then all a token further in
one step of the model, which reads its weights and what they share once."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from gemtool.infer.engine import Engine
from gemtool.infer.sequence import PROMPT_TILE, Sequence
from gemtool.infer.steps import Buffers, PageTables, forks_step, no_forks, place_fork
from gemtool.model.cache import Cache
from gemtool.model.config import ModelConfig
from gemtool.model.forks import Forks

MOST = 8
"""Forks at a time, at most."""
ROWS = 1 << 17
"""Positions that they have room for together, at most: 32 MB a layer with one key head of 64."""


def rows_for(engine: Engine, prompt: int, answer: int) -> tuple[int, int]:
    """Positions that a fork needs for a prompt and an answer of so many tokens, and those in which it
    reads the prompt."""
    unit = _unit(engine.config)
    tile = PROMPT_TILE if prompt <= PROMPT_TILE else max(engine.chunk, PROMPT_TILE)
    return _whole(unit + prompt + answer, unit), _whole(2 * unit + prompt + tile, unit)


def forks_at_once(room: int, count: int) -> int:
    """How many of `count` forks that need so many rows are run together: a power of two, so that few
    sizes are ever compiled; 1 where there is no room for two."""
    most = max(min(MOST, ROWS // _power(room)), 1)
    return min(_power(count), 1 << (most.bit_length() - 1))


class Forked:
    """Forks of a sequence, in buffers behind its own.

    Attributes:
        count: how many.

    Args:
        live: the sequence, itself a fork of what is to be kept.
        count: how many.
        room, work: what `rows_for` gives for the longest prompts and answers.
    """

    def __init__(self, live: Sequence, engine: Engine, count: int, room: int, work: int) -> None:
        unit = _unit(engine.config)
        room = _whole(_power(room), unit)
        start = live.length // unit * unit
        rows = start + _whole(max(work, room), unit) + room * np.arange(count, dtype=np.int32)
        live.reserve(int(rows[-1]) + room)
        self.count = count
        self._live, self._engine, self._mark = live, engine, live.mark()
        self._forks = Forks(jnp.int32(start), jnp.asarray(rows, jnp.int32), room)
        self._states: Cache = no_forks(engine.config, self._mark[0], count)

    def begin(self, which: int, prompt: np.ndarray) -> np.ndarray:
        """Makes one of the forks the sequence with a prompt, int32 [n]; scores float32 [V] of what
        follows."""
        live = self._live
        if len(prompt):
            live.extend(prompt)
        logits = live.logits
        assert logits is not None
        self._states = live.with_buffers(
            lambda buffers, _: place_fork(
                self._engine.config,
                buffers,
                self._states,
                live.mark()[0],
                np.int32(which),
                self._forks,
                np.int32(live.first),
            )[::-1]
        )
        live.back_to(self._mark)
        return logits

    def step(self, tokens: np.ndarray, running: np.ndarray) -> np.ndarray:
        """Appends a token, of int32 [B], to each fork that is `running`, bool [B]; scores float32
        [B, V] of what follows, which mean nothing for the others."""

        def program(
            buffers: Buffers, tables: PageTables
        ) -> tuple[tuple[jax.Array, Cache], Buffers]:
            logits, buffers, states = forks_step(
                self._engine.params,
                self._engine.config,
                tokens.astype(np.int32),
                buffers,
                self._states,
                tables,
                self._forks,
                running,
            )
            return (logits, states), buffers

        logits, self._states = self._live.with_buffers(program)
        self._live.verify(self._states)
        return np.asarray(logits)


def _unit(config: ModelConfig) -> int:
    """What positions of forks are multiples of: the blocks of all indices."""
    return math.lcm(*(kind.index.block for kind in config.layer_kinds if kind.index is not None))


def _whole(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def _power(count: int) -> int:
    """The least power of two that is as much."""
    return 1 << (count - 1).bit_length()
