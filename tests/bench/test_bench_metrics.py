"""Metrics of timelines made by hand, whose values can be checked by eye."""

import pytest

from llmkit.bench.bench_metrics import (
    CONDITIONAL_SPEED_METRICS,
    SPEED_METRICS,
    RequestTimeline,
    RunResult,
    calculate_client_metrics,
    calculate_metrics,
    median_metrics,
    parse_slo,
    percentile,
    require_complete,
)
from llmkit.common.errors import InputError, UsageError


def timelines() -> list[RequestTimeline]:
    return [
        RequestTimeline(
            "a", 10.0, (10.5, 10.75, 11.0), prompt_tokens=100, cached_tokens=64, output_tokens=3
        ),
        RequestTimeline("b", 10.0, (11.0, 11.5, 13.0), prompt_tokens=50, output_tokens=5),
    ]


def test_request_latencies() -> None:
    a, b = timelines()
    assert (a.ttft_s, a.e2e_s, a.tpot_s, a.itl_s) == (0.5, 1.0, 0.25, [0.25, 0.25])
    assert (b.ttft_s, b.e2e_s, b.tpot_s, b.itl_s) == (1.0, 3.0, 0.5, [0.5, 1.5])
    assert RequestTimeline("c", 0.0, (1.0,), output_tokens=1).tpot_s is None


def test_metrics_of_a_run() -> None:
    figures = calculate_metrics(timelines(), wall_s=4.0)
    assert figures["output_tps"] == 2.0
    assert figures["total_tps"] == (150 + 8) / 4
    assert figures["request_rate"] == 0.5
    assert (figures["prompt_tokens"], figures["cached_tokens"], figures["output_tokens"]) == (
        150,
        64,
        8,
    )
    assert figures["cache_hit_rate"] == 64 / 150
    assert (figures["requests"], figures["wall_s"]) == (2, 4.0)
    assert figures["ttft_mean_ms"] == 750.0
    assert figures["ttft_p50_ms"] == 750.0
    assert figures["ttft_p99_ms"] == pytest.approx(995.0)
    assert figures["tpot_mean_ms"] == 375.0
    assert figures["e2e_p90_ms"] == pytest.approx(2800.0)
    assert figures["itl_mean_ms"] == 625.0  # pooled over the gaps 250, 250, 500 and 1500
    assert figures["itl_p50_ms"] == 375.0
    assert figures["itl_p95_ms"] == pytest.approx(1350.0)
    assert figures.keys() == SPEED_METRICS.keys() - CONDITIONAL_SPEED_METRICS


def test_metrics_of_single_tokens_have_no_itl() -> None:
    figures = calculate_metrics([RequestTimeline("a", 0.0, (0.5,), 4, 0, 1)], wall_s=1.0)
    assert figures["ttft_p99_ms"] == 500.0
    assert not {name for name in figures if name.startswith(("tpot", "itl"))}


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([7.0], 99, 7.0),
        ([1, 2, 3, 4, 5], 50, 3),
        ([5, 1, 4, 2], 50, 3.0),
        (range(101), 99, 99),
        ([0, 10], 95, 9.5),
    ],
)
def test_percentile_interpolates(values: list[float], percent: float, expected: float) -> None:
    assert percentile(values, percent) == pytest.approx(expected)


def test_median_metrics_over_rounds() -> None:
    rounds = [
        {"output_tps": 3.0, "itl_p99_ms": 9.0},
        {"output_tps": 1.0, "itl_p99_ms": 5.0},
        {"output_tps": 2.0},
    ]
    assert median_metrics(rounds) == {"output_tps": 2.0, "itl_p99_ms": 7.0}


def test_require_complete_counts_failures() -> None:
    failed = RequestTimeline("online-0-7", 0.0, error="HTTP 500: no")
    with pytest.raises(
        InputError,
        match=r"1 of 3 requests of scenario online failed at x .*online-0-7: HTTP 500: no",
    ):
        require_complete([*timelines(), failed], "x", "online")
    require_complete(timelines(), "x", "online")


def test_slo_is_parsed() -> None:
    assert parse_slo("ttft:200ms, tpot:50ms,e2e:2s") == {"ttft": 0.2, "tpot": 0.05, "e2e": 2.0}
    for text in ("", "ttft", "ttft:200", "itl:3ms", "ttft:ms", "ttft:1.2.3s", "ttft:200ms,"):
        with pytest.raises(
            UsageError, match=r"is not understood at .*ttft:200ms,tpot:50ms,e2e:2s was expected"
        ):
            parse_slo(text)


@pytest.mark.parametrize(
    ("slo", "requests"),
    [
        ({"ttft": 0.5}, 1),
        ({"ttft": 1.0}, 2),
        ({"tpot": 0.3}, 1),
        ({"e2e": 0.9}, 0),
        ({"ttft": 1.0, "e2e": 1.0}, 1),
    ],
)
def test_goodput_counts_requests_within_every_bound(slo: dict[str, float], requests: int) -> None:
    assert calculate_metrics(timelines(), 4.0, slo)["goodput"] == requests / 4


def test_goodput_ignores_tpot_of_single_tokens() -> None:
    assert (
        calculate_metrics([RequestTimeline("a", 0.0, (0.5,), 4, 0, 1)], 1.0, {"tpot": 0.001})[
            "goodput"
        ]
        == 1.0
    )


def test_client_metrics() -> None:
    assert calculate_client_metrics(RunResult(4.0, timelines())) == {}
    late = [RequestTimeline("a", 0.0, (0.5,), 4, 0, 1, schedule_lag_s=0.25)]
    assert calculate_client_metrics(RunResult(2.0, late, 0.5)) == {
        "client_us": 5e5,
        "client_busy": 0.25,
        "client_late_ms": 250.0,
    }
