"""The text needle of the Gemini 1.5 report (arXiv 2403.05530, section 5.2.1.1), and harder ones.

One sentence, "The special magic {city} number is: {number}", is put at a depth of a haystack of
essays that is repeated to the length; city and number differ in every case. The model is asked for
the number. Depths are spaced linearly from the start to the end of the haystack.

With `shared`, the needles of all depths are in one haystack, each with a city of its own, and each is
asked for by itself: of a length and repetition, one context for all. Harder, as the other needles are
near misses, and as much cheaper as there are depths.

Other variants hide more in the same context, or ask in other words: see `cases`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gemtool.data.vocab import Vocab
from gemtool.errors import UsageError
from gemtool.probes.distractors import near_misses
from gemtool.probes.haystack import Case, Straw, spaced
from gemtool.probes.wordings import CITIES, WORDINGS, Wording, wording_named

NEEDLE = WORDINGS["report"].needle
(QUESTION,) = WORDINGS["report"].questions
PREFIX = WORDINGS["report"].prefix
NUMBER_DIGITS = 7
SMALLEST, LARGEST = 10 ** (NUMBER_DIGITS - 1), 10**NUMBER_DIGITS


@dataclass(frozen=True)
class Variant:
    """What is hidden and asked for, as the arguments of `cases` say."""

    wording: Wording
    distractors: int
    values: int
    absent: bool


def cases(
    vocab: Vocab,
    haystack: str,
    *,
    lengths: Sequence[int],
    depths: int,
    repetitions: int,
    seed: int,
    shared: bool = False,
    wording: str = "report",
    distractors: int = 0,
    values: int = 1,
    absent: bool = False,
) -> Iterator[Case]:
    """Every case of the grid, shortest first; each depends on its place and the seed only.
    Those that share a haystack come one after the other.

    Variants of a case have the same needles, and begin at the same place of the haystack.

    Args:
        haystack: text without the needle; it is repeated to the length.
        lengths: context lengths in tokens.
        depths: how many depths, linearly spaced from 0 to 1 (one alone is 0.5).
        repetitions: cases a cell, each with its own city, number and start in the haystack.
        shared: whether the needles of all depths of a length and repetition lie in one haystack.
        wording: a name in `WORDINGS`.
        distractors: near misses for each needle, at random places of its haystack.
        values: numbers of each city, in a needle each: the first at the depth of the case, the others
            at random places. All of them are asked for.
        absent: whether the city that is asked for is one without a needle. The near misses are of it.

    Raises:
        GemtoolError: the haystack is too short.
        UsageError: a length has no room for the needle, there are not enough cities, or the variants
            exclude each other.
    """
    variant = Variant(wording_named(wording), distractors, values, absent)
    if absent and values > 1:
        raise UsageError(
            "--absent hides no number of the city that is asked for: leave --values out"
        )
    together = depths if shared else 1
    # Near misses of another city need one that is left.
    needed = together * (1 + absent) + (distractors > 0)
    if needed > len(CITIES):
        most = (len(CITIES) - (distractors > 0)) // (1 + absent)
        raise UsageError(f"--depths: a haystack holds {most} needles here, not {depths}")
    straw = Straw.of(vocab, haystack)

    def of_haystack(length: int, places: list[float], case: int, key: list[int]) -> Iterator[Case]:
        rng = np.random.default_rng(key)
        return _cases(vocab, straw, variant, length, places, case, rng)

    places = spaced(depths)
    for length in sorted(lengths):
        if shared:
            for case in range(repetitions):
                yield from of_haystack(length, places, case, [seed, length, depths, case])
            continue
        for row, depth in enumerate(places):
            for case in range(repetitions):
                yield from of_haystack(length, [depth], case, [seed, length, row, depths, case])


def _cases(
    vocab: Vocab,
    straw: Straw,
    variant: Variant,
    length: int,
    depths: list[float],
    case: int,
    rng: np.random.Generator,
) -> Iterator[Case]:
    """The cases of one haystack, a city a depth, in ascending order."""
    wording = variant.wording
    # What a variant adds is drawn from streams of its own: it changes nothing else.
    for_cities, for_values, for_distractors, for_questions = rng.spawn(4)
    cities = [str(city) for city in rng.choice(CITIES, size=len(depths), replace=False)]
    first = [str(number) for number in rng.integers(SMALLEST, LARGEST, size=len(depths))]
    taken = set(first)
    more = _unused(for_values, taken)
    numbers = [[number, *(next(more) for _ in range(variant.values - 1))] for number in first]
    others = [str(city) for city in for_cities.permutation(sorted(set(CITIES) - set(cities)))]
    asked = cities
    if variant.absent:
        asked, others = others[: len(cities)], others[len(cities) :]

    needles = [
        [vocab.encode(" " + wording.needle.format(city=city, number=n)) for n in of_city]
        for city, of_city in zip(cities, numbers, strict=True)
    ]
    hidden = [(depth, found[0]) for depth, found in zip(depths, needles, strict=True)]
    hidden += [(for_values.random(), needle) for found in needles for needle in found[1:]]
    false = _unused(for_distractors, taken)
    for city in asked:
        count = variant.distractors * variant.values
        for text in near_misses(wording, city, others, false, count, for_distractors):
            hidden.append((for_distractors.random(), vocab.encode(" " + text)))
    haystack = straw.hide(length, hidden, rng)

    many = variant.values > 1
    questions = wording.questions_for_all if many else wording.questions
    prefix = wording.prefix_for_all if many else wording.prefix
    for i, city in enumerate(asked):
        yield Case(
            length=length,
            depth=depths[i],
            case=case,
            question=str(for_questions.choice(questions)).format(city=city),
            prefix=prefix.format(city=city),
            answer="" if variant.absent else " ".join(numbers[i]),
            needle_at=haystack.positions[i],
            # The model may say the whole sentence for each further number.
            max_tokens=2 * NUMBER_DIGITS + sum(len(needle) for needle in needles[i][1:]),
            beginning=wording.beginning,
            haystack=haystack,
        )


def _unused(rng: np.random.Generator, taken: set[str]) -> Iterator[str]:
    """Numbers that are not taken; they are then."""
    while True:
        number = str(rng.integers(SMALLEST, LARGEST))
        if number not in taken:
            taken.add(number)
            yield number


def score(case: Case, text: str) -> float:
    """The share of the case's numbers that stand in the text, as RULER's substring match (arXiv
    2404.06654); of a case without numbers, 1 if the text claims none."""
    numbers = case.answer.split()
    if not numbers:
        return float(not claims_number(text))
    return sum(number in text for number in numbers) / len(numbers)


def claims_number(text: str) -> bool:
    """Whether there are four digits in a row, or thousands that are set apart (1,234)."""
    return re.search(r"\d{4}|\d[,.'\s]\d{3}", text) is not None
