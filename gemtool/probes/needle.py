"""The text needle of the Gemini 1.5 report (arXiv 2403.05530, section 5.2.1.1).

One sentence, "The special magic {city} number is: {number}", is put at a depth of a haystack of
essays that is repeated to the length; city and number differ in every case. The model is asked for
the number. Depths are spaced linearly from the start to the end of the haystack.
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
    _needle: np.ndarray = field(repr=False, compare=False)
    _straw: np.ndarray = field(repr=False, compare=False)
    _first: int = field(repr=False, compare=False)
    """Where in the straw the haystack begins."""

    @property
    def context(self) -> np.ndarray:
        """int32 [length], built when it is asked for: a grid of long contexts fills no memory."""
        hay = np.resize(np.roll(self._straw, -self._first), self.length - len(self._needle))
        parts = hay[: self.needle_at], self._needle, hay[self.needle_at :]
        return np.concatenate(parts).astype(np.int32)


def cases(
    vocab: Vocab,
    haystack: str,
    *,
    lengths: Sequence[int],
    depths: int,
    repetitions: int,
    seed: int,
) -> Iterator[Case]:
    """Every case of the grid, shortest first; each depends on its place and the seed only.

    Args:
        haystack: text without the needle; it is repeated to the length.
        lengths: context lengths in tokens.
        depths: how many depths, linearly spaced from 0 to 1 (one alone is 0.5).
        repetitions: cases a cell, each with its own city, number and start in the haystack.

    Raises:
        GemtoolError: the haystack is too short.
        UsageError: a length has no room for the needle.
    """
    straw = vocab.encode(haystack)
    ends = sentence_ends(vocab, straw)
    if len(straw) < 200 or len(ends) < 2:
        raise GemtoolError("the haystack needs at least a few sentences of text")
    places = [0.5] if depths == 1 else np.linspace(0.0, 1.0, depths).tolist()
    for length in sorted(lengths):
        for row, depth in enumerate(places):
            for case in range(repetitions):
                rng = np.random.default_rng([seed, length, row, depths, case])
                yield _case(vocab, straw, ends, length, depth, case, rng)


def sentence_ends(vocab: Vocab, tokens: np.ndarray) -> np.ndarray:
    """int64: positions behind a token that ends a sentence, where a needle may stand."""
    closing = [i for i in range(vocab.size) if vocab.piece_bytes(i)[-1:] in (b".", b"\n")]
    return np.flatnonzero(np.isin(tokens, closing)) + 1


def _case(
    vocab: Vocab,
    straw: np.ndarray,
    ends: np.ndarray,
    length: int,
    depth: float,
    case: int,
    rng: np.random.Generator,
) -> Case:
    city = str(rng.choice(CITIES))
    number = str(rng.integers(10 ** (NUMBER_DIGITS - 1), 10**NUMBER_DIGITS))
    needle = vocab.encode(" " + NEEDLE.format(city=city, number=number))
    room = length - len(needle)
    if room < SMALLEST_HAYSTACK:
        raise UsageError(
            f"a length of {length:,} has no room for needle and haystack; the shortest here is "
            f"{len(needle) + SMALLEST_HAYSTACK}"
        )
    first = int(rng.choice(ends))
    return Case(
        length=length,
        depth=depth,
        case=case,
        question=QUESTION.format(city=city),
        prefix=PREFIX.format(city=city),
        answer=number,
        needle_at=_nearest_end(ends, len(straw), first, round(depth * room), room),
        _needle=needle,
        _straw=straw,
        _first=first,
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
