"""The vocabulary: exact round trips, fixed ids, training and extension through the command."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gemtool.control import CONTROL_COUNT, CONTROL_TOKENS
from gemtool.data.vocab import FIRST_BYTE, FIRST_TEXT, WHITESPACE, Vocab, train_vocab
from gemtool.errors import CorruptInput, GemtoolError, UsageError
from tests.conftest import command_environment

VOCAB = Vocab.load()


@pytest.fixture(scope="module")
def english() -> list[str]:
    """Lines of made-up prose, enough for a small vocabulary."""
    rng = random.Random(0)
    syllables = [c + v + e for c in "bdfgklmnprst" for v in "aeiou" for e in ("", "n", "st")]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(2000)]
    return [" ".join(rng.choices(words, k=12)) + f" {rng.randint(0, 9999)}." for _ in range(3000)]


@pytest.fixture(scope="module")
def small(english: list[str], tmp_path_factory: pytest.TempPathFactory) -> Vocab:
    path = tmp_path_factory.mktemp("vocab") / "small.model"
    path.write_bytes(train_vocab(english, size=600))
    return Vocab.load(path)


def pieces(text: str | bytes) -> list[bytes]:
    return [VOCAB.piece_bytes(int(i)) for i in VOCAB.encode(text)]


@settings(deadline=None, database=None)
@given(st.binary(max_size=200))
@example(b"\xed\xa0\x80")  # a surrogate
@example(b"\xff\xfe\x00 \xe2\x96\x81 \xe2\x96")
@example(b"\xef\xbb\xbf\xef\xbf\xbd\xf4\x90\x80\x80")
@example(b"<0x0A><unk>\r\n \n\n\n\t ")
def test_any_bytes_round_trip(data: bytes) -> None:
    ids = VOCAB.encode(data)
    assert ids.dtype == np.int32
    assert ids.ndim == 1
    assert VOCAB.decode_bytes(ids) == data
    assert not data or ids.min() >= CONTROL_COUNT


@settings(deadline=None, database=None)
@given(st.text(max_size=200) | st.text("▁ \t\n\r\0a1é語", max_size=40))
def test_any_text_round_trips(text: str) -> None:
    assert VOCAB.decode(VOCAB.encode(text)) == text
    assert VOCAB.encode(text).tolist() == VOCAB.encode(text.encode()).tolist()


@settings(deadline=None, database=None)
@given(st.lists(st.text("ab▁\0 \n", max_size=20) | st.binary(max_size=20), max_size=8))
def test_a_batch_equals_one_by_one_for_any_threads(texts: list[str | bytes]) -> None:
    for threads in (1, 3):
        batch = VOCAB.encode_batch(texts, threads=threads)
        assert [ids.tolist() for ids in batch] == [VOCAB.encode(text).tolist() for text in texts]
        assert all(ids.dtype == np.int32 for ids in batch)


def test_lone_surrogates_are_their_three_bytes() -> None:
    assert VOCAB.decode_bytes(VOCAB.encode("a\ud800b")) == b"a\xed\xa0\x80b"


@pytest.mark.parametrize("name", [*CONTROL_TOKENS, "<pad>", "</s>", "<0x41>"])
def test_names_of_control_tokens_are_plain_text(name: str) -> None:
    for text in (name, f"a{name}b", f" {name} "):
        ids = VOCAB.encode(text)
        assert ids.min() >= FIRST_TEXT
        assert VOCAB.decode(ids) == text


def test_control_ids_contribute_nothing() -> None:
    assert VOCAB.decode([2, *VOCAB.encode("Hello").tolist(), 7, 63]) == "Hello"
    assert VOCAB.decode_bytes([]) == b""


@pytest.mark.parametrize("wrong", [-1, VOCAB.size])
def test_ids_outside_the_vocabulary_are_refused(wrong: int) -> None:
    with pytest.raises(GemtoolError, match=f"token id {wrong} is outside"):
        VOCAB.decode([100, wrong])


def test_layout_of_the_default() -> None:
    assert VOCAB.size == 16384
    assert re.fullmatch("[0-9a-f]{16}", VOCAB.fingerprint)
    assert [VOCAB.piece_bytes(FIRST_BYTE + i) for i in range(256)] == [
        bytes([i]) for i in range(256)
    ]
    first = [VOCAB.piece_bytes(FIRST_TEXT + i).decode() for i in range(len(WHITESPACE))]
    assert first == list(WHITESPACE)
    learned = [VOCAB.piece_bytes(i).decode() for i in range(FIRST_TEXT, VOCAB.size)]
    assert len(set(learned)) == len(learned)
    assert all(len(piece) == 1 for piece in learned if re.search(r"\d", piece))


def test_white_space_and_digits() -> None:
    assert pieces("a\nb\n\nc\r\nd") == [b"a", b"\n", b"b", b"\n\n", b"c", b"\r\n", b"d"]
    assert pieces("\n        return")[0] == b"\n"
    assert len(pieces("        ")) == 1
    assert pieces("4829173") == [b"4", b"8", b"2", b"9", b"1", b"7", b"3"]


@pytest.mark.parametrize(
    ("text", "least"),
    [
        ("The Committee on Finance reported that the bill had passed the House.", 3.5),
        ("Alle Menschen sind frei und gleich an Würde und Rechten geboren.", 2.2),
        ("Все люди рождаются свободными и равными в своем достоинстве и правах.", 3.0),
        ("सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता", 3.0),
    ],
)
def test_bytes_per_token(text: str, least: float) -> None:
    assert len(text.encode()) / len(VOCAB.encode(text)) > least


def test_training_is_deterministic_and_exact(english: list[str], small: Vocab) -> None:
    assert small.size == 600
    assert train_vocab(english, size=600) == small.model
    assert train_vocab(english, size=600, seed=1, sentences=1000) != small.model
    assert small.decode(small.encode("no such Ünicode ▁ text\n")) == "no such Ünicode ▁ text\n"


def test_extension_only_appends(small: Vocab, english: list[str], tmp_path: Path) -> None:
    georgian = [line.translate({ord("a") + i: 0x10D0 + i for i in range(26)}) for line in english]
    (tmp_path / "more.model").write_bytes(train_vocab(georgian, size=750, extend=small))
    more = Vocab.load(tmp_path / "more.model")
    assert more.size == 750
    ids = range(small.size)
    assert [more.piece_bytes(i) for i in ids] == [small.piece_bytes(i) for i in ids]
    for line in english[:50]:
        assert more.encode(line).tolist() == small.encode(line).tolist()
    assert len(more.encode(georgian[0])) < len(small.encode(georgian[0])) / 3
    assert more.decode(more.encode(georgian[0])) == georgian[0]


def test_impossible_sizes(english: list[str], small: Vocab) -> None:
    with pytest.raises(UsageError, match="--size 300 is too small"):
        train_vocab(english, size=300)
    with pytest.raises(UsageError, match="--size 600 is too small"):
        train_vocab(english, size=600, extend=small)
    with pytest.raises(GemtoolError, match=r"too little text for --size 9000; .* --size \d+ at mo"):
        train_vocab(english[:50], size=9000)
    with pytest.raises(GemtoolError, match=r"only \d+ new pieces"):
        train_vocab(english[:50], size=9000, extend=small)
    with pytest.raises(GemtoolError, match="every line is empty"):
        train_vocab(["", " \n"], size=600)


def test_files_that_are_no_vocabulary(tmp_path: Path) -> None:
    import sentencepiece

    with pytest.raises(GemtoolError, match=r"none\.model: vocabulary cannot be read: no such file"):
        Vocab.load(tmp_path / "none.model")
    for content in (b"", b"text\n" * 100, VOCAB.model[:5000]):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(CorruptInput, match=r"bad\.model"):
            Vocab.load(tmp_path / "bad.model")
    with (tmp_path / "foreign.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["some words here", "and there"] * 9),
            model_writer=file,
            vocab_size=350,
            byte_fallback=True,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    with pytest.raises(CorruptInput, match="not one of gemtool"):
        Vocab.load(tmp_path / "foreign.model")


def test_command_text_and_jsonl_agree(gemtool, english: list[str], tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("\n".join(english))
    records = [json.dumps({"text": "\n".join(english[i : i + 10])}) for i in range(0, 3000, 10)]
    (tmp_path / "in.jsonl").write_text("\n".join(records) + "\n\n")
    gemtool("vocab", "in.txt", "--size", 600, "-o", "a.model")
    gemtool("vocab", "in.jsonl", "--size", 600, "-o", "b.model")
    piped = gemtool("vocab", "--size", 600, input=(tmp_path / "in.txt").read_bytes())
    made = (tmp_path / "a.model").read_bytes()
    assert made == (tmp_path / "b.model").read_bytes() == piped.stdout

    again = gemtool("vocab", "in.txt", "--size", 600, "-o", "a.model", check=False)
    assert again.returncode == 2
    gemtool("vocab", "in.txt", "--size", 700, "--extend", "a.model", "-f", "-o", "a.model")
    assert Vocab.load(tmp_path / "a.model").size == 700


def test_command_names_the_bad_line(gemtool, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "one"}\n{"txt": "two"}\n')
    done = gemtool("vocab", "in.jsonl", "-o", "x.model", check=False)
    assert done.returncode == 3
    assert b"in.jsonl: line 2: expected a JSON object" in done.stderr
    assert not (tmp_path / "x.model").exists()


def test_sizes_that_the_text_does_not_allow(gemtool, tmp_path: Path) -> None:
    """The message says which size would do, and that size does."""
    (tmp_path / "in.txt").write_text("Grüße aus Köln, ein Ж und ein 語 von vielen Zeichen.\n" * 3)
    for size, code, words in ((2000, 1, "too little text"), (326, 2, "too small for the letters")):
        done = gemtool("vocab", "in.txt", "--size", size, "-o", "x.model", check=False)
        said = done.stderr.decode()
        assert (done.returncode, len(said.splitlines())) == (code, 1), said
        assert words in said
        possible = re.search(r"--size (\d+)(?: at most)?\n", said)
        assert possible, said
        gemtool("vocab", "in.txt", "--size", possible[1], "-f", "-o", "y.model")
    done = gemtool("vocab", "in.txt", "--size", 10**12, "-o", "x.model", check=False)
    assert done.returncode == 2
    assert {path.name for path in tmp_path.iterdir()} == {"in.txt", "y.model"}


def test_terminated_while_it_learns(tmp_path: Path) -> None:
    """Native threads run on as the interpreter goes: that must not abort it."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(40_000)]
    lines = [" ".join(rng.choices(words, k=12)) for _ in range(90_000)]
    (tmp_path / "in.txt").write_text("\n".join(lines))
    process = subprocess.Popen(
        [sys.executable, "-m", "gemtool", "vocab", "in.txt", "--size", "4000", "-o", "x.model"],
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env=command_environment(),
    )
    assert process.stderr is not None
    assert b"learning from" in process.stderr.readline()
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert b"terminate" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]
