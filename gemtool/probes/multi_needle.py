"""The multiple needles of the Gemini 1.5 report (arXiv 2403.05530, section 5.2.1.1).

A context holds as many needles as there are depths, each with a city and a number of its own. One turn
asks for all numbers without naming a city. Every needle is a case; those of a context share the answer,
and the mean of their scores is recall: found / hidden.

The contexts are those of the needle probe with `shared`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from gemtool.data.vocab import Vocab
from gemtool.probes import needle
from gemtool.probes.haystack import Case
from gemtool.probes.needle import score

__all__ = ["cases", "score"]

QUESTION = "What are all the special magic numbers?"
PREFIX = "The special magic"
BEGINNING = 64


def cases(
    vocab: Vocab,
    haystack: str,
    *,
    lengths: Sequence[int],
    depths: int,
    repetitions: int,
    seed: int,
) -> Iterator[Case]:
    """Every needle of every context, shortest first, those of a context by depth.

    Args:
        haystack: text without needles; it is repeated to the length.
        lengths: context lengths in tokens.
        depths: needles of a context, linearly spaced from the start to the end.
        repetitions: contexts a length.

    Raises:
        GemtoolError: the haystack is too short.
        UsageError: a length has no room for the needles, or there are more of them than cities.
    """
    grid = needle.cases(
        vocab,
        haystack,
        lengths=lengths,
        depths=depths,
        repetitions=repetitions,
        seed=seed,
        shared=True,
    )
    for case in grid:
        # The model may say the whole sentence for each number.
        said = sum(map(len, case.haystack.hidden))
        yield replace(
            case,
            question=QUESTION,
            prefix=PREFIX,
            max_tokens=case.max_tokens + said,
            beginning=BEGINNING,
        )
