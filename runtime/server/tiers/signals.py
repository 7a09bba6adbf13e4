"""How sure a model was of its answer, from the log probabilities of the answer's tokens.

The same signals are computed in a model's server, from a URL's responses and by `bench route`, so
that a calibration holds for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

TOP_LOGPROBS = 5  # alternatives of each token that the entropy is computed from
ENTROPY_TOKENS = 4  # tokens at an answer's start whose entropy is a signal
MEAN_LOGPROB = "mean_logprob"  # of the tokens, in nats
MIN_LOGPROB = "min_logprob"  # of the least probable token, in nats
FIRST_ENTROPY = "first_entropy"  # mean of the first ENTROPY_TOKENS tokens, in nats
# The least difference between the log probabilities of the two most probable tokens, in nats.
# A model that differs from another by small errors chooses another token where this is small.
MIN_MARGIN = "min_margin"
SIGNALS = (MEAN_LOGPROB, MIN_LOGPROB, FIRST_ENTROPY, MIN_MARGIN)
_LOWEST_LOGPROB = -20.0  # a token that was forced, or a rounding to zero, counts as this
_LEAST_REST = 1e-9  # probability of all tokens that are not among the alternatives


class AnswerSignals:
    """The signals of one answer, as its tokens come."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self._sum = 0.0
        self._lowest = 0.0
        self._least_margin = -_LOWEST_LOGPROB
        self._entropies: list[float] = []

    def add(self, logprob: float, top_logprobs: Iterable[float]) -> None:
        """Add the next token. top_logprobs: of the most probable tokens at its position."""
        top_logprobs = tuple(top_logprobs)
        logprob = max(logprob, _LOWEST_LOGPROB)
        self.num_tokens += 1
        self._sum += logprob
        self._lowest = min(self._lowest, logprob)
        self._least_margin = min(self._least_margin, token_margin(top_logprobs))
        if len(self._entropies) < ENTROPY_TOKENS:
            self._entropies.append(token_entropy(top_logprobs))

    def values(self) -> dict[str, float] | None:
        """The SIGNALS by name; None for an answer without tokens."""
        if not self.num_tokens:
            return None
        return {
            MEAN_LOGPROB: self._sum / self.num_tokens,
            MIN_LOGPROB: self._lowest,
            FIRST_ENTROPY: sum(self._entropies) / len(self._entropies),
            MIN_MARGIN: self._least_margin,
        }


def token_entropy(top_logprobs: Iterable[float]) -> float:
    """The entropy of the next token, in nats, all tokens but TOP_LOGPROBS merged into one.

    It is never above the entropy of the whole distribution (Cover and Thomas, Elements of
    Information Theory, 2nd ed., problem 2.4: a function of a variable has no more entropy).
    """
    highest = sorted(top_logprobs, reverse=True)[:TOP_LOGPROBS]
    probabilities = [math.exp(min(logprob, 0.0)) for logprob in highest]
    rest = max(1.0 - sum(probabilities), _LEAST_REST)
    terms = [-p * math.log(p) for p in (*probabilities, rest) if p > 0]
    return max(0.0, sum(terms))


def token_margin(top_logprobs: Iterable[float]) -> float:
    """How far the most probable token is ahead of the second, in nats; at most 20.

    Fewer than two tokens leave nothing to choose: the highest margin.
    """
    highest = sorted(top_logprobs, reverse=True)[:2]
    if len(highest) < 2:
        return -_LOWEST_LOGPROB
    return min(highest[0] - max(highest[1], _LOWEST_LOGPROB), -_LOWEST_LOGPROB)


def logistic(bias: float, weights: Mapping[Any, float], values: Mapping[str, float]) -> float:
    """The probability 1 / (1 + exp(-(bias + sum of weight * value)))."""
    score = bias + sum(weight * values[name] for name, weight in weights.items())
    return sigmoid(score)


def sigmoid(score: float) -> float:
    """The logistic function, without overflow."""
    if score >= 0:
        return 1 / (1 + math.exp(-score))
    power = math.exp(score)
    return power / (1 + power)
