"""Batches from packed spans, and the training loader: order, mixing, exact resumption."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemtool.control import (
    AUDIO,
    BEGIN_AUDIO,
    BEGIN_IMAGE,
    END_IMAGE,
    EOD,
    IMAGE,
    UNTRAINED_TARGETS,
    VIDEO,
)
from gemtool.data.arrays import media_groups
from gemtool.data.packing import Packer
from gemtool.data.settings import MediaSettings
from gemtool.data.sharding import create_shards
from gemtool.data.shards import ShardFolder
from gemtool.errors import CorruptInput, GemtoolError, UsageError
from gemtool.stream.spans import KINDS, Header, Span
from gemtool.train.loader import Loader, build_batch, evaluation_batches, open_data

LENGTH = 160
LOW = MediaSettings(image_tokens=66)
HEADER = Header(
    vocab={"fingerprint": "0123456789abcdef", "size": 32768},
    settings=LOW.to_dict(),
    packed={"length": LENGTH},
)


def text(rng, doc="d", span=0, size=20, start=0) -> Span:
    loss = rng.random(size, np.float32) if rng.random() < 0.3 else None
    return Span(doc, span, "text", rng.integers(64, 999, size).astype(np.int32), start, loss)


def image(rng, doc="d", span=0, start=0, kind="image") -> Span:
    soft = np.full(64, IMAGE if kind == "image" else VIDEO, np.int32)
    tokens = np.concatenate([[BEGIN_IMAGE], soft, [END_IMAGE]]).astype(np.int32)
    pixels = rng.integers(0, 256, (64, 14, 14, 3), np.uint8)
    return Span(doc, span, kind, tokens, start, payload=pixels)


def audio(rng, doc="d", span=0, rows=25, start=0, marked=False) -> Span:
    tokens = np.full(rows + marked, AUDIO, np.int32)
    if marked:
        tokens[0] = BEGIN_AUDIO
    sound = rng.standard_normal((rows, 4, 80)).astype(np.float16)
    return Span(doc, span, "audio", tokens, start, payload=sound)


def documents(rng, count: int, kinds: str, name: str = "d"):
    """Documents of `count` spans of the kinds t, i, v, a, at random."""
    for index in range(count):
        doc = f"{name}{index}"
        spans = [text(rng, doc, 0, int(rng.integers(1, 120)))]
        for kind in rng.permutation(list(kinds)):
            number = len(spans)
            if kind == "i":
                spans.append(image(rng, doc, number))
            elif kind == "v":
                spans.append(image(rng, doc, number, kind="video"))
            elif kind == "a":
                spans.append(audio(rng, doc, number, int(rng.integers(1, 26)), marked=True))
            else:
                spans.append(text(rng, doc, number, int(rng.integers(1, 50))))
        spans.append(Span(doc, len(spans), "control", np.array([EOD], np.int32)))
        yield from spans


def sequences_of(spans, length=LENGTH) -> list[list[Span]]:
    sequences: list[list[Span]] = []
    for span in Packer(length, 4).pack(spans):
        if span.offset == 0:
            sequences.append([])
        sequences[-1].append(span)
    return sequences


def write_folder(path: Path, spans, header: Header = HEADER) -> ShardFolder:
    with create_shards(path, header, chunk=64) as writer:
        for span in Packer(header.packed["length"], 4).pack(spans):
            writer.append(span)
    return ShardFolder(path)


def as_bytes(batch) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(batch)]


# Building a batch


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), kinds=st.sampled_from(["", "t", "i", "tia", "vai"]))
def test_batches_say_what_the_spans_say(seed, kinds):
    """Against the definition, position by position."""
    rng = np.random.default_rng(seed)
    sequences = [*sequences_of(documents(rng, 8, kinds)), []]
    batch = build_batch(sequences, LENGTH, LOW, KINDS)
    soft: dict[str, dict[int, np.ndarray]] = {"visual": {}, "audio": {}}
    numbers: dict[str, set[int]] = {}
    for row, spans in enumerate(sequences):
        flat = [
            (int(token), span.segment, span.loss[i] if span.loss is not None else None, span.doc)
            for span in spans
            for i, token in enumerate(span.tokens)
        ]
        flat += [(0, 0, None, "")] * (LENGTH - len(flat))
        begin = 0
        for t, (token, segment, _, doc) in enumerate(flat):
            numbers.setdefault(doc, set()).add(int(batch.documents[row, t]))
            if t and segment != flat[t - 1][1]:
                begin = t
            assert batch.tokens[row, t] == token
            assert batch.segments[row, t] == segment
            assert batch.positions[row, t] == (t - begin if segment else 0)
            target, weight = 0, 0.0
            if segment and t + 1 < LENGTH and flat[t + 1][1] == segment:
                target, _, given_weight, _ = flat[t + 1]
                default = float(target not in UNTRAINED_TARGETS)
                weight = default if given_weight is None else given_weight
            assert batch.targets[row, t] == target
            assert batch.weights[row, t] == np.float32(weight)
        for span in spans:
            if span.payload is not None:
                encoder = "audio" if span.kind == "audio" else "visual"
                where = np.flatnonzero(np.isin(span.tokens, [IMAGE, VIDEO, AUDIO])) + span.offset
                features = span.payload.reshape(len(where), -1)
                at = row * LENGTH + where
                soft[encoder].update(zip(at.tolist(), features, strict=True))
    # One number a document, whatever the row or segment; 0 is padding's.
    assert all(len(found) == 1 for found in numbers.values())
    assert len(set.union(*numbers.values())) == len(numbers)
    assert numbers[""] == {0}
    for encoder, expected in soft.items():
        groups = batch.media[encoder]
        found = {}
        for values, at, rows in zip(groups.values, groups.at, groups.rows, strict=True):
            assert (at == batch.tokens.size) == (rows == 0)
            assert not values[rows:].any()
            found.update({int(at) + i: values[i] for i in range(rows)})
        assert found.keys() == expected.keys()
        for at, features in expected.items():
            np.testing.assert_array_equal(found[at], features)


def test_shapes_and_dtypes_do_not_depend_on_content():
    rng = np.random.default_rng(0)
    sequences = sequences_of(documents(rng, 40, "ia"))[:4]
    full = build_batch(sequences, LENGTH, LOW, KINDS)
    empty = build_batch([[]] * 4, LENGTH, LOW, KINDS)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype.name), full)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype.name), empty)
    assert shapes.tokens == ((4, LENGTH), "int32")
    assert shapes.weights == ((4, LENGTH), "float32")
    assert shapes.documents == ((4, LENGTH), "int32")
    visual, sound = shapes.media["visual"], shapes.media["audio"]
    assert visual.values == ((10, 64, 588), "uint8")
    assert sound.values == ((26, 25, 320), "float16")
    assert sound.at == sound.rows == ((26,), "int32")


def test_parts_of_a_document_are_told_by_its_number(tmp_path, monkeypatch):
    """Of one that was cut over sequences, and of two with the same id, from spans or from shards."""
    rng = np.random.default_rng(0)
    spans = [text(rng, "long", 0, 2 * LENGTH + 40), text(rng, "é", 0, 30), text(rng, "long", 0, 9)]
    folder = write_folder(tmp_path / "shards", spans)
    batch = build_batch([*folder, []], LENGTH, LOW, KINDS)
    rows = [np.unique(row[row != 0]) for row in batch.documents]
    assert len(rows) == 4
    (long,) = rows[0]
    assert rows[1] == [long]
    assert set(rows[2]) > {long}
    assert len(rows[2]) == 2
    assert batch.segments[2].max() == 3
    np.testing.assert_array_equal(batch.documents != 0, batch.segments != 0)
    assert not batch.documents[3].any()
    plain = build_batch([[*spans] for spans in folder] + [[]], LENGTH, LOW, KINDS)
    np.testing.assert_array_equal(plain.documents, batch.documents)

    monkeypatch.setattr("gemtool.train.loader.zlib.crc32", lambda _: 0)
    zero = build_batch([*folder], LENGTH, LOW, KINDS)
    assert set(np.unique(zero.documents)) == {0, 1}


def test_encoders_that_no_kind_needs_are_left_out():
    assert build_batch([[]], 8, LOW, {"text", "control"}).media == {}
    assert list(build_batch([[]], 8, LOW, {"text", "video"}).media) == ["visual"]
    assert list(build_batch([[]], 8, LOW, {"audio"}).media) == ["audio"]


def test_many_partial_groups_take_the_next_power_of_two():
    rng = np.random.default_rng(0)
    spans = [audio(rng, span=i, rows=2) for i in range(40)]
    batch = build_batch(sequences_of(spans, 80), 80, LOW, KINDS)
    assert batch.media["audio"].values.shape[0] == 64
    assert (batch.media["audio"].rows[:40] == 2).all()


def test_long_audio_becomes_groups_of_a_second():
    span = audio(np.random.default_rng(0), rows=60, marked=True)
    groups = media_groups(span, LOW)
    assert groups.at.tolist() == [1, 26, 51]
    assert groups.rows.tolist() == [25, 25, 10]
    values = groups.values.reshape(75, 4, 80)
    np.testing.assert_array_equal(values[:60], span.payload)
    assert not values[60:].any()


def test_media_of_other_settings_are_refused():
    rng = np.random.default_rng(0)
    good = image(rng, "cat.png", 3)
    for wrong, said in (
        (dataclasses.replace(good, payload=None), "no payload"),
        (dataclasses.replace(good, payload=good.payload[:63]), r"uint8 \[63, 14, 14, 3\]"),
        (dataclasses.replace(good, payload=good.payload.astype(np.float16)), "float16"),
        (dataclasses.replace(good, tokens=np.array([IMAGE, 1, IMAGE], np.int32)), "not one run"),
    ):
        with pytest.raises(CorruptInput, match=rf"cat\.png: span 3 \(image\).*{said}"):
            media_groups(wrong, LOW)
    assert media_groups(text(rng), LOW) is None


# The loader


@pytest.fixture
def folders(tmp_path) -> list[ShardFolder]:
    rng = np.random.default_rng(0)
    return [
        write_folder(tmp_path / "text", documents(rng, 30, "", "a")),
        write_folder(tmp_path / "media", documents(rng, 12, "ia", "b")),
    ]


@pytest.fixture
def loader():
    """Makes loaders and ends their threads."""
    made: list[Loader] = []

    def make(*arguments, **options) -> Loader:
        made.append(Loader(*arguments, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_each_pass_is_another_permutation(folders, loader):
    folder = folders[0]
    rows = {build_batch([s], LENGTH, LOW, ()).tokens.tobytes(): i for i, s in enumerate(folder)}
    assert len(rows) == len(folder) > 5
    batches = loader([(folder, 1.0)], batch_size=1, seed=3)
    passes = [[rows[next(batches).tokens.tobytes()] for _ in rows] for _ in range(3)]
    for order in passes:
        assert sorted(order) == sorted(rows.values())
    assert passes[0] != passes[1] != passes[2]
    again = loader([(folder, 1.0)], batch_size=1, seed=3)
    assert [rows[next(again).tokens.tobytes()] for _ in rows] == passes[0]
    other = loader([(folder, 1.0)], batch_size=1, seed=4)
    assert [rows[next(other).tokens.tobytes()] for _ in rows] != passes[0]


def test_texts_are_read_by_column(folders, loader, monkeypatch):
    """The loader makes no object of a span that has no media."""

    def refuse(*arguments):
        raise AssertionError("a span was made")

    expected = [next(loader([(folders[0], 1.0)], batch_size=2)) for _ in range(3)]
    monkeypatch.setattr("gemtool.stream.rows.spans_of", refuse)
    found = [next(loader([(folders[0], 1.0)], batch_size=2)) for _ in range(3)]
    assert [as_bytes(batch) for batch in found] == [as_bytes(batch) for batch in expected]
    with pytest.raises(AssertionError, match="a span was made"):
        list(evaluation_batches(folders[1], 2))


def test_weights_are_shares_of_the_sequences(folders, loader):
    batches = loader([(folders[0], 0.75), (folders[1], 0.25)], batch_size=4)
    assert batches.kinds == {"text", "control", "image", "audio"}
    assert batches.sequences == len(folders[0]) + len(folders[1])
    first = set(map(bytes, build_batch(list(folders[0]), LENGTH, LOW, ()).tokens))
    from_first = 0
    for _ in range(25):
        batch = next(batches)
        assert set(batch.media) == {"visual", "audio"}
        from_first += sum(bytes(row) in first for row in batch.tokens)
    assert from_first == 75


def test_restored_at_any_point_the_rest_is_the_same(folders, loader):
    data = [(folders[0], 2.0), (folders[1], 1.0)]
    batches = loader(data, batch_size=3, seed=1)
    states, contents = [], []
    for _ in range(12):
        states.append(json.dumps(batches.get_state()))
        contents.append(as_bytes(next(batches)))
    for start, state in enumerate(states):
        fresh = loader(data, batch_size=3, seed=1)
        if start % 2:
            next(fresh)  # as well from a loader that is running and has read ahead
        fresh.set_state(json.loads(state))
        assert json.dumps(fresh.get_state()) == state
        assert [as_bytes(next(fresh)) for _ in contents[start:]] == contents[start:]


def test_a_state_of_other_data_is_refused(folders, loader):
    state = loader([(folders[0], 1.0)], 2, seed=0).get_state()
    for arguments in (
        ([(folders[1], 1.0)], 2, 0),
        ([(folders[0], 1.0), (folders[1], 1.0)], 2, 0),
        ([(folders[0], 1.0)], 4, 0),
        ([(folders[0], 1.0)], 2, 1),
    ):
        with pytest.raises(GemtoolError, match="the data order cannot be resumed"):
            loader(*arguments).set_state(state)


def test_damage_reaches_the_caller_by_name(folders, loader):
    part = folders[0].path / "part-00000.arrow"
    part.write_bytes(bytes(part.stat().st_size))
    with pytest.raises(CorruptInput, match=r"part-00000\.arrow: damaged"):
        next(loader([(ShardFolder(folders[0].path), 1.0)], 2))


def test_folders_that_do_not_match_are_refused(folders, tmp_path):
    rng = np.random.default_rng(0)
    for name, changes, said in (
        ("longer", {"packed": {"length": 320}}, "its length is 320"),
        ("words", {"vocab": {"fingerprint": "f" * 16, "size": 5}}, "its vocabulary is ffff"),
        ("high", {"settings": MediaSettings().to_dict()}, "its media settings is"),
    ):
        header = dataclasses.replace(HEADER, **changes)
        other = write_folder(tmp_path / name, documents(rng, 3, ""), header)
        with pytest.raises(GemtoolError, match=said):
            Loader([(folders[0], 1.0), (other, 1.0)], 2)
    nothing = write_folder(tmp_path / "nothing", [])
    with pytest.raises(GemtoolError, match="holds no sequences"):
        Loader([(nothing, 1.0)], 2)


def test_evaluation_sees_each_sequence_once(folders):
    folder = folders[1]
    batches = list(evaluation_batches(folder, 5))
    assert {batch.tokens.shape for batch in batches} == {(5, LENGTH)}
    rows = np.concatenate([batch.tokens for batch in batches])
    expected = build_batch(list(folder), LENGTH, LOW, folder.kinds).tokens
    np.testing.assert_array_equal(rows[: len(folder)], expected)
    assert not rows[len(folder) :].any()


def test_data_arguments(folders, tmp_path):
    path = str(folders[0].path)
    assert open_data(path)[1] == 1.0
    folder, weight = open_data(f"{path}:0.25")
    assert (folder.path, weight) == (folders[0].path, 0.25)
    folders[0].path.rename(tmp_path / "a:2")  # a name that looks like a weight
    assert open_data(str(tmp_path / "a:2"))[1] == 1.0
    assert open_data(f"{tmp_path / 'a:2'}:3")[1] == 3.0
    for wrong in ("0", "-1", "nan", "inf"):
        with pytest.raises(UsageError, match="expected a number above 0"):
            open_data(f"{tmp_path / 'a:2'}:{wrong}")
    with pytest.raises(GemtoolError, match="no such folder"):
        open_data(str(tmp_path / "nowhere"))
