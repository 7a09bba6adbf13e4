"""The KL divergence of two predictions of which only the most probable tokens are known.

`bench/server_quality.py` has the same bound for whole texts, in torch, which the router does not
import.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_MIN_REST = 1e-9  # probability of all merged tokens; rounding may leave 0 or less


@dataclass(frozen=True)
class AnswerDivergence:
    """How far two models' predictions for the tokens of one answer are apart."""

    kl_sum: float  # nats, a lower bound
    max_kl: float  # of one token
    num_tokens: int
    num_same_top: int  # tokens for which both have the same most probable token

    @property
    def mean_kl(self) -> float:
        """The mean over the tokens."""
        return self.kl_sum / self.num_tokens


def divergence_bound(p: Mapping[str, float], q: Mapping[str, float]) -> float:
    """A lower bound of KL(p || q) from log probabilities by token.

    Tokens that are not known on both sides are merged into one, which can only make the divergence
    smaller (the log sum inequality).
    """
    total = 0.0
    p_known = 0.0
    q_known = 0.0
    for token in p.keys() & q.keys():
        probability = math.exp(p[token])
        total += probability * (p[token] - q[token])
        p_known += probability
        q_known += math.exp(q[token])
    p_rest = max(1.0 - p_known, _MIN_REST)
    q_rest = max(1.0 - q_known, _MIN_REST)
    return max(0.0, total + p_rest * math.log(p_rest / q_rest))


def answer_divergence(
    p: Sequence[Mapping[str, float]], q: Sequence[Mapping[str, float]]
) -> AnswerDivergence:
    """Compare the predictions for the same tokens, at least one."""
    bounds = []
    num_same_top = 0
    for p_token, q_token in zip(p, q, strict=True):
        bounds.append(divergence_bound(p_token, q_token))
        num_same_top += max(p_token, key=p_token.__getitem__) == max(
            q_token, key=q_token.__getitem__
        )
    return AnswerDivergence(sum(bounds), max(bounds), len(bounds), num_same_top)
