"""Says what the demo's pictures and files show, and what they do not."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "needle.jsonl").read_text().splitlines()]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (answer, *_) = (json.loads(line) for line in (folder / "answer.jsonl").open())
    recall = {
        length: [row["score"] for row in rows if row["length"] == length]
        for length in sorted({row["length"] for row in rows})
    }
    found = ", ".join(
        f"{sum(scores):.0f} of {len(scores)} at {length:,} tokens"
        for length, scores in recall.items()
    )
    losses = [row["loss"] for row in metrics]
    print(f"picture  {folder / 'needle.png'}")
    print(f"rows     {folder / 'needle.jsonl'}")
    print(f"answer   {folder / 'answer.jsonl'}: {answer['text']!r}")
    print(
        f"\nAfter {metrics[-1]['step']} steps (loss {losses[0]:.2f} to {losses[-1]:.2f}) nano found "
        f"hidden numbers in text it never saw: {found}. That shows the pipeline and the recall of "
        "one literal needle; it does not show that the model understands language, pictures or "
        "sound: its answer about the film is that of a model trained for minutes."
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
