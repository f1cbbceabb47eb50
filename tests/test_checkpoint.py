"""Checkpoint folders: round trips, fingerprints, and every kind of damage."""

from __future__ import annotations

import dataclasses
import json
import tomllib
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from gemtool.checkpoint import (
    CARD,
    CONFIG,
    VOCAB,
    WEIGHTS,
    Checkpoint,
    open_checkpoint,
    read_settings,
    write_checkpoint,
)
from gemtool.data.settings import MediaSettings
from gemtool.data.vocab import Vocab, train_vocab
from gemtool.errors import CorruptInput, GemtoolError
from gemtool.model.config import LayerKind, ModelConfig
from gemtool.model.params import flatten, init_params

SETTINGS = MediaSettings(image_tokens=66, fps=2.0)


@pytest.fixture(scope="module")
def vocab(tmp_path_factory) -> Vocab:
    path = tmp_path_factory.mktemp("vocab") / "small.model"
    path.write_bytes(train_vocab(Path(__file__).read_text().splitlines(), size=420))
    return Vocab.load(path)


@pytest.fixture(scope="module")
def config(vocab: Vocab) -> ModelConfig:
    kind = LayerKind("G", heads=2, kv_heads=1, head_dim=4)
    return ModelConfig("tiny", vocab.size, 8, "G", (kind,), d_ff=16)


@pytest.fixture(scope="module")
def params(config):
    return init_params(config, jax.random.key(0))


def save(folder, vocab, config, params, step=7) -> str:
    return write_checkpoint(folder, config, params, vocab, SETTINGS, {"note": "mine"}, step)


@pytest.fixture
def saved(tmp_path, vocab, config, params) -> Checkpoint:
    save(tmp_path / "c", vocab, config, params)
    return open_checkpoint(tmp_path / "c")


def test_what_is_written_comes_back(saved, vocab, config, params):
    assert (saved.config, saved.settings, saved.step) == (config, SETTINGS, 7)
    assert saved.vocab.fingerprint == vocab.fingerprint
    assert saved.card["note"] == "mine"
    saved.verify()
    loaded, expected = flatten(saved.load_params()), flatten(params)
    assert list(loaded) == list(expected)
    for path, array in loaded.items():
        np.testing.assert_array_equal(array, expected[path])
        assert array.base is not None, "not a view of the file"
        assert not array.flags.writeable
    assert sorted(p.name for p in saved.path.iterdir()) == sorted([CARD, CONFIG, VOCAB, WEIGHTS])
    assert len({p.stat().st_mode for p in saved.path.iterdir()}) == 1


def test_files_are_plain(saved, params):
    """Other tools read each of them."""
    arrays = load_file(saved.path / WEIGHTS)
    np.testing.assert_array_equal(arrays["embedding"], params["embedding"])
    tables = tomllib.loads((saved.path / CONFIG).read_text())
    assert tables["media"]["image_tokens"] == 66
    assert tables["vocab"]["fingerprint"] == saved.vocab.fingerprint
    assert json.loads((saved.path / CARD).read_text())["fingerprint"] == saved.fingerprint


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere weights are copied")
def test_weights_are_used_where_they_are_mapped(saved, params):
    """Nearly all: those whose size is no multiple of 64 bytes come last."""
    mapped = saved.tensors()
    placed = jax.device_put(mapped)
    whole = {path for path, array in mapped.items() if array.nbytes % 64 == 0}
    assert len(whole) >= 5
    assert len(whole) < len(mapped)
    for path in whole:
        assert placed[path].unsafe_buffer_pointer() == mapped[path].ctypes.data, path
    # What is donated of them is not written over in the file.
    doubled = jax.jit(lambda x: jax.tree.map(lambda y: y * 2, x), donate_argnums=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = doubled({path: placed[path] for path in whole})
    np.testing.assert_array_equal(found["embedding"], 2 * params["embedding"])
    saved.verify()


def test_equal_content_is_equal_bytes(tmp_path, vocab, config, params):
    for name in ("one", "two"):
        save(tmp_path / name, vocab, config, params)
    for name in (CONFIG, VOCAB, WEIGHTS, CARD):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_fingerprint_covers_weights_and_configuration(tmp_path, vocab, config, params):
    first = save(tmp_path / "c", vocab, config, params)
    changed = {**params, "norm": params["norm"] + 1e-6}
    assert save(tmp_path / "c", vocab, config, changed) != first
    other = dataclasses.replace(config, norm_eps=1e-5)
    assert save(tmp_path / "c", vocab, other, params) != first
    assert save(tmp_path / "c", vocab, config, params, step=8) == first


def test_a_changed_byte_is_found(saved):
    weights = saved.path / WEIGHTS
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    for use in (Checkpoint.verify, Checkpoint.load_params):
        with pytest.raises(CorruptInput, match="damaged"):
            use(open_checkpoint(saved.path))


@pytest.mark.parametrize("name", [CONFIG, VOCAB, WEIGHTS])
def test_truncated_files_are_refused(saved, name):
    content = (saved.path / name).read_bytes()
    for length in [*range(0, min(len(content), 400), 23), len(content) // 2, len(content) - 1]:
        if name == CONFIG and length == len(content) - 1:
            continue  # the last line end means nothing to TOML
        (saved.path / name).write_bytes(content[:length])
        with pytest.raises(CorruptInput) as raised:
            open_checkpoint(saved.path).load_params()
        assert name in str(raised.value) or CONFIG in str(raised.value)
        assert "\n" not in str(raised.value)


def test_missing_files(saved, tmp_path):
    with pytest.raises(GemtoolError, match=r"no such folder.*gemtool train"):
        open_checkpoint("nano")
    with pytest.raises(GemtoolError, match="no such folder"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(GemtoolError, match="not a checkpoint"):
        open_checkpoint(tmp_path)
    (saved.path / CARD).unlink()
    assert open_checkpoint(saved.path).card == {}
    for name in (WEIGHTS, VOCAB, CONFIG):
        (saved.path / name).unlink()
        with pytest.raises(GemtoolError, match=name):
            open_checkpoint(saved.path)


def test_a_card_of_another_save_is_ignored(saved):
    """A kill may come between the card and the weights."""
    card = json.loads((saved.path / CARD).read_text())
    (saved.path / CARD).write_text(json.dumps({**card, "fingerprint": "0" * 16}))
    assert open_checkpoint(saved.path).card == {}


def test_weights_of_another_architecture(saved, vocab, config, params):
    text = (saved.path / CONFIG).read_text()
    (saved.path / CONFIG).write_text(text.replace("d_ff = 16", "d_ff = 24"))
    with pytest.raises(CorruptInput, match="layers/0/mlp/down"):
        open_checkpoint(saved.path).load_params()


def test_a_newer_version(saved):
    text = (saved.path / CONFIG).read_text()
    (saved.path / CONFIG).write_text(text.replace("version = 1", "version = 99"))
    with pytest.raises(GemtoolError, match="upgrade"):
        open_checkpoint(saved.path)


def test_settings_alone(saved):
    settings, file = read_settings(saved.path)
    assert settings == SETTINGS
    assert Vocab.load(file).fingerprint == saved.vocab.fingerprint
