"""Beyond one literal needle: what is hidden and asked for in each variant, and what it scores."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gemtool.cmd.probe import chosen_options, read_haystack, titled
from gemtool.data.vocab import Vocab
from gemtool.errors import UsageError
from gemtool.probes import PROBES, multi_needle, needle, open_probe, probe_options
from gemtool.probes.distractors import look_alike, near_misses
from gemtool.probes.haystack import Case, Straw
from gemtool.probes.wordings import CITIES, WORDINGS, Wording
from tests.conftest import ROOT

NAMES = list(WORDINGS)


@pytest.fixture(scope="module")
def vocab() -> Vocab:
    return Vocab.load()


@pytest.fixture(scope="module")
def haystack() -> str:
    """Short: what is hidden counts here, not where."""
    return read_haystack(None)[:20_000]


def some_cases(vocab: Vocab, haystack: str, **options: Any) -> list[Case]:
    grid: dict[str, Any] = {"lengths": [3000], "depths": 4, "repetitions": 2, "seed": 0}
    return list(needle.cases(vocab, haystack, **{**grid, "shared": True, **options}))


def contexts(vocab: Vocab, found: list[Case]) -> list[tuple[str, list[Case]]]:
    """The text of each context, and its cases."""
    same: dict[int, list[Case]] = {}
    for case in found:
        same.setdefault(id(case.haystack), []).append(case)
    return [(vocab.decode(those[0].context), those) for those in same.values()]


def matches(template: str, text: str) -> list[tuple[str, str]]:
    """City and number of every sentence of this wording."""
    pattern = re.escape(template).replace(r"\{city\}", r"(\w+)").replace(r"\{number\}", r"(\d+)")
    return re.findall(pattern, text)


def city_of(case: Case, wording: Wording, *, many: bool = False) -> str:
    for question in wording.questions_for_all if many else wording.questions:
        found = re.fullmatch(re.escape(question).replace(r"\{city\}", r"(\w+)"), case.question)
        if found:
            return str(found[1])
    raise AssertionError(f"{case.question!r} is no question of the wording")


@pytest.mark.parametrize(
    ("shared", "digest"),
    [
        (False, "ad3de1975e8bd1578d924af692d7b4413287ee4082e7f4d953a0f27a90bda54c"),
        (True, "53e3ad7897e2f24dc518dd507c8772872b675dc669a0345bfe9fa9ae99c97c41"),
    ],
)
def test_the_default_is_what_it_was_before_there_were_variants(
    vocab: Vocab, shared: bool, digest: str
) -> None:
    grid: dict[str, Any] = {"lengths": [2000, 500], "depths": 3, "repetitions": 2, "seed": 0}
    seen = hashlib.sha256()
    for c in needle.cases(vocab, read_haystack(None), **grid, shared=shared):
        told = c.length, c.depth, c.case, c.question, c.prefix, c.answer, c.needle_at
        seen.update(repr(told).encode() + c.context.tobytes())
        assert (c.max_tokens, c.beginning) == (14, 24)
    assert seen.hexdigest() == digest


@pytest.mark.parametrize("name", NAMES)
def test_a_wording_is_well_formed(vocab: Vocab, name: str) -> None:
    wording = WORDINGS[name]
    asked = (*wording.questions, *wording.questions_for_all, wording.prefix_for_all)
    told = (wording.needle, *wording.near_misses)
    for text in (*asked, *told):
        assert text.count("{city}") == 1
        assert text.count("{number}") == (text in told)
        filled = text.format(city="Paris", number=1234567)
        assert vocab.decode(vocab.encode(filled)) == filled
        assert not re.search(r"\d{8}|[{}]", filled)
    assert len(set(asked)) == len(asked)
    assert len(set(told)) == len(told) >= 6
    assert wording.needle.startswith(wording.prefix)
    assert "{city}" in wording.prefix
    assert not wording.prefix.endswith(" ")
    # A sentence behind the number, and the model's own beginning, have room.
    assert len(vocab.encode(wording.prefix.format(city="Copenhagen"))) < wording.beginning
    # In one script each.
    letters = re.sub(r"\{\w+\}", "", "".join(asked + told))
    script = {"russian": r"[А-Яа-яёЁ]", "chinese": r"[\u4e00-\u9fff]"}.get(name, r"[A-Za-zÀ-ÿ]")
    assert all(re.match(script, letter) for letter in letters if letter.isalpha())


def test_paraphrases_are_many_and_new() -> None:
    """No example trains on what the probe asks, but for the words of the report."""
    paraphrased = WORDINGS["paraphrased"]
    assert len(paraphrased.questions) >= 8
    assert paraphrased.needle == WORDINGS["report"].needle
    written = "".join(path.read_text() for path in (ROOT / "examples").rglob("*.py"))
    for text in (
        *paraphrased.questions,
        *paraphrased.questions_for_all,
        *WORDINGS["report"].questions_for_all,
        *paraphrased.near_misses,
    ):
        assert f'"{text}"' not in written, text


@pytest.mark.parametrize("name", NAMES)
def test_needle_question_and_prefix_are_of_the_wording(
    vocab: Vocab, haystack: str, name: str
) -> None:
    wording = WORDINGS[name]
    for text, cases in contexts(vocab, some_cases(vocab, haystack, wording=name)):
        hidden = matches(wording.needle, text)
        assert len(hidden) == len(cases) == 4
        for case in cases:
            city = city_of(case, wording)
            assert hidden.count((city, case.answer)) == 1
            assert case.prefix == wording.prefix.format(city=city)
            sentence = wording.needle.format(city=city, number=case.answer)
            size = len(vocab.encode(" " + sentence))
            assert vocab.decode(case.context[case.needle_at :][:size]).strip() == sentence
    # Wordings differ in words only.
    report = some_cases(vocab, haystack)
    same = some_cases(vocab, haystack, wording=name)
    assert [c.answer for c in same] == [c.answer for c in report]
    assert [c.haystack.first for c in same] == [c.haystack.first for c in report]


def test_paraphrases_are_drawn(vocab: Vocab, haystack: str) -> None:
    wording = WORDINGS["paraphrased"]
    found = some_cases(vocab, haystack, wording="paraphrased", depths=20)
    assert found == some_cases(vocab, haystack, wording="paraphrased", depths=20)
    used = {c.question.replace(city_of(c, wording), "{city}") for c in found}
    assert len(used) > len(wording.questions) / 2
    report = some_cases(vocab, haystack, depths=20)
    for case, literal in zip(found, report, strict=True):
        np.testing.assert_array_equal(case.context, literal.context)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("absent", [False, True])
def test_distractors(vocab: Vocab, haystack: str, name: str, absent: bool) -> None:
    wording, count = WORDINGS[name], 9  # more than there are kinds
    found = some_cases(vocab, haystack, wording=name, distractors=count, absent=absent)
    for text, cases in contexts(vocab, found):
        assert len(cases[0].context) == 3000
        assert len(cases[0].haystack.hidden) == len(cases) * (1 + count)
        told = [
            pair for row in (wording.needle, *wording.near_misses) for pair in matches(row, text)
        ]
        assert len(told) == len(cases) * (1 + count)
        assert len({number for _, number in told}) == len(told)
        literal = matches(wording.needle, text)
        asked = {city_of(case, wording) for case in cases}
        own = [(city, number) for city, number in literal if city in asked]
        assert sorted(number for _, number in own) == sorted(c.answer for c in cases if c.answer)
        # For each city: of a look-alike, of another city, and of each changed sentence.
        for row in wording.near_misses:
            assert asked <= {city for city, _ in matches(row, text)}
        names = Counter(city for city, _ in literal)
        assert any(name not in CITIES for name in names)
        assert any(name in CITIES and name not in asked for name in names)
    assert found == some_cases(vocab, haystack, wording=name, distractors=count, absent=absent)


def test_near_misses_stand_at_ends_of_sentences(vocab: Vocab, haystack: str) -> None:
    straw = Straw.of(vocab, haystack)
    (case, *_) = some_cases(vocab, haystack, distractors=5)
    first, places = case.haystack.first, case.haystack.places
    ends = set(((straw.ends - first) % len(straw.tokens)).tolist())
    room = case.length - sum(map(len, case.haystack.hidden))
    assert all(place % len(straw.tokens) in ends or place in (0, room) for place in places)
    assert len(set(places)) > 15, "all over the context"
    assert list(places) == sorted(places)


def test_near_misses_differ_in_one_respect() -> None:
    rng = np.random.default_rng(0)
    wording, numbers = WORDINGS["report"], (str(n) for n in range(1_000_000, 1_000_100))
    made = list(near_misses(wording, "Paris", ["Rome", "Oslo"], numbers, 7, rng))
    assert len({re.sub(r"\d+", "", text) for text in made}) == 7
    assert sum("Paris" in text for text in made) == 5
    assert sum("Rome" in text or "Oslo" in text for text in made) == 1
    for city in CITIES:
        name = look_alike(city, rng)
        assert name not in CITIES
        assert len(name) == len(city)
        assert name[0] == city[0]
        assert 1 <= sum(a != b for a, b in zip(name, city, strict=True)) <= 2


@pytest.mark.parametrize("name", ["report", "paraphrased", "russian"])
def test_values(vocab: Vocab, haystack: str, name: str) -> None:
    wording = WORDINGS[name]
    found = some_cases(vocab, haystack, wording=name, values=3, distractors=2)
    literal = some_cases(vocab, haystack)
    for case, one in zip(found, literal, strict=True):
        numbers = case.answer.split()
        assert len(set(numbers)) == 3
        assert numbers[0] == one.answer
        assert case.max_tokens > one.max_tokens + 20
        assert needle.score(case, " and ".join(numbers)) == 1.0
        assert needle.score(case, f"{numbers[1]}, {numbers[1]}") == pytest.approx(1 / 3)
        assert needle.score(case, "none") == 0.0
    for text, cases in contexts(vocab, found):
        hidden = matches(wording.needle, text)
        for case in cases:
            city = city_of(case, wording, many=True)
            assert sorted(n for c, n in hidden if c == city) == sorted(case.answer.split())
            assert case.prefix == wording.prefix_for_all.format(city=city)
            # The first is at the depth of the row.
            first = wording.needle.format(city=city, number=case.answer.split()[0])
            size = len(vocab.encode(" " + first))
            assert vocab.decode(case.context[case.needle_at :][:size]).strip() == first
            assert abs(case.needle_at / case.length - case.depth) < 0.15
        assert len(cases[0].haystack.hidden) == len(cases) * 3 * (1 + 2)


@pytest.mark.parametrize("shared", [False, True])
def test_absent(vocab: Vocab, haystack: str, shared: bool) -> None:
    wording = WORDINGS["report"]
    found = some_cases(vocab, haystack, absent=True, shared=shared)
    present = some_cases(vocab, haystack, shared=shared)
    for case, other in zip(found, present, strict=True):
        np.testing.assert_array_equal(case.context, other.context)
        assert case.answer == ""
        assert case.needle_at == other.needle_at
    for text, cases in contexts(vocab, found):
        hidden = matches(wording.needle, text)
        asked = {city_of(case, wording) for case in cases}
        assert len(hidden) == len(asked) == len(cases) >= 1
        assert not asked & {city for city, _ in hidden}
        assert not any(city in text for city in asked)
    case = found[0]
    for text, right in (
        ("", 1.0),
        (" unknown.", 1.0),
        ("not among the 100 of them", 1.0),
        (" 1234567.", 0.0),
        ("It is 2024", 0.0),
        ("1,234,567", 0.0),
    ):
        assert needle.score(case, text) == right, text


def test_without_sharing_a_context_has_what_belongs_to_its_needle(
    vocab: Vocab, haystack: str
) -> None:
    found = some_cases(vocab, haystack, shared=False, distractors=2, values=2)
    assert len(contexts(vocab, found)) == len(found) == 8
    assert all(len(case.haystack.hidden) == 2 * (1 + 2) for case in found)


@pytest.mark.parametrize(
    "options",
    [{"distractors": 3}, {"values": 2}, {"absent": True}, {"wording": "paraphrased"}],
)
def test_a_variant_depends_on_the_seed(
    vocab: Vocab, haystack: str, options: dict[str, Any]
) -> None:
    first, again = (some_cases(vocab, haystack, **options) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert a == b
        np.testing.assert_array_equal(a.context, b.context)
    other = some_cases(vocab, haystack, seed=1, **options)
    assert not any(a.question == b.question for a, b in zip(first, other, strict=True))


def test_impossible_variants_are_refused(vocab: Vocab, haystack: str) -> None:
    for options, message in (
        ({"absent": True, "values": 2}, "--absent .* leave --values out"),
        ({"wording": "germann"}, "--wording: no 'germann'; did you mean 'german'"),
        ({"depths": 51, "absent": True}, "--depths: a haystack holds 50 needles here, not 51"),
        ({"depths": 101, "distractors": 1}, "--depths: a haystack holds 100 needles"),
        ({"lengths": [100], "distractors": 10}, "no room .* the shortest here is [0-9]+"),
        ({"lengths": [100], "values": 10}, "no room"),
    ):
        with pytest.raises(UsageError, match=message):
            some_cases(vocab, haystack, **options)  # type: ignore[arg-type]
    # The most that there are cities for.
    assert some_cases(vocab, haystack, depths=50, absent=True, distractors=1, lengths=[9000])


def test_multi_needle(vocab: Vocab, haystack: str) -> None:
    grid: dict[str, Any] = {"depths": 100, "repetitions": 2, "seed": 0, "lengths": [6000]}
    found = list(multi_needle.cases(vocab, haystack, **grid))
    assert len(found) == 200
    assert len({case.answer for case in found}) == 200
    assert {(c.question, c.prefix) for c in found} == {
        ("What are all the special magic numbers?", "The special magic")
    }
    for text, cases in contexts(vocab, found):
        hidden = matches(needle.NEEDLE, text)
        assert sorted(number for _, number in hidden) == sorted(case.answer for case in cases)
        assert len({city for city, _ in hidden}) == len(cases) == 100
        assert all(text.count(case.answer) == 1 for case in cases)
        # All of them could be said as they stand there.
        whole = "".join(f" {needle.NEEDLE.format(city=c, number=n)}" for c, n in hidden)
        assert {c.max_tokens for c in cases} == {cases[0].max_tokens}
        assert len(vocab.encode(whole)) < cases[0].max_tokens
        half = " ".join(case.answer for case in cases[::2])
        assert sum(multi_needle.score(case, half) for case in cases) == 50
    with pytest.raises(UsageError, match="--depths: a haystack holds 101 needles"):
        list(multi_needle.cases(vocab, haystack, **{**grid, "depths": 102}))


def test_probes_keep_to_their_contract() -> None:
    common = ["vocab", "haystack", "lengths", "depths", "repetitions", "seed"]
    for name in PROBES:
        module = open_probe(name)
        parameters = list(inspect.signature(module.cases).parameters)
        assert parameters == [*common, *probe_options(name)]
        assert list(inspect.signature(module.score).parameters) == ["case", "text"]


def test_options_of_a_probe() -> None:
    given: dict[str, Any] = dict.fromkeys(probe_options("needle"))
    assert chosen_options("needle", **given) == probe_options("needle")
    changed = chosen_options("needle", **{**given, "values": 4, "shared": True})
    assert titled("needle", changed) == "needle --shared --values 4"
    assert titled("multi-needle", chosen_options("multi-needle", **given)) == "multi-needle"
    with pytest.raises(UsageError, match="probe multi-needle has no --distractors"):
        chosen_options("multi-needle", **{**given, "distractors": 0})


def test_score_of_a_case_with_several_numbers(vocab: Vocab, haystack: str) -> None:
    case = replace(some_cases(vocab, haystack)[0], answer="1234567 7654321")
    assert needle.score(case, "7654321 and 1234567") == 1.0
    assert needle.score(case, "7654321") == 0.5
