"""The search of `--mode slo` on a running target."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median

from llmkit.bench.backends import Backend
from llmkit.bench.bench_metrics import RunResult, calculate_metrics, require_complete
from llmkit.bench.slo.slo_result import SloProbe, SloResult
from llmkit.bench.slo.slo_search import Probe, SloGoal, SloSearch
from llmkit.bench.slo.slo_workload import SloWorkload
from llmkit.common.errors import InputError
from llmkit.common.formatting import milliseconds_text
from llmkit.common.progress import Progress

ALONE_REQUESTS = 8  # one at a time
BURST_REQUESTS = 32  # at once: the search begins at their throughput


def search_slo(
    backend: Backend,
    workload: SloWorkload,
    goal: SloGoal,
    progress: Progress,
    curve_loads: bool = True,
) -> SloResult:
    """Find the most load at which the target keeps the SLO.

    curve_loads: then run a few lower loads, too, for the curve of latency over load.
    Raises InputError when every request of a run fails.
    """
    alone = backend.run(workload.alone(ALONE_REQUESTS), 1)
    require_complete(alone.timelines, backend.name, "single requests")
    search_name = "rate" if goal.is_rate else "concurrency"
    unit = SloResult(search_name, goal.attained, dict(goal.slo)).unit
    missed = missed_bounds(alone, goal.slo)
    if missed:
        return SloResult(search_name, goal.attained, dict(goal.slo), high=0.0, missed_alone=missed)
    numbers = iter(range(1 << 30))

    def measure(load: float, count: int, _index: int) -> RunResult:
        requests = workload.probe(load, count, next(numbers))
        clients = count if goal.is_rate else int(load)
        run = backend.run(requests, clients)
        if all(timeline.error is not None for timeline in run.timelines):
            require_complete(run.timelines, backend.name, f"{load:g} {unit}")
        return run

    def report(probe: Probe) -> None:
        share = sum(run.kept for run in probe.runs) / sum(run.counted for run in probe.runs)
        kind = "a short run, " if probe.is_pilot else ""
        progress.message(
            f"{backend.name}: {probe.load:g} {unit}: {kind}{share:.1%} keep the bounds,"
            f" {probe.verdict}"
        )

    latency_s = median(timeline.e2e_s for timeline in alone.timelines)
    search = SloSearch(goal, measure, latency_s, report)
    start = 1.0
    if goal.is_rate:
        burst = backend.run(workload.alone(BURST_REQUESTS), BURST_REQUESTS)
        require_complete(burst.timelines, backend.name, "requests at once")
        start = BURST_REQUESTS / burst.wall_s
    found = search.find(start)
    if curve_loads and found.load:
        for load in _curve_loads(found.load, goal.is_rate):
            if load not in search.probes:
                search.pilot(load)
    return SloResult(
        search_name,
        goal.attained,
        dict(goal.slo),
        found.load,
        found.low,
        found.high,
        found.shown_low,
        found.shown_high,
        [_summary(search.probes[load], goal) for load in sorted(search.probes)],
    )


def missed_bounds(run: RunResult, slo: Mapping[str, float]) -> str:
    """The bounds that most single requests miss, with what was measured; "": none."""
    parts = []
    for name, bound_s in slo.items():
        found = [getattr(timeline, f"{name}_s") for timeline in run.timelines]
        seconds = [value for value in found if value is not None]
        if seconds and median(seconds) > bound_s:
            measured = milliseconds_text(1000 * median(seconds))
            parts.append(f"{name} is {measured} and its bound {milliseconds_text(1000 * bound_s)}")
    return " and ".join(parts)


def require_reachable(target: str, result: SloResult) -> None:
    """Raises InputError when even a single request misses the bounds."""
    if result.missed_alone:
        raise InputError(
            f"{target} misses the SLO with a single request at a time: {result.missed_alone}"
            f" (medians of {ALONE_REQUESTS} requests)",
            "Bounds that a single request keeps were expected",
            "Give larger bounds with --slo, or a faster model",
        )


def _curve_loads(load: float, is_rate: bool) -> Sequence[float]:
    """Lower loads, for a curve that begins where latency does not depend on load."""
    loads = [load * share for share in (0.125, 0.25, 0.5, 0.75)]
    if is_rate:
        return [float(f"{value:.4g}") for value in loads]
    return [float(round(value)) for value in loads if value >= 1]


def _summary(probe: Probe, goal: SloGoal) -> SloProbe:
    """A probe as the report stores it."""
    longest = max(probe.results, key=lambda run: len(run.timelines))
    complete = [timeline for timeline in longest.timelines if timeline.error is None]
    metrics = calculate_metrics(complete, longest.wall_s) if complete else {}
    counted = sum(run.counted for run in probe.runs)
    low, high = probe.attainment.interval(goal.attained)
    return SloProbe(
        probe.load,
        probe.verdict,
        probe.is_pilot,
        sum(run.sent for run in probe.runs),
        sum(run.failed for run in probe.runs),
        sum(run.kept for run in probe.runs) / max(1, counted),
        low,
        high,
        probe.runs[-1].growth,
        metrics.get("output_tps", 0.0),
        metrics.get("ttft_p50_ms", math.nan),
        metrics.get("ttft_p99_ms", math.nan),
        metrics.get("e2e_p50_ms", math.nan),
        metrics.get("tpot_p90_ms"),
    )
