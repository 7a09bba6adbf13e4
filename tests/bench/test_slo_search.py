"""The most load under an SLO: attainment, the search on a server with known times, its report."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy
import pytest
from support.fixed_time_http import fixed_time_server
from support.fixed_time_server import (
    FixedTimeServer,
    highest_rate,
    share_without_longer_wait,
)
from support.tiny_models import tiny_checkpoint

from llmkit.bench.bench_metrics import RequestTimeline, RunResult
from llmkit.bench.bench_options import LoadOptions
from llmkit.bench.bench_page import drawings, report_page
from llmkit.bench.bench_report import BenchReport, TargetReport
from llmkit.bench.report_tables import render_report, spread_text
from llmkit.bench.slo.attainment import (
    Attainment,
    autocorrelation_time,
    judge_run,
    requests_to_decide,
)
from llmkit.bench.slo.knee import knee
from llmkit.bench.slo.measure_slo import require_reachable, search_slo
from llmkit.bench.slo.slo_result import SloResult
from llmkit.bench.slo.slo_search import SloGoal
from llmkit.bench.slo.slo_tables import slo_sentences
from llmkit.bench.slo.slo_workload import SloWorkload, slo_scenario
from llmkit.bench.workload import PromptDataset, build_workload
from llmkit.cli import main
from llmkit.common.errors import InputError
from llmkit.common.progress import SilentProgress

DATA = PromptDataset("tokens", range(10_000))
OUTPUT_TOKENS = 9
SLOTS = 32
TTFT_S = 0.4
TPOT_S = 0.15
BOUND_S = 0.6
GOAL = SloGoal({"ttft": BOUND_S}, 0.9, True, 0.05, 10, 2400)


class SimulatedBackend(FixedTimeServer):
    """The fixed-time server in virtual time, as a backend."""

    name = "fixed"
    context_tokens = None

    def start(self) -> dict[str, float]:
        return {}

    def stop(self) -> dict[str, float]:
        return {}


def slo_workload(seed: int, is_rate: bool = True) -> SloWorkload:
    load = LoadOptions("slo", input_tokens=(8, 8), output_tokens=(OUTPUT_TOKENS, OUTPUT_TOKENS))
    sample = build_workload(DATA, [slo_scenario(load, is_rate, 1.0, 8)], seed=seed)
    return SloWorkload.of(sample, DATA, load)


def search(
    goal: SloGoal, seed: int = 0, slots: int = SLOTS, ttft_s: float = TTFT_S, tpot_s: float = TPOT_S
) -> SloResult:
    backend = SimulatedBackend(slots, ttft_s, tpot_s)
    return search_slo(backend, slo_workload(seed, goal.is_rate), goal, SilentProgress())


def run_of(latencies_s: list[float], errors: int = 0) -> RunResult:
    """Requests one second apart with these times to first token; the first `errors` failed."""
    timelines = [
        RequestTimeline(str(i), float(i), (i + s,), 1, 0, 1, "HTTP 429" if i < errors else None)
        for i, s in enumerate(latencies_s)
    ]
    return RunResult(float(len(latencies_s)), timelines)


def test_queue_formula_is_that_of_one_slot() -> None:
    """Erlang's solution of M/D/1, for waits shorter than one service."""
    rate, wait = 0.5, 0.7
    assert share_without_longer_wait(rate, 1, 1.0, wait) == pytest.approx(
        (1 - rate) * math.exp(rate * wait), rel=1e-6
    )


@pytest.mark.parametrize(
    "seed", [*range(5), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(5, 10))]
)
def test_slo_search_finds_the_capacity_of_a_fixed_time_server(seed: int) -> None:
    """Within 5 %, ten of ten: the rate at which exactly 90 % wait less than 0.2 s."""
    service_s = TTFT_S + (OUTPUT_TOKENS - 1) * TPOT_S
    capacity = highest_rate(SLOTS, service_s, BOUND_S - TTFT_S, GOAL.attained)
    result = search(GOAL, seed)
    assert result.load == pytest.approx(capacity, rel=0.05)
    assert result.shown_low <= capacity * 1.01
    assert result.shown_high >= capacity * 0.99
    assert 0 < result.low <= result.load <= result.high < math.inf
    assert sum(not probe.is_pilot for probe in result.probes) <= GOAL.max_probes
    assert all(probe.requests <= GOAL.max_requests for probe in result.probes), (
        "the requests of a load are bounded"
    )


