"""The parts of a model that are trained apart: its trunk, and the index that learns from the trunk."""

from __future__ import annotations

from gemtool.model.params import Tree, flatten, is_index, unflatten

TRUNK, INDEX = "trunk", "index"
PARTS = (TRUNK, INDEX)


def split(params: Tree, part: str) -> tuple[Tree, Tree]:
    """A tree in the structure of the parameters, stacked or not, cut in two: the leaves of a part, and
    all others."""
    sides: tuple[Tree, Tree] = {}, {}
    for path, leaf in flatten(params).items():
        sides[is_index(path) != (part == INDEX)][path] = leaf
    return unflatten(sides[0]), unflatten(sides[1])


def merge(inside: Tree, outside: Tree) -> Tree:
    """The opposite of `split`."""
    return unflatten(flatten(inside) | flatten(outside))
