"""The benchmark report's charts.

They show quality over speed, the distribution of latencies, latency over throughput, the stages of
a start, and when each request ran. Every target has its own colour and shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmkit.bench.bench_metrics import STAGE_PREFIX, STARTUP, STARTUP_METRICS, find_metric
from llmkit.bench.report_tables import number_text
from llmkit.common import svg_charts as draw
from llmkit.common.formatting import bytes_text
from llmkit.common.svg_charts import MARKERS, WIDTH, Plot, Point, series_color, with_headroom

if TYPE_CHECKING:
    from llmkit.bench.bench_report import BenchReport, TargetReport

MAX_TIMELINE_REQUESTS = 48
MAX_CIRCLE_RADIUS = 34
_BAR_ROW = 58  # the height of a target's row in the chart of starts
_LETTER_WIDTH = 7  # approximate, in a stage's name
# A target's name keeps this distance from the names before it.
_NAME_WIDTH = 160
_NAME_HEIGHT = 30
_QUALITY_TITLES = {
    "mean_kl": "KL divergence, nats a token (lower is better)",
    "perplexity": "perplexity (lower is better)",
}


def target_legend(report: BenchReport) -> str:
    """The targets' marks and names, as HTML."""
    return draw.legend(
        (series_color(index), MARKERS[index % len(MARKERS)], target.name)
        for index, target in enumerate(report.targets)
    )


def pareto_chart(report: BenchReport) -> str:
    """Quality over speed, with memory as the area of circles; "" for fewer than two targets.

    A dashed line joins the targets of the Pareto front.
    """
    has_kl = any("mean_kl" in target.metrics for target in report.targets)
    quality_metric = "mean_kl" if has_kl else "perplexity"
    # Target index, speed and quality.
    points: list[tuple[int, float, float]] = []
    for index, target in enumerate(report.targets):
        quality = _quality(report, target, quality_metric)
        speed = _fastest_output_tps(target)
        if quality is not None and speed is not None and math.isfinite(quality):
            points.append((index, speed, quality))
    if len(points) < 2:
        return ""
    plot = _plot([(speed, quality) for _, speed, quality in points], height=320)
    x_title = "output tokens/s, of the fastest scenario (more is better)"
    parts = plot.axes(x_title, _QUALITY_TITLES[quality_metric], 52)
    front = _pareto_front([(speed, quality) for _, speed, quality in points])
    parts.append(draw.polyline("front", plot.points(front)))
    memory = _memory_bytes(report, [index for index, _, _ in points])
    most_memory = max(memory.values()) or 1
    named: list[Point] = []  # the positions of the targets' names
    for index, speed, quality in points:
        name = report.targets[index].name
        size = bytes_text(memory[index])
        x = plot.x(speed)
        y = plot.y(quality)
        radius = MAX_CIRCLE_RADIUS * math.sqrt(memory[index] / most_memory)
        shapes = draw.circle(f"area {series_color(index)}", x, y, radius)
        shapes += draw.series_marker(index, x, y)
        tooltip = (
            f"{name}: {number_text(speed)} tokens/s, "
            f"{quality_metric} {number_text(quality)}, {size}"
        )
        parts.append(draw.group(shapes, tooltip))
        # The name stands beside the circle, towards the middle of the drawing.
        if x > WIDTH * 0.7:
            anchor = "end"
            name_x = x - (radius + 6)
        else:
            anchor = "start"
            name_x = x + (radius + 6)
        # It stays above the axis and away from the other names.
        name_y = min(y, plot.bottom - 18)
        while _overlaps_name((name_x, name_y), named):
            name_y -= 4
        named.append((name_x, name_y))
        parts.append(draw.text("name", name_x, name_y - 4, name, anchor))
        parts.append(draw.text("tick", name_x, name_y + 12, size, anchor))
    return draw.svg(parts, 414, "quality over speed, with memory as the area of the circles")


def _quality(report: BenchReport, target: TargetReport, metric: str) -> float | None:
    """A target's quality; the baseline has a KL divergence of 0 from itself."""
    is_reference = metric == "mean_kl" and target.name == report.baseline
    return target.metrics.get(metric, 0.0 if is_reference else None)


def _fastest_output_tps(target: TargetReport) -> float | None:
    rates = [
        metrics["output_tps"] for metrics in target.scenarios.values() if "output_tps" in metrics
    ]
    return max(rates, default=None)


