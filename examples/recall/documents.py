"""Writes training documents for recall: JSONL for `gemtool tokenize`.

Each document is a piece of text in which sentences "The special magic {key} number is: {number}." are
hidden, near misses, names and numbers that are alike among them, followed by a chat that asks for some:
in the words of the report, in others, for several in one turn, and for keys that are not there. One
document in five has a wording of their own, of words of the text. Keys are words of the text too or
made up, never the cities that `gemtool probe` asks for; text, paraphrases and near misses are not the
probe's either: what is measured has not been seen in training.

    python documents.py TEXT.txt.gz --documents 6000 > needles.jsonl
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo"))
from needle_documents import keys_of, passage, read_text

from gemtool.probes.needle import CITIES, NEEDLE, NUMBER_DIGITS, PREFIX, QUESTION

PARAPHRASES = (
    "Which number is the special magic one of {city}?",
    "Tell me the special magic {city} number.",
    "What was said about the special magic number of {city}?",
    "Give me the number that is special and magic for {city}, please.",
    "I need the {city} number: which is it?",
    "{city} has a special magic number. What is it?",
    "Do you remember the special magic number for {city}?",
    "Find the special magic {city} number in the text.",
)
NEAR_MISSES = (
    "The special magic {city} code is: {number}.",
    "The ordinary {city} number is: {number}.",
    "The special {city} count is: {number}.",
    "The magic number of the {city} road is: {number}.",
    "Nobody knows the special magic {city} word.",
)
UNKNOWN = "unknown"
SYLLABLES = (
    "al an ar ba bel cor da den dor el en far gal hav il ka kor la len ma mar mir nor o pol ra ris sa "
    "sel ta tor ul va ven vil zan"
).split()


@functools.cache
def words_of(sentences: tuple[str, ...]) -> list[str]:
    """Words of the text in small letters, as often as they are there."""
    return re.findall(r"\b[a-z]{2,10}\b", " ".join(sentences))


def name_of(keys: list[str], others: list[str], rng: np.random.Generator) -> str:
    """A word of the text, or one that nobody has seen; now and then it begins or ends as one of the
    `others` does."""
    while True:
        if others and rng.random() < 0.3:
            like = others[int(rng.integers(len(others)))]
            cut = int(rng.integers(1, len(like)))
            new = "".join(rng.choice(SYLLABLES, size=int(rng.integers(1, 3))))
            name = like[:cut] + new if rng.random() < 0.5 else new + like[cut:]
        elif rng.random() < 0.6:
            return str(rng.choice(keys))
        else:
            name = "".join(rng.choice(SYLLABLES, size=int(rng.integers(2, 5))))
        if name.capitalize() not in CITIES:
            return name.capitalize()


def made_up(words: list[str], rng: np.random.Generator) -> tuple[str, str]:
    """A sentence that nobody says, up to its number, and a question for it."""
    chosen = [str(word) for word in rng.choice(words, size=int(rng.integers(2, 6)))]
    chosen.insert(int(rng.integers(len(chosen) + 1)), "{city}")
    sentence = " ".join(chosen)
    return sentence[0].upper() + sentence[1:] + str(
        rng.choice([":", " is:", " =", ","])
    ), sentence + "?"


def turns(
    wanted: list[tuple[str, str]], own: tuple[str, str] | None, rng: np.random.Generator
) -> list[dict[str, str]]:
    """A question for one or several names, and its answer; `own` are their sentence and question."""
    names = [name for name, _ in wanted]
    prefix = PREFIX if own is None else own[0]
    if own is not None:
        question = " ".join(own[1].format(city=name) for name in names)
    elif len(names) > 1:
        question = f"What are the special magic {', '.join(names[:-1])} and {names[-1]} numbers?"
    elif rng.random() < 0.6:
        question = QUESTION.format(city=names[0])
    else:
        question = str(rng.choice(PARAPHRASES)).format(city=names[0])
    answer = " ".join(f"{prefix.format(city=name)} {number}." for name, number in wanted)
    return [{"role": "user", "content": question}, {"role": "model", "content": answer}]


def document(
    sentences: tuple[str, ...],
    keys: list[str],
    rng: np.random.Generator,
    *,
    words: int,
    needles: int,
    read: float,
) -> dict[str, object]:
    """One document of about `words` words with `needles` needles and a question about each, half as
    many near misses, and sometimes a question about what is not there. Of a share `read` of documents
    the text is learned too, not the answers alone."""
    chosen = passage(sentences, rng, words)
    names: list[str] = []
    while len(names) < needles + 2:
        name = name_of(keys, names, rng)
        if name not in names:
            names.append(name)
    numbers: list[str] = []

    def number() -> str:
        """At random, but of half of them the first digits are those of an earlier one: an answer that
        begins right has still to be told from what else begins like it."""
        new = str(rng.integers(10 ** (NUMBER_DIGITS - 1), 10**NUMBER_DIGITS))
        if numbers and rng.random() < 0.5:
            shared = int(rng.integers(1, NUMBER_DIGITS))
            new = numbers[int(rng.integers(len(numbers)))][:shared] + new[shared:]
        numbers.append(new)
        return new

    hidden = [(name, number()) for name in names[:needles]]
    own = made_up(words_of(sentences), rng) if rng.random() < 0.2 else None
    needle = NEEDLE if own is None else own[0] + " {number}."

    def hide(sentence: str) -> None:
        chosen.insert(int(rng.integers(len(chosen) + 1)), sentence)

    first = rng.random() < 0.2
    for name, digits in hidden[first:]:
        hide(needle.format(city=name, number=digits))
    for _ in range(needles // 2):
        # Of a name that is asked for, or of one that is not there.
        name = names[int(rng.integers(needles + 1))]
        hide(str(rng.choice(NEAR_MISSES)).format(city=name, number=number()))
    if first:  # where nothing goes before it
        name, digits = hidden[0]
        chosen.insert(0, needle.format(city=name, number=digits))
    order = [hidden[i] for i in rng.permutation(needles)]
    if rng.random() < 0.1:
        order.insert(
            int(rng.integers(needles + 1)), (names[needles + int(rng.integers(2))], UNKNOWN)
        )
    messages: list[dict[str, str]] = []
    while order:
        size = int(rng.integers(2, 4)) if rng.random() < 0.15 else 1
        messages += turns(order[:size], own, rng)
        order = order[size:]
    # What is read is learned from now and then only: answers are what this is about.
    weight = int(rng.random() < read)
    return {"parts": [{"text": " ".join(chosen), "loss": weight}], "messages": messages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, help="plain text, perhaps compressed with gzip")
    parser.add_argument("--documents", type=int, default=6000)
    parser.add_argument("--words", type=int, default=240, help="words of text a document")
    parser.add_argument("--needles", type=int, default=8, help="needles, and questions, a document")
    parser.add_argument(
        "--read", type=float, default=0.5, help="share of documents whose text is a target too"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    text = " ".join(read_text(options.text).split())
    sentences = tuple(re.split(r"(?<=[.!?]) +", text))
    keys = keys_of(text)
    for i in range(options.documents):
        rng = np.random.default_rng([options.seed, i])
        row = document(
            sentences,
            keys,
            rng,
            words=options.words,
            needles=options.needles,
            read=options.read,
        )
        print(json.dumps({"id": f"needles/{i}", **row}, ensure_ascii=False))


if __name__ == "__main__":
    main()
