"""The text needle of the Gemini 1.5 report (arXiv 2403.05530, section 5.2.1.1).

One sentence, "The special magic {city} number is: {number}", is put at a depth of a haystack of
essays that is repeated to the length; city and number differ in every case. The model is asked for
the number. Depths are spaced linearly from the start to the end of the haystack.

With `shared`, the needles of all depths are in one haystack, each with a city of its own, and each is
asked for by itself: of a length and repetition, one context for all. Harder, as the other needles are
near misses, and as much cheaper as there are depths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from gemtool.data.vocab import Vocab
from gemtool.errors import GemtoolError, UsageError

NEEDLE = "The special magic {city} number is: {number}."
QUESTION = "What is the special magic {city} number?"
PREFIX = "The special magic {city} number is:"
NUMBER_DIGITS = 7
SMALLEST_HAYSTACK = 32
"""Tokens around the needle in the shortest context."""

CITIES = (
    "Accra Amsterdam Ankara Antwerp Athens Baghdad Baku Bangkok Barcelona Beirut Belgrade Berlin "
    "Bogota Boston Bristol Brussels Bucharest Budapest Cairo Calcutta Caracas Chicago Cologne "
    "Copenhagen Dakar Damascus Delhi Denver Dublin Edinburgh Florence Geneva Glasgow Hamburg "
    "Hanoi Havana Helsinki Houston Istanbul Jakarta Jerusalem Kabul Kiev Kingston Krakow Lagos "
    "Leipzig Lima Lisbon London Madrid Manila Marseille Melbourne Memphis Milan Montreal Moscow "
    "Mumbai Munich Nairobi Naples Nice Odessa Osaka Oslo Ottawa Oxford Palermo Paris Perth Prague "
    "Quebec Quito Riga Rome Rotterdam Santiago Seattle Seoul Seville Shanghai Singapore Sofia "
    "Stockholm Sydney Tallinn Tbilisi Tehran Tokyo Toronto Tunis Turin Valencia Venice Vienna "
    "Warsaw Wellington York Zagreb Zurich"
).split()


@dataclass(frozen=True)
class Case:
    """One question about one context."""

    length: int
    """Tokens of the context, the needle included."""
    depth: float
    """Where the needle is: 0 at the start, 1 at the end."""
    case: int
    """Which repetition of the cell."""
    question: str
    prefix: str
    """How the model's turn begins."""
    answer: str
    needle_at: int
    """Token position of the needle in the context."""
    haystack: Haystack = field(repr=False, compare=False)
    """Cases of the same object share a context."""

    @property
    def context(self) -> np.ndarray:
        """int32 [length], built when it is asked for: a grid of long contexts fills no memory."""
        return self.haystack.build()


@dataclass(frozen=True, eq=False)
class Haystack:
    """Straw with needles in it."""

    length: int
    straw: np.ndarray
    """int32 [n], repeated to the length."""
    first: int
    """Where in the straw it begins."""
    needles: tuple[np.ndarray, ...]
    places: tuple[int, ...]
    """How much straw is before each needle, ascending."""

    def build(self) -> np.ndarray:
        """int32 [length]."""
        room = self.length - sum(map(len, self.needles))
        hay = np.resize(np.roll(self.straw, -self.first), room)
        parts, at = [], 0
        for needle, place in zip(self.needles, self.places, strict=True):
            parts += [hay[at:place], needle]
            at = place
        return np.concatenate([*parts, hay[at:]]).astype(np.int32)