@pytest.mark.parametrize("seed", range(3))
def test_slo_search_sees_a_queue_that_grows(seed: int) -> None:
    """TPOT never depends on the load here: only the growing queue limits it."""
    goal = replace(GOAL, slo={"tpot": 1.0}, max_requests=4000)
    capacity = SLOTS / (TTFT_S + (OUTPUT_TOKENS - 1) * TPOT_S)
    result = search(goal, seed)
    assert result.load == pytest.approx(capacity, rel=0.06)
    above = [probe for probe in result.probes if probe.load > 1.2 * capacity]
    assert above and all(probe.verdict == "grows" for probe in above)
    assert all(probe.attained == 1.0 for probe in above), "no bound was missed"
    assert above[-1].growth == pytest.approx(above[-1].load / capacity - 1, rel=0.2)


def test_slo_search_finds_the_most_clients() -> None:
    """Of 2 K + k clients on K slots, k of K requests wait longer than one service."""
    service_s = TTFT_S + (OUTPUT_TOKENS - 1) * TPOT_S
    goal = replace(GOAL, is_rate=False, slo={"ttft": TTFT_S + service_s + 1e-6})
    most = 2 * SLOTS + math.floor(0.1 * SLOTS)
    result = search(goal)
    assert result.load == pytest.approx(most, rel=0.05)
    assert result.low <= most <= result.high
    assert result.load == int(result.load)
    assert result.unit == "clients"


def test_slo_bounds_that_a_single_request_misses_are_named() -> None:
    goal = replace(GOAL, slo={"ttft": 0.1, "tpot": 1.0})
    result = search(goal)
    assert result.load == 0 and not result.probes
    with pytest.raises(InputError) as caught:
        require_reachable("model", result)
    assert "ttft is 400 ms and its bound 100 ms" in str(caught.value)
    assert "medians of 8 requests" in str(caught.value)
    target = TargetReport("fixed", "fixed", "url", {"slo_rate": 0.0}, slo=result)
    assert target.interval("slo_rate") == (0.0, 0.0)
    assert caught.value.exit_code == 3


def test_slo_search_that_runs_out_says_undecided() -> None:
    goal = replace(GOAL, attained=0.99, max_requests=1400, max_probes=8)
    result = search(goal)
    assert result.undecided
    target = TargetReport("fixed", "fixed", "url", slo=result)
    text = " ".join(slo_sentences(target))
    assert f"undecided from {result.undecided[0]:.4g} to {result.undecided[-1]:.4g}" in text
    assert f"{result.load:.4g} requests/s (95 %: {result.low:.4g} to {result.high:.4g})" in text


def test_failed_requests_are_misses() -> None:
    judged = judge_run(run_of([0.1] * 200, errors=100), {"ttft": 1.0}, True)
    assert judged.failed == 50, "of the half that failed, the first quarter warmed up"
    assert judged.kept == judged.counted - judged.failed


def test_short_run_above_capacity_grows() -> None:
    rising = judge_run(run_of([0.01 * i for i in range(60)]), {"ttft": 10.0}, True)
    assert rising.kept == rising.counted, "no bound was missed yet"
    assert rising.grows
    random = Random(0)
    steady = judge_run(run_of([random.random() for _ in range(60)]), {"ttft": 10.0}, True)
    assert not steady.grows


def test_autocorrelation_time_of_an_autoregressive_process() -> None:
    noise = numpy.random.default_rng(0).normal(size=200_000)
    values = numpy.zeros_like(noise)
    for i in range(1, len(noise)):
        values[i] = 0.8 * values[i - 1] + noise[i]
    assert autocorrelation_time(values) == pytest.approx((1 + 0.8) / (1 - 0.8), rel=0.15)
    assert autocorrelation_time(noise) == pytest.approx(1, rel=0.1)
    assert autocorrelation_time(numpy.ones(50)) == 1


