"""Turns unpacked packages into one training and one held-out text file a language.

    python corpora.py PACKAGES CORPORA [--megabytes 56]

PACKAGES is what `fetch.sh` filled: a folder per package. The result is CORPORA/train/LANG.txt and
CORPORA/heldout/LANG.txt, the same bytes for the same packages. Standard library only.

How much a language contributes is its size to the power 0.4 (temperature sampling), so that small
languages are not drowned; English prose and code get a fixed share on top.
"""

from __future__ import annotations

import argparse
import gettext
import gzip
import html
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import prose

TEMPERATURE = 0.4
FIXED_SHARES = {"en": 0.30, "code": 0.15}
HELD_OUT_BYTES = 150_000

# Lines of a translation that are left in English teach nothing: in these languages a line needs a
# letter of the language's own script.
SCRIPTS = {
    "ar": "\u0600-\u06ff", "fa": "\u0600-\u06ff", "he": "\u0590-\u05ff", "el": "\u0370-\u03ff",
    "ru": "\u0400-\u04ff", "uk": "\u0400-\u04ff", "bg": "\u0400-\u04ff", "hi": "\u0900-\u097f",
    "mr": "\u0900-\u097f", "bn": "\u0980-\u09ff", "ta": "\u0b80-\u0bff", "te": "\u0c00-\u0c7f",
    "th": "\u0e00-\u0e7f", "ko": "\uac00-\ud7af", "zh": "\u4e00-\u9fff",
    "ja": "\u3040-\u30ff\u4e00-\u9fff",
}  # fmt: skip
OWN_LETTER = {language: re.compile(f"[{letters}]") for language, letters in SCRIPTS.items()}

BLOCK = re.compile(r"</(?:p|li|h\d|td|th|dt|dd|title|div|pre|item|entry)>|<br ?/?>", re.I)
NOT_TEXT = re.compile(r"<(script|style|head)\b.*?</\1>|<!--.*?-->", re.I | re.S)
TAG = re.compile(r"<[^>]*>")
ROFF_ESCAPE = re.compile(r"\\f(?:\[\w*\]|\(..|.)|\\s[-+]?\d|\\[&|^/,%:]")
ROFF_TEXT_MACROS = {"B", "I", "BR", "IR", "RB", "RI", "BI", "IB", "SH", "SS", "IP", "SM", "Nm"}
ROFF_CHARACTERS = {r"\-": "-", r"\(aq": "'", r"\(dq": '"', r"\e": "\\", r"\ ": " ", r"\(bu": "•"}


def language_of(code: str) -> str:
    """`pt-BR`, `zh_CN` -> `pt`, `zh`: regional variants share a file."""
    return re.split(r"[-_@.]", code)[0].lower()


def read(path: Path) -> str:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return data.decode("utf-8", errors="ignore")


def from_markup(text: str) -> str:
    """Paragraphs of HTML or Mallard XML, one a line, without tags."""
    text = BLOCK.sub("\x00", NOT_TEXT.sub(" ", text))
    text = html.unescape(TAG.sub("", text))
    return "\n".join(line for part in text.split("\x00") if (line := " ".join(part.split())))


def from_roff(text: str) -> str:
    """The words of a manual page; requests are dropped, filled lines are joined to paragraphs."""
    paragraphs: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.startswith((".", "'")):
            macro, _, rest = line[1:].lstrip().partition(" ")
            if macro not in ROFF_TEXT_MACROS:
                paragraphs.append([])
                continue
            line = rest.replace('"', "")
            if macro in ("SH", "SS"):
                paragraphs.append([])
        for escape, character in ROFF_CHARACTERS.items():
            line = line.replace(escape, character)
        paragraphs[-1].append(ROFF_ESCAPE.sub("", line).strip())
    return "\n".join(" ".join(words) for words in paragraphs if words)


def from_catalogue(path: Path) -> str:
    """The translated messages of a compiled gettext catalogue."""
    with path.open("rb") as file:
        catalogue = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
    messages = (message for key, message in sorted(catalogue.items(), key=str) if key)
    return "\n".join(" ".join(TAG.sub("", message).split()) for message in messages)


