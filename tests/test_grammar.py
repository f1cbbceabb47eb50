"""Answers that match a grammar: whatever a model prefers, what it says is valid, and ends."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemtool.checkpoint import open_checkpoint
from gemtool.control import CONTROL_COUNT, END_TURN, EOD
from gemtool.data.vocab import Vocab
from gemtool.errors import CorruptInput, GemtoolError, UsageError
from gemtool.infer import grammar as grammar_module
from gemtool.infer.decode import read_requests
from gemtool.infer.engine import Engine
from gemtool.infer.grammar import Constraint, Constraints, Grammar
from gemtool.infer.sampling import Sampling, log_softmax, sample
from gemtool.infer.text import Prompt
from tests.conftest import ROOT, Command
from tests.test_prefill_decode import make_engine, tiny

VOCAB = Vocab.load()
PIECES = [VOCAB.piece_bytes(i) for i in range(VOCAB.size)]
CONSTRAINTS = Constraints(VOCAB)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "run"
    make_engine(path, tiny(VOCAB.size), VOCAB, 64)
    return path


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine(open_checkpoint(folder), 64)


def begin(kind: str, text: str | dict[str, Any]) -> Constraint:
    return CONSTRAINTS.begin(Grammar.parse(kind, text))


def walk(constraint: Constraint, rng: np.random.Generator, most: int = 400) -> str:
    """The text of random tokens, each of which the constraint allows; it ends when it may."""
    data = b""
    for _ in range(most):
        (allowed,) = np.nonzero(constraint.mask())
        token = END_TURN if END_TURN in allowed else int(rng.choice(allowed))
        constraint.advance(token)
        if token == END_TURN:
            break
        assert token >= CONTROL_COUNT
        data += PIECES[token]
        if constraint.finished:
            break
    assert constraint.finished
    return data.decode()


def spell(constraint: Constraint, text: str) -> None:
    """Advances by a text, in the shortest tokens that are allowed."""
    data = text.encode()
    while data:
        allowed = np.flatnonzero(constraint.mask()).tolist()
        fitting = [i for i in allowed if i >= CONTROL_COUNT and data.startswith(PIECES[i])]
        assert fitting, (text, data)
        token = min(fitting, key=lambda i: len(PIECES[i]))
        constraint.advance(token)
        data = data[len(PIECES[token]) :]


# What is allowed


REGEXES = (
    "[0-9]{3}-[0-9]{4}",
    "(yes|no|maybe)( [a-z]{1,9}){0,3}",
    "é|ü|日本|🤖",
    ".{5}",
    r"[^a-z]{4}\d",
    'a/b"c',
    "",
    "(?i)stop",
    "[\U0001f300-\U0001f5ff]{3}",
    "a\nb",
)


@pytest.mark.parametrize("pattern", REGEXES)
def test_random_walks_match_the_pattern(pattern: str) -> None:
    for seed in range(15):
        text = walk(begin("regex", pattern), np.random.default_rng(seed))
        assert re.fullmatch(pattern, text), text


schemas = st.deferred(lambda: leaves | arrays | objects)
names = st.sampled_from(["a", "name", "größe", "x y", 'q"'])
leaves = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.integers(-50, 50).map(lambda n: {"type": "integer", "minimum": n, "maximum": n + 20}),
    st.integers(1, 6).map(lambda n: {"type": "string", "minLength": n - 1, "maxLength": n}),
    st.lists(st.integers() | st.text(max_size=4) | st.none(), min_size=1, max_size=3).map(
        lambda values: {"enum": values}
    ),
)
arrays = st.tuples(schemas, st.integers(0, 2)).map(
    lambda x: {"type": "array", "items": x[0], "minItems": x[1], "maxItems": x[1] + 1}
)
objects = st.dictionaries(names, schemas, max_size=3).flatmap(
    lambda properties: st.sets(st.sampled_from(sorted(properties) or ["a"])).map(
        lambda required: {
            "type": "object",
            "properties": properties,
            "required": sorted(required & properties.keys()),
            "additionalProperties": False,
        }
    )
)


def follows(value: Any, schema: dict[str, Any]) -> bool:
    """JSON Schema as far as `schemas` go."""
    if "enum" in schema:
        return any(value == one and type(value) is type(one) for one in schema["enum"])
    kind = schema["type"]
    if kind == "object":
        properties = schema["properties"]
        return (
            isinstance(value, dict)
            and set(schema["required"]) <= value.keys() <= properties.keys()
            and all(follows(one, properties[name]) for name, one in value.items())
        )
    if kind == "array":
        return (
            isinstance(value, list)
            and schema["minItems"] <= len(value) <= schema["maxItems"]
            and all(follows(one, schema["items"]) for one in value)
        )
    if kind == "string":
        return isinstance(value, str) and schema["minLength"] <= len(value) <= schema["maxLength"]
    if kind == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    return value is None if kind == "null" else isinstance(value, bool)


@settings(max_examples=60)
@given(schemas, st.integers(0, 1 << 30))
def test_random_walks_follow_random_schemas(schema: dict[str, Any], seed: int) -> None:
    text = walk(begin("json_schema", schema), np.random.default_rng(seed), 2000)
    assert follows(json.loads(text), schema), text
    assert "\n" not in text


def test_json_is_spelled_as_json_dumps_does() -> None:
    value = {"a": [1, 2], "b": {"c": None}}
    c = {"type": "object", "properties": {"c": {"type": "null"}}, "additionalProperties": False}
    a = {"type": "array", "items": {"type": "integer"}}
    constraint = begin("json_schema", {"type": "object", "properties": {"a": a, "b": c}})
    spell(constraint, json.dumps(value)[:-1])
    assert not constraint.finished
    constraint = begin("json_schema", {"type": "object", "properties": {"a": a}})
    spell(constraint, '{"a": [')
    allowed = [PIECES[i] for i in np.flatnonzero(constraint.mask())]
    assert not any(piece.startswith((b" ", b"\n")) for piece in allowed)


def test_the_mask_is_of_pieces_and_of_ends_where_the_text_is_whole() -> None:
    constraint = begin("regex", "ab*")
    mask = constraint.mask()
    assert (mask.dtype, mask.shape) == (np.bool_, (VOCAB.size,))
    assert {PIECES[i] for i in np.flatnonzero(mask)} == {b"a", b"ab"}
    spell(constraint, "ab")
    mask = constraint.mask()
    assert np.flatnonzero(mask[:CONTROL_COUNT]).tolist() == sorted([EOD, END_TURN])
    assert not constraint.finished
    constraint.advance(EOD)
    assert constraint.finished


def test_finished_at_once_when_nothing_can_follow() -> None:
    constraint = begin("regex", "[0-9]{3}")
    spell(constraint, "12")
    assert not constraint.finished
    spell(constraint, "3")
    assert constraint.finished


def test_constraints_of_one_grammar_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    constraints, grammar = Constraints(VOCAB), Grammar.parse("regex", "ab|cd")
    first, second = constraints.begin(grammar), constraints.begin(grammar)
    spell(first, "a")
    spell(second, "cd")
    assert second.finished
    assert not first.finished
    compiled: list[Grammar] = []
    monkeypatch.setattr(constraints, "_compile", compiled.append)
    constraints.begin(Grammar.parse("regex", "ab|cd"))
    assert not compiled


def test_a_grammar_is_checked_once_for_all_lines() -> None:
    misses = grammar_module._compiled.cache_info().misses
    lines = b"".join(b'{"prompt": "a", "json_schema": {"enum": ["once"]}}\n' for _ in range(20))
    prompts = [r.prompt for r in read_requests(io.BytesIO(lines), "p", Prompt(""))]
    assert len({prompt.grammar for prompt in prompts}) == 1
    assert grammar_module._compiled.cache_info().misses == misses + 1


@pytest.mark.parametrize(
    "text",
    ['start: <[4]> "a"', "start: <[6]>", "start: AB\nAB: /a/ & /b/"],
)
def test_control_tokens_and_the_impossible_are_never_allowed(text: str) -> None:
    constraint = begin("grammar", text)
    with pytest.raises(GemtoolError, match=r"the grammar (allows no text|cannot be followed)"):
        for _ in range(3):
            mask = constraint.mask()
            assert not mask[:CONTROL_COUNT].any()
            constraint.advance(int(np.flatnonzero(mask)[0]))


def test_too_ambiguous_a_grammar_is_one_line() -> None:
    constraint = begin("regex", "(a{1000}){1000}")
    with pytest.raises(GemtoolError, match=r"cannot be followed: .*too many") as failure:
        for _ in range(3):
            constraint.advance(int(np.flatnonzero(constraint.mask())[0]))
    assert "\n" not in str(failure.value)


@given(st.integers(0, 1 << 30), st.sampled_from([0.0, 0.3, 1.0, 50.0]))
def test_sampling_knows_the_allowed_only(seed: int, temperature: float) -> None:
    rng = np.random.default_rng(seed)
    logits, mask = rng.normal(size=20).astype(np.float32) * 9, rng.random(20) < 0.2
    mask[rng.integers(20)] = True
    how = Sampling(temperature, top_k=int(rng.integers(0, 5)), top_p=0.9)
    token = sample(logits, how, (seed, 0, 0), mask)
    assert mask[token]
    if temperature == 0:
        assert logits[token] == logits[mask].max()


# Answers of a model


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["cat", "dog", None]},
        "ages": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99},
                 "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "kind", "ages"],
    "additionalProperties": False,
}  # fmt: skip


@pytest.mark.parametrize("temperature", [0.0, 1.0, 4.0])
def test_a_model_of_random_weights_answers_by_the_schema(
    engine: Engine, temperature: float
) -> None:
    for seed in range(4):
        prompt = Prompt(
            "Who?",
            seed=seed,
            sampling=Sampling(temperature),
            max_tokens=200,
            grammar=Grammar.parse("json_schema", SCHEMA),
        )
        parts: list[str] = []
        answer = engine.answer(None, prompt, parts.append)
        assert answer.finish == "stop"
        assert VOCAB.decode_bytes(answer.tokens).decode() == answer.text == "".join(parts)
        value = json.loads(answer.text)
        assert list(value) == ["name", "kind", "ages"]
        assert len(value["name"]) <= 8
        assert value["kind"] in ("cat", "dog", None)
        assert 1 <= len(value["ages"]) <= 3
        assert all(0 <= age <= 99 for age in value["ages"])


@pytest.mark.parametrize(
    ("kind", "text", "pattern"),
    [
        ("regex", "[0-9]{2}(,[0-9]{2}){3}", "[0-9]{2}(,[0-9]{2}){3}"),
        ("regex", "日本|é{3}", "日本|é{3}"),
        ("grammar", 'start: item ("," item)~2\nitem: /[a-f]{2}/ | "🤖"', "(.+,){2}.+"),
    ],
)
def test_a_model_of_random_weights_matches(
    engine: Engine, kind: str, text: str, pattern: str
) -> None:
    context = engine.prefill(VOCAB.encode("A document about numbers."))
    for temperature in (0.0, 2.0):
        prompt = Prompt("?", sampling=Sampling(temperature), grammar=Grammar.parse(kind, text))
        answer = engine.answer(context, prompt)
        assert re.fullmatch(pattern, answer.text), answer.text
        assert answer.finish == "stop"


def test_an_answer_ends_with_its_grammar_or_at_max_tokens(engine: Engine) -> None:
    digits = Grammar.parse("regex", "[0-9]{9}")
    whole = engine.answer(None, Prompt("?", grammar=digits, max_tokens=9))
    assert (len(whole.text), whole.finish) == (9, "stop")
    cut = engine.answer(None, Prompt("?", grammar=digits, max_tokens=8))
    assert (cut.text, cut.finish) == (whole.text[:8], "length")
    letters = Grammar.parse("regex", "abc[de]fgh")
    stopped = engine.answer(None, Prompt("?", grammar=letters, stop=("f",)))
    assert re.fullmatch("abc[de]", stopped.text)
    assert stopped.finish == "stop"


def test_the_grammar_is_of_what_follows_the_prefix(engine: Engine) -> None:
    grammar = Grammar.parse("regex", "[0-9]{2}")
    answer = engine.answer(None, Prompt("?", prefix="It is ", grammar=grammar))
    assert re.fullmatch("[0-9]{2}", answer.text)


def test_logprobs_are_those_of_the_model(engine: Engine) -> None:
    prompt = Prompt("?", grammar=Grammar.parse("regex", "[0-9]"), logprobs=2)
    answer = engine.answer(None, prompt)
    (step,) = engine.generate(None, prompt.tokens(VOCAB), max_tokens=1)
    values = log_softmax(step.logits)
    (entry,) = answer.logprobs
    assert entry["logprob"] == float(values[answer.tokens[0]])
    assert entry["top"][0]["token"] == step.token != answer.tokens[0]


# What is refused


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("regex", "[", "regex: unclosed character class"),
        ("regex", "(?=a)b", "regex: look-around.* not supported"),
        ("regex", r"(a)\1", "regex: backreferences are not supported"),
        ("regex", "\ud800", "regex: .*surrogates"),
        ("grammar", 'start: "a"\n  foo', "grammar: line 2, column"),
        ("grammar", "start: <user>", 'grammar: line 1, column 8: unknown special token: "<user>"$'),
        ("grammar", 'item: "a"', "grammar: no start rule"),
        ("json_schema", "{", "json-schema: line 1, column 2: not JSON: expecting property name"),
        ("json_schema", "[]", "json-schema: not a JSON object; expected one"),
        ("json_schema", {"type": "nonsense"}, "json-schema: Invalid type: nonsense"),
        ("json_schema", {"type": "array", "uniqueItems": True}, "Unimplemented keys"),
        ("json_schema", {"type": "integer", "minimum": 2, "maximum": 1}, "Unsatisfiable"),
        ("json_schema", {"$ref": "http://example.com/schema"}, "json-schema: .*not present"),
        ("json_schema", '{"items":' * 100_000, "json-schema: too deeply nested"),
        ("grammar", "start: " + "(" * 100_000, "grammar: line 1, .*too deeply nested"),
    ],
)
def test_what_is_no_grammar_is_one_line(kind: str, text: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as failure:
        Grammar.parse(kind, text)
    assert "\n" not in str(failure.value)
    assert failure.value.exit_code == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"regex": "["}, "p.jsonl: line 1: regex: unclosed character class"),
        ({"json_schema": {"type": 1}}, "p.jsonl: line 1: json-schema: type must be"),
        ({"json_schema": "x"}, "line 1: json-schema: line 1, column 1: not JSON"),
        ({"json_schema": 3}, "'json_schema' is 3; expected dict or str"),
        ({"grammar": "x", "regex": "y"}, "line 1: 'regex' and 'grammar' exclude each other"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], message: str) -> None:
    line = json.dumps({"prompt": "a", **fields}).encode()
    with pytest.raises(CorruptInput, match=message):
        list(read_requests(io.BytesIO(line), "p.jsonl", Prompt("")))


# The command


@pytest.fixture
def poisoned(tmp_path: Path) -> dict[str, str]:
    """An environment in which llguidance cannot be imported."""
    package = tmp_path / "poisoned" / "llguidance"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    return {"PYTHONPATH": os.pathsep.join([str(package.parent), str(ROOT)])}


def test_only_a_grammar_imports_its_library(
    gemtool: Command, folder: Path, poisoned: dict[str, str]
) -> None:
    ask = ("decode", "--ckpt", folder, "--prompt", "?", "--max-tokens", 2)
    assert json.loads(gemtool(*ask, env=poisoned).stdout)["tokens"]
    assert b"imported" in gemtool(*ask, "--regex", "a", env=poisoned, check=False).stderr


def test_commands(gemtool: Command, folder: Path, tmp_path: Path) -> None:
    ask = ("decode", "--ckpt", folder, "--max-tokens", 90)
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA, indent=2))
    (tmp_path / "list.lark").write_text('start: WORD ("," WORD)~1..3\nWORD: /[a-z]{3}/\n')
    lines = [
        {"prompt": "?"},
        {"prompt": "?", "regex": "[0-9]{4}"},
        {"prompt": "?", "grammar": 'start: "so be it"'},
        {"prompt": "?", "json_schema": '{"const": [1, null]}', "temperature": 1},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def texts(*options: object) -> list[str]:
        rows = [json.loads(line) for line in gemtool(*ask, *options).stdout.splitlines()]
        assert {row["finish"] for row in rows} == {"stop"}
        return [row["text"] for row in rows]

    by_schema, digits, fixed, array = texts("--prompts", "p.jsonl", "--json-schema", "schema.json")
    assert json.loads(by_schema).keys() == SCHEMA["properties"].keys()
    assert re.fullmatch("[0-9]{4}", digits)
    assert (fixed, array) == ("so be it", "[1, null]")
    assert texts("--prompt", "?", "--json-schema", json.dumps(SCHEMA)) == [by_schema]
    assert texts("--prompt", "?", "--regex", "[0-9]{4}") == [digits]
    (words,) = texts("--prompt", "?", "--grammar", "list.lark", "--temperature", 1)
    assert re.fullmatch("[a-z]{3}(,[a-z]{3}){1,3}", words)

    def refused(code: int, message: str, *options: object) -> None:
        done = gemtool(*ask, *options, check=False)
        shown = done.stderr.decode()
        assert (done.returncode, done.stdout) == (code, b""), shown
        assert shown == f"gemtool: error: {message}\n"

    refused(2, "regex: unclosed character class", "--prompt", "?", "--regex", "[")
    refused(2, "--regex and --grammar exclude each other", "--regex", "a", "--grammar", "b")
    refused(2, "--json-schema: 'nothing.json' cannot be read: no such file or directory",
            "--json-schema", "nothing.json")  # fmt: skip
    (tmp_path / "p.jsonl").write_text('{"prompt": "?"}\n{"prompt": "?", "regex": "("}\n')
    refused(3, "p.jsonl: line 2: regex: unclosed group", "--prompts", "p.jsonl")
