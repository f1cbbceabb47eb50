"""Prompts of one context answered together against one after the other: `python bench/answers.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from measure import Row, call, compare, keep_to_one_core, report
from model import engine_of

PRESETS = ("nano", "mini")
LENGTH = 4096
PROMPTS, TOKENS = 8, 32
REPEATS = 5


def rows(folder: Path) -> Iterator[Row]:
    keep_to_one_core()
    for preset in PRESETS:
        yield answers(preset)


def answers(preset: str, length: int = LENGTH, tokens: int = TOKENS, repeats: int = REPEATS) -> Row:
    """Greedy answers of random weights, which go on to the end: as many tokens of both."""
    import jax

    from gemtool.infer.text import Prompt
    from gemtool.infer.together import answer_together
    from gemtool.model.config import load_preset
    from gemtool.model.params import init_params

    config = load_preset(preset)
    engine = engine_of(config, init_params(config, jax.random.key(0)))
    rng = np.random.default_rng(0)
    context = engine.prefill(rng.integers(320, config.vocab_size, length, np.int32))
    words = [f"What is number {number}?" for number in range(PROMPTS)]
    prompts = [Prompt(text, max_tokens=tokens, index=index) for index, text in enumerate(words)]
    found: dict[str, int] = {}

    def together() -> None:
        found["ours"] = sum(len(x.tokens) for x in answer_together(engine, context, prompts))

    def alone() -> None:
        found["peer"] = sum(len(engine.answer(context, prompt).tokens) for prompt in prompts)

    together()
    alone()
    row = compare(
        f"{PROMPTS} prompts of {length} tokens of {preset}, together against one by one",
        lambda: call(together),
        lambda: call(alone),
        repeats=repeats,
        unit="tokens/s",
        work=(found["ours"], found["peer"]),
        warm_up=False,
    )
    return {**row, "tokens": found["ours"]}


if __name__ == "__main__":
    report(rows)