def _pareto_front(points: Sequence[Point]) -> list[Point]:
    """The (speed, quality) pairs that no other beats in both, the fastest first."""
    front = []
    best_quality = math.inf
    for speed, quality in sorted(points, key=lambda point: -point[0]):
        if quality < best_quality:
            front.append((speed, quality))
            best_quality = quality
    return front


def _overlaps_name(place: Point, named: Sequence[Point]) -> bool:
    x, y = place
    return any(
        abs(x - other_x) < _NAME_WIDTH and abs(y - other_y) < _NAME_HEIGHT
        for other_x, other_y in named
    )


def _memory_bytes(report: BenchReport, indices: Sequence[int]) -> dict[int, float]:
    """The targets' memory, by the best metric that all of them have; 0 when there is none."""
    for metric in ("peak_gpu_bytes", "peak_memory_bytes", "checkpoint_bytes"):
        if all(metric in report.targets[index].metrics for index in indices):
            return {index: report.targets[index].metrics[metric] for index in indices}
    return dict.fromkeys(indices, 0.0)


def latency_chart(report: BenchReport, scenario: str) -> str:
    """The distributions of a scenario's TTFT, TPOT and e2e latency; "" when there are none.

    A line shows the percentage of requests whose latency was at most the value on the x axis.
    """
    latencies = (("TTFT, ms", "ttft_s", 1000), ("TPOT, ms", "tpot_s", 1000), ("e2e, s", "e2e_s", 1))
    parts: list[str] = []
    width = (WIDTH - 16) / 3
    for column, (title, attribute, scale) in enumerate(latencies):
        lines: list[tuple[int, list[float]]] = []
        for index, target in enumerate(report.targets):
            requests = target.requests.get(scenario, ())
            found = [getattr(request, attribute) for request in requests]
            values = sorted(scale * value for value in found if value is not None)
            if values:
                lines.append((index, values))
        if not lines:
            continue
        highest = max(values[-1] for _, values in lines)
        plot = Plot(70 + column * width, 14, width - 86, 220, with_headroom(highest), 100)
        parts += plot.axes(title, "% of requests" if column == 0 else "")
        for index, values in lines:
            steps: list[Point] = [(values[0], 0.0)]
            for rank, value in enumerate(values):
                steps.append((value, 100 * rank / len(values)))
                steps.append((value, 100 * (rank + 1) / len(values)))
            steps.append((plot.max_x, 100.0))
            parts.append(draw.polyline(f"line {series_color(index)}", plot.points(steps)))
    if not parts:
        return ""
    return draw.svg(parts, 290, f"distribution of latencies in {scenario}")


def load_chart(report: BenchReport) -> str:
    """Latency over throughput with a point for each load; "" for fewer than two loads."""
    loads = [
        (entry["name"], float(entry["load"]))
        for entry in report.workload.get("scenarios", ())
        if entry.get("load")
    ]
    if len(loads) < 2:
        return ""
    parts: list[str] = []
    width = (WIDTH - 10) / 2
    for column, (metric, title) in enumerate(
        (("ttft_p50_ms", "TTFT p50, ms"), ("tpot_mean_ms", "TPOT mean, ms"))
    ):
        # For each target: load, throughput and latency.
        lines: list[list[tuple[float, float, float]]] = []
        for target in report.targets:
            curve = []
            for scenario, load in loads:
                metrics = target.scenarios.get(scenario, {})
                if metric in metrics:
                    curve.append((load, metrics["output_tps"], metrics[metric]))
            lines.append(curve)
        points = [(speed, latency) for curve in lines for _, speed, latency in curve]
        if not points:
            continue
        plot = _plot(points, 74 + column * width, width - 96, 300)
        parts += plot.axes("output tokens/s", title)
        for index, curve in enumerate(lines):
            places = plot.points((speed, latency) for _, speed, latency in curve)
            parts.append(draw.polyline(f"line {series_color(index)}", places))
            for (load, speed, latency), (x, y) in zip(curve, places, strict=True):
                tooltip = (
                    f"{report.targets[index].name} at {load:g}: {number_text(speed)} tokens/s, "
                    f"{title} {latency:.4g}"
                )
                parts.append(draw.group(draw.series_marker(index, x, y), tooltip))
                parts.append(draw.text("tick", x, y - 9, f"{load:g}"))
    label = "latency over throughput; numbers are the load: clients, or requests a second"
    return draw.svg(parts, 376, label)


