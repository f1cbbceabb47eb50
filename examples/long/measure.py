"""What a long context takes: prefilled into a file, then asked for numbers hidden all over it.

    python measure.py document --tokens 1M > text.jsonl
    python measure.py document --video six-minutes.mp4 > video.jsonl   (ten times, numbers between)
    python measure.py run --ckpt RUN text.jsonl > text.row
    python measure.py table text.row video.row

`run` tokenizes and prefills in a pipe, asks for the first number twice, each time in a new process,
then for all, and samples the memory of each process: all that is resident, and of that what is
anonymous (RssAnon of /proc/PID/status), which unlike pages of a mapped file the system cannot drop. The
questions are those of `gemtool probe needle`. Linux only.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gemtool.probes
from gemtool.probes.needle import CITIES, NEEDLE, PREFIX, QUESTION

HIDDEN = {city: str(4270913 + 561707 * i) for i, city in enumerate(CITIES[:9])}
"""City -> its number, in the order in which they are in the context, as far from each other."""
HAYSTACK = Path(gemtool.probes.__path__[0]) / "haystack.txt.gz"
LETTERS_A_TOKEN = 4.4
"""Of the haystack, about: a context may be some percent longer or shorter than its name says."""
EVERY = 0.01
"""Seconds between samples."""


def document(tokens: str | None, video: str | None) -> dict[str, Any]:
    """A document for `gemtool tokenize`: the numbers, and the same straw before, between and behind."""
    straw = {"video": video} if video is not None else {"text": some_text(str(tokens))}
    parts = [straw]
    for city, number in HIDDEN.items():
        parts += [{"text": f" {NEEDLE.format(city=city, number=number)} "}, straw]
    return {"id": "text" if video is None else "video", "parts": parts}


def some_text(tokens: str) -> str:
    """A piece of the haystack, as long as what is between numbers in a context of `tokens` ("1M")."""
    count = float(tokens.rstrip("kM")) * {"k": 1e3, "M": 1e6}.get(tokens[-1], 1)
    text = " ".join(gzip.decompress(HAYSTACK.read_bytes()).decode().split())
    length = int(count * LETTERS_A_TOKEN / (len(HIDDEN) + 1))
    return (text * (length // len(text) + 1))[:length]


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


def ask(ckpt: str, context: Path, cities: Sequence[str]) -> dict[str, Any]:
    """Asks in a process of its own."""
    prompts = [
        {"prompt": QUESTION.format(city=city), "prefix": PREFIX.format(city=city), "max_tokens": 16}
        for city in cities
    ]
    questions = context.with_suffix(".prompts.jsonl")
    questions.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    command = ["gemtool", "decode", "--ckpt", ckpt, "--cache", context, "--prompts", questions]
    started = time.monotonic()
    with (
        subprocess.Popen([*command, "--format", "text"], stdout=subprocess.PIPE) as process,
        Memory(process.pid) as memory,
    ):
        assert process.stdout is not None
        first = process.stdout.read(1)
        seconds = time.monotonic() - started
        answers = (first + process.stdout.read()).decode()
        if process.wait():
            raise SystemExit(f"{context}: decode failed")
    return {
        "first_token_seconds": round(seconds, 2),
        "right": sum(HIDDEN[city] in answers for city in cities),
        "asked": len(cities),
        "decode_anonymous": memory.anonymous,
    }


def run(ckpt: str, source: Path) -> dict[str, Any]:
    target = source.with_suffix(".ctx")
    row = {"name": source.stem, **prefill(ckpt, source, target)}
    first, second = (ask(ckpt, target, list(HIDDEN)[:1]) for _ in range(2))
    return {
        **row,
        **ask(ckpt, target, list(HIDDEN)),
        "first_token_seconds_before": first["first_token_seconds"],
        "first_token_seconds": second["first_token_seconds"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    head = (
        "| context | tokens | prefill | tokens/s | its memory | file | first token | anonymous memory |"
        " numbers found |"
    )
    lines = [head, "|" + " --- |" * 9]
    for row in rows:
        cells = (
            row["name"],
            f"{row['tokens']:,}",
            f"{row['prefill_seconds']:,.0f} s",
            f"{row['tokens_per_s']:,}",
            f"{row['prefill_resident'] / 1e9:.1f} GB",
            f"{row['file'] / 1e6:,.{0 if row['file'] > 1e7 else 1}f} MB",
            f"{row['first_token_seconds']:.1f} s",
            f"{row['decode_anonymous'] / 1e9:.2f} GB",
            f"{row['right']} of {row['asked']}",
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
