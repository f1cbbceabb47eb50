"""Log-probabilities of tokens as JSON objects: of those that decode chose, and of a document's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from gemtool.control import UNTRAINED_TARGETS
from gemtool.data.vocab import Vocab
from gemtool.errors import GemtoolError
from gemtool.infer.steps import Scores

DIGITS = 6
"""Decimals that rows of documents have: what float32 has of log-probabilities."""

_UNTRAINED = np.array(sorted(UNTRAINED_TARGETS), np.int32)


class Entries:
    """Makes the JSON objects; remembers the text of tokens, which documents ask for again and again."""

    def __init__(self, vocab: Vocab) -> None:
        self._vocab = vocab
        self._texts: dict[int, str] = {}

    def entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        """`token`, `text` and `logprob` of one token."""
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = self._vocab.decode([token])
        return {"token": token, "text": text, "logprob": logprob}

    def top(self, best: Iterable[tuple[int, float]]) -> list[dict[str, Any]]:
        """What `top` holds: the entries of the most likely tokens, the best first."""
        return [self.entry(token, logprob) for token, logprob in best]

    def rows(
        self, doc: str, start: int, tokens: np.ndarray, scores: Scores
    ) -> Iterator[dict[str, Any]]:
        """A row a token: `doc`, `position`, its entry, and where any were asked for `top`.

        `logprob` and `top` are None of the first token of a document, which nothing goes before, and
        of soft positions and the marks around them, which no model learns to predict.

        Args:
            doc: id of the document.
            start: position of the first token.
            tokens: int32 [n].
            scores: of at least so many; what is behind means nothing.

        Raises:
            GemtoolError: a score is not a finite number.
        """
        own, best, values = (np.asarray(x)[: len(tokens)] for x in scores)
        nothing = np.isin(tokens, _UNTRAINED)
        if not start:
            nothing[0] = True
        if not np.isfinite(own[~nothing]).all():
            raise GemtoolError(
                f"document {doc!r}: the model's scores are not finite numbers; its weights are unusable"
            )
        own, values = (
            np.round(x.astype(np.float64), DIGITS) + 0.0 for x in (own, values)
        )  # no -0.0
        columns = zip(
            tokens.tolist(), nothing, own.tolist(), best.tolist(), values.tolist(), strict=True
        )
        for position, (token, skip, logprob, ids, logprobs) in enumerate(columns, start):
            row = {"doc": doc, "position": position, **self.entry(token, None if skip else logprob)}
            if ids:
                row["top"] = None if skip else self.top(zip(ids, logprobs, strict=True))
            yield row
