"""Metrics on timelines made by hand, with figures that can be checked by eye."""

import pytest

from llmkit.bench.metrics import (
    CONDITIONAL,
    SPEED_METRICS,
    RequestTimeline,
    Run,
    client_figures,
    medians,
    parse_slo,
    percentile,
    require_complete,
    summarize,
)
from llmkit.checkpoint.errors import InputError, UsageError


def timelines() -> list[RequestTimeline]:
    return [
        RequestTimeline("a", 10.0, (10.5, 10.75, 11.0), prompt_tokens=100, cached_tokens=64, output_tokens=3),
        RequestTimeline("b", 10.0, (11.0, 11.5, 13.0), prompt_tokens=50, output_tokens=5),
    ]


def test_one_request() -> None:
    a, b = timelines()
    assert (a.ttft_s, a.e2e_s, a.tpot_s, a.gaps_s) == (0.5, 1.0, 0.25, [0.25, 0.25])
    assert (b.ttft_s, b.e2e_s, b.tpot_s, b.gaps_s) == (1.0, 3.0, 0.5, [0.5, 1.5])
    assert RequestTimeline("c", 0.0, (1.0,), output_tokens=1).tpot_s is None


def test_figures_of_a_run() -> None:
    figures = summarize(timelines(), wall_s=4.0)
    assert figures["output_tps"] == 2.0
    assert figures["total_tps"] == (150 + 8) / 4
    assert figures["request_rate"] == 0.5
    assert (figures["prompt_tokens"], figures["cached_tokens"], figures["output_tokens"]) == (150, 64, 8)
    assert (figures["requests"], figures["wall_s"]) == (2, 4.0)
    assert figures["ttft_mean_ms"] == 750.0
    assert figures["ttft_p50_ms"] == 750.0
    assert figures["ttft_p99_ms"] == pytest.approx(995.0)
    assert figures["tpot_mean_ms"] == 375.0
    assert figures["e2e_p90_ms"] == pytest.approx(2800.0)
    assert figures["itl_mean_ms"] == 625.0  # pooled over the gaps 250, 250, 500 and 1500
    assert figures["itl_p50_ms"] == 375.0
    assert figures["itl_p95_ms"] == pytest.approx(1350.0)
    assert figures.keys() == SPEED_METRICS.keys() - CONDITIONAL


def test_single_tokens_have_no_gaps() -> None:
    figures = summarize([RequestTimeline("a", 0.0, (0.5,), 4, 0, 1)], wall_s=1.0)
    assert figures["ttft_p99_ms"] == 500.0
    assert not {name for name in figures if name.startswith(("tpot", "itl"))}


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [([7.0], 99, 7.0), ([1, 2, 3, 4, 5], 50, 3), ([5, 1, 4, 2], 50, 3.0), (range(101), 99, 99), ([0, 10], 95, 9.5)],
)
def test_percentiles(values: list[float], percent: float, expected: float) -> None:
    assert percentile(values, percent) == pytest.approx(expected)


def test_medians_over_rounds() -> None:
    rounds = [{"output_tps": 3.0, "itl_p99_ms": 9.0}, {"output_tps": 1.0, "itl_p99_ms": 5.0}, {"output_tps": 2.0}]
    assert medians(rounds) == {"output_tps": 2.0, "itl_p99_ms": 7.0}


def test_failures_are_counted_and_end_the_measurement() -> None:
    failed = RequestTimeline("online-0-7", 0.0, error="HTTP 500: no")
    with pytest.raises(InputError, match=r"1 of 3 requests of scenario online failed at x .*online-0-7: HTTP 500: no"):
        require_complete([*timelines(), failed], "x", "online")
    require_complete(timelines(), "x", "online")


def test_bounds() -> None:
    assert parse_slo("ttft:200ms, tpot:50ms,e2e:2s") == {"ttft": 0.2, "tpot": 0.05, "e2e": 2.0}
    for text in ("", "ttft", "ttft:200", "itl:3ms", "ttft:ms", "ttft:1.2.3s", "ttft:200ms,"):
        with pytest.raises(UsageError, match=r"is not understood at .*ttft:200ms,tpot:50ms,e2e:2s was expected"):
            parse_slo(text)


@pytest.mark.parametrize(
    ("slo", "requests"),
    [({"ttft": 0.5}, 1), ({"ttft": 1.0}, 2), ({"tpot": 0.3}, 1), ({"e2e": 0.9}, 0), ({"ttft": 1.0, "e2e": 1.0}, 1)],
)
def test_goodput_counts_requests_that_keep_every_bound(slo: dict[str, float], requests: int) -> None:
    assert summarize(timelines(), 4.0, slo)["goodput"] == requests / 4


def test_one_token_cannot_be_late_with_its_next() -> None:
    assert summarize([RequestTimeline("a", 0.0, (0.5,), 4, 0, 1)], 1.0, {"tpot": 0.001})["goodput"] == 1.0


def test_the_client_is_measured() -> None:
    assert client_figures(Run(4.0, timelines())) == {}
    late = [RequestTimeline("a", 0.0, (0.5,), 4, 0, 1, late_s=0.25)]
    assert client_figures(Run(2.0, late, 0.5)) == {"client_us": 5e5, "client_busy": 0.25, "client_late_ms": 250.0}
