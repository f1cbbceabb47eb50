"""Guesses at what a model will say, from what was said before (prompt lookup decoding).

Answers repeat their context: names, numbers, quotations, code. What followed the last few tokens where
they were seen before is a guess that costs nothing, and a model scores several guessed tokens in little
more time than one. As in speculative decoding (arXiv 2211.17192), only what the model would have chosen
itself is kept.
"""

from __future__ import annotations

import numpy as np

from gemtool.control import CONTROL_COUNT

LONGEST = 3
"""Tokens that are looked for, at most; fewer where these were never seen."""
GUESSES = 8
"""Tokens that are guessed at a time, at most."""
WORTH = 2
"""Right guesses that pay for a step that checks guesses."""
REST = 8
"""Steps without guesses after wrong ones, at most."""
_CHUNK = 1 << 16  # tokens that are searched at a time, from the end: most are found near it


class NgramDraft:
    """What one answer may go on with, by what went before.

    Attributes:
        drafted: tokens guessed so far.
        accepted: those of them that the model chose too.
    """

    def __init__(self, tokens: np.ndarray) -> None:
        """Takes what precedes the answer, int32 [n]: context and prompt."""
        self._count = len(tokens)
        self._tokens = np.concatenate([tokens.astype(np.int32), np.zeros(256, np.int32)])
        self.drafted = self.accepted = 0
        self._pause = self._rest = 0

    def push(self, token: int) -> None:
        """Takes the next token of the answer."""
        if self._count == len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.zeros_like(self._tokens)])
        self._tokens[self._count] = token
        self._count += 1

    def learn(self, guesses: int, right: int) -> None:
        """Takes how many guesses were made, and how many of them, from the first on, were right. While
        they do not pay, more and more steps go without."""
        if right >= min(guesses, WORTH):
            self._pause = 0
        else:
            self._pause = min(2 * self._pause, REST) or 1
        self._rest = self._pause

    def guess(self, most: int) -> list[int]:
        """What may come next, at most `most` and GUESSES tokens, none of them a control token."""
        if self._rest:
            self._rest -= 1
            return []
        start = self._found()
        if start is None:
            return []
        guesses: list[int] = []
        for at in range(start, start + min(most, GUESSES)):
            # Beyond the end, what repeats goes on as it began.
            beyond = at - self._count
            token = int(self._tokens[at]) if beyond < 0 else guesses[beyond]
            if token < CONTROL_COUNT:
                break
            guesses.append(token)
        return guesses

    def _found(self) -> int | None:
        """The position after the last occurrence of the last tokens: of three if there is one, else of
        two, else of one."""
        tokens, count = self._tokens, self._count
        best, length = None, 0
        for stop in range(count - 1, 0, -_CHUNK):
            first = max(stop - _CHUNK, 0)
            (ends,) = np.nonzero(tokens[first:stop] == tokens[count - 1])
            ends += first
            for size in range(1, LONGEST + 1):
                if size > 1:
                    ends = ends[ends >= size - 1]
                    ends = ends[tokens[ends - (size - 1)] == tokens[count - size]]
                if not len(ends):
                    break
                if size > length:
                    best, length = int(ends[-1]) + 1, size
            if length == LONGEST:
                break
        return best
