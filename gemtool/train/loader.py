"""Training batches from shard folders: shuffled globally, mixed by weight, resumed exactly.

grain gives the order: a batch is a pure function of its index, so the state of a loader is one
number, and a thread may read ahead without being part of it.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from gemtool.data.arrays import ENCODERS, Groups, group_rows, media_groups, no_groups
from gemtool.data.settings import MediaSettings
from gemtool.data.shards import ShardFolder
from gemtool.errors import GemtoolError, UsageError
from gemtool.model.batch import Batch, MediaGroups
from gemtool.stream.rows import Rows, rows_of
from gemtool.stream.spans import Span

_PREFETCH = 2


def build_batch(
    sequences: Sequence[Sequence[Span]], length: int, settings: MediaSettings, kinds: Iterable[str]
) -> Batch:
    """A batch of numpy arrays, [B, T] = [len(sequences), length].

    Args:
        sequences: of each row the packed spans (`offset` and `segment` set); empty for a row of
            padding.
        length: T.
        settings: those that made the media.
        kinds: kinds that may occur. An encoder that none of them needs is left out of `media`; the
            others are always there, for shapes that do not change from batch to batch: N is
            B * T / P rounded up. Where many groups are partial there may be more; then N is the
            next power of two.

    Raises:
        CorruptInput: a payload does not fit its placeholders.
    """
    shape = (len(sequences), length)
    tokens, segments, documents = (np.zeros(shape, np.int32) for _ in range(3))
    own_weights = np.zeros(shape, np.float32)
    encoders = sorted({ENCODERS[kind] for kind in kinds if kind in ENCODERS})
    groups: dict[str, list[Groups]] = {encoder: [] for encoder in encoders}
    for row, spans in enumerate(sequences):
        rows = rows_of(spans)
        at = rows.positions
        tokens[row, at] = rows.tokens
        segments[row, at] = rows.segments
        documents[row, at] = _documents(rows)
        own_weights[row, at] = rows.weights()
        for span in rows.media():
            found = media_groups(span, settings)
            if found is not None:
                assert span.offset is not None
                first = found.at + np.int32(row * length + span.offset)
                groups[ENCODERS[span.kind]].append(Groups(found.values, first, found.rows))

    column = np.arange(length, dtype=np.int32)
    begins = np.ones(shape, bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    positions = column - np.maximum.accumulate(np.where(begins, column, 0), axis=1)
    positions[segments == 0] = 0

    targets, weights = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    within = ~begins[:, 1:] & (segments[:, 1:] > 0)
    targets[:, :-1] = np.where(within, tokens[:, 1:], 0)
    weights[:, :-1] = np.where(within, own_weights[:, 1:], 0)
    media = {
        encoder: _stack(encoder, found, settings, math.prod(shape))
        for encoder, found in groups.items()
    }
    return Batch(tokens, segments, positions, targets, weights, media, documents=documents)


def _documents(rows: Rows) -> np.ndarray:
    """int32 [n]: of each token a number made from the id of its document, never 0.

    Two documents may share one by chance, once in four billion pairs: then they are merely no
    negatives of one another.
    """
    numbers = []
    for ids in rows.documents():
        crcs = [zlib.crc32(doc.encode()) or 1 for doc in ids.dictionary.to_pylist()]
        numbers.append(np.array(crcs, np.uint32).view(np.int32)[ids.indices.to_numpy()])
    return np.repeat(np.concatenate([np.empty(0, np.int32), *numbers]), rows.counts)


def _stack(
    encoder: str, groups: list[Groups], settings: MediaSettings, positions: int
) -> MediaGroups:
    count = sum(len(group.at) for group in groups)
    capacity = max(1, -(-positions // group_rows(encoder, settings)))
    if count > capacity:
        capacity = 1 << (count - 1).bit_length()
    stacked = no_groups(encoder, settings, capacity, absent=positions)
    end = 0
    for group in groups:
        start, end = end, end + len(group.at)
        stacked.values[start:end] = group.values
        stacked.at[start:end] = group.at
        stacked.rows[start:end] = group.rows
    return MediaGroups(stacked.values, stacked.at, stacked.rows)


def open_data(text: str) -> tuple[ShardFolder, float]:
    """Opens `DIR` or `DIR:WEIGHT`, as `--data` takes them; the weight is 1 by default.

    Raises:
        UsageError: the weight is not a positive number.
        GemtoolError, CorruptInput: as `ShardFolder`.
    """
    path, separator, number = text.rpartition(":")
    if not separator or Path(text).exists():
        return ShardFolder(text), 1.0
    try:
        weight = float(number)
    except ValueError:
        if Path(path).exists():
            raise UsageError(f"--data {text}: the weight {number!r} is no number") from None
        return ShardFolder(text), 1.0
    if not (0 < weight < math.inf):
        raise UsageError(f"--data {text}: the weight is {number}; expected a number above 0")
    return ShardFolder(path), weight


class Loader:
    """An endless iterator over batches of sequences from one or more shard folders.

    Each folder is shuffled as a whole, anew in each pass, and repeated; `weight` is its share of
    the sequences, kept to about 1% in any stretch of the run. Order and content depend on the
    arguments only.

    Args:
        data: folders and their weights. They must agree in length, vocabulary and media settings.
        batch_size: sequences of a batch.
        seed: of the order, below 2**32.

    Attributes:
        length: positions of a sequence.
        vocab: `fingerprint` and `size` of the vocabulary.
        settings: MediaSettings of the folders.
        kinds: kinds that occur in any of them.
        sequences: sequences in all of them.
        fingerprint: 16 hex digits of everything that determines the batches.

    Raises:
        GemtoolError: a folder is empty or does not match the first.
    """

    def __init__(
        self, data: Sequence[tuple[ShardFolder, float]], batch_size: int, seed: int = 0
    ) -> None:
        folders = [folder for folder, _ in data]
        first = folders[0]
        for folder in folders:
            require_match(first, folder)
        self.length = first.length
        self.vocab = first.vocab
        self.settings = MediaSettings.from_dict(first.settings)
        self.kinds = frozenset().union(*(folder.kinds for folder in folders))
        self.sequences = sum(len(folder) for folder in folders)
        determined_by = [[f.fingerprint, weight] for f, weight in data], batch_size, seed
        self.fingerprint = hashlib.sha256(json.dumps(determined_by).encode()).hexdigest()[:16]

        # Each folder has its own stream of seeds: grain adds the number of the pass to it.
        seeds = np.random.SeedSequence(seed).generate_state(len(folders))
        endless = [
            grain.MapDataset.source(folder).shuffle(int(one)).repeat()
            for folder, one in zip(folders, seeds, strict=True)
        ]
        mixed = grain.MapDataset.mix(endless, [weight for _, weight in data])
        # There is no remainder, but asking for one would round a length of 2**63 - 1 up.
        batches = mixed.batch(batch_size, batch_fn=self._build, drop_remainder=True)
        # One thread: reading is mostly memory maps and numpy, more would only contend.
        reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCH)
        self._batches = iter(batches.to_iter_dataset(reading))

    def _build(self, sequences: Sequence[Sequence[Span]]) -> Batch:
        return build_batch(sequences, self.length, self.settings, self.kinds)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """What `set_state` needs to go on with the batch that would come next; fit for JSON."""
        return {"next": self._batches.get_state()["next_index"], "data": self.fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where `get_state` was called.

        Raises:
            GemtoolError: the state is of other data, another batch size or another seed.
        """
        if state["data"] != self.fingerprint:
            raise GemtoolError(
                "the data order cannot be resumed: the shards, their weights, the batch size or "
                f"the seed have changed (fingerprint {self.fingerprint}, saved {state['data']})"
            )
        self._batches.set_state({"next_index": state["next"]})

    def close(self) -> None:
        """Ends the thread that reads ahead."""
        self._batches.close()


