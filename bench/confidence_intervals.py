"""Confidence intervals and t tests over repetitions of the same workload."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, variance

Z_95 = 1.95996  # the 97.5 % quantile of the normal distribution
STDERR_SUFFIX = "_stderr"  # of the metric that holds another metric's standard error
# The 97.5 % quantile of Student's t for 1 to 30 degrees of freedom.
# fmt: off
_T_QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)
# fmt: on


def t_quantile(degrees_of_freedom: float) -> float:
    """The 97.5 % quantile of Student's t for 1 or more degrees of freedom.

    Degrees of freedom below 31 are rounded down, but not for a rounding error of their own. From
    there on a series in their inverse is used.
    """
    if degrees_of_freedom < 31:
        return _T_QUANTILES[min(30, int(degrees_of_freedom + 1e-9)) - 1]
    return Z_95 + 2.3723 / degrees_of_freedom + 2.8225 / degrees_of_freedom**2


def confidence_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % confidence interval of the mean of repetitions; None for fewer than two."""
    if len(values) < 2:
        return None
    mean = fmean(values)
    half = t_quantile(len(values) - 1) * math.sqrt(variance(values) / len(values))
    return mean - half, mean + half


def share_interval(passed: int, total: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share of 1 or more cases, by Wilson's score.

    Unlike one of standard errors, it has a width when all cases passed or none.
    """
    share = passed / total
    z2 = Z_95**2 / total
    middle = (share + z2 / 2) / (1 + z2)
    half = Z_95 * math.sqrt((share * (1 - share) + z2 / 4) / total) / (1 + z2)
    return max(0.0, middle - half), min(1.0, middle + half)


def means_differ(a: Sequence[float], b: Sequence[float], paired: bool = False) -> bool | None:
    """Whether two means differ at the 5 % level; None when either has fewer than two repetitions.

    paired: the repetitions took turns, so that both saw the same disturbances; the test is a paired
    t test. Otherwise it is Welch's t test, which allows different variances.
    """
    if min(len(a), len(b)) < 2:
        return None
    if paired and len(a) == len(b):
        low, high = confidence_interval([x - y for x, y in zip(a, b, strict=True)]) or (0.0, 0.0)
        return not low <= 0 <= high
    variance_a = variance(a) / len(a)
    variance_b = variance(b) / len(b)
    total = variance_a + variance_b
    if not total:
        return fmean(a) != fmean(b)
    degrees_of_freedom = total**2 / (variance_a**2 / (len(a) - 1) + variance_b**2 / (len(b) - 1))
    quantile = t_quantile(max(1.0, degrees_of_freedom))
    return abs(fmean(a) - fmean(b)) > quantile * math.sqrt(total)
