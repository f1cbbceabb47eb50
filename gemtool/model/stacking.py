"""Equal layers as one array for each of their parameters, so that a scan can run them.

A program of 48 unrolled layers takes a compiler many times as long as one of four and a loop. On the
CPU layers stay apart: there a loop that indexes stacked weights copies them each time. Where layers
repeat with a period of several (`LLLG LLLG ...`), a turn of the loop runs that many:

    layers/0/...                      layers before the first repeat, by their index
    layers/stack/0/attention/q        [repeats, ...] of the first layer of each period, ...
    layers/47/...                     layers after the last repeat
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from gemtool.model.config import ModelConfig

Tree = dict[str, Any]

STACK = "stack"


@dataclass(frozen=True)
class Repeats:
    """Layers `first` to `first + period * times - 1` are `times` times the same `period` layers."""

    first: int
    period: int
    times: int

    @property
    def stop(self) -> int:
        """The first layer after them."""
        return self.first + self.period * self.times


def repeats(config: ModelConfig) -> Repeats | None:
    """The repeats that leave the fewest different layers to compile; None if no layer repeats."""
    looks = [(kind, config.is_moe(i)) for i, kind in enumerate(config.layer_kinds)]
    count = len(looks)
    best, fewest = None, count
    for period in range(1, count // 2 + 1):
        for first in range(count - 2 * period + 1):
            stop = first + period
            while stop < count and looks[stop] == looks[stop - period]:
                stop += 1
            times = (stop - first) // period
            left = count - period * (times - 1)
            if times > 1 and left < fewest:
                best, fewest = Repeats(first, period, times), left
    return best


def stack_layers(config: ModelConfig, tree: Tree, join: Callable[..., Any]) -> Tree:
    """`tree`, in the structure of the parameters, with repeated layers joined: `join` gets the leaves
    of one parameter in the order of their layers."""
    found = repeats(config)
    if found is None:
        return tree
    layers = tree["layers"]
    apart = {i: p for i, p in layers.items() if not found.first <= int(i) < found.stop}
    stacked = {}
    for j in range(found.period):
        same = [layers[str(i)] for i in range(found.first + j, found.stop, found.period)]
        stacked[str(j)] = jax.tree.map(join, *same, is_leaf=lambda x: not isinstance(x, dict))
    return {**tree, "layers": {**apart, STACK: stacked}}


def unstack_layers(config: ModelConfig, tree: Tree, take: Callable[[Any, int], Any]) -> Tree:
    """The opposite: `take(leaf, n)` gives the n-th layer's of a joined leaf."""
    found = repeats(config)
    if found is None or STACK not in tree["layers"]:
        return tree
    layers = {i: p for i, p in tree["layers"].items() if i != STACK}
    for index in range(found.first, found.stop):
        turn, j = divmod(index - found.first, found.period)
        layers[str(index)] = jax.tree.map(
            lambda leaf, turn=turn: take(leaf, turn), tree["layers"][STACK][str(j)]
        )
    return {**tree, "layers": layers}
