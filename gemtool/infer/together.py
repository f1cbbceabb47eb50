"""Many prompts of one context, answered together: as many at a time as fit, and the next one as soon as
one has ended. Each answer is the one that it would get alone, but where two tokens have the same score
to the last bits."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gemtool.errors import GemtoolError
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

    Those that show media, are sped up by guesses, or ask for so much that two do not fit, are answered
    alone; on a mesh all are. Until the last answer is taken, or the iterator closed, the context is
    forked: nothing else can be asked of it.

    Args:
        engine: the model.
        context: what they are about; None is an empty one.
        prompts: what is asked.
        on_text: gets the text of answers, one after the other, while they are generated; the next one's
            begins when the answer before it has been taken.

    Raises:
        GemtoolError: as `Engine.answer`.
    """
    asked = [_Asked.of(engine, prompt) for prompt in prompts]
    for alone, run in itertools.groupby(asked, lambda one: one.is_alone):
        group = list(run)
        if alone or len(group) == 1:
            for one in group:
                yield engine.answer(context, one.prompt, on_text)
        else:
            with contextlib.closing(_group(engine, context, group, on_text)) as found:
                yield from found


@dataclass(frozen=True)
class _Asked:
    """A prompt, and what it takes to answer it in a fork."""

    prompt: Prompt
    tokens: np.ndarray
    """int32 [n], media aside."""
    room: int
    work: int
    is_alone: bool

    @classmethod
    def of(cls, engine: Engine, prompt: Prompt) -> _Asked:
        tokens = prompt.tokens(engine.vocab)
        room, work = rows_for(engine, len(tokens), prompt.max_tokens)
        fits = forks_at_once(max(room, work), 2) > 1
        alone = engine.mesh is not None or bool(prompt.media) or prompt.draft or not fits
        return cls(prompt, tokens, room, work, alone)


def _group(
    engine: Engine,
    context: sequence.Sequence | None,
    asked: list[_Asked],
    on_text: OnText | None,
) -> Generator[Answer]:
    engine.require_tokens(context, [one.tokens for one in asked])
    room, work = max(one.room for one in asked), max(one.work for one in asked)
    with (engine.begin() if context is None else context).fork() as live:
        forked = Forked(live, engine, forks_at_once(room, len(asked)), room, work)
        group = _Group(engine, forked, live.length, asked)
        for number in range(len(asked)):
            group.fill()
            if on_text is not None:
                group.tell(number, on_text)
            while number not in group.ended:
                group.step()
                group.fill()
            yield group.taken(number)


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
        ended: by number of the prompt, the answers that are whole, and why others cannot be given.
    """

    def __init__(self, engine: Engine, forked: Forked, cached: int, asked: list[_Asked]) -> None:
        self._engine, self._forked, self._cached, self._asked = engine, forked, cached, asked
        self._coming = iter(range(len(asked)))
        self._running: dict[int, _Running] = {}  # by fork
        self._answering: dict[int, Answering] = {}
        self.ended: dict[int, Answer | GemtoolError] = {}

    def fill(self) -> None:
        """Lets prompts begin where a fork is free."""
        for fork in range(self._forked.count):
            while fork not in self._running:
                number = next(self._coming, None)
                if number is None:
                    return
                self._begin(fork, number, self._asked[number])

    def _begin(self, fork: int, number: int, asked: _Asked) -> None:
        length = len(asked.tokens)
        try:
            answering, chooser = self._engine.answering(asked.prompt, length, self._cached)
        except GemtoolError as problem:
            self.ended[number] = problem
            return
        self._answering[number] = answering
        self._running[fork] = _Running(number, answering, chooser)
        self._choose(fork, self._forked.begin(fork, asked.tokens))

    def step(self) -> None:
        """Takes all that are being answered a token further."""
        tokens = np.zeros(self._forked.count, np.int32)
        running = np.zeros(self._forked.count, np.bool)
        for fork, own in self._running.items():
            tokens[fork], running[fork] = own.token, True
        scores = self._forked.step(tokens, running)
        for fork in list(self._running):
            self._choose(fork, scores[fork])

    def tell(self, number: int, on_text: OnText) -> None:
        """From now on `on_text` gets the text of an answer."""
        if number in self._answering:
            self._answering[number].tell(on_text)

    def taken(self, number: int) -> Answer:
        """An answer that has ended; raises what kept it from that."""
        found = self.ended.pop(number)
        if isinstance(found, GemtoolError):
            raise found
        del self._answering[number]
        return found

    def _choose(self, fork: int, logits: np.ndarray) -> None:
        """The next token of a fork, which is free if its answer ends with it."""
        own = self._running[fork]
        try:
            step = own.chooser.choose(logits)
        except GemtoolError as problem:
            self.ended[own.number] = problem
            del self._running[fork]
            return
        own.token = step.token
        if own.answering.take(step) or own.chooser.ended:
            self.ended[own.number] = own.answering.end()
            del self._running[fork]
