"""The vocabulary: a sentencepiece unigram model under which any bytes round-trip exactly.

Ids of every vocabulary: control tokens 0..63 (gemtool.control), the 256 byte pieces 64..319,
tab and newline pieces, then learned pieces. Digits are always single pieces. An extended vocabulary
only appends, so that ids keep their meaning.

Unigram language model: arXiv 1804.10959. Byte fallback: a character outside the vocabulary becomes
the pieces of its UTF-8 bytes.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import random
import re
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemtool import log
from gemtool.control import CONTROL_COUNT, CONTROL_TOKENS
from gemtool.errors import CorruptInput, GemtoolError, UsageError, reason

DEFAULT_MODEL = Path(__file__).with_name("default.model")
DEFAULT_SIZE = 16384
FIRST_BYTE = CONTROL_COUNT
"""Id of the piece of byte 0; the others follow in order."""
FIRST_TEXT = FIRST_BYTE + 256
"""Id of the first piece that is neither control nor byte."""
WHITESPACE = ("\n", "\n\n", "\r\n", "\t")
"""Pieces that training never sees (it works on lines), so they are put in by hand."""
MINIMUM_SIZE = FIRST_TEXT + len(WHITESPACE) + 1

LARGEST_SIZE = 1 << 20

_SPACE = "\u2581"  # how sentencepiece spells a space inside a piece
_OTHER_DIGIT = re.compile(r"((?![0-9])\d)")  # sentencepiece's split_digits knows ASCII only
_MAX_LINE = 4000  # bytes of UTF-8; sentencepiece drops longer training lines

# What sentencepiece would alter: its own sign for a space, NUL (its end of text), and ill-formed
# UTF-8, which "surrogateescape" turns into U+DC80..U+DCFF.
_ALTERED = re.compile("([\0\u2581\udc80-\udcff]+)")


class Vocab:
    """Text to token ids and back. `decode_bytes(encode(data)) == data` for any bytes.

    Attributes:
        size: number of ids.
        fingerprint: the first 16 hex digits of the SHA-256 of the model file.
        path: where the model was read from.
        model: the sentencepiece model, serialized.
    """

    def __init__(self, model: bytes, path: Path) -> None:
        """Takes a serialized model.

        Raises:
            CorruptInput: it is no sentencepiece model, or its ids are not laid out as ours are.
        """
        import sentencepiece

        self.path = path
        self.model = model
        self.fingerprint = hashlib.sha256(model).hexdigest()[:16]
        try:
            if not model:
                raise OSError
            self._processor: Any = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.size: int = self._processor.get_piece_size()
        except (RuntimeError, OSError):
            raise CorruptInput(f"{path}: not a vocabulary (a sentencepiece model)") from None
        _check_layout(self._processor, path)

    @classmethod
    def load(cls, path: str | Path | None = None) -> Vocab:
        """Reads a model file; None is the vocabulary that ships with gemtool."""
        path = DEFAULT_MODEL if path is None else Path(path)
        try:
            model = path.read_bytes()
        except OSError as problem:
            raise GemtoolError(f"{path}: vocabulary cannot be read: {reason(problem)}") from None
        return cls(model, path)

    @functools.cached_property
    def _bytes(self) -> list[bytes]:
        """What each id stands for."""
        return [
            b"" if i < CONTROL_COUNT
            else bytes([i - FIRST_BYTE]) if i < FIRST_TEXT
            else self._processor.id_to_piece(i).replace(_SPACE, " ").encode()
            for i in range(self.size)
        ]  # fmt: skip

    def extends(self, other: Vocab) -> bool:
        """Whether every id of `other` means the same here."""
        piece = self._processor.id_to_piece
        return other.size <= self.size and all(
            piece(i) == other._processor.id_to_piece(i) for i in range(other.size)
        )

    def encode(self, text: str | bytes) -> np.ndarray:
        """Token ids [n], int32. Never a control id, whatever the text spells.

        A str that holds lone surrogates stands for their three-byte form ("surrogatepass").
        """
        parts = _split(text)
        if len(parts) == 1 and isinstance(parts[0], str):
            return self._processor.encode(parts[0], out_type="numpy")
        return self._join(
            self._processor.encode(part, out_type="numpy") if isinstance(part, str) else part
            for part in parts
        )

    def encode_batch(self, texts: Sequence[str | bytes], threads: int = 1) -> list[np.ndarray]:
        """`encode` of each text, on several threads; the result does not depend on their number."""
        split = [_split(text) for text in texts]
        plain = [part for parts in split for part in parts if isinstance(part, str)]
        encoded = iter(self._processor.encode(plain, out_type="numpy", num_threads=threads))
        return [
            next(encoded)
            if len(parts) == 1 and isinstance(parts[0], str)
            else self._join(next(encoded) if isinstance(part, str) else part for part in parts)
            for parts in split
        ]

    @staticmethod
    def _join(parts: Iterable[np.ndarray | bytes]) -> np.ndarray:
        arrays = [
            np.frombuffer(part, np.uint8).astype(np.int32) + np.int32(FIRST_BYTE)
            if isinstance(part, bytes)
            else part
            for part in parts
        ]
        return np.concatenate(arrays) if arrays else np.empty(0, np.int32)

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes of token ids [n]; control ids contribute nothing.

        Raises:
            GemtoolError: an id is outside the vocabulary.
        """
        array = np.asarray(ids, dtype=np.int64)
        if array.size and (array.min() < 0 or array.max() >= self.size):
            wrong = array[(array < 0) | (array >= self.size)][0]
            raise GemtoolError(
                f"token id {wrong} is outside the vocabulary {self.path} of {self.size} ids; "
                f"use the vocabulary that the tokens were made with"
            )
        return b"".join(map(self._bytes.__getitem__, array.tolist()))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """`decode_bytes` as text; ill-formed UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def piece_bytes(self, token: int) -> bytes:
        """The bytes of one id, empty for a control token."""
        return self.decode_bytes([token])


def _split(text: str | bytes) -> list[str | bytes]:
    """Runs of text for sentencepiece (str) and runs that it would alter (bytes), in order."""
    if isinstance(text, bytes):
        try:
            plain = text.decode()
        except UnicodeDecodeError:
            return _split_altered(text.decode("utf-8", "surrogateescape"))
    else:
        try:
            text.encode()
        except UnicodeEncodeError:
            return _split(text.encode("utf-8", "surrogatepass"))
        plain = text
    if "\0" in plain or _SPACE in plain:
        return _split_altered(plain)
    return [plain] if plain else []


def _split_altered(text: str) -> list[str | bytes]:
    parts = _ALTERED.split(text)  # text, altered, text, ...
    return [
        part.encode("utf-8", "surrogateescape") if index % 2 else part
        for index, part in enumerate(parts)
        if part
    ]


def _check_layout(processor: Any, path: Path) -> None:
    """Refuses a sentencepiece model that was not made by `train_vocab`."""

    def refuse(found: object, expected: str) -> None:
        raise CorruptInput(
            f"{path}: a sentencepiece model, but not one of gemtool: {found} where {expected} was "
            f"expected; make one with `gemtool vocab`"
        )

    if processor.get_piece_size() < MINIMUM_SIZE:
        refuse(f"{processor.get_piece_size()} pieces", f"at least {MINIMUM_SIZE}")
    for i, name in enumerate(CONTROL_TOKENS):
        if processor.id_to_piece(i) != name or not (processor.is_control(i) or i == 0):
            refuse(f"id {i} is {processor.id_to_piece(i)!r}", f"the control token {name!r}")
    for i in range(FIRST_BYTE, FIRST_TEXT):
        if not processor.is_byte(i) or int(processor.id_to_piece(i)[1:-1], 16) != i - FIRST_BYTE:
            refuse(f"id {i} is {processor.id_to_piece(i)!r}", f"byte {i - FIRST_BYTE}")
    probe = " \t  x\n\n\ny  "
    if processor.decode(processor.encode(probe)) != probe:
        refuse("white space that is normalised away", "identity normalisation")


# Training


def train_vocab(
    lines: Iterable[str],
    *,
    size: int = DEFAULT_SIZE,
    extend: Vocab | None = None,
    seed: int = 0,
    sentences: int = 500_000,
) -> bytes:
    """Learns a vocabulary of exactly `size` ids; the same input and seed give the same bytes.

    Args:
        lines: the text; a uniform sample of at most `sentences` lines is used.
        size: number of ids.
        extend: a vocabulary whose ids are all kept; only `size - extend.size` pieces are learned
            and appended, with the scores they have in the new text.
        seed: of the sample.
        sentences: how many lines to learn from.

    Returns:
        The serialized sentencepiece model.

    Raises:
        UsageError: `size` is impossible.
        GemtoolError: the text is too little for `size` pieces.
    """
    smallest = MINIMUM_SIZE if extend is None else extend.size + 1
    if size < smallest:
        what = "control tokens and bytes need" if extend is None else f"{extend.path} has"
        raise UsageError(f"--size {size} is too small: {what} {smallest - 1}, add at least one")
    if size > LARGEST_SIZE:
        raise UsageError(f"--size {size} is too large; at most {LARGEST_SIZE:,}")
    sample = _sample(lines, sentences, random.Random(seed))
    if not sample:
        raise GemtoolError("no text to learn a vocabulary from: every line is empty")
    amount = sum(map(len, sample)) / 1e6
    if amount > 5:  # else it takes seconds
        log.info(f"learning from {amount:,.0f} MB of text, about {amount * 4.8:.0f} s")
    if extend is None:
        learned = _unigram(sample, size - len(WHITESPACE), exact=True)
        pieces = _pieces(learned)
        whitespace = [_piece(text, 0.0, _USER_DEFINED) for text in WHITESPACE]
        model = _with_pieces(learned, [*pieces[:FIRST_TEXT], *whitespace, *pieces[FIRST_TEXT:]])
    else:
        model = _extended(extend, sample, size)
    Vocab(model, Path("the new vocabulary"))  # validates the ids
    return model


def _extended(base: Vocab, sample: list[str], size: int) -> bytes:
    """`base` with the most frequent new pieces of the sample behind its own."""
    import sentencepiece

    wanted = size - base.size
    # Many learned pieces are in the base already, so learn more than are wanted.
    learned = _unigram(sample, FIRST_TEXT + 2 * wanted + 2000, exact=False)
    processor = sentencepiece.SentencePieceProcessor(model_proto=learned)
    known = {base._processor.id_to_piece(i) for i in range(base.size)}
    found = [
        (piece, processor.get_score(i))
        for i in range(FIRST_TEXT, processor.get_piece_size())
        if (piece := processor.id_to_piece(i)) not in known
    ]
    if len(found) < wanted:
        raise GemtoolError(
            f"the text gives only {len(found)} new pieces, {wanted} were asked for; give more text "
            f"or --size {base.size + len(found)}"
        )
    # Letters first: without its letters a script falls back to bytes. Then by probability.
    found.sort(key=lambda item: (len(item[0]) > 1, -item[1], item[0]))
    added = [_piece(text, score, _NORMAL) for text, score in found[:wanted]]
    return _with_pieces(base.model, [*_pieces(base.model), *added])


def _sample(lines: Iterable[str], count: int, order: random.Random) -> list[str]:
    """A uniform sample of what sentencepiece can use of the lines, in random order (reservoir)."""
    kept: list[str] = []
    for seen, line in enumerate(itertools.chain.from_iterable(map(_usable, lines))):
        if seen < count:
            kept.append(line)
        elif (place := order.randrange(seen + 1)) < count:
            kept[place] = line
    order.shuffle(kept)
    return kept


def _usable(line: str) -> Iterator[str]:
    """Cuts a line at tabs, digits and what sentencepiece reserves, to a length that it accepts."""
    for part in re.split("[\t\n\r\0\u2581\u2585]", _OTHER_DIGIT.sub(r"\t\1\t", line)):
        while len(part.encode("utf-8", "replace")) > _MAX_LINE:
            head = part.encode("utf-8", "replace")[:_MAX_LINE].decode("utf-8", "ignore")
            head = head[: head.rfind(" ")] if " " in head.strip() else head
            yield head
            part = part[len(head) :]
        if part.strip():
            yield part


def _unigram(sample: list[str], size: int, *, exact: bool) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    try:
        _in_thread(
            sentencepiece.SentencePieceTrainer.train,
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type="unigram",
            vocab_size=size,
            hard_vocab_limit=exact,
            character_coverage=0.9997,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            unk_piece=CONTROL_TOKENS[0],
            bos_piece=CONTROL_TOKENS[1],
            eos_piece=CONTROL_TOKENS[2],
            control_symbols=list(CONTROL_TOKENS[3:]),
            max_sentence_length=2 * _MAX_LINE,
            num_threads=8,  # sums are split by it: a constant keeps the result the same everywhere
            minloglevel=2,
        )
    except (RuntimeError, OSError) as problem:
        raise _impossible(str(problem), size + len(WHITESPACE)) from None
    return model.getvalue()


def _impossible(message: str, size: int) -> GemtoolError:
    """What sentencepiece says of a size that the text does not allow, in our words."""
    most = re.search(r"<= (\d+)", message)
    if most and "too high" in message:
        return GemtoolError(
            f"too little text for --size {size}; give more text, or --size "
            f"{int(most[1]) + len(WHITESPACE)} at most"
        )
    least = re.search(r"required_chars\. \d+ vs (\d+)", message)
    if least:
        return UsageError(
            f"--size {size} is too small for the letters of this text; give at least --size "
            f"{int(least[1]) + len(WHITESPACE)}"
        )
    told = re.sub(r"^\w+: \S+\(\d+\) \[.*\] ", "", message).strip() or "no reason was given"
    return GemtoolError(f"the vocabulary cannot be trained: {told}")


def _in_thread(work: Callable[..., object], **arguments: Any) -> None:
    """Calls `work` beside the main thread, which thus hears signals: native code is deaf to them."""
    failures: list[Exception] = []

    def run() -> None:
        try:
            work(**arguments)
        except Exception as failure:
            failures.append(failure)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


# A sentencepiece model is a protocol buffer: repeated field 1 holds the pieces (1 text, 2 score as
# float32, 3 type), field 2 the trainer's settings (4 is the vocabulary size). Fields may be
# appended: later values win.

_NORMAL, _USER_DEFINED = 1, 4


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def _delimited(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _piece(text: str, score: float, kind: int) -> bytes:
    content = _delimited(1, text.encode()) + b"\x15" + struct.pack("<f", score)
    return _delimited(1, content + b"\x18" + _varint(kind))


def _fields(model: bytes) -> Iterator[tuple[int, bytes]]:
    """(field number, whole encoded field) of a model, whose fields are all length-delimited."""

    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            value |= (model[at] & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if model[at - 1] < 0x80:
                return value, at

    at = 0
    while at < len(model):
        tag, body = varint(at)
        length, body = varint(body)
        yield tag >> 3, model[at : body + length]
        at = body + length


def _pieces(model: bytes) -> list[bytes]:
    return [field for number, field in _fields(model) if number == 1]


def _with_pieces(model: bytes, pieces: list[bytes]) -> bytes:
    settings = [field for number, field in _fields(model) if number != 1]
    size = _delimited(2, b"\x20" + _varint(len(pieces)))
    return b"".join([*pieces, *settings, size])
