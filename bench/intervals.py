"""How sure a figure is: Student's t over repetitions of the same work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, variance

Z = 1.95996  # the 97.5 % quantile of the normal distribution
ERROR = "_stderr"  # what the name of a figure's standard error ends with, where it is known
# The 97.5 % quantile of Student's t for 1 to 30 degrees of freedom.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def t_quantile(freedom: float) -> float:
    """Student's t at 97.5 % for 1 or more degrees of freedom, rounded down; beyond 30 its expansion in 1 / freedom."""
    return _T[int(freedom) - 1] if freedom < 31 else Z + 2.3723 / freedom + 2.8225 / freedom**2


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % confidence interval of the mean of repetitions; None for fewer than two."""
    if len(values) < 2:
        return None
    mean, half = fmean(values), t_quantile(len(values) - 1) * math.sqrt(variance(values) / len(values))
    return mean - half, mean + half


def differ(a: Sequence[float], b: Sequence[float], paired: bool = False) -> bool | None:
    """Whether two means differ at the 5 % level; None when either has fewer than two repetitions.

    paired: the repetitions were taken in turn, so that what disturbed one also disturbed the other: a t test of their
    differences. Else Welch's, which wants no equal variances.
    """
    if min(len(a), len(b)) < 2:
        return None
    if paired and len(a) == len(b):
        low, high = interval([x - y for x, y in zip(a, b, strict=True)]) or (0.0, 0.0)
        return not low <= 0 <= high
    parts = variance(a) / len(a), variance(b) / len(b)
    if not sum(parts):
        return fmean(a) != fmean(b)
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / (len(a) - 1) + parts[1] ** 2 / (len(b) - 1))
    return abs(fmean(a) - fmean(b)) > t_quantile(max(1.0, freedom)) * math.sqrt(sum(parts))
