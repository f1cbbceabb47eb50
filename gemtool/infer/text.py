"""Prompts to tokens, and generated tokens to text as it comes."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from gemtool.control import END_TURN, MODEL, USER
from gemtool.data.vocab import Vocab
from gemtool.errors import UsageError
from gemtool.infer.grammar import Grammar
from gemtool.infer.sampling import Sampling
from gemtool.stream.spans import Span


@dataclass(frozen=True)
class Prompt:
    """One question to a model, and how to answer it."""

    text: str
    prefix: str = ""
    """How the model's turn begins; it is part of the prompt, not of the answer."""
    raw: bool = False
    """Continue the text as it is, instead of answering it as a turn of a conversation."""
    max_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these strings."""
    seed: int = 0
    index: int = 0
    """Number among the prompts of a run: with `seed`, what random draws depend on."""
    logprobs: int = 0
    """Report the log-probabilities of so many best tokens at each step."""
    grammar: Grammar | None = None
    """What the answer must match; the prefix is no part of it."""
    draft: bool = False
    """Guess by n-grams what comes next, for speed."""
    media: tuple[str, ...] = ()
    """Files that are shown before the text (`gemtool.infer.media`)."""

    def __post_init__(self) -> None:
        if self.draft and self.sampling.temperature > 0:
            raise UsageError(
                f"temperature is {self.sampling.temperature}; with --draft it must be 0"
            )

    def tokens(self, vocab: Vocab) -> np.ndarray:
        """int32 [n], media aside: `<user>` text `<end_turn>` `<model>` prefix; raw, text and prefix
        alone."""
        if self.raw:
            return vocab.encode(self.text + self.prefix)
        turn = [USER], vocab.encode(self.text), [END_TURN, MODEL], vocab.encode(self.prefix)
        return np.concatenate([np.asarray(part, np.int32) for part in turn])

    def spans(self, vocab: Vocab, media: Iterable[Span]) -> list[Span]:
        """The tokens as spans, with those of media before the text."""
        tokens, shown = self.tokens(vocab), list(media)
        begin = 0 if self.raw else 1  # behind <user>
        before, after = tokens[:begin], tokens[begin:]
        return [Span("prompt", 0, "text", before), *shown, Span("prompt", 1, "text", after)]


class TextStream:
    """Bytes of generated tokens in, text out.

    Characters are never split: the bytes of an unfinished one wait for the rest. Bytes that are not
    UTF-8 become U+FFFD. With stop strings, text that could be the beginning of one waits as well.

    Attributes:
        stopped: a stop string was found; the text before it has been given.
    """

    def __init__(self, stop: tuple[str, ...] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = tuple(text for text in stop if text)
        self._held = ""
        self.stopped = False

    def push(self, data: bytes) -> str:
        """Text that is certain after these bytes."""
        return self._release(self._decoder.decode(data))

    def finish(self) -> str:
        """What still waited."""
        text = self._release(self._decoder.decode(b"", final=True))
        held, self._held = self._held, ""
        return text + held

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest beginning of `stop`, short of all of it, that `text` ends with."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
