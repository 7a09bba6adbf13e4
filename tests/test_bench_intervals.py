"""Confidence intervals and significance against tables and against simulation."""

from random import Random

import pytest

from llmkit.bench.intervals import differ, interval, t_quantile


@pytest.mark.parametrize(("freedom", "t"), [(1, 12.706), (2.9, 4.303), (30, 2.042), (40, 2.021), (120, 1.980)])
def test_quantiles_are_those_of_the_tables(freedom: float, t: float) -> None:
    assert t_quantile(freedom) == pytest.approx(t, abs=1e-3)


def test_an_interval_by_hand() -> None:
    assert interval([1.0]) is None
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))


@pytest.mark.parametrize("count", [3, 5, 20])
def test_intervals_hold_the_mean_as_often_as_they_say(count: int) -> None:
    random = Random(count)
    intervals = [interval([random.gauss(7, 2) for _ in range(count)]) for _ in range(2000)]
    held = sum(one is not None and one[0] <= 7 <= one[1] for one in intervals)
    assert held == pytest.approx(0.95 * 2000, abs=4 * (2000 * 0.95 * 0.05) ** 0.5)


@pytest.mark.parametrize("paired", [False, True])
def test_what_is_alike_rarely_differs_and_what_differs_is_seen(paired: bool) -> None:
    random = Random(1)
    draws = [[[random.gauss(mean, 1) for _ in range(5)] for mean in (10, 10, 14)] for _ in range(1000)]
    assert sum(bool(differ(a, b, paired)) for a, b, _ in draws) < 80
    assert sum(bool(differ(a, c, paired)) for a, _, c in draws) > 950


def test_turns_taken_see_through_a_machine_that_drifts() -> None:
    drift = [100.0, 70.0, 120.0, 90.0]
    a, b = drift, [1.05 * value + noise for value, noise in zip(drift, (0.1, -0.1, 0.2, 0.0), strict=True)]
    assert differ(a, b, paired=True)
    assert not differ(a, b)


def test_too_little_to_tell() -> None:
    assert differ([1.0], [2.0, 3.0]) is None
    assert differ([1.0, 1.0], [1.0, 1.0]) is False
    assert differ([1.0, 1.0], [2.0, 2.0]) is True