def test_attainment_is_decided_with_the_promised_error() -> None:
    """Of true attainments just as wanted, at most ALPHA are ever decided wrongly."""
    random = Random(1)
    wrong = 0
    for _ in range(400):
        kept = 0
        for count in range(1, 1500):
            kept += random.random() < 0.9
            if count % 50 == 0 and Attainment(kept, count).decides(0.9) is not None:
                wrong += 1
                break
    assert wrong <= 400 * 0.02
    assert Attainment(950, 1000).decides(0.9) is True
    assert Attainment(850, 1000).decides(0.9) is False
    low, high = Attainment(900, 1000).interval(0.9)
    assert 0.86 < low < 0.9 < high < 0.94
    assert requests_to_decide(0.9) < 80 < 500 < requests_to_decide(0.99) < 800


def test_knee_is_where_latency_bends() -> None:
    curve = [(load, 1 / (1 - load / 10)) for load in range(10)]
    assert knee(curve) == 7
    assert knee([(load, float(load)) for load in range(10)]) is None
    assert knee(curve[:2]) is None


def test_slo_requests_differ_between_probes_and_keep_their_rate() -> None:
    workload = slo_workload(0)
    first = workload.probe(5.0, 101, 0)
    again = workload.probe(5.0, 101, 1)
    assert [request.prompt for request in first] != [request.prompt for request in again]
    times = [request.send_at_s for request in first]
    assert times[0] == 0 and times[-1] == pytest.approx(100 / 5.0)
    assert times != [request.send_at_s for request in again]
    assert workload.probe(5.0, 101, 0) == first


def test_slo_report_has_tables_charts_and_survives_json() -> None:
    result = search(GOAL)
    target = TargetReport("fixed", "fixed", "url", {"slo_rate": result.load}, slo=result)
    target.metrics["knee_load"] = result.probes[3].load
    report = BenchReport([target])
    assert target.interval("slo_rate") == (result.low, result.high)
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert BenchReport.from_json(document).to_json() == report.to_json()
    charts = drawings(report)
    assert {"slo-0", "interactivity"} <= charts.keys()
    assert charts["slo-0"].count('class="mark') >= 5
    page = report_page(report).decode()
    assert "Most load under the SLO" in page and "keeps the SLO" in page
    assert f"{result.load:.4g} requests/s" in page
    assert render_report(report).renderables


def test_slo_interval_without_an_end_is_no_spread() -> None:
    result = SloResult("rate", 0.9, {"ttft": 1.0}, load=5.0, low=5.0)
    target = TargetReport("fast", "fast", "url", {"slo_rate": 5.0}, slo=result)
    assert spread_text(target, "slo_rate", 1.0) == ""
    (sentence,) = slo_sentences(target)
    assert sentence.startswith("fast: at least 5 requests/s")
    target.slo = replace(result, load=0.0, low=0.0)
    assert slo_sentences(target)[0].startswith("fast: no load was shown to have 0.9 of")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_slo_search_over_http(tmp_path: Path) -> None:
    """The same server with real sockets and clocks. It takes about ten minutes.

    It must run alone: other work on the machine counts as the server's, and lowers what is found.
    """
    tiny_checkpoint(tmp_path / "model")
    service_s = TTFT_S + (OUTPUT_TOKENS - 1) * TPOT_S
    capacity = highest_rate(SLOTS, service_s, BOUND_S - TTFT_S, 0.9)
    with fixed_time_server(SLOTS, TTFT_S, TPOT_S) as url:
        words = ["--url", url, "--tokenizer", str(tmp_path / "model"), "--mode", "slo"]
        words += ["--slo", f"ttft:{BOUND_S}s", "--attained", "0.9", "--requests", "1400"]
        words += ["--max-probes", "10", "--input-tokens", "8", "--output-tokens", "9"]
        words += ["--no-quality", "-q", "-o", str(tmp_path / "report.json")]
        assert main.run(["bench", *words]) == 0
    (target,) = json.loads((tmp_path / "report.json").read_text())["targets"]
    assert target["metrics"]["slo_rate"] == pytest.approx(capacity, rel=0.05)
