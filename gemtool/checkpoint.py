"""A checkpoint folder: everything that runs a model, in files that other tools read too.

    config.toml          [model] architecture, [media] settings, [vocab] fingerprint and size
    vocab.model          the vocabulary
    weights.safetensors  parameters under their paths ("layers/0/attention/q"), fingerprint, step
    card.json            what it was trained on, by which commands, with which metrics
    state/               of a training run: what `train --resume` needs (`gemtool.train.state`)

The fingerprint covers configuration, vocabulary and weights, and is compared whenever the weights
are loaded. Files are replaced one by one and
atomically, the weights last, which hold the fingerprint and the step. This module imports jax only
where parameters are read as a tree.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gemtool import log
from gemtool.data.settings import MediaSettings
from gemtool.data.vocab import Vocab
from gemtool.errors import CorruptInput, GemtoolError, reason
from gemtool.model.config import ModelConfig
from gemtool.stream.files import atomic_file, atomic_write
from gemtool.stream.mapped import MappedSource

VERSION = 1
CONFIG = "config.toml"
VOCAB = "vocab.model"
WEIGHTS = "weights.safetensors"
CARD = "card.json"

_METADATA = "gemtool"
_ALIGNED = 64
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "I32": np.int32}


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint folder. Weights stay on disk until they are asked for."""

    path: Path
    config: ModelConfig
    settings: MediaSettings
    vocab: Vocab
    fingerprint: str
    """16 hex digits of configuration, vocabulary and weights, computed when it was saved."""
    step: int
    """Training steps behind the weights."""
    card: dict[str, Any]
    """card.json; empty if it belongs to another save than the weights."""

    @cached_property
    def _weights(self) -> MappedSource:
        with (self.path / WEIGHTS).open("rb") as file:
            return MappedSource(file)

    @cached_property
    def _seen(self) -> list[tuple[int, int]]:
        """What the file of the weights was when they were verified."""
        return [self._weights.stamp()]

    @cached_property
    def _tensors(self) -> dict[str, np.ndarray]:
        return _tensors_of(self._weights, self.path / WEIGHTS)

    def tensors(self) -> dict[str, np.ndarray]:
        """Read-only memory-mapped arrays by path: {"layers/0/attention/q": ...}."""
        return dict(self._tensors)

    def load_params(self) -> dict[str, Any]:
        """The parameters as the nested dict that the model takes, memory-mapped (numpy), verified.

        Raises:
            CorruptInput: they are not those of the architecture in config.toml, or the checkpoint
                is damaged.
        """
        from gemtool.model.params import abstract_params, flatten, unflatten

        found = self._tensors
        expected = flatten(abstract_params(self.config))
        for path in sorted(expected.keys() | found.keys()):
            shapes = [
                f"{side[path].dtype} {list(side[path].shape)}" if path in side else "nothing"
                for side in (found, expected)
            ]
            if shapes[0] != shapes[1]:
                raise CorruptInput(
                    f"{self.path / WEIGHTS}: parameter {path!r} is {shapes[0]}; "
                    f"{self.path / CONFIG} describes {shapes[1]}"
                )
        _ = self._seen  # from before they are verified
        self.verify()
        return unflatten(found)

    def require_as_loaded(self) -> None:
        """Verifies the weights again where another process wrote to their file, which may be where they
        are used.

        Raises:
            CorruptInput: they are other ones now.
        """
        if self._seen[-1:] != [stamp := self._weights.stamp()]:
            self.verify()
            self._seen.append(stamp)

    def verify(self) -> None:
        """Computes the fingerprint again.

        Raises:
            CorruptInput: it is not the one stored with the weights.
        """
        text = (self.path / CONFIG).read_text("utf-8")
        found = fingerprint_of(text, self.vocab.fingerprint, self._tensors)
        if found != self.fingerprint:
            raise CorruptInput(
                f"{self.path}: damaged or edited: configuration, vocabulary and weights have "
                f"fingerprint {found}, saved was {self.fingerprint}; copy the checkpoint again"
            )


