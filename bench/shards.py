"""Speed of reading shards: `python bench/shards.py`.

Prints one JSON object a line on stdout and a table on stderr. Records are packed sequences of 8,192
tokens of text, in the page cache, read one by one in one shuffled order. Every reader maps or reads a
record, finds its tokens and adds them up. Rates are bytes of the file a CPU-second; `ratio` is ours
over the peer's, the median of alternating runs.

* against a bare memory-mapped Arrow read of the same record batches, which checks nothing: once with
  each checksum compared, as the first reading of a folder does, and once as every later reading;
* against ArrayRecord (group size 1, uncompressed) of the same records, which checks them each time;
* against the same, where the peer only fetches the bytes of a record and decodes nothing.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from measure import Row, call, compare, report, shell

from gemtool.data.shards import ShardFolder
from gemtool.stream.spans import ArrowSpanWriter, Header, Span

REPEATS = 7
LENGTH, SEQUENCES = 8192, 2000


def write_packed(path: Path) -> None:
    """A packed stream of texts of about 1,000 tokens, each sequence full."""
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        writer = ArrowSpanWriter(file, Header(packed={"length": LENGTH}))
        for seq in range(SEQUENCES):
            cuts = [0, *sorted(rng.choice(LENGTH - 1, 7, replace=False) + 1), LENGTH]
            for segment, (start, stop) in enumerate(itertools.pairwise(cuts), 1):
                tokens = rng.integers(320, 16384, stop - start, np.int32)
                text = Span(f"{seq}/{segment}", 0, "text", tokens)
                text.seq, text.offset, text.segment = seq, int(start), segment
                writer.append(text)
        writer.close()


def rows(folder: Path) -> Iterator[Row]:
    write_packed(folder / "packed")
    shell("gemtool shard -q packed -o arrow", folder)
    order = np.random.default_rng(1).permutation(SEQUENCES).tolist()
    (file,) = (folder / "arrow").glob("*.arrow")
    size = file.stat().st_size / 1e9
    opened = ShardFolder(folder / "arrow")
    chunks = -(-LENGTH // opened.manifest["chunk"])
    expected = sum(int(opened[i].tokens.sum()) for i in order)

    def first() -> int:
        return read(ShardFolder(folder / "arrow"))

    def again() -> int:
        return read(opened)

    def read(shards: ShardFolder) -> int:
        return sum(int(shards[i].tokens.sum()) for i in order)

    def bare() -> int:
        total = 0
        with pa.memory_map(str(file)) as source:
            reader = pa.ipc.open_file(source)
            for i in order:
                for batch in range(i * chunks, (i + 1) * chunks):
                    total += int(reader.get_batch(batch).column("tokens").values.to_numpy().sum())
        return total

    assert first() == again() == bare() == expected
    yield row("8k records from shards, verified, against a bare Arrow map", size, first, bare)
    yield row("the same records once more, against a bare Arrow map", size, again, bare)
    try:
        from array_record.python.array_record_module import ArrayRecordReader
    except ImportError:
        print("array_record is not installed: not compared", file=sys.stderr)
        return
    shell("gemtool shard -q packed -o records --to array_record", folder)
    (export,) = (folder / "records").glob("*.array_record")

    def decoded() -> int:
        total = 0
        reader = ArrayRecordReader(str(export))
        for i in order:
            (batch,) = pa.ipc.open_stream(reader.read([i])[0])
            total += int(batch.column("tokens").values.to_numpy().sum())
        return total

    def fetched() -> int:
        reader = ArrayRecordReader(str(export))
        return sum(len(reader.read([i])[0]) for i in order)

    assert decoded() == expected
    yield row("8k records from shards, verified, against ArrayRecord", size, first, decoded)
    yield row("the same records once more, against ArrayRecord", size, again, decoded)
    yield row("8k records, verified, against ArrayRecord bytes, undecoded", size, first, fetched)


def row(what: str, size: float, ours: Callable[[], int], peer: Callable[[], int]) -> Row:
    return compare(
        what,
        lambda: call(ours),
        lambda: call(peer),
        repeats=REPEATS,
        unit="GB/CPU-s",
        work=(size, size),
    )


if __name__ == "__main__":
    report(rows)
