"""Points of throughput over interactivity, the Pareto front, and the best server options."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from llmkit.bench.bench_report import BenchReport, TargetReport


class LoadPoint(NamedTuple):
    """A load of a target: throughput of a device and tokens a second of a user."""

    target: int  # position in the report
    load: str  # "12.5 requests/s", "c8"
    interactivity: float  # tokens/s of a user, of the slowest tenth: 1 / (TPOT at P90)
    throughput: float  # output tokens/s of a GPU, or of the machine
    latency_ms: float  # TTFT at P50

    def beats(self, other: LoadPoint) -> bool:
        """Whether it is at least as good in both and better in one."""
        return (
            self.interactivity >= other.interactivity
            and self.throughput >= other.throughput
            and (self.interactivity, self.throughput) != (other.interactivity, other.throughput)
        )


def load_points(report: BenchReport) -> list[LoadPoint]:
    """The loads of all targets that have a TPOT: the probes of a search, else the scenarios."""
    points: list[LoadPoint] = []
    for index, target in enumerate(report.targets):
        devices = max(1, target.gpus)
        if target.slo is not None and target.slo.probes:
            points += [
                LoadPoint(
                    index,
                    f"{probe.load:g} {target.slo.unit}",
                    probe.interactivity,
                    probe.output_tps / devices,
                    probe.ttft_p50_ms,
                )
                for probe in target.slo.probes
                if probe.interactivity is not None
            ]
            continue
        points += [
            LoadPoint(
                index,
                scenario,
                1000 / metrics["tpot_p90_ms"],
                metrics["output_tps"] / devices,
                metrics["ttft_p50_ms"],
            )
            for scenario, metrics in target.scenarios.items()
            if metrics.get("tpot_p90_ms")
        ]
    return points


def pareto_points(points: Sequence[LoadPoint]) -> list[LoadPoint]:
    """The points that no other beats, from the fastest for one user on."""
    front = [point for point in points if not any(other.beats(point) for other in points)]
    return sorted(front, key=lambda point: (-point.interactivity, point.throughput))


class RankedTarget(NamedTuple):
    """A combination of server options with the figure by which it is ranked."""

    target: TargetReport
    score: float
    on_front: bool  # one of its loads is on the Pareto front
    ties_with_best: bool  # its interval and the best one's overlap


def ranking_metric(report: BenchReport) -> str:
    """What combinations of options are ranked by."""
    if any(target.slo is not None for target in report.targets):
        search = next(target.slo.search for target in report.targets if target.slo is not None)
        return "slo_rate" if search == "rate" else "slo_concurrency"
    has_goodput = any("goodput" in m for t in report.targets for m in t.scenarios.values())
    return "goodput" if has_goodput else "output_tps"


def ranked_targets(report: BenchReport) -> list[RankedTarget]:
    """The combinations of a sweep over server options, the best first; [] without a sweep.

    They are ranked by the most load under the SLO for each GPU, else by the highest goodput or
    output throughput of any load.
    """
    swept = [target for target in report.targets if target.serve_options]
    if not swept:
        return []
    metric = ranking_metric(report)
    front = {point.target for point in pareto_points(load_points(report))}
    rows = []
    for target in swept:
        values = [m[metric] for m in target.scenarios.values() if metric in m]
        best = target.metrics.get(metric, max(values, default=0.0))
        rows.append((target, best / max(1, target.gpus)))
    rows.sort(key=lambda row: -row[1])
    first_low, _ = _interval(rows[0][0], metric)
    return [
        RankedTarget(
            target,
            score,
            report.targets.index(target) in front,
            target is not rows[0][0] and _interval(target, metric)[1] >= first_low,
        )
        for target, score in rows
    ]


def _interval(target: TargetReport, metric: str) -> tuple[float, float]:
    """The interval of the ranking metric for each GPU; (inf, -inf) where it is not known."""
    found = target.interval(metric)
    if found is None:
        return math.inf, -math.inf
    return found[0] / max(1, target.gpus), found[1] / max(1, target.gpus)


def serve_command(target: TargetReport) -> str:
    """The command line that serves a target as it was benched."""
    words = [word for pair in target.serve_options.items() for word in pair if word]
    return shlex.join(["llmkit", "serve", target.reference, *words])
