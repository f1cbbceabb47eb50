"""One token after the other: what a model chooses, checked against a grammar, sped up by guesses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gemtool.control import END_TURN, EOD
from gemtool.infer.draft import GUESSES, NgramDraft
from gemtool.infer.grammar import Constraint
from gemtool.infer.sampling import Sampling, sample

if TYPE_CHECKING:
    from gemtool.infer.sequence import Sequence

TILE = 2 * GUESSES
"""Positions of a step that checks guesses; before them are tokens that wait to be run again."""


@dataclass(frozen=True)
class Step:
    """One chosen token."""

    token: int
    logits: np.ndarray
    """float32 [V]: the model's scores, also of tokens that a constraint forbade."""


class Chooser:
    """Chooses the tokens of one answer.

    Attributes:
        left: how many may still be chosen.
        ended: whether the last one ended the answer.
    """

    def __init__(
        self,
        sampling: Sampling,
        seed: tuple[int, int],
        max_tokens: int,
        constraint: Constraint | None,
    ) -> None:
        self._sampling, self._seed, self._constraint = sampling, seed, constraint
        self._count, self.left = 0, max_tokens
        self.ended = False

    def choose(self, logits: np.ndarray) -> Step:
        """The next token, for scores float32 [V]; raises as `sample` and `Constraint.mask`."""
        constraint = self._constraint
        mask = None if constraint is None else constraint.mask()
        token = sample(logits, self._sampling, (*self._seed, self._count), mask)
        if constraint is not None:
            constraint.advance(token)
        self._count, self.left = self._count + 1, self.left - 1
        finished = constraint is not None and constraint.finished
        self.ended = token in (END_TURN, EOD) or finished or self.left == 0
        return Step(token, logits)


def chosen(live: Sequence, chooser: Chooser, draft: NgramDraft | None = None) -> Iterator[Step]:
    """The tokens that a chooser chooses after a sequence, which is extended by them.

    With a draft they are the same, but several may come of one step of the model: it runs over
    guesses, and the scores after each right one choose the next token. Where a guess was wrong the
    sequence goes back to before the step, and what was right of it waits to be run again, in the step
    that checks the next guesses.
    """
    assert live.logits is not None
    step = chooser.choose(live.logits)
    yield step
    waiting: list[int] = []  # chosen, but not yet of the sequence
    while not chooser.ended:
        waiting.append(step.token)
        guesses: list[int] = []
        if draft is not None:
            draft.push(step.token)
            guesses = draft.guess(min(TILE - len(waiting), chooser.left - 1))
            draft.drafted += len(guesses)
        before, run = live.mark(), np.array([*waiting, *guesses], np.int32)
        if len(run) == 1:
            live.extend(run)
            rows = live.logits[None]
        else:
            rows = live.extend_scored(run, TILE, GUESSES + 1)[-len(guesses) - 1 :]
        for row, guess in zip(rows, [*guesses, None], strict=True):
            step = chooser.choose(row)
            yield step
            if draft is None or step.token != guess:
                break
            draft.accepted += 1
            draft.push(step.token)
            waiting.append(step.token)
            if chooser.ended:
                break
        if draft is not None and guesses:
            draft.learn(len(guesses), len(waiting) - len(run) + len(guesses))
        if len(waiting) < len(run):
            live.back_to(before)
        else:
            waiting = []
