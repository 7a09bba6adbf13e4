"""The load at which the attainment falls below the wanted share, from all probes together.

A logistic curve of misses over the logarithm of the load is fitted to the probes. One load alone
needs thousands of requests to be decided; the curve uses those of the loads around it, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy

_LOADS = 601  # of the grid
_SLOPES = numpy.geomspace(1.0, 1000.0, 61)  # of the logit, for a load that is e times as high
_NEAR = 1.2  # loads farther away, as a ratio, do not lie on the same curve


@dataclass(frozen=True)
class LoadCounts:
    """A load with its requests, as if they were independent."""

    load: float
    kept: float
    missed: float


@dataclass(frozen=True)
class Threshold:
    """The load at which exactly the wanted share of the requests keeps the SLO."""

    load: float  # the median of the posterior
    low: float  # the 95 % interval
    high: float


def fit_threshold(
    counts: Sequence[LoadCounts], attained: float, near: float, low: float, high: float
) -> Threshold:
    """The threshold, given that it lies between `low` and `high`, from the loads near `near`.

    Every threshold and every slope in between, on logarithmic scales, is equally likely before.
    """
    grid = numpy.linspace(math.log(low), math.log(high), _LOADS)
    base = math.log((1 - attained) / attained)
    likelihood = numpy.zeros((len(_SLOPES), _LOADS))
    for entry in counts:
        if not near / _NEAR <= entry.load <= near * _NEAR:
            continue
        position = math.log(entry.load)
        logits = base + _SLOPES[:, None] * (position - grid[None, :])
        likelihood -= entry.missed * numpy.logaddexp(0, -logits)
        likelihood -= entry.kept * numpy.logaddexp(0, logits)
    weights = numpy.exp(likelihood - likelihood.max()).sum(axis=0)
    cumulative = (numpy.cumsum(weights) - weights / 2) / weights.sum()
    ends = numpy.interp([0.5, 0.025, 0.975], cumulative, grid)
    return Threshold(*(float(math.exp(end)) for end in ends))
