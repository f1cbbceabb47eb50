"""Conversations: turns that are kept, and saved as a context that the next ones continue."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np

from gemtool.control import END_TURN
from gemtool.infer.answer import Answer
from gemtool.infer.contexts import Base
from gemtool.infer.engine import Engine
from gemtool.infer.prefill import write_context
from gemtool.infer.text import Prompt
from gemtool.stream.spans import Span

DOC = "conversation"
"""Document of turns that are about none."""


class Conversation:
    """Turns after a context, or about none.

    Attributes:
        tokens: int32 [n], of all turns so far.
    """

    def __init__(self, engine: Engine, base: Base | None = None) -> None:
        self._engine, self._base = engine, base
        self.tokens = np.empty(0, np.int32)
        self._spans: list[Span] = []

    def turns(
        self, prompts: Iterable[Prompt], on_text: Callable[[str], None] | None = None
    ) -> Iterator[tuple[Prompt, Answer]]:
        """Prompts with their answers, one after the other, each with all before it; `on_text` as in
        `Engine.answer`."""
        base = self._engine.begin() if self._base is None else self._base.sequence
        with base.fork() as live:
            for prompt in prompts:
                spans = self._engine.spans(prompt)
                answer = self._engine.answer(live, prompt, on_text, spans)
                turn = [*spans, _said(prompt, answer)]
                live.extend(self._engine.pieces(turn))
                tokens = np.concatenate([span.tokens for span in turn])
                live.tokens = np.concatenate([live.tokens, tokens])
                self.tokens = np.concatenate([self.tokens, tokens])
                self._spans += turn
                yield prompt, answer

    def save(self, sink: BinaryIO, pg: tuple[Any, ...] | None = ()) -> dict[str, Any]:
        """Writes the context with all turns, and returns its footer; `pg` as in `write_context`."""
        doc = DOC if self._base is None else self._base.doc
        return write_context(self._engine, doc, self._spans, sink, base=self._base, pg=pg)


def _said(prompt: Prompt, answer: Answer) -> Span:
    """An answer, which ends the model's turn however it was ended; a raw text just goes on."""
    end = [] if prompt.raw else [END_TURN]
    return Span("answer", 0, "text", np.array([*answer.tokens, *end], np.int32))
