"""Cost against quality of a route: what each share of large calls gives.

The quality of an answer is 0 to 1. The gap is the difference of mean quality between the large tier
and the small one; a route keeps the part of it by which its own mean is above the small tier's
(RouteLLM, arXiv 2406.18665, section 3: performance gap recovered).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmkit.bench.routing.fit_logistic import Array

Mask = NDArray[np.bool_]  # [n], one for each prompt

SHARES = tuple(share / 20 for share in range(21))  # of large calls, in the curve


@dataclass(frozen=True)
class CurvePoint:
    """A route at one share of large calls."""

    share: float  # of requests that the large tier answers
    quality: float  # mean over all prompts
    gap: float  # part of the gap that is kept; NaN: there is no gap
    cost: float  # of all requests, 1: all go to the large tier at once


@dataclass(frozen=True)
class RouteOutcomes:
    """What each prompt gives and costs with each tier."""

    small_quality: Array  # [n], 0 to 1
    large_quality: Array  # [n]
    small_cost: Array  # [n] of an answer that stands
    abandoned_cost: Array  # [n] of an answer that is given up
    large_cost: Array  # [n]

    def point(self, to_large: Mask) -> CurvePoint:
        """The point where the prompts of the mask [n] go to the large tier."""
        quality = np.where(to_large, self.large_quality, self.small_quality)
        cost = np.where(to_large, self.abandoned_cost + self.large_cost, self.small_cost)
        gap = self.large_quality.mean() - self.small_quality.mean()
        kept = (quality.mean() - self.small_quality.mean()) / gap if gap > 0 else math.nan
        return CurvePoint(
            float(to_large.mean()),
            float(quality.mean()),
            float(kept),
            float(cost.sum() / max(self.large_cost.sum(), 1e-12)),
        )

    def curve(self, scores: Array, shares: Sequence[float] = SHARES) -> list[CurvePoint]:
        """The points at `shares`, where prompts of low scores [n] go to the large tier first."""
        order = np.argsort(scores, kind="stable")
        rank = np.empty(len(order), dtype=int)
        rank[order] = np.arange(len(order))
        # Half a prompt rounds down, so that a share is never exceeded.
        return [self.point(rank < math.floor(share * len(order) + 1e-9)) for share in shares]

    def oracle(self, shares: Sequence[float] = SHARES) -> list[CurvePoint]:
        """The best possible curve, which knows the quality of all answers."""
        return self.curve(self.small_quality - self.large_quality, shares)

    def random(self, shares: Sequence[float] = SHARES) -> list[CurvePoint]:
        """What a share of requests drawn at random gives on average, without asking the small."""
        none, everything = self.point(np.zeros(self.count, bool)), self.point(self._all)
        return [
            CurvePoint(
                share,
                none.quality + share * (everything.quality - none.quality),
                share if not math.isnan(everything.gap) else math.nan,
                (1 - share) * none.cost + share,
            )
            for share in shares
        ]

    @property
    def count(self) -> int:
        """The number of prompts."""
        return len(self.small_quality)

    @property
    def _all(self) -> Mask:
        return np.ones(self.count, bool)


def threshold_for_share(scores: Array, share: float) -> float:
    """The threshold below which at most `share` of the scores [n] lie."""
    ordered = np.sort(scores)
    count = math.floor(share * len(ordered) + 1e-9)
    if count >= len(ordered):
        return 1.0
    return float(ordered[count])


def area_under_roc(scores: Array, good: Mask) -> float:
    """The chance that a good answer has a higher score than a bad one; NaN without both."""
    positive, negative = scores[good], scores[~good]
    if not len(positive) or not len(negative):
        return math.nan
    above = (positive[:, None] > negative[None, :]).sum()
    ties = (positive[:, None] == negative[None, :]).sum()
    return float((above + ties / 2) / (len(positive) * len(negative)))