def cases(
    vocab: Vocab,
    haystack: str,
    *,
    lengths: Sequence[int],
    depths: int,
    repetitions: int,
    seed: int,
    shared: bool = False,
) -> Iterator[Case]:
    """Every case of the grid, shortest first; each depends on its place and the seed only.
    Those that share a haystack come one after the other.

    Args:
        haystack: text without the needle; it is repeated to the length.
        lengths: context lengths in tokens.
        depths: how many depths, linearly spaced from 0 to 1 (one alone is 0.5).
        repetitions: cases a cell, each with its own city, number and start in the haystack.
        shared: whether the needles of all depths of a length and repetition lie in one haystack.

    Raises:
        GemtoolError: the haystack is too short.
        UsageError: a length has no room for the needle, or there are more depths than cities.
    """
    if shared and depths > len(CITIES):
        raise UsageError(f"--shared: a haystack holds {len(CITIES)} needles, not {depths}")
    straw = vocab.encode(haystack)
    ends = sentence_ends(vocab, straw)
    if len(straw) < 200 or len(ends) < 2:
        raise GemtoolError("the haystack needs at least a few sentences of text")
    places = [0.5] if depths == 1 else np.linspace(0.0, 1.0, depths).tolist()
    for length in sorted(lengths):
        if shared:
            for case in range(repetitions):
                rng = np.random.default_rng([seed, length, depths, case])
                yield from _cases(vocab, straw, ends, length, places, case, rng)
            continue
        for row, depth in enumerate(places):
            for case in range(repetitions):
                rng = np.random.default_rng([seed, length, row, depths, case])
                yield from _cases(vocab, straw, ends, length, [depth], case, rng)


def sentence_ends(vocab: Vocab, tokens: np.ndarray) -> np.ndarray:
    """int64: positions behind a token that ends a sentence, where a needle may stand."""
    closing = [i for i in range(vocab.size) if vocab.piece_bytes(i)[-1:] in (b".", b"\n")]
    return np.flatnonzero(np.isin(tokens, closing)) + 1


def _cases(
    vocab: Vocab,
    straw: np.ndarray,
    ends: np.ndarray,
    length: int,
    depths: list[float],
    case: int,
    rng: np.random.Generator,
) -> Iterator[Case]:
    """The cases of one haystack, a needle a depth, in ascending order."""
    cities = [str(city) for city in rng.choice(CITIES, size=len(depths), replace=False)]
    smallest, largest = 10 ** (NUMBER_DIGITS - 1), 10**NUMBER_DIGITS
    numbers = [str(number) for number in rng.integers(smallest, largest, size=len(depths))]
    needles = tuple(
        vocab.encode(" " + NEEDLE.format(city=city, number=number))
        for city, number in zip(cities, numbers, strict=True)
    )
    sizes = [len(needle) for needle in needles]
    room = length - sum(sizes)
    if room < SMALLEST_HAYSTACK:
        raise UsageError(
            f"a length of {length:,} has no room for needle and haystack; the shortest here is "
            f"{sum(sizes) + SMALLEST_HAYSTACK}"
        )
    first = int(rng.choice(ends))
    found = [_nearest_end(ends, len(straw), first, round(depth * room), room) for depth in depths]
    haystack = Haystack(length, straw, first, needles, tuple(found))
    for i, (city, number) in enumerate(zip(cities, numbers, strict=True)):
        yield Case(
            length=length,
            depth=depths[i],
            case=case,
            question=QUESTION.format(city=city),
            prefix=PREFIX.format(city=city),
            answer=number,
            needle_at=found[i] + sum(sizes[:i]),
            haystack=haystack,
        )


def _nearest_end(ends: np.ndarray, period: int, first: int, wanted: int, room: int) -> int:
    """The end of a sentence nearest to `wanted` in the haystack rolled by `first` and repeated."""
    turns = wanted // period
    shifted = np.sort((ends - first) % period)
    near = np.concatenate([shifted + k * period for k in (turns - 1, turns, turns + 1)])
    near = np.concatenate([[0, room], near[(near >= 0) & (near <= room)]])
    return int(near[np.argmin(np.abs(near - wanted))])


def score(case: Case, text: str) -> float:
    """1 if the number stands in the text, as RULER's substring match (arXiv 2404.06654), else 0."""
    return float(case.answer in text)