# Reading


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a checkpoint folder.

    Raises:
        GemtoolError: there is no such folder, or a newer gemtool wrote it.
        CorruptInput: the folder is no checkpoint, training has not saved yet, or a file is missing,
            damaged, or belongs to another checkpoint.
    """
    folder = Path(path)
    tables = _read_config(folder)
    vocab = _read_vocab(folder, tables)
    config, settings = _parsed(folder, tables)
    if config.vocab_size != vocab.size:
        raise CorruptInput(
            f"{folder / CONFIG}: vocab_size is {config.vocab_size}, but {VOCAB} has {vocab.size}"
        )
    header, _ = _read_header(folder / WEIGHTS)
    try:
        saved = json.loads(header["__metadata__"][_METADATA])
        fingerprint, step = str(saved["fingerprint"]), int(saved["step"])
    except (KeyError, TypeError, ValueError):
        raise CorruptInput(f"{folder / WEIGHTS}: lacks the fingerprint of a checkpoint") from None
    card = _read_card(folder)
    if card.get("fingerprint") != fingerprint:
        log.debug(f"{folder / CARD}: is of another save than the weights; ignored")
        card = {}
    return Checkpoint(folder, config, settings, vocab, fingerprint, step, card)


def read_settings(path: str | Path) -> tuple[MediaSettings, Path]:
    """What tokenizing for a checkpoint takes: its media settings and its vocabulary file.

    Raises:
        GemtoolError, CorruptInput: as `open_checkpoint`, which also reads the rest.
    """
    folder = Path(path)
    tables = _read_config(folder)
    _read_vocab(folder, tables)
    return _parsed(folder, tables)[1], folder / VOCAB


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    try:
        tables = tomllib.loads(file.read_bytes().decode())
    except (FileNotFoundError, NotADirectoryError):
        if not folder.exists() and folder.name == str(folder):
            raise GemtoolError(
                f"{folder}: no such folder, and no checkpoint of that name ships with gemtool; "
                "make one with `gemtool train --ckpt DIR` and name its folder"
            ) from None
        hint = "name a folder of `gemtool train`"
        if folder.is_dir():
            raise CorruptInput(f"{folder}: has no {CONFIG}: not a checkpoint; {hint}") from None
        raise GemtoolError(f"{folder}: no such folder; {hint}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as problem:
        raise CorruptInput(f"{file}: damaged: not TOML: {problem}") from None
    version = tables.get("version")
    if isinstance(version, int) and version > VERSION:
        raise GemtoolError(
            f"{file}: checkpoint version {version}; this gemtool reads up to {VERSION}, "
            "please upgrade it"
        )
    for name in ("model", "media", "vocab"):
        if not isinstance(tables.get(name), dict):
            raise CorruptInput(f"{file}: damaged: no table [{name}]")
    return tables


def _parsed(folder: Path, tables: dict[str, Any]) -> tuple[ModelConfig, MediaSettings]:
    try:
        return ModelConfig.from_dict(tables["model"]), MediaSettings.from_dict(tables["media"])
    except GemtoolError as problem:
        raise CorruptInput(f"{folder / CONFIG}: {problem}") from None


def _read_vocab(folder: Path, tables: dict[str, Any]) -> Vocab:
    file = folder / VOCAB
    if not file.exists():
        raise CorruptInput(f"{file}: is missing; copy the checkpoint again")
    vocab = Vocab.load(file)
    if vocab.fingerprint != tables["vocab"].get("fingerprint"):
        raise CorruptInput(
            f"{file}: has fingerprint {vocab.fingerprint}, {CONFIG} says "
            f"{tables['vocab'].get('fingerprint')}; copy the checkpoint again"
        )
    return vocab


def _read_card(folder: Path) -> dict[str, Any]:
    try:
        card = json.loads((folder / CARD).read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as problem:
        raise CorruptInput(f"{folder / CARD}: damaged: not JSON: {problem}") from None
    return card if isinstance(card, dict) else {}


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, validated by that library, and where its data begin."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):
            pass
        with file.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            return json.loads(stream.read(size)), 8 + size
    except FileNotFoundError:
        raise CorruptInput(
            f"{file}: is missing; training has not saved a checkpoint yet, or the copy is not whole"
        ) from None
    except SafetensorError as problem:
        raise CorruptInput(f"{file}: damaged: {str(problem).lower()}") from None


def _tensors_of(source: MappedSource, file: Path) -> dict[str, np.ndarray]:
    """Views of what is in a safetensors file that is mapped."""
    header, start = _read_header(file)
    header.pop("__metadata__", None)
    data = np.frombuffer(source.read(), np.uint8)
    tensors = {}
    for path, entry in sorted(header.items()):
        if entry["dtype"] not in _DTYPES:
            raise CorruptInput(f"{file}: parameter {path!r} has unknown type {entry['dtype']}")
        first, last = (start + offset for offset in entry["data_offsets"])
        tensors[path] = data[first:last].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


# Writing


def write_checkpoint(
    folder: str | Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    vocab: Vocab,
    settings: MediaSettings,
    card: Mapping[str, Any],
    step: int,
) -> str:
    """Writes or replaces a checkpoint and returns its fingerprint.

    Args:
        folder: made if it does not exist; other files in it are left alone.
        config: of the model; its vocab_size is that of `vocab`.
        params: nested dict of arrays.
        vocab: copied.
        settings: copied.
        card: what else should be known; `fingerprint`, `step` and counts are added.
        step: training steps behind the parameters.
    """
    import tomli_w

    from gemtool.model.params import count_params, flatten

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tables = {
        "version": VERSION,
        "vocab": {"fingerprint": vocab.fingerprint, "size": vocab.size},
        "media": settings.to_dict(),
        "model": config.to_dict(),
    }
    text = tomli_w.dumps(tables)
    tensors = {path: np.ascontiguousarray(leaf) for path, leaf in flatten(dict(params)).items()}
    fingerprint = fingerprint_of(text, vocab.fingerprint, tensors)
    total, active = count_params(config)
    card = {
        "fingerprint": fingerprint,
        "step": step,
        "parameters": total,
        "active_parameters": active,
        **card,
    }
    _replace(folder / CONFIG, text.encode())
    _replace(folder / VOCAB, vocab.model)
    encoded = json.dumps(card, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    atomic_write(folder / CARD, encoded.encode())
    saved = json.dumps({"fingerprint": fingerprint, "step": step})
    _write_tensors(folder / WEIGHTS, tensors, {_METADATA: saved})
    return fingerprint


def _write_tensors(file: Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes a safetensors file whose tensors can be used where they are mapped.

    On a CPU, JAX copies what does not begin at a multiple of 64 bytes. The library's own writer aligns
    to 8, and orders by name: here those come last, whose size is no such multiple.

    Raises:
        GemtoolError: it cannot be written.
    """
    names = {dtype: name for name, dtype in _DTYPES.items()}
    ordered = sorted(tensors.items(), key=lambda item: (item[1].nbytes % _ALIGNED != 0, item[0]))
    header: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for path, tensor in ordered:
        place = [at, at + tensor.nbytes]
        kind = names[tensor.dtype.type]
        header[path] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": place}
        at = place[1]
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % _ALIGNED)
    try:
        with atomic_file(file, through_link=False) as sink:
            sink.write(struct.pack("<Q", len(encoded)) + encoded)
            for _, tensor in ordered:
                sink.write(tensor.reshape(-1).view(np.uint8).data)
    except OSError as problem:
        raise GemtoolError(f"{file}: cannot be written: {reason(problem)}") from None


def _replace(file: Path, content: bytes) -> None:
    """Writes a file unless it says that already."""
    if not file.exists() or file.read_bytes() != content:
        atomic_write(file, content)


def fingerprint_of(config: str, vocab: str, tensors: Mapping[str, np.ndarray]) -> str:
    """First 16 hex digits of the SHA-256 over the text of config.toml, the vocabulary's
    fingerprint, and name, dtype, shape and bytes of each tensor by ascending name.
    """
    digest = hashlib.sha256(json.dumps([config, vocab]).encode())
    for path, tensor in sorted(tensors.items()):
        digest.update(json.dumps([path, tensor.dtype.name, list(tensor.shape)]).encode())
        if math.prod(tensor.shape):
            digest.update(np.ascontiguousarray(tensor).data)
    return digest.hexdigest()[:16]
