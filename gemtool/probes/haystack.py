"""Haystacks: text with sentences hidden in it, and the cases that ask for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from gemtool.data.vocab import Vocab
from gemtool.errors import GemtoolError, UsageError

SMALLEST_HAYSTACK = 32
"""Tokens around the needle in the shortest context."""


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
    """Cases of a context with the same question share the model's answer."""
    prefix: str
    """How the model's turn begins."""
    answer: str
    """The numbers that the model should say, a space between two; "" if it should say none."""
    needle_at: int
    """Token position of the needle in the context."""
    max_tokens: int
    """Enough for the answer after the prefix."""
    beginning: int
    """As many more if the model's turn is not begun for it."""
    haystack: Haystack = field(repr=False, compare=False)
    """Cases of the same object share a context."""

    @property
    def context(self) -> np.ndarray:
        """int32 [length], built when it is asked for: a grid of long contexts fills no memory."""
        return self.haystack.build()


@dataclass(frozen=True, eq=False)
class Haystack:
    """Straw with sentences in it."""

    length: int
    straw: np.ndarray
    """int32 [n], repeated to the length."""
    first: int
    """Where in the straw it begins."""
    hidden: tuple[np.ndarray, ...]
    """The sentences, int32 [n] each, in the order of their depths."""
    places: tuple[int, ...]
    """How much straw is before each sentence, ascending."""
    positions: tuple[int, ...]
    """Where in the context each sentence begins, in the order in which they were given."""

    def build(self) -> np.ndarray:
        """int32 [length]."""
        room = self.length - sum(map(len, self.hidden))
        hay = np.resize(np.roll(self.straw, -self.first), room)
        parts, at = [], 0
        for sentence, place in zip(self.hidden, self.places, strict=True):
            parts += [hay[at:place], sentence]
            at = place
        return np.concatenate([*parts, hay[at:]]).astype(np.int32)


@dataclass(frozen=True, eq=False)
class Straw:
    """Text to hide sentences in."""

    tokens: np.ndarray
    """int32 [n]."""
    ends: np.ndarray
    """int64 [m]: positions behind a sentence."""

    @classmethod
    def of(cls, vocab: Vocab, text: str) -> Straw:
        """Of a text without needles.

        Raises:
            GemtoolError: it is too short.
        """
        tokens = vocab.encode(text)
        ends = sentence_ends(vocab, tokens)
        if len(tokens) < 200 or len(ends) < 2:
            raise GemtoolError("the haystack needs at least a few sentences of text")
        return cls(tokens, ends)

    def hide(
        self,
        length: int,
        sentences: Sequence[tuple[float, np.ndarray]],
        rng: np.random.Generator,
    ) -> Haystack:
        """A haystack of `length` tokens that begins at a random sentence of the straw.

        Args:
            length: the sentences included.
            sentences: depth from 0 to 1, and tokens, int32 [n]; each is put behind the sentence of
                the straw that ends nearest to its depth, those of one place as they are given.
            rng: draws where the straw begins.

        Raises:
            UsageError: the length has no room for them.
        """
        taken = sum(len(tokens) for _, tokens in sentences)
        room = length - taken
        if room < SMALLEST_HAYSTACK:
            raise UsageError(
                f"a length of {length:,} has no room for needle and haystack; the shortest here is "
                f"{taken + SMALLEST_HAYSTACK}"
            )
        first = int(rng.choice(self.ends))
        places = [self._nearest_end(first, round(depth * room), room) for depth, _ in sentences]
        order = sorted(range(len(places)), key=places.__getitem__)
        positions = [0] * len(places)
        before = 0
        for i in order:
            positions[i] = places[i] + before
            before += len(sentences[i][1])
        return Haystack(
            length=length,
            straw=self.tokens,
            first=first,
            hidden=tuple(sentences[i][1] for i in order),
            places=tuple(places[i] for i in order),
            positions=tuple(positions),
        )

    def _nearest_end(self, first: int, wanted: int, room: int) -> int:
        """The end of a sentence nearest to `wanted` in the straw rolled by `first` and repeated."""
        period = len(self.tokens)
        turns = wanted // period
        shifted = np.sort((self.ends - first) % period)
        near = np.concatenate([shifted + k * period for k in (turns - 1, turns, turns + 1)])
        near = np.concatenate([[0, room], near[(near >= 0) & (near <= room)]])
        return int(near[np.argmin(np.abs(near - wanted))])


def sentence_ends(vocab: Vocab, tokens: np.ndarray) -> np.ndarray:
    """int64: positions behind a token that ends a sentence, where a needle may stand."""
    closing = [i for i in range(vocab.size) if vocab.piece_bytes(i)[-1:] in (b".", b"\n")]
    return np.flatnonzero(np.isin(tokens, closing)) + 1


def spaced(count: int) -> list[float]:
    """So many depths, evenly from 0 to 1; one alone is 0.5."""
    return [0.5] if count == 1 else np.linspace(0.0, 1.0, count).tolist()
