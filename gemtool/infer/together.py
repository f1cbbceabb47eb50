"""Many prompts of one context, answered together: as many at a time as fit, and the next one as soon as
one has ended. Each answer is the one that it would get alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gemtool.infer import sequence
from gemtool.infer.answer import Answer, Answering
from gemtool.infer.engine import Engine
from gemtool.infer.forks import Forked, forks_at_once, rows_for
from gemtool.infer.generate import Chooser
from gemtool.infer.text import Prompt

OnText = Callable[[str], None]


def answer_together(
    engine: Engine,
    context: sequence.Sequence | None,
    prompts: Sequence[Prompt],
    on_text: OnText | None = None,
) -> Iterator[Answer]:
    """The answers to prompts, in their order, each as soon as it and those before it have ended.

    Those that show media or are sped up by guesses are answered alone, and on a mesh all are.

    Args:
        engine: the model.
        context: what they are about; None is an empty one.
        prompts: what is asked.
        on_text: gets the text of answers, one after the other, while they are generated; the next one's
            begins when the answer before it has been taken.

    Raises:
        GemtoolError: as `Engine.answer`.
    """
    for alone, run in itertools.groupby(prompts, lambda prompt: _is_alone(engine, prompt)):
        group = list(run)
        if alone or len(group) == 1:
            for prompt in group:
                yield engine.answer(context, prompt, on_text)
        else:
            yield from _group(engine, context, group, on_text)


def _is_alone(engine: Engine, prompt: Prompt) -> bool:
    return engine.mesh is not None or bool(prompt.media) or prompt.draft


def _group(
    engine: Engine,
    context: sequence.Sequence | None,
    prompts: list[Prompt],
    on_text: OnText | None,
) -> Iterator[Answer]:
    asked = [prompt.tokens(engine.vocab) for prompt in prompts]
    engine.require_tokens(context, asked)
    rows = [rows_for(engine, len(x), p.max_tokens) for x, p in zip(asked, prompts, strict=True)]
    room, work = (max(column) for column in zip(*rows, strict=True))
    with (engine.begin() if context is None else context).fork() as live:
        count = forks_at_once(room, len(prompts))
        group = _Group(engine, Forked(live, engine, count, room, work), live.length, prompts, asked)
        for number in range(len(prompts)):
            group.fill()
            if on_text is not None:
                group.answering[number].tell(on_text)
            while number not in group.ended:
                group.step()
                group.fill()
            yield group.ended.pop(number)
            del group.answering[number]


@dataclass
class _Running:
    """A prompt that is being answered."""

    number: int
    answering: Answering
    chooser: Chooser
    token: int = 0
    """The last one chosen."""


class _Group:
    """Prompts that are answered together, each in a fork.

    Attributes:
        answering: by number of the prompt, those that have begun and are not taken yet.
        ended: the answers of those that have ended.
    """

    def __init__(
        self,
        engine: Engine,
        forked: Forked,
        cached: int,
        prompts: list[Prompt],
        asked: list[np.ndarray],
    ) -> None:
        self._engine, self._forked, self._cached = engine, forked, cached
        self._prompts, self._asked = prompts, asked
        self._coming = iter(range(len(prompts)))
        self._running: dict[int, _Running] = {}  # by fork
        self.answering: dict[int, Answering] = {}
        self.ended: dict[int, Answer] = {}

    def fill(self) -> None:
        """Lets prompts begin where a fork is free."""
        for fork in range(self._forked.count):
            while fork not in self._running:
                number = next(self._coming, None)
                if number is None:
                    return
                tokens = self._asked[number]
                answering, chooser = self._engine.answering(
                    self._prompts[number], len(tokens), self._cached
                )
                self.answering[number] = answering
                self._running[fork] = _Running(number, answering, chooser)
                self._choose(fork, self._forked.begin(fork, tokens))

    def step(self) -> None:
        """Takes all that are being answered a token further."""
        tokens = np.zeros(self._forked.count, np.int32)
        for fork, own in self._running.items():
            tokens[fork] = own.token
        scores = self._forked.step(tokens)
        for fork in list(self._running):
            self._choose(fork, scores[fork])

    def _choose(self, fork: int, logits: np.ndarray) -> None:
        """The next token of a fork, which is free if its answer ends with it."""
        own = self._running[fork]
        step = own.chooser.choose(logits)
        own.token = step.token
        if own.answering.take(step) or own.chooser.ended:
            self.ended[own.number] = own.answering.end()
            del self._running[fork]
