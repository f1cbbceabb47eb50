"""Chosen tokens -> an answer: its text as it becomes certain, where it ends, and what it took."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gemtool.control import END_TURN, EOD
from gemtool.data.vocab import Vocab
from gemtool.infer.draft import NgramDraft
from gemtool.infer.generate import Step
from gemtool.infer.grammar import Constraint
from gemtool.infer.logprobs import Entries
from gemtool.infer.sampling import best, log_softmax
from gemtool.infer.text import Prompt, TextStream


@dataclass(frozen=True)
class Answer:
    """What a model said to a prompt."""

    text: str
    tokens: list[int]
    """Without the token that ended the answer."""
    finish: str
    """"stop": the model ended its turn, a stop string came, or the grammar allows no more; "length":
    max_tokens were chosen."""
    prompt: int
    """Tokens of the prompt."""
    cached: int
    """Tokens of the context before it."""
    seconds: float
    logprobs: list[dict[str, Any]]
    """Where asked for, an entry a token: `token`, `text`, `logprob`, and `top`, the best tokens."""
    drafted: int = 0
    """Tokens that were guessed."""
    accepted: int = 0
    """Those of them that the model chose too."""


class Answering:
    """An answer while its tokens are chosen.

    Args:
        prompt: what is answered.
        length: tokens of it.
        cached: tokens of the context before it.
        constraint: that of the prompt's grammar.
        on_text: gets the text piece by piece, as soon as it is certain.
        started: when the work on it began, of `time.perf_counter`.
    """

    def __init__(
        self,
        vocab: Vocab,
        entries: Entries,
        prompt: Prompt,
        length: int,
        cached: int,
        constraint: Constraint | None,
        on_text: Callable[[str], None] | None,
        started: float,
    ) -> None:
        self._started = started
        self._vocab, self._entries, self._prompt = vocab, entries, prompt
        self._length, self._cached, self._constraint = length, cached, constraint
        self._on_text = on_text
        self._stream, self._texts, self._finish = TextStream(prompt.stop), list[str](), "length"
        self._tokens: list[int] = []
        self._logprobs: list[dict[str, Any]] = []

    def take(self, step: Step) -> bool:
        """Takes the next token; whether the answer ends with or before it, by what it says."""
        if step.token in (END_TURN, EOD):
            self._finish = "stop"
            return True
        self._tokens.append(step.token)
        if self._prompt.logprobs:
            self._logprobs.append(self._scores(step))
        self._release(self._stream.push(self._vocab.piece_bytes(step.token)))
        return self._stream.stopped

    def tell(self, on_text: Callable[[str], None]) -> None:
        """From now on `on_text` gets the text, and now what there is of it."""
        self._on_text = on_text
        if self._texts:
            on_text("".join(self._texts))

    def end(self, draft: NgramDraft | None = None) -> Answer:
        """The answer, of which no more tokens come."""
        self._release(self._stream.finish())
        constraint = self._constraint
        if self._stream.stopped or (constraint is not None and constraint.finished):
            self._finish = "stop"
        return Answer(
            text="".join(self._texts),
            tokens=self._tokens,
            finish=self._finish,
            prompt=self._length,
            cached=self._cached,
            seconds=time.perf_counter() - self._started,
            logprobs=self._logprobs,
            drafted=0 if draft is None else draft.drafted,
            accepted=0 if draft is None else draft.accepted,
        )

    def _release(self, text: str) -> None:
        if text:
            self._texts.append(text)
            if self._on_text is not None:
                self._on_text(text)

    def _scores(self, step: Step) -> dict[str, Any]:
        values = log_softmax(step.logits)
        own = self._entries.entry(step.token, float(values[step.token]))
        return {**own, "top": self._entries.top(best(values, self._prompt.logprobs))}
