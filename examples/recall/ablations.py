"""Leaves out of the recipe one thing at a time, and asks at 64,000 tokens: a short training of each.

    python ablations.py                    all, into ../../build/recall/ablations; done ones are skipped
    python ablations.py shift sticky       some
    python ablations.py --lengths 64k,1M base two        asks at a million tokens too
    python ablations.py --list             what there is, and what was found

Each is a folder of its own, made by the Makefile of the recipe with another model.toml and stages.toml;
interrupted, it goes on where it was. Five to ten minutes each on one core.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent

MODEL, STAGES = (HERE / name for name in ("model.toml", "stages.toml"))

# kinds.S: as kinds.G, with whose keys and values it works.
TEXT = MODEL.read_text()
GLOBAL = TEXT[TEXT.index("[kinds.G]") : TEXT.index("# The window layer behind it")]
SHARING = (
    GLOBAL.replace("kinds.G", "kinds.S")
    .replace('attention = "indexed"', 'attention = "indexed"\nshares = "G"')
    .replace("key_shift = 1\ntie_qk_init = true\n", "")
    .replace("block = 64\n", "")
)
EXPERTS = TEXT[TEXT.index("[moe]") :]

VARIANTS: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "base": ("the recipe, shorter", []),
    "shift": ("keys see their own token", [("key_shift = 1", "key_shift = 0")]),
    "tie": ("keys begin unlike queries", [("tie_qk_init = true", "tie_qk_init = false")]),
    "conv8": ("a convolution of 8 tokens, not 16", [("qk_conv = 16", "qk_conv = 8")]),
    "conv4": ("a convolution of 4 tokens", [("qk_conv = 16", "qk_conv = 4")]),
    "negatives": ("no keys of other sequences", [("negatives = 2", "negatives = 0")]),
    "sticky": ("a query scores blocks by itself alone", [("sticky = 8", "sticky = 1")]),
    "landmarks8": ("8 landmarks a block, not 4", [("landmarks = 4", "landmarks = 8")]),
    "landmarks1": ("1 landmark a block", [("landmarks = 4", "landmarks = 1")]),
    "block32": (
        "blocks of 32 tokens, not 64; twice as many chosen",
        [
            ("block = 64", "block = 32"),
            ("local = 2", "local = 4"),
            ("select = 32", "select = 64"),
            ("growth = 4", "growth = 8"),
        ],
    ),
    "temperature": (
        "attention no sharper further on",
        [("length_scale = 0.2", "length_scale = 0.0")],
    ),
    "horizon": (
        "the index learns from attention as it falls",
        [("sticky = 8", "sticky = 8\nhorizon = 1")],
    ),
    "two": (
        "a second global layer, on the keys of the first",
        [('layers = "LLGI"', 'layers = "LLGISI"'), ("[moe]", SHARING + "[moe]")],
    ),
    "dense": (
        "no experts: a feed-forward layer of 384 in each",
        [(EXPERTS, ""), ("dense_layers = 1\n", "")],
    ),
}
"""Name -> what it is, and what is replaced in model.toml and stages.toml."""


def changed(text: str, changes: list[tuple[str, str]]) -> str:
    for old, new in changes:
        text = text.replace(old, new)
    return text


def write_if_new(path: Path, text: str) -> None:
    """For `make`, a file that says the same is as old as it was."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def run(name: str, folder: Path, options: argparse.Namespace) -> None:
    changes = VARIANTS[name][1]
    model, stages = MODEL.read_text(), STAGES.read_text()
    for old, _ in changes:
        if old not in model + stages:
            raise SystemExit(f"{name}: {old!r} is in neither {MODEL.name} nor {STAGES.name}")
    stages = re.sub(r"steps = \d+", "steps = {}", stages).format(*options.steps)
    folder.mkdir(parents=True, exist_ok=True)
    write_if_new(folder / "model.toml", changed(model, changes))
    write_if_new(folder / "stages.toml", changed(stages, changes))
    settings = {
        "BUILD": folder,
        "MODEL": folder / "model.toml",
        "STAGES": folder / "stages.toml",
        "SHARDS": folder.parent / "shards",
        "LENGTH": 512,
        "DOCUMENTS": "--documents 4000 --words 100 --needles 4",
        "SEED": options.seed,
    }
    targets = [str(path) for path in answers(folder, options).values()]
    command = ["make", "-s", "-C", str(HERE), *targets]
    subprocess.run([*command, *(f"{k}={v}" for k, v in settings.items())], check=True)


def answers(folder: Path, options: argparse.Namespace) -> dict[str, Path]:
    """The rows of the probe, of each length."""
    return {name: folder / f"recall-{name}.jsonl" for name in options.lengths.split(",")}


def found(path: Path) -> str:
    if not path.exists():
        return ""
    scores = [json.loads(line)["score"] for line in path.open()]
    return f"{sum(scores):.0f} of {len(scores)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(VARIANTS))
    parser.add_argument("--list", action="store_true", help="what there is, and what was found")
    parser.add_argument(
        "--steps", type=int, nargs=2, default=(150, 250), metavar=("TRUNK", "INDEX")
    )
    parser.add_argument("--lengths", default="64k", help="as of gemtool probe needle")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--build", type=Path, default=HERE / "../../build/recall/ablations")
    options = parser.parse_args()
    build = options.build.resolve()
    for name in options.names or VARIANTS:
        if name not in VARIANTS:
            parser.error(f"no ablation {name!r}; there are {', '.join(VARIANTS)}")
        if not options.list:
            run(name, build / name, options)
        cells = [f"{found(path):14}" for path in answers(build / name, options).values()]
        print(f"{name:12} {VARIANTS[name][0]:52} {' '.join(cells)}".rstrip(), flush=True)


if __name__ == "__main__":
    main()
