"""Conversations: turns that are kept, and saved as a context that the next ones continue."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np

from gemtool.control import END_TURN
from gemtool.infer.contexts import Base
from gemtool.infer.engine import Answer, Engine
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

    def turns(
        self, prompts: Iterable[Prompt], on_text: Callable[[str], None] | None = None
    ) -> Iterator[tuple[Prompt, Answer]]:
        """Prompts with their answers, one after the other, each with all before it; `on_text` as in
        `Engine.answer`."""
        base = self._engine.begin() if self._base is None else self._base.sequence
        with base.fork() as live:
            for prompt in prompts:
                answer = self._engine.answer(live, prompt, on_text)
                turn = _turn(self._engine, prompt, answer)
                live.extend(turn)
                live.tokens = np.concatenate([live.tokens, turn])
                self.tokens = np.concatenate([self.tokens, turn])
                yield prompt, answer

    def save(self, sink: BinaryIO, pg: tuple[Any, ...] | None = ()) -> dict[str, Any]:
        """Writes the context with all turns, and returns its footer; `pg` as in `write_context`."""
        doc = DOC if self._base is None else self._base.doc
        spans = [Span(doc, 0, "text", self.tokens)]
        return write_context(self._engine, doc, spans, sink, base=self._base, pg=pg)


def _turn(engine: Engine, prompt: Prompt, answer: Answer) -> np.ndarray:
    """The tokens int32 [n] of a question and its answer, which ends the model's turn however it was
    ended; a raw text just goes on."""
    end = [] if prompt.raw else [END_TURN]
    parts = prompt.tokens(engine.vocab), answer.tokens, end
    return np.concatenate([np.asarray(part, np.int32) for part in parts])
