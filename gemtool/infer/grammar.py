"""Grammars that answers must match: which tokens may come next.

llguidance follows a grammar byte by byte and knows which tokens of a vocabulary it allows. Only pieces
with bytes are ever allowed, and, where the text so far is whole, the tokens that end an answer.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gemtool.control import CONTROL_COUNT, END_TURN, EOD
from gemtool.data.vocab import Vocab
from gemtool.errors import GemtoolError, UsageError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

KINDS = ("json_schema", "regex", "grammar")
"""How a grammar may be given; "grammar" is llguidance's dialect of Lark."""
KEPT = 64
"""Compiled grammars that are kept for prompts to come."""

# As json.dumps writes: one line, and a model cannot fill an answer with white space.
_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class Grammar:
    """What the text of an answer must match from its first byte to its last."""

    kind: str
    """One of KINDS."""
    text: str

    @classmethod
    def parse(cls, kind: str, given: str | Mapping[str, Any]) -> Grammar:
        """Checks a grammar; a JSON schema may also be an object.

        Raises:
            UsageError: it is none, asks for what llguidance does not know, or clearly nothing can
                match it.
        """
        grammar = cls(kind, _schema(given) if kind == "json_schema" else str(given))
        _compiled(grammar)
        return grammar


def _schema(given: str | Mapping[str, Any]) -> str:
    """A JSON schema as text, always spelled the same."""
    try:
        schema = json.loads(given) if isinstance(given, str) else given
        if not isinstance(schema, Mapping):
            raise UsageError('json-schema: not a JSON object; expected one as {"type": "object"}')
        return json.dumps(schema)
    except json.JSONDecodeError as problem:
        where = f"line {problem.lineno}, column {problem.colno}"
        raise UsageError(f"json-schema: {where}: not JSON: {problem.msg.lower()}") from None
    except RecursionError:
        raise UsageError("json-schema: too deeply nested") from None


@functools.lru_cache(KEPT)
def _compiled(grammar: Grammar) -> str:
    """The grammar as llguidance takes it; raises as `Grammar.parse`."""
    from llguidance import LLMatcher

    name = grammar.kind.replace("_", "-")
    try:
        if grammar.kind == "json_schema":
            compiled = LLMatcher.grammar_from_json_schema(grammar.text, defaults=_JSON)  # type: ignore[arg-type]
        elif grammar.kind == "regex":
            compiled = LLMatcher.grammar_from_regex(grammar.text)
        else:
            compiled = LLMatcher.grammar_from_lark(grammar.text)
        failed, problems = LLMatcher.validate_grammar_with_warnings(compiled, _bytes_alone())
    except ValueError as problem:  # half of a surrogate pair
        raise UsageError(f"{name}: {_reason(str(problem))}") from None
    if failed:
        raise UsageError(f"{name}: {_reason(problems[0], in_file=grammar.kind == 'grammar')}")
    return compiled


def _reason(message: str, in_file: bool = False) -> str:
    """What llguidance says in several lines, in one; with the place `in_file`."""
    first, *others = message.strip().splitlines()
    place = re.match(r"(?:at )?(\d+)\((\d+)\): ", first)
    told = first[place.end() :] if place else first
    told = next((x.removeprefix("error: ") for x in others if x.startswith("error: ")), told)
    told = told.partition("; following special tokens")[0]
    return f"line {place[1]}, column {place[2]}: {told}" if place and in_file else told


class Constraint:
    """How far one answer is in its grammar."""

    def __init__(self, matcher: LLMatcher, size: int) -> None:
        self._matcher = matcher
        self._size = size
        self._ended = False

    def mask(self) -> np.ndarray:
        """Which tokens may come next, bool [V].

        Raises:
            GemtoolError: none may, or the grammar is too ambiguous to be followed.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._require_sound()
        mask = np.unpackbits(bits, count=self._size, bitorder="little").astype(bool)
        # Lark can ask for control tokens, also in the middle.
        mask[:CONTROL_COUNT] = False
        mask[[END_TURN, EOD]] = self._matcher.is_accepting()
        if not mask.any():
            raise GemtoolError(
                "the grammar allows no text to go on with; it must not ask for tokens"
            )
        return mask

    def advance(self, token: int) -> None:
        """Takes a token that `mask` allowed."""
        if token in (END_TURN, EOD):
            self._ended = True
            return
        self._matcher.consume_token(token)
        self._require_sound()

    @property
    def finished(self) -> bool:
        """Whether the text is whole and nothing can follow it, or the answer was ended."""
        return self._ended or self._matcher.is_stopped()

    def _require_sound(self) -> None:
        if self._matcher.is_error():
            why = _reason(self._matcher.get_error())
            if why == "NoExtensionBias":
                why = "no text matches it"
            raise GemtoolError(f"the grammar cannot be followed: {why}")


class Constraints:
    """Begins constraints over the tokens of a vocabulary; a grammar is compiled once."""

    def __init__(self, vocab: Vocab) -> None:
        self._vocab = vocab
        self._matcher = functools.lru_cache(KEPT)(self._compile)

    def begin(self, grammar: Grammar) -> Constraint:
        """A constraint for one answer."""
        return Constraint(self._matcher(grammar).deep_copy(), self._vocab.size)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        from llguidance import LLMatcher

        return LLMatcher(self._tokenizer, _compiled(grammar), log_level=0)

    @functools.cached_property
    def _tokenizer(self) -> LLTokenizer:
        pieces = [self._vocab.piece_bytes(i) for i in range(CONTROL_COUNT, self._vocab.size)]
        return _Tokens(pieces, self._vocab.encode).tokenizer()


@functools.cache
def _bytes_alone() -> LLTokenizer:
    """The tokens that all vocabularies have."""
    pieces = [bytes([byte]) for byte in range(256)]
    return _Tokens(pieces, lambda text: [CONTROL_COUNT + x for x in text.encode()]).tokenizer()


class _Tokens:
    """Control tokens and pieces as llguidance wants to see them (its `TokenizerWrapper`)."""

    is_tokenizer_wrapper = True
    eos_token_id = END_TURN
    bos_token_id = None
    special_token_ids = tuple(range(CONTROL_COUNT))

    def __init__(self, pieces: list[bytes], encode: Callable[[str], Iterable[int]]) -> None:
        self._encode = encode
        # Control tokens have no bytes, but must have names: such as no grammar can spell.
        self.tokens = [b"\xff%d" % i for i in range(CONTROL_COUNT)] + pieces

    def __call__(self, text: str) -> list[int]:
        return [int(token) for token in self._encode(text)]

    def tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        return LLTokenizer(self, eos_token=[END_TURN, EOD])  # type: ignore[arg-type]
