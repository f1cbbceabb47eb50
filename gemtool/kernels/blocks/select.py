"""The choice of blocks in plain XLA, in the forms that XLA's CPU compiler runs fast.

Queries are taken in groups. A loop with a *dynamic* bound scores one tile of blocks after the other
for a whole group, as far as it has candidates, and keeps the scores and the greatest of each run of
`RUN` blocks. The best blocks are then sought only within the best runs, and looking back over the
last queries is left to them too: the maximum over queries and that over the blocks of a run may be
taken in either order.

That loses nothing. Order blocks by score, then number, and runs by greatest score, then number: if
a run is not among the first k, each of those k holds a block that comes before all blocks of this
one, so that none of these is among the first k blocks.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gemtool.kernels.dtypes import accumulator
from gemtool.kernels.turns import counted_turns

RUN = 64
# Queries of a group, at most: each group reads all landmarks once.
GROUP = 128
# (queries of a group, blocks of a tile): its scores stay in the core's own cache.
TILES = ((32, 256), (0, 1024))


def choose_blocks_xla(
    u: jax.Array,
    landmarks: jax.Array,
    *,
    candidates: jax.Array,
    width: jax.Array,
    most: int,
    sticky: int,
) -> jax.Array:
    """See `gemtool.kernels.blocks.choose_blocks`."""
    with jax.named_scope("choose_blocks"):
        return _choose(u, landmarks, candidates, width, most, sticky)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How queries and blocks are cut."""

    groups: int  # of a batch row
    queries: int  # of a group
    sticky: int
    exist: int  # NB
    tile: int  # blocks of a tile, whole runs

    @classmethod
    def of(cls, length: int, exist: int, sticky: int) -> _Plan:
        groups = -(-length // GROUP)
        queries = -(-length // groups)
        tile = next(tile for least, tile in TILES if queries >= least)
        return cls(groups, queries, sticky, exist, min(tile, _round_up(exist, RUN)))

    @property
    def rows(self) -> int:
        """Queries of a group and those they look back at."""
        return self.queries + self.sticky - 1

    @property
    def tiles(self) -> int:
        return -(-self.exist // self.tile)

    @property
    def tile_runs(self) -> int:
        return self.tile // RUN

    @property
    def runs(self) -> int:
        return self.tiles * self.tile_runs


def _choose(
    u: jax.Array,
    landmarks: jax.Array,
    candidates: jax.Array,
    width: jax.Array,
    most: int,
    sticky: int,
) -> jax.Array:
    batch, slots, dim, exist = landmarks.shape
    length = u.shape[1] - sticky + 1
    if exist == 0:
        return jnp.full((batch, length, most), -1, jnp.int32)
    plan, dtype = _Plan.of(length, exist, sticky), accumulator(u.dtype)
    pad = plan.groups * plan.queries - length
    u = jnp.pad(u.astype(dtype), ((0, 0), (0, pad), (0, 0)))
    candidates, width = (
        jnp.pad(x, (0, pad)).reshape(plan.groups, plan.queries) for x in (candidates, width)
    )
    whole = exist // plan.tile
    # The last blocks, if they are no whole tile.
    tail = jnp.pad(
        landmarks[..., whole * plan.tile :],
        ((0, 0), (0, 0), (0, 0), (0, plan.tiles * plan.tile - exist)),
    )

    def group(kept: tuple[jax.Array, jax.Array], step: jax.Array) -> Any:
        row, i = step // plan.groups, step % plan.groups
        at = (row, i * plan.queries, jnp.int32(0))
        own = lax.dynamic_slice(u, at, (1, plan.rows, dim))[0]
        allowed = candidates[i]

        def score(source: jax.Array, first: jax.Array, tile: jax.Array, kept: Any) -> Any:
            """Keep the scores of a tile, `source` from its block `first` on."""
            products = []
            for slot in range(slots):
                place = (row, jnp.int32(slot), jnp.int32(0), first)
                marks = lax.dynamic_slice(source, place, (1, 1, dim, plan.tile))[0, 0]
                products.append(
                    lax.dot_general(
                        own,
                        marks.astype(dtype),
                        (((1,), (0,)), ((), ())),
                        precision=lax.Precision.HIGHEST,
                    )
                )
            best = functools.reduce(jnp.maximum, products)
            by_run = best.reshape(plan.rows, plan.tile_runs, RUN)
            scores, greatest = kept
            return (
                lax.dynamic_update_index_in_dim(scores, by_run, tile, 0),
                lax.dynamic_update_index_in_dim(greatest, by_run.max(axis=2), tile, 0),
            )

        needed = (allowed.max() + plan.tile - 1) // plan.tile

        if whole:

            def whole_tile(tile: jax.Array, kept: Any) -> Any:
                return score(landmarks, tile * plan.tile, tile, kept)

            last = jnp.minimum(needed, whole)
            with counted_turns(whole):  # of a full buffer
                kept = lax.fori_loop(jnp.int32(0), last, whole_tile, kept)
        if whole < plan.tiles:

            def last_tile(tile: jax.Array, kept: Any) -> Any:
                return score(tail, jnp.int32(0), tile, kept)

            with counted_turns(plan.tiles - whole):
                kept = lax.fori_loop(jnp.int32(whole), needed, last_tile, kept)
        return kept, _best(plan, *kept, allowed, width[i], most)

    # Carried from group to group, so that it is not cleared for each: what is beyond a group's
    # candidates is of another one, and hidden.
    kept = (
        jnp.zeros((plan.tiles, plan.rows, plan.tile_runs, RUN), dtype),
        jnp.zeros((plan.tiles, plan.rows, plan.tile_runs), dtype),
    )
    _, chosen = lax.scan(group, kept, jnp.arange(batch * plan.groups, dtype=jnp.int32))
    return chosen.reshape(batch, -1, most)[:, :length]


def last_scores(u: jax.Array, landmarks: jax.Array, count: jax.Array) -> jax.Array:
    """The scores that `choose_blocks` compares, of the last query of each of F sequences, all of which
    have the same landmarks: floating [F, NB]. They are computed tile by tile, so that what is between
    takes little memory.

    Args:
        u: floating [F, sticky, I], that query and those that it looks back at.
        landmarks: floating [1, M, I, NB].
        count: int32 []: only of so many blocks, the first ones. Scores of others mean nothing.
    """
    forks, sticky, dim = u.shape
    _, slots, _, exist = landmarks.shape
    dtype = accumulator(u.dtype)
    tile = min(TILES[-1][1], exist)
    rows = u.astype(dtype).reshape(-1, dim)

    def of_tile(number: jax.Array, scores: jax.Array) -> jax.Array:
        first = jnp.minimum(number * tile, exist - tile)
        # Of the whole array: for a part of it XLA's CPU compiler copies it before the loop.
        marks = lax.dynamic_slice(landmarks, (0, 0, 0, first), (1, slots, dim, tile))[0]
        products = jnp.einsum(
            "ri,mij->mrj", rows, marks.astype(dtype), precision=lax.Precision.HIGHEST
        )
        best = products.max(axis=0).reshape(forks, sticky, tile).max(axis=1)
        return lax.dynamic_update_slice_in_dim(scores, best, first, 1)

    tiles = (jnp.minimum(count, exist) + tile - 1) // tile
    with counted_turns(-(-exist // tile)):  # of a full buffer
        return lax.fori_loop(jnp.int32(0), tiles, of_tile, jnp.zeros((forks, exist), dtype))


def _best(
    plan: _Plan,
    scores: jax.Array,
    greatest: jax.Array,
    allowed: jax.Array,
    width: jax.Array,
    most: int,
) -> jax.Array:
    """The best blocks of each query of a group: int32 [queries, most].

    `scores` [tiles, rows, runs of a tile, RUN] and `greatest`, the same without the last axis, of
    single queries; `allowed` and `width` int32 [queries].
    """
    # Runs that are candidates throughout; the one that is in part always takes part below.
    full = allowed // RUN
    run = jnp.arange(plan.runs, dtype=jnp.int32)
    of_rows = greatest.transpose(1, 0, 2).reshape(plan.rows, plan.runs)
    of_runs = jnp.where(run[None] < full[:, None], _look_back(of_rows, plan.sticky), -jnp.inf)
    _, best_runs = lax.top_k(of_runs, min(most, plan.runs))
    best_runs = best_runs.astype(jnp.int32)
    best_runs = jnp.where(best_runs < full[:, None], best_runs, plan.runs + 1)
    # In order of their numbers, so that of equal scores the lower block stays the first.
    runs = jnp.sort(jnp.concatenate([best_runs, full[:, None]], axis=1), axis=1)

    flat = scores.reshape(-1, RUN)
    query = jnp.arange(plan.queries, dtype=jnp.int32)[:, None]
    existing = jnp.minimum(runs, plan.runs - 1)
    tile, within = existing // plan.tile_runs, existing % plan.tile_runs

    def of_query(back: int) -> jax.Array:
        place = (tile * plan.rows + query + back) * plan.tile_runs + within
        return flat.at[place].get(mode="promise_in_bounds")

    found = functools.reduce(jnp.maximum, [of_query(back) for back in range(plan.sticky)])
    left = allowed[:, None] - runs * RUN
    is_candidate = jnp.arange(RUN, dtype=jnp.int32)[None, None] < left[..., None]
    found = jnp.where(is_candidate, found, -jnp.inf).reshape(plan.queries, -1)
    taken = min(most, found.shape[1])
    _, order = lax.top_k(found, taken)
    order = order.astype(jnp.int32)
    chosen = jnp.take_along_axis(runs, order // RUN, axis=1) * RUN + order % RUN
    chosen = jnp.pad(chosen, ((0, 0), (0, most - taken)), constant_values=-1)
    exists = jnp.arange(most, dtype=jnp.int32)[None] < jnp.minimum(width, allowed)[:, None]
    return jnp.where(exists, chosen, -1)


def _look_back(x: jax.Array, sticky: int) -> jax.Array:
    """The greatest of each row and the `sticky - 1` before it: [rows, X] -> [queries, X]."""
    covered = 1
    while covered < sticky:
        step = min(covered, sticky - covered)
        x = jnp.maximum(x[step:], x[:-step])
        covered += step
    return x


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
