"""Near misses: sentences that differ from a needle in one respect, each with a number of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from gemtool.probes.wordings import CITIES, Wording

VOWELS, CONSONANTS = "aeiou", "bcdfghjklmnpqrstvwxyz"


def near_misses(
    wording: Wording,
    city: str,
    others: Sequence[str],
    numbers: Iterator[str],
    count: int,
    rng: np.random.Generator,
) -> Iterator[str]:
    """Sentences that could be mistaken for the needle of a city.

    The kinds take turns, in random order: the needle of another city, of a name that looks like the
    city's, and those that the wording has.

    Args:
        others: cities that have no needle and are not asked for.
        numbers: that are no answers.
    """
    order = rng.permutation(2 + len(wording.near_misses))
    for i in range(count):
        kind = int(order[i % len(order)])
        name, template = city, wording.needle
        if kind == 0:
            name = str(rng.choice(others))
        elif kind == 1:
            name = look_alike(city, rng)
        else:
            template = wording.near_misses[kind - 2]
        yield template.format(city=name, number=next(numbers))


def look_alike(city: str, rng: np.random.Generator) -> str:
    """A name that is no city here: one or two letters of a city's are others."""
    while True:
        letters = list(city)
        for at in rng.choice(np.arange(1, len(city)), size=int(rng.integers(1, 3)), replace=False):
            # A vowel stays one, so that the name could be said.
            letters[at] = str(rng.choice(list(VOWELS if letters[at] in VOWELS else CONSONANTS)))
        name = "".join(letters)
        if name not in CITIES:
            return name
