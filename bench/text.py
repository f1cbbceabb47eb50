"""Speed of text through the pipe against sentencepiece: `python bench/text.py`.

`gemtool tokenize -@ N` between two real pipes, against one call of sentencepiece's own batch
encoding on N threads, given the same chunks: its fastest way, twice that of line after line. The
text is long (128 MB: English essays repeated, and the other languages that `make media` fetched
if it did), which makes the start of our process small; it is part of our cost all the same.
"""

from __future__ import annotations

import gzip
import io
import os
from collections.abc import Iterator
from pathlib import Path

from measure import ROOT, Cost, Row, call, compare, report, shell

from gemtool.data.text import text_chunks
from gemtool.data.vocab import Vocab

MEDIA = Path(os.environ.get("GEMTOOL_MEDIA", ROOT / "build/media"))
SIZE = 128_000_000
REPEATS = 5


def prose() -> list[bytes]:
    """A text a language."""
    essays = gzip.decompress((ROOT / "gemtool/probes/haystack.txt.gz").read_bytes())
    return [essays, *(path.read_bytes() for path in sorted(MEDIA.glob("text-*.txt")))]


def rows(folder: Path) -> Iterator[Row]:
    from sentencepiece import SentencePieceProcessor

    texts = prose()
    unit = b"".join(texts)
    text = unit * -(-SIZE // len(unit))
    (folder / "text.txt").write_bytes(text)
    processor = SentencePieceProcessor(model_proto=Vocab.load().model)
    chunks = [chunk.decode() for chunk in text_chunks(io.BytesIO(text))]
    for threads in (1, 2):
        command = f"cat text.txt | gemtool tokenize -q -@ {threads} | cat > /dev/null"

        def ours(command: str = command) -> Cost:
            return shell(command, folder)

        def peer(threads: int = threads) -> Cost:
            return call(lambda: processor.encode(chunks, out_type="numpy", num_threads=threads))

        yield compare(
            f"text, languages: {len(texts)}, -@ {threads}, against sentencepiece",
            ours,
            peer,
            repeats=REPEATS,
            unit="MB/CPU-s",
            work=(len(text) / 1e6, len(text) / 1e6),
        )


if __name__ == "__main__":
    report(rows)