def require_match(first: ShardFolder, other: ShardFolder, *, length: bool = True) -> None:
    """Refuses a folder that is empty or that a model of the first cannot take.

    Raises:
        GemtoolError: naming what differs: length (where that matters), vocabulary or media settings.
    """
    if not len(other):
        raise GemtoolError(f"{other.path}: holds no sequences")
    for what, mine, theirs in (
        ("length", first.length, other.length if length else first.length),
        ("vocabulary", first.vocab.get("fingerprint"), other.vocab.get("fingerprint")),
        ("media settings", _structural(first), _structural(other)),
    ):
        if mine != theirs:
            raise GemtoolError(
                f"{other.path}: its {what} is {theirs}, that of {first.path} {mine}; "
                "folders of a run must agree in these"
            )


def _structural(folder: ShardFolder) -> dict[str, Any]:
    return MediaSettings.from_dict(folder.settings).structural()


def evaluation_batches(folder: ShardFolder, batch_size: int) -> Iterator[Batch]:
    """Each sequence of a folder once, in order; the last batch is filled up with padding."""
    settings = MediaSettings.from_dict(folder.settings)
    for start in range(0, len(folder), batch_size):
        stop = min(start + batch_size, len(folder))
        sequences: list[Sequence[Span]] = [folder[index] for index in range(start, stop)]
        sequences += [[]] * (batch_size - len(sequences))
        yield build_batch(sequences, folder.length, settings, folder.kinds)
