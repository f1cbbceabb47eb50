"""Speed of text through the pipe against sentencepiece: `python bench/text.py`.

`gemtool tokenize -@ N` between two real pipes, against one call of sentencepiece's own batch
encoding on N threads, given the same chunks: its fastest way, twice that of line after line. The
text is long (64 MB in eleven languages, a megabyte of prose repeated), which makes the start of
our process small; it is part of our cost all the same.
"""

from __future__ import annotations

import gzip
import io
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from timing import ROOT, call, compare, report, shell

sys.path.insert(0, str(ROOT))

SIZE = 64_000_000
REPEATS = 5


def prose() -> bytes:
    """English essays, and what `make media` has fetched in other languages."""
    essays = gzip.decompress((ROOT / "gemtool/probes/haystack.txt.gz").read_bytes())
    others = [path.read_bytes() for path in sorted((ROOT / "build/media").glob("text-*.txt"))]
    return essays + b"".join(others)


def rows(folder: Path) -> Iterator[dict[str, Any]]:
    from sentencepiece import SentencePieceProcessor

    from gemtool.data.text import text_chunks
    from gemtool.data.vocab import Vocab

    unit = prose()
    text = unit * (SIZE // len(unit))
    (folder / "text.txt").write_bytes(text)
    processor = SentencePieceProcessor(model_proto=Vocab.load().model)
    chunks = [chunk.decode() for chunk in text_chunks(io.BytesIO(text))]
    for threads in (1, 2):
        command = f"cat text.txt | gemtool tokenize -q -@ {threads} | cat > /dev/null"

        def ours(command: str = command) -> Any:
            return shell(command, folder)

        def peer(threads: int = threads) -> Any:
            return call(lambda: processor.encode(chunks, out_type="numpy", num_threads=threads))

        what = f"text, {len(text) / 1e6:.0f} MB, -@ {threads}, against sentencepiece"
        yield {"what": what, "threads": threads, **compare(ours, peer, REPEATS)}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        report(rows(Path(scratch)))
