"""Writes training documents for the text needle: JSONL for `gemtool tokenize`.

Each document is a piece of text in which sentences "The special magic {key} number is: {number}."
are hidden, followed by a chat that asks for some of them. The keys are words of the text, not the
cities that `gemtool probe needle` asks for, and the text is not the probe's haystack: what the probe
measures has not been seen in training.

    python needle_documents.py TEXT.txt.gz --documents 800 --words 420 > needles.jsonl
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gemtool.probes.needle import CITIES, NEEDLE, NUMBER_DIGITS, PREFIX, QUESTION


def read_text(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()


def keys_of(text: str) -> list[str]:
    """Capitalised words of the text that are not cities of the probe."""
    words = set(re.findall(r"\b[A-Z][a-z]{3,9}\b", text))
    return sorted(words - set(CITIES))


def passage(sentences: Sequence[str], rng: np.random.Generator, words: int) -> list[str]:
    """Sentences that follow one another, of about `words` words."""
    first = int(rng.integers(len(sentences)))
    chosen: list[str] = []
    count = 0
    while count < words:
        sentence = sentences[(first + len(chosen)) % len(sentences)]
        chosen.append(sentence)
        count += sentence.count(" ") + 1
    return chosen


def document(
    sentences: list[str], keys: list[str], rng: np.random.Generator, *, words: int, needles: int
) -> dict[str, object]:
    """One document of about `words` words with `needles` needles and a question about each."""
    chosen = passage(sentences, rng, words)
    names = rng.choice(keys, size=needles, replace=False).tolist()
    low, high = 10 ** (NUMBER_DIGITS - 1), 10**NUMBER_DIGITS
    numbers = [str(n) for n in rng.integers(low, high, size=needles)]
    for name, number in zip(names, numbers, strict=True):
        at = int(rng.integers(len(chosen) + 1))
        chosen.insert(at, NEEDLE.format(city=name, number=number))
    messages: list[dict[str, str]] = []
    for i in rng.permutation(needles):
        answer = f"{PREFIX.format(city=names[i])} {numbers[i]}."
        messages.append({"role": "user", "content": QUESTION.format(city=names[i])})
        messages.append({"role": "model", "content": answer})
    return {"text": " ".join(chosen), "messages": messages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, help="plain text, perhaps compressed with gzip")
    parser.add_argument("--documents", type=int, default=800)
    parser.add_argument("--words", type=int, default=420, help="words of text a document")
    parser.add_argument("--needles", type=int, default=4, help="needles, and questions, a document")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    text = " ".join(read_text(options.text).split())
    sentences = re.split(r"(?<=[.!?]) +", text)
    keys = keys_of(text)
    for i in range(options.documents):
        rng = np.random.default_rng([options.seed, i])
        row = document(sentences, keys, rng, words=options.words, needles=options.needles)
        print(json.dumps({"id": f"needles/{i}", **row}, ensure_ascii=False))


if __name__ == "__main__":
    main()
