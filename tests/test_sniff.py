"""What an input is, by its first bytes and its name."""

from __future__ import annotations

import pytest

from gemtool.data.records import looks_like_record, parse_record
from gemtool.data.sniff import HEAD, sniff
from gemtool.errors import GemtoolError


@pytest.mark.parametrize(
    ("head", "name", "kind"),
    [
        (b"BM, said the man", "-", "text"),
        (b"P6 10 12 points", "-", "text"),
        (b"carefree", "-", "text"),
        (b"BZhang", "-", "text"),
        (b"GATTACA" * 100, "-", "text"),
        (b"P6\n# made by hand\n2 2\n255\n....", "-", "image"),
        (b"\0\0\0\x08wide", "-", "video"),
        ((b"G\x40\0\x10" + bytes(184)) * 3, "a.ts", "video"),
        (b"let x: number = 1;", "a.ts", "text"),
        (b"<html>not found</html>", "a.png", "image"),  # and soon refused
        (b"GIF89a", "wrong.txt", "image"),
        (b"OggS" + bytes(30) + b"\x80theora", "-", "video"),
        (b"OggS" + bytes(30) + b"OpusHead", "-", "audio"),
        (b"\x1aE\xdf\xa3 A_OPUS", "a.webm", "audio"),
        (b"\x1aE\xdf\xa3 V_VP9 A_OPUS", "a.webm", "video"),
        (b"\0\0\0\x20ftypisom", "a.mp4", "video"),
        (b"\0\0\0\x10moov....soun", "-", "audio"),
        (b"\0\0\0\x20moov....soun", "-", "video"),  # the list of tracks is longer than the head
        (b"\0\1\2", "sound.mp3", "audio"),
        (b'{"text": "a"}\n{"text"', "-", "records"),
        (b'{"text": "a", "other": 1}\n', "-", "text"),
        (b'{\n "text": "a"\n}\n', "-", "text"),
        (b'{"text": 1}', "a.jsonl", "records"),
        (b'{"id": 7, "text": "' + b"a" * HEAD, "-", "records"),
        (b'{"name": "' + b"a" * HEAD, "-", "text"),
        (b"", "-", "text"),
    ],
)
def test_sniff(head: bytes, name: str, kind: str) -> None:
    assert sniff(head, name) == kind


@pytest.mark.parametrize(
    ("head", "hint"),
    [(b"\xfd7zXZ\0", "xzcat"), (b"%PDF-1.7", "pdftotext"), (b"a\0b", "--modality")],
)
def test_what_cannot_be_tokenized_is_refused(head: bytes, hint: str) -> None:
    with pytest.raises(GemtoolError, match=hint):
        sniff(head, "x")


def test_a_record_may_begin_with_a_byte_order_mark() -> None:
    assert looks_like_record(b'\xef\xbb\xbf{"text": "a"}\n')
    assert parse_record(b'\xef\xbb\xbf{"text": "a"}\n').items[0].value == "a"
