"""From scores to the next token: greedy, or drawn from a truncated distribution.

The order is that of most toolkits: temperature, then top-k, top-p (nucleus, arXiv 1904.09751) and
min-p (arXiv 2407.01082), each on what the one before left over. Where scores tie, the lower id
wins.
Draws depend on (seed, prompt, step) only, so an answer can be repeated alone: each token has a number
of its own (the Gumbel-max trick), so that the last bits of scores, which may depend on what is computed
together, decide as rarely as they do in greedy decoding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemtool.errors import GemtoolError, UsageError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The default is greedy, as in all evaluations of the Gemini report."""

    temperature: float = 0.0
    """Divides the scores; 0 takes the best token always."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most probable tokens whose probabilities reach p."""
    min_p: float = 0.0
    """Keep tokens at least this probable relative to the best one."""

    def __post_init__(self) -> None:
        for name, good, wanted in (
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top-k", self.top_k >= 0, "0 (all) or more"),
            ("top-p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("min-p", 0 <= self.min_p <= 1, "from 0 to 1"),
        ):
            if not good:
                value = getattr(self, name.replace("-", "_"))
                raise UsageError(f"{name} is {value}; expected {wanted}")


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities float64 [V] of scores [V].

    Raises:
        GemtoolError: the best score is infinite or not a number.
    """
    shifted = logits.astype(np.float64) - float(logits[_best(logits)])
    return shifted - np.log(np.exp(shifted).sum())


def _best(logits: np.ndarray) -> int:
    index = int(np.argmax(logits))  # of a NaN, if there is one
    if not np.isfinite(logits[index]):
        raise GemtoolError("the model's scores are not finite numbers; its weights are unusable")
    return index


def distribution(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """What a token is drawn from: ids int64 [n], the most probable first, and probabilities [n].

    Args:
        logits: float32 [V].
        sampling: with temperature 0, the best token alone is left.
    """
    if sampling.temperature == 0:
        return np.array([_best(logits)]), np.ones(1)
    # Differences first, and in float64: the best score is 0 at any temperature, and with a tiny one
    # all others are -inf.
    shifted = logits.astype(np.float64) - float(logits[_best(logits)])
    with np.errstate(over="ignore"):
        probabilities = np.exp(log_softmax(shifted / sampling.temperature))
    ids = np.argsort(-probabilities, kind="stable")
    if sampling.top_k:
        ids = ids[: sampling.top_k]
    kept = probabilities[ids] / probabilities[ids].sum()
    if sampling.top_p < 1:
        before = np.cumsum(kept) - kept
        count = np.count_nonzero(before < sampling.top_p)  # at least one: before[0] is 0
        ids, kept = ids[:count], kept[:count]
    if sampling.min_p > 0:
        count = np.count_nonzero(kept >= sampling.min_p * kept[0])
        ids, kept = ids[:count], kept[:count]
    return ids, kept / kept.sum()


def sample(
    logits: np.ndarray,
    sampling: Sampling,
    seed: tuple[int, int, int],
    mask: np.ndarray | None = None,
) -> int:
    """The next token for scores float32 [V]; `seed` is (seed, prompt index, step).

    With `mask` bool [V], of the tokens where it is true, at least one, as if there were no others.
    """
    allowed = np.arange(len(logits)) if mask is None else np.flatnonzero(mask)
    places, probabilities = distribution(logits[allowed], sampling)
    ids = allowed[places]
    if len(ids) == 1:
        return int(ids[0])
    noise = np.random.default_rng(seed).gumbel(size=len(logits))[ids]
    with np.errstate(divide="ignore"):
        return int(ids[np.argmax(np.log(probabilities) + noise)])


def best(log_probabilities: np.ndarray, count: int) -> list[tuple[int, float]]:
    """The `count` most probable tokens and their log-probabilities, the best first."""
    ids = np.argsort(-log_probabilities, kind="stable")[:count]
    return [(int(i), float(log_probabilities[i])) for i in ids]
