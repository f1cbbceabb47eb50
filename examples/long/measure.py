"""What a long context takes: prefilled into a file, then asked for a number hidden in its middle.

    python measure.py document --tokens 1M > text.jsonl
    python measure.py document --video half-an-hour.mp4 > video.jsonl   (seen twice, before and after)
    python measure.py run --ckpt RUN text.jsonl > text.row
    python measure.py table text.row video.row

`run` tokenizes and prefills in a pipe, asks twice, each time in a new process, and samples the memory
of each process while it runs: all that is resident, and of that what is anonymous (RssAnon of
/proc/PID/status), which unlike pages of a mapped file the system cannot drop. Linux only.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gemtool.probes
from gemtool.probes.needle import NEEDLE, QUESTION

CITY, NUMBER = "Reykjavik", "4270913"
HAYSTACK = Path(gemtool.probes.__path__[0]) / "haystack.txt.gz"
LETTERS_A_TOKEN = 4.4
"""Of the haystack, about: a context may be some percent longer or shorter than its name says."""
EVERY = 0.01
"""Seconds between samples."""


def document(tokens: str | None, video: str | None) -> dict[str, Any]:
    """A document for `gemtool tokenize` with a needle in its middle."""
    needle = {"text": " " + NEEDLE.format(city=CITY, number=NUMBER) + " "}
    if video is not None:
        return {"id": "video", "parts": [{"video": video}, needle, {"video": video}]}
    assert tokens is not None
    count = float(tokens.rstrip("kM")) * {"k": 1e3, "M": 1e6}.get(tokens[-1], 1)
    text = " ".join(gzip.decompress(HAYSTACK.read_bytes()).decode().split())
    half = int(count * LETTERS_A_TOKEN / 2)
    before = (text * (half // len(text) + 1))[:half]
    return {"id": "text", "parts": [{"text": before}, needle, {"text": before}]}


@dataclass
class Memory:
    """The greatest amounts seen of a process's memory, in bytes."""

    pid: int
    anonymous: int = 0
    resident: int = 0
    _ended: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Memory:
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(EVERY):
            try:
                status = Path(f"/proc/{self.pid}/status").read_text()
            except OSError:
                return
            sizes = dict(line.split(":", 1) for line in status.splitlines())
            if "RssAnon" in sizes:  # not of one that has just ended
                self.anonymous = max(self.anonymous, 1024 * int(sizes["RssAnon"].split()[0]))
                self.resident = max(self.resident, 1024 * int(sizes["VmHWM"].split()[0]))


def prefill(ckpt: str, source: Path, target: Path) -> dict[str, Any]:
    """Tokenizes and prefills, in a pipe."""
    started = time.monotonic()
    with (
        subprocess.Popen(["gemtool", "tokenize", source], stdout=subprocess.PIPE) as tokenize,
        subprocess.Popen(
            ["gemtool", "prefill", "-f", "--ckpt", ckpt, "-o", target], stdin=tokenize.stdout
        ) as process,
        Memory(process.pid) as memory,
    ):
        assert tokenize.stdout is not None
        tokenize.stdout.close()
        if process.wait() or tokenize.wait():
            raise SystemExit(f"{source}: prefill failed")
    seconds = time.monotonic() - started
    shown = subprocess.run(["gemtool", "view", "--stats", target], capture_output=True, check=True)
    length = json.loads(shown.stdout)["length"]
    return {
        "tokens": length,
        "prefill_seconds": round(seconds, 1),
        "tokens_per_s": round(length / seconds),
        "prefill_resident": memory.resident,
        "prefill_anonymous": memory.anonymous,
        "file": target.stat().st_size,
    }


def ask(ckpt: str, context: Path) -> dict[str, Any]:
    """Asks once, in a process of its own."""
    started = time.monotonic()
    question = QUESTION.format(city=CITY)
    command = ["gemtool", "decode", "--ckpt", ckpt, "--cache", context, "--format", "text"]
    with (
        subprocess.Popen(
            [*command, "--prompt", question, "--max-tokens", "24"], stdout=subprocess.PIPE
        ) as process,
        Memory(process.pid) as memory,
    ):
        assert process.stdout is not None
        first = process.stdout.read(1)
        seconds = time.monotonic() - started
        answer = (first + process.stdout.read()).decode().strip()
        if process.wait():
            raise SystemExit(f"{context}: decode failed")
    return {
        "first_token_seconds": round(seconds, 2),
        "answer": answer,
        "right": NUMBER in answer,
        "decode_anonymous": memory.anonymous,
    }


def run(ckpt: str, source: Path) -> dict[str, Any]:
    target = source.with_suffix(".ctx")
    row = {"name": source.stem, **prefill(ckpt, source, target)}
    first = ask(ckpt, target)
    return {
        **row,
        **ask(ckpt, target),
        "first_token_seconds_before": first["first_token_seconds"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    head = (
        "| context | tokens | prefill | tokens/s | its memory | file | first token | anonymous memory |"
        " answer |"
    )
    lines = [head, "|" + " --- |" * 9]
    for row in rows:
        cells = (
            row["name"],
            f"{row['tokens']:,}",
            f"{row['prefill_seconds']:,.0f} s",
            f"{row['tokens_per_s']:,}",
            f"{row['prefill_resident'] / 1e9:.1f} GB",
            f"{row['file'] / 1e9:.2f} GB",
            f"{row['first_token_seconds']:.1f} s",
            f"{row['decode_anonymous'] / 1e9:.2f} GB",
            "right" if row["right"] else f"wrong: {row['answer'][:40]!r}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    make = verbs.add_parser("document")
    of = make.add_mutually_exclusive_group(required=True)
    of.add_argument("--tokens", help="of text: 1M, 10M")
    of.add_argument("--video", help="a film, as the document names it")
    measure = verbs.add_parser("run")
    measure.add_argument("--ckpt", required=True)
    measure.add_argument("document", type=Path)
    show = verbs.add_parser("table")
    show.add_argument("rows", type=Path, nargs="+")
    options = parser.parse_args()
    if options.verb == "document":
        print(json.dumps(document(options.tokens, options.video), ensure_ascii=False))
    elif options.verb == "run":
        print(json.dumps(run(options.ckpt, options.document)))
    else:
        print(table([json.loads(path.read_text()) for path in options.rows]))


if __name__ == "__main__":
    main()
