"""Confidence intervals and t tests against tables and simulation."""

from random import Random

import pytest

from llmkit.bench.confidence_intervals import confidence_interval, means_differ, t_quantile


@pytest.mark.parametrize(
    ("freedom", "t"), [(1, 12.706), (2.9, 4.303), (30, 2.042), (40, 2.021), (120, 1.980)]
)
def test_t_quantiles_match_the_tables(freedom: float, t: float) -> None:
    assert t_quantile(freedom) == pytest.approx(t, abs=1e-3)


def test_confidence_interval_matches_a_manual_calculation() -> None:
    assert confidence_interval([1.0]) is None
    assert confidence_interval([1.0, 2.0, 3.0]) == pytest.approx(
        (2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5)
    )


@pytest.mark.parametrize("count", [3, 5, 20])
def test_confidence_intervals_contain_the_mean_in_95_percent(count: int) -> None:
    random = Random(count)
    intervals = [
        confidence_interval([random.gauss(7, 2) for _ in range(count)]) for _ in range(2000)
    ]
    held = sum(one is not None and one[0] <= 7 <= one[1] for one in intervals)
    assert held == pytest.approx(0.95 * 2000, abs=4 * (2000 * 0.95 * 0.05) ** 0.5)


@pytest.mark.parametrize("paired", [False, True])
def test_t_test_finds_real_differences_and_few_others(paired: bool) -> None:
    random = Random(1)
    draws = [
        [[random.gauss(mean, 1) for _ in range(5)] for mean in (10, 10, 14)] for _ in range(1000)
    ]
    assert sum(bool(means_differ(a, b, paired)) for a, b, _ in draws) < 80
    assert sum(bool(means_differ(a, c, paired)) for a, _, c in draws) > 950


@pytest.mark.parametrize("spread", [1.0, 0.1, 3.7])
@pytest.mark.parametrize("swapped", [False, True])
def test_welch_t_test_has_the_degrees_of_freedom_of_the_means_that_vary(
    spread: float, swapped: bool
) -> None:
    """Where one side does not vary they are the other side's 3, for a quantile of 3.182.

    5 x 4 repetitions with one variance would have 7, for 2.365; 4 would be 2.776.
    """
    fixed = [0.0] * 5
    error = spread * (2 / 3) ** 0.5 / 2  # of the mean of four values with these distances
    for t, expected in ((3.15, False), (3.21, True)):
        varying = [t * error + spread * distance for distance in (-1, 0, 0, 1)]
        pair = (varying, fixed) if swapped else (fixed, varying)
        assert means_differ(*pair) is expected, t


def test_welch_t_test_weighs_both_variances() -> None:
    """Variances of the means 1/6 and 1/150: 3.24 degrees of freedom, and not 3 + 3."""
    small = [-0.2, 0.0, 0.0, 0.2]
    for t, expected in ((3.1, False), (3.25, True)):
        mean = t * (1 / 6 + 1 / 150) ** 0.5
        assert means_differ(small, [mean + x for x in (-1, 0, 0, 1)]) is expected
    assert t_quantile(3 - 1e-12) == t_quantile(3)
    assert t_quantile(31 - 1e-12) == t_quantile(30)


def test_paired_t_test_ignores_drift() -> None:
    drift = [100.0, 70.0, 120.0, 90.0]
    a = drift
    b = [1.05 * value + noise for value, noise in zip(drift, (0.1, -0.1, 0.2, 0.0), strict=True)]
    assert means_differ(a, b, paired=True)
    assert not means_differ(a, b)


def test_t_test_needs_two_repetitions() -> None:
    assert means_differ([1.0], [2.0, 3.0]) is None
    assert means_differ([1.0, 1.0], [1.0, 1.0]) is False
    assert means_differ([1.0, 1.0], [2.0, 2.0]) is True
