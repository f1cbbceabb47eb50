"""Makes the two shipped English texts from two npm packages of public-domain prose.

    python prose.py PACKAGES HAYSTACK.txt.gz TRAINING.txt.gz

The haystack is State of the Union addresses of 1790 to 1849, the training text other addresses
and half of Moby-Dick: no document is in both. Standard library only; the same packages give the
same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from pathlib import Path

HAYSTACK_YEARS = range(1790, 1850)
HAYSTACK_DIGITS = (0, 3, 6, 9)
TRAINING_YEARS = (1852, 1855, 1858, 1862, 1865, 1868, 1872, 1875, 1877, 1881)
PARAGRAPH = 700  # characters; the packages hold an address as one line
SENTENCE_END = re.compile(r"(?<=[a-z\d][.?!])\s+(?=[A-Z\"])")


def in_haystack(year: int) -> bool:
    return year in HAYSTACK_YEARS and year % 10 in HAYSTACK_DIGITS


def paragraphs(text: str) -> list[str]:
    """Paragraphs as the text has them; where it has none, whole sentences up to a fair length."""
    result = []
    for block in re.split(r"\n\s*\n", text):
        current = ""
        for sentence in SENTENCE_END.split(" ".join(block.split())):
            if current and len(current) + len(sentence) > PARAGRAPH:
                result.append(current)
                current = ""
            current = f"{current} {sentence}".strip()
        if current:
            result.append(current)
    return result


def addresses(packages: Path) -> list[tuple[int, str]]:
    """(year, text) of every State of the Union address, oldest first."""
    files = sorted(packages.glob("*datasets-sotu*/package/data/*.json"))
    records = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return [(int(record["year"]), record["text"]) for record in records]


def chapters(packages: Path) -> list[str]:
    """The numbered chapters of Moby-Dick, in order."""
    files = packages.glob("*datasets-moby-dick*/package/data/chapter_*.json")
    records = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    numbered = sorted((int(r["chapter"]), r["text"]) for r in records if r["chapter"].isdigit())
    return [text for _, text in numbered]


def write(path: Path, texts: list[str]) -> None:
    content = "\n\n".join("\n\n".join(paragraphs(text)) for text in texts) + "\n"
    path.write_bytes(gzip.compress(content.encode(), compresslevel=9, mtime=0))
    print(f"{path}: {len(content):,} characters, {path.stat().st_size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packages", type=Path)
    parser.add_argument("haystack", type=Path)
    parser.add_argument("training", type=Path)
    options = parser.parse_args()
    speeches = addresses(options.packages)
    write(options.haystack, [text for year, text in speeches if in_haystack(year)])
    book = chapters(options.packages)[::2]
    write(options.training, [*[text for year, text in speeches if year in TRAINING_YEARS], *book])


if __name__ == "__main__":
    main()