def timeline_chart(target: TargetReport, index: int, scenario: str) -> str:
    """A bar for each request, pale until its first token; "" when there are none.

    index: the target's position in the report, for its colour.
    """
    requests = sorted(target.requests.get(scenario, ()))[:MAX_TIMELINE_REQUESTS]
    if not requests:
        return ""
    row_height = 14 if len(requests) <= 16 else 8
    end = max(request.sent_s + request.e2e_s for request in requests)
    plot = Plot(74, 8, WIDTH - 90, row_height * len(requests), with_headroom(end), 1)
    parts = plot.time_axis("seconds from the first request")
    for row, request in enumerate(requests):
        y = plot.top + row * row_height + 1
        first_token_s = request.sent_s + request.ttft_s
        last_token_s = request.sent_s + request.e2e_s
        bars = ""
        for css_class, start, stop in (
            ("wait", request.sent_s, first_token_s),
            ("run", first_token_s, last_token_s),
        ):
            width = max(0.5, plot.x(stop) - plot.x(start))
            css_class = f"{css_class} {series_color(index)}"
            bars += draw.rect(css_class, plot.x(start), y, width, row_height - 2)
        tooltip = (
            f"{request.prompt_tokens} tokens in ({request.cached_tokens} cached), "
            f"{request.output_tokens} out; sent at {request.sent_s:.3f} s, "
            f"TTFT {1000 * request.ttft_s:.1f} ms, e2e {request.e2e_s:.3f} s"
        )
        parts.append(draw.group(bars, tooltip))
    is_complete = len(requests) == len(target.requests[scenario])
    last_label = "last" if is_complete else f"{MAX_TIMELINE_REQUESTS}th"
    parts.append(draw.text("tick", plot.left - 8, plot.top + row_height, "first", "end"))
    parts.append(draw.text("tick", plot.left - 8, plot.bottom, last_label, "end"))
    label = f"when the requests of {scenario} ran at {target.name}"
    return draw.svg(parts, plot.bottom + 46, label)


def start_chart(report: BenchReport) -> str:
    """A bar for each target's start, divided into its stages; "" when none was measured.

    The last stage is the time from ready to the first token.
    """
    # Each target's name, and its stages with their seconds.
    bars: list[tuple[str, list[tuple[str, float]]]] = []
    for target in report.targets:
        metrics = target.scenarios.get(STARTUP, {})
        stages = [
            (metric, seconds)
            for metric, seconds in metrics.items()
            if metric.startswith(STAGE_PREFIX) and seconds > 0
        ]
        if stages:
            first_token_s = metrics["first_token_s"] - metrics["ready_s"]
            bars.append((target.name, [*stages, ("first_token_s", first_token_s)]))
    if not bars:
        return ""
    longest = max(sum(seconds for _, seconds in stages) for _, stages in bars)
    plot = Plot(16, 8, WIDTH - 32, _BAR_ROW * len(bars), with_headroom(longest), 1)
    parts = plot.time_axis("seconds from the start of the command")
    for row, (name, stages) in enumerate(bars):
        y = plot.top + _BAR_ROW * row
        parts.append(draw.text("name", plot.left, y + 13, name, "start"))
        start = 0.0
        for index, (metric, seconds) in enumerate(stages):
            title = _stage_title(metric)
            x = plot.x(start)
            width = seconds / plot.max_x * plot.width
            bar = draw.rect(f"run {series_color(index)}", x, y + 20, max(0.5, width), 16)
            parts.append(draw.group(bar, f"{title}: {seconds:.3f} s"))
            if width > _LETTER_WIDTH * len(title):
                parts.append(draw.text("tick", x + 2, y + 49, title, "start"))
            start += seconds
    label = "what the time from the command to the first token went into"
    return draw.svg(parts, plot.bottom + 46, label)


def _stage_title(metric: str) -> str:
    if metric == "first_token_s":
        return "first token"
    found = find_metric(metric) or STARTUP_METRICS[metric]
    return found.title.removeprefix("of it: ")


def _plot(
    points: Sequence[Point], left: float = 74, width: float = WIDTH - 90, height: float = 300
) -> Plot:
    """A plot whose axes hold the points with some room."""
    max_x = with_headroom(1.08 * max(x for x, _ in points))
    max_y = with_headroom(1.08 * max(y for _, y in points))
    return Plot(left, 24, width, height, max_x, max_y)
