"""Charts: throughput over interactivity with the Pareto front, and the search for the most load."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from llmkit.bench.slo.option_points import LoadPoint, load_points, pareto_points
from llmkit.common import svg_charts as draw
from llmkit.common.svg_charts import WIDTH, Plot, series_color, with_headroom

if TYPE_CHECKING:
    from llmkit.bench.bench_report import BenchReport, TargetReport

_VERDICT_MARKS = {"kept": 0, "undecided": 1, "missed": 2, "grows": 3}  # series of colours, shapes
_LABELS = 8  # loads that are named along the front, at most


def interactivity_chart(report: BenchReport) -> str:
    """Throughput over interactivity, a line for each target; "" for fewer than three loads.

    The dashed line joins the Pareto front.
    """
    points = load_points(report)
    if len(points) < 3:
        return ""
    max_x = with_headroom(1.08 * max(point.interactivity for point in points))
    max_y = with_headroom(1.08 * max(point.throughput for point in points))
    plot = Plot(74, 24, WIDTH - 90, 320, max_x, max_y)
    per = "a GPU" if any(target.gpus for target in report.targets) else "of the machine"
    parts = plot.axes("tokens/s of a user, 1 / (TPOT at P90)", f"output tokens/s {per}")
    front = pareto_points(points)
    parts.append(draw.polyline("front", plot.points(_corner(point) for point in front)))
    for index, target in enumerate(report.targets):
        own = sorted((p for p in points if p.target == index), key=lambda p: p.interactivity)
        for point in own:
            x, y = plot.x(point.interactivity), plot.y(point.throughput)
            note = "" if point in front else ", loses"
            tooltip = (
                f"{target.name}, {point.load}: {point.throughput:,.4g} tokens/s {per}, "
                f"{point.interactivity:,.4g} tokens/s of a user, TTFT {point.latency_ms:,.4g} ms"
                f"{note}"
            )
            shapes = draw.series_marker(index, x, y)
            if point in front:
                shapes += draw.circle(f"area {series_color(index)}", x, y, 9)
            parts.append(draw.group(shapes, tooltip))
    step = max(1, math.ceil(len(front) / _LABELS))
    for point in front[::step]:
        x, y = plot.x(point.interactivity), plot.y(point.throughput)
        parts.append(draw.text("tick", x, y - 13, point.load))
    return draw.svg(parts, 400, "throughput over interactivity, with the Pareto front")


def _corner(point: LoadPoint) -> tuple[float, float]:
    return point.interactivity, point.throughput


def slo_chart(target: TargetReport) -> str:
    """The share within the bounds and the latency of each load; "" without a search."""
    result = target.slo
    if result is None or not result.probes:
        return ""
    probes = result.probes
    parts: list[str] = []
    width = (WIDTH - 10) / 2
    highest = max((p.load for p in probes), default=1.0)
    if result.load and result.high < math.inf:
        # Loads far above what is possible would squeeze the interesting ones.
        highest = min(highest, 2 * result.high)
    shown = [probe for probe in probes if probe.load <= highest]
    for column, (title, scale) in enumerate(
        (("% of requests within the bounds", 100.0), ("end-to-end latency p50, ms", 1.0))
    ):
        values = [p.attained if column == 0 else p.e2e_p50_ms for p in shown]
        top = 100.0 if column == 0 else max(v for v in values if math.isfinite(v))
        plot = Plot(
            74 + column * width, 24, width - 96, 280, with_headroom(highest), with_headroom(top)
        )
        parts += plot.axes(result.unit, title)
        if result.load:
            right = plot.x(min(result.high, plot.max_x))
            left = plot.x(result.low)
            band = draw.rect("wait s0", left, plot.top, max(1.0, right - left), plot.height)
            parts.append(
                draw.group(
                    band, f"{result.load:.4g} {result.unit}, {result.low:.4g} to {result.high:.4g}"
                )
            )
        if column == 0:
            y = plot.y(100 * result.attained)
            parts.append(draw.polyline("front", [(plot.left, y), (plot.right, y)]))
        knee_load = target.metrics.get("knee_load")
        if column == 1 and knee_load is not None and knee_load <= highest:
            x = plot.x(knee_load)
            parts.append(draw.polyline("front", [(x, plot.top), (x, plot.bottom)]))
            parts.append(draw.text("tick", x, plot.top - 4, f"knee {knee_load:.4g}"))
        for probe, value in zip(shown, values, strict=True):
            if not math.isfinite(value):
                continue
            mark = draw.series_marker(
                _VERDICT_MARKS[probe.verdict], plot.x(probe.load), plot.y(scale * value)
            )
            kind = ", a short run" if probe.is_pilot else ""
            tooltip = (
                f"{probe.load:.4g} {result.unit}: {probe.attained:.2%} within the bounds, "
                f"{probe.verdict}{kind}"
            )
            parts.append(draw.group(mark, tooltip))
    return draw.svg(parts, 356, f"the search for the most load under the SLO at {target.name}")


def verdict_legend() -> str:
    """The marks of the loads, as HTML."""
    names = {
        "kept": "keeps the SLO",
        "undecided": "not decided on its own",
        "missed": "misses it",
        "grows": "the queue grows",
    }
    return draw.legend(
        (series_color(index), draw.MARKERS[index], names[verdict])
        for verdict, index in _VERDICT_MARKS.items()
    )