def json_strings(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for child in value.values():
            yield from json_strings(child)
    elif isinstance(value, list):
        for child in value:
            yield from json_strings(child)
    elif isinstance(value, str) and len(value) > 40:
        yield html.unescape(TAG.sub("", value))


def text_of(path: Path) -> str:
    """What a file says, by its kind."""
    if path.suffix in (".html", ".page"):
        return from_markup(read(path))
    if path.suffix == ".mo":
        return from_catalogue(path)
    return read(path)


# Path inside PACKAGES -> language: a group of the pattern, or fixed.
TRANSLATIONS = [
    re.compile(pattern)
    for pattern in (
        r"gnome-user-docs/.*/help/([^/]+)/.*\.page$",
        r"debian-handbook/.*/html/([^/]+)/.*\.html$",
        r"libreoffice-help[^/]*/.*/help/([^/]+)/text/.*\.html$",
        r"libreoffice-l10n[^/]*/.*/resource/([^/]+)/LC_MESSAGES/.*\.mo$",
        r"django/.*/locale/([^/]+)/LC_MESSAGES/.*\.mo$",
    )
]
MANUAL = re.compile(r"/share/man/(?:([^/]+)/)?man\d/")
DOCUMENTATION = re.compile(
    r"linux-doc[^/]*/.*/Documentation/.*\.(rst|txt)(\.gz)?$|python3\.11-doc/.*\.rst\.txt$"
)
SOURCE_CODE = re.compile(
    r"(libpython3\.11-stdlib|linux-libc-dev|django)/.*\.(py|c|h|js|html|css|json)$"
)
FACTBOOK = re.compile(r"[^/]*factbook[^/]*/package/[^/]+/[^/]+\.json$")


def documents(packages: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of every usable file, in a fixed order."""
    for path in sorted(p for p in packages.rglob("*") if p.is_file() and not p.is_symlink()):
        name = path.relative_to(packages).as_posix()
        translation = next((m for p in TRANSLATIONS if (m := p.match(name))), None)
        if translation:
            code = translation[1]
            yield "en" if code == "C" else language_of(code), text_of(path)
        elif manual := MANUAL.search(name):
            yield language_of(manual[1] or "en"), from_roff(read(path))
        elif DOCUMENTATION.match(name) or SOURCE_CODE.match(name):
            yield "code", read(path)
        elif FACTBOOK.match(name):
            yield "en", "\n".join(json_strings(json.loads(read(path))))
    for year, text in prose.addresses(packages):
        if not prose.in_haystack(year):
            yield "en", "\n".join(prose.paragraphs(text))
    for text in prose.chapters(packages):
        yield "en", "\n".join(prose.paragraphs(text))


def usable(line: str, language: str) -> bool:
    letters = OWN_LETTER.get(language)
    return (
        bool(line.strip()) and "\0" not in line and (letters is None or bool(letters.search(line)))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packages", type=Path)
    parser.add_argument("corpora", type=Path)
    parser.add_argument("--megabytes", type=float, default=56.0, help="of training text in all")
    options = parser.parse_args()

    texts: dict[str, list[str]] = defaultdict(list)
    for language, text in documents(options.packages):
        lines = [line for line in text.split("\n") if usable(line, language)]
        if lines:
            texts[language].append("\n".join(lines))

    order = random.Random(0)
    held_out: dict[str, str] = {}
    for language, parts in sorted(texts.items()):
        order.shuffle(parts)
        kept, taken = [], 0
        while parts and taken < min(HELD_OUT_BYTES, sum(map(len, parts)) // 20):
            kept.append(parts.pop())
            taken += len(kept[-1])
        held_out[language] = "\n".join(kept)

    sizes = {language: sum(len(t.encode()) for t in parts) for language, parts in texts.items()}
    total = options.megabytes * 1e6
    rest = total * (1 - sum(FIXED_SHARES.values()))
    scale = sum(s**TEMPERATURE for lang, s in sizes.items() if lang not in FIXED_SHARES)
    for language, parts in sorted(texts.items()):
        share = rest * sizes[language] ** TEMPERATURE / scale
        if language in FIXED_SHARES:
            share = FIXED_SHARES[language] * total
        lines = list(dict.fromkeys("\n".join(parts).split("\n")))
        order.shuffle(lines)
        written = 0
        for name, content in (("train", lines), ("heldout", held_out[language].split("\n"))):
            folder = options.corpora / name
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f"{language}.txt").open("w", encoding="utf-8") as file:
                room = share if name == "train" else float("inf")
                for line in content:
                    room -= len(line.encode()) + 1
                    if room < 0:
                        break
                    file.write(line + "\n")
                    written += (len(line.encode()) + 1) * (name == "train")
        print(f"{language:6} {sizes[language] / 1e6:8.2f} MB found {written / 1e6:8.2f} MB written")


if __name__ == "__main__":
    main()
