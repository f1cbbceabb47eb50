"""What a file is: by its first bytes, then by its name."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import PurePath

from gemtool.data import compressed
from gemtool.data.records import looks_like_record
from gemtool.errors import CorruptInput

HEAD = 64 << 10
"""How many bytes `sniff` wants to see."""


class Modality(StrEnum):
    """What an input is taken for."""

    auto = "auto"
    text = "text"
    image = "image"
    audio = "audio"
    video = "video"


RECORDS = "records"
"""A kind beside those of Modality: JSONL, a document a line."""

EXTENSIONS: dict[str, frozenset[str]] = {
    RECORDS: frozenset({"jsonl", "ndjson"}),
    "image": frozenset(
        "avif bmp gif ico jp2 jpeg jpg pbm pgm png ppm qoi tga tif tiff webp".split()
    ),
    "audio": frozenset(
        "aac aif aiff amr flac m4a m4b mka mp2 mp3 oga ogg opus wav wave wma".split()
    ),
    "video": frozenset("3gp avi flv m2ts m4v mkv mov mp4 mpeg mpg ogv vob webm wmv".split()),
    "text": frozenset(
        (
            "adoc asm awk bat bib c cc cfg clj cmake conf cpp cs css csv cxx d dart diff el erl ex "
            "f90 fs go gradle h hpp hs htm html ini ipynb java jl js json jsx kt less lisp log lua "
            "m4 make markdown md mjs mk ml nim org patch php pl pm po proto ps1 py pyi pyx r rb rs "
            "rst sass scala scm scss sh sql srt svelte svg swift tcl tex texi toml ts tsv tsx txt "
            "vb vim vtt vue xml yaml yml zig"
        ).split()
    ),
}
_NAMES = frozenset("Dockerfile LICENSE Makefile NOTICE README".split())

_CONTAINERS = {"ebml", "ftyp", "ogg", "asf"}
"""These hold sound with or without pictures."""

# The patterns ask for more than the usual magic number where a text could begin with that.
_BOX_SIZE = rb"(?=.{0,3}[\0-\x08]).{4}"

_MAGIC: tuple[tuple[re.Pattern[bytes], str], ...] = tuple(
    (re.compile(pattern, re.DOTALL), kind)
    for pattern, kind in (
        (rb"\xff\xd8\xff", "image"),  # JPEG
        (rb"\x89PNG\r\n\x1a\n", "image"),
        (rb"GIF8[79]a", "image"),
        (rb"BM.{4}\0\0\0\0", "image"),
        (rb"II\*\0|MM\0\*", "image"),  # TIFF
        (rb"RIFF.{4}WEBP", "image"),
        (rb"qoif.{8}[\x03\x04][\0\x01]", "image"),
        (rb"P[56]\s+(?:#[^\n]*\n\s*)*\d+\s+\d+\s+(?:255|65535)\s", "image"),  # PGM, PPM
        (rb"\0\0\0\x0cjP  ", "image"),  # JPEG 2000
        (rb"\0\0\x01\0[\x01-\x20]\0", "image"),  # ICO
        (_BOX_SIZE + rb"ftyp(?:avif|avis|mif1|heic)", "image"),
        (rb"RIFF.{4}WAVE|RF64.{4}WAVE", "audio"),
        (rb"fLaC", "audio"),
        (rb"ID3[\x02-\x04]", "audio"),
        (rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb]", "audio"),  # MPEG layer 2 and 3; e2, e3: MPEG 2.5
        (rb"\xff[\xf0\xf1\xf8\xf9]", "audio"),  # AAC
        (rb"FORM.{4}AIF[FC]", "audio"),
        (rb"#!AMR", "audio"),
        (_BOX_SIZE + rb"ftypM4[AB]", "audio"),
        (rb"OggS.{22,300}?(?:\x80theora|OVP80)", "video"),
        (rb"OggS", "ogg"),
        (_BOX_SIZE + rb"(?:ftyp|moov|mdat|wide|skip|free)", "ftyp"),
        (rb"\x1aE\xdf\xa3", "ebml"),  # Matroska, WebM
        (rb"0&\xb2u\x8ef\xcf\x11", "asf"),
        (rb"RIFF.{4}AVI ", "video"),
        (rb"FLV\x01", "video"),
        (rb"\0\0\x01[\xb3\xba]", "video"),  # MPEG
        (rb"(?:G[\0-\x7f].[\x10-\x3f].{184}){2}G", "video"),  # MPEG transport stream
    )
)

_COMPRESSED = ((b"\x1f\x8b\x08", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"))

_REFUSED: tuple[tuple[bytes, str], ...] = (
    (b"\xfd7zXZ\0", "compressed with xz; pipe it in with `xzcat`"),
    (b"BZh91AY&SY", "compressed with bzip2; pipe it in with `bzcat`"),
    (b"PK\x03\x04", "a zip archive; unpack it first"),
    (b"%PDF-", "a PDF; turn it into text with `pdftotext` or pages into images with `pdftoppm`"),
    (b"\xff\xff\xff\xff", "an Arrow stream, perhaps tokenized already"),
    (b"ARROW1\0\0", "an Arrow file, perhaps a shard"),
    (b"\xff\xfe", "UTF-16; convert it with `iconv -f utf-16 -t utf-8`"),
    (b"\xfe\xff", "UTF-16; convert it with `iconv -f utf-16 -t utf-8`"),
)


def extension_kind(name: str) -> str | None:
    """The kind that a file's name speaks of: text, image, audio, video, records or None.

    That of compressed text is the text's.
    """
    path = PurePath(name)
    if path.suffix.lower() in compressed.EXTENSIONS:
        kind = extension_kind(path.stem)
        return kind if kind in ("text", RECORDS) else None
    if path.name in _NAMES:
        return "text"
    extension = path.suffix[1:].lower()
    return next((kind for kind, known in EXTENSIONS.items() if extension in known), None)


def sniff(head: bytes, name: str) -> str:
    """The kind of an input of which `head` is the beginning.

    Args:
        head: its first HEAD bytes, all of them if it is shorter.
        name: its path, for the extension and for messages.

    Returns:
        `text`, `image`, `audio`, `video`, RECORDS for JSONL of documents, or one of
        `compressed.COMPRESSED`, which is text or records inside.

    Raises:
        CorruptInput: binary content that is none of these.
    """
    by_name = extension_kind(name)
    for pattern, kind in _MAGIC:
        if pattern.match(head):
            return kind if kind not in _CONTAINERS else _container(kind, head, by_name)
    for magic, kind in _COMPRESSED:
        if head.startswith(magic):
            return kind
    for magic, what in _REFUSED:
        if head.startswith(magic):
            raise CorruptInput(f"{name}: cannot be tokenized: it is {what}")
    if by_name in ("image", "audio", "video"):
        return by_name  # a format without a magic number; or damaged, which is found soon
    if b"\0" in head:
        raise CorruptInput(
            f"{name}: binary data that is no known image, audio or video; --modality says what "
            "to take it for"
        )
    if by_name == RECORDS or looks_like_record(head):
        return RECORDS
    return "text"


def sniff_text(head: bytes, name: str) -> str:
    """The kind of what was compressed: `text` or RECORDS.

    Raises:
        CorruptInput: anything else.
    """
    path = PurePath(name)
    inner = path.stem if path.suffix.lower() in compressed.EXTENSIONS else name
    kind = sniff(head, inner)
    if kind not in ("text", RECORDS):
        raise CorruptInput(f"{name}: of compressed files only text is read; unpack it first")
    return kind


def _container(kind: str, head: bytes, by_name: str | None) -> str:
    """Audio where the list of tracks is in sight and has no pictures; else the name tells."""
    if kind == "ebml" and re.search(rb"A_[A-Z]", head) and not re.search(rb"V_[A-Z]", head):
        return "audio"
    index = head.find(b"moov")
    if kind == "ftyp" and index >= 4:
        size = int.from_bytes(head[index - 4 : index], "big")
        tracks = head[index - 4 : index - 4 + size]
        if len(tracks) == size and b"soun" in tracks and b"vide" not in tracks:
            return "audio"
    if by_name in ("audio", "video"):
        return by_name
    return "audio" if kind == "ogg" else "video"
