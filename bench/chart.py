"""The report's figures as SVG: what targets trade, how latencies spread, what load does, and when requests ran.

Colours are classes; a target has a mark of its own too. Every drawing is well-formed XML, so that it is also a file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmkit.bench.metrics import STAGE, STARTUP, STARTUP_METRICS, metric_named
from llmkit.bench.tables import number_text
from llmkit.checkpoint.page import STYLE, WIDTH, escaped, svg
from llmkit.checkpoint.text import bytes_text
from llmkit.quant.chart import KINDS

if TYPE_CHECKING:
    from llmkit.bench.report import BenchReport, TargetReport

MARKS = tuple(KINDS.values())
COLORS = """
:root{--s0:#2a78d6;--s1:#d9561f;--s2:#12875c;--s3:#6a4fc4;--s4:#8a6d00}
@media(prefers-color-scheme:dark){:root{--s0:#5aa0f0;--s1:#f08050;--s2:#35b587;--s3:#a692f0;--s4:#d0ad35}}
.s0{fill:var(--s0);stroke:var(--s0)}.s1{fill:var(--s1);stroke:var(--s1)}.s2{fill:var(--s2);stroke:var(--s2)}
.s3{fill:var(--s3);stroke:var(--s3)}.s4{fill:var(--s4);stroke:var(--s4)}
.line{fill:none;stroke-width:2;stroke-linejoin:round}
.area{fill-opacity:.25;stroke-width:1.5}
.front{fill:none;stroke:var(--rule);stroke-dasharray:4 4}
.wait{fill-opacity:.25;stroke:none}.run{stroke:none}
.name{font-size:13px;fill:var(--ink)}
"""
ROWS = 48  # requests of a timeline that are drawn
Point = tuple[float, float]


@dataclass(frozen=True)
class Panel:
    """A plot's place in a drawing and its linear axes, which begin at 0."""

    left: float
    top: float
    width: float
    height: float
    right_value: float
    top_value: float

    def x(self, value: float) -> float:
        return self.left + value / self.right_value * self.width

    def y(self, value: float) -> float:
        return self.top + self.height - value / self.top_value * self.height

    def frame(self, x_title: str, y_title: str, below: float = 38) -> list[str]:
        """Grid, numbers and titles; below: how far the horizontal axis' title is from it."""
        bottom, right = self.top + self.height, self.left + self.width
        parts = [f'<line class="base" x1="{self.left}" x2="{right:.1f}" y1="{bottom}" y2="{bottom}"/>']
        for value in ticks(self.top_value):
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{self.left}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(_text("tick", self.left - 8, y + 4, f"{value:,.6g}", "end"))
        numbers = ticks(self.right_value)
        parts += [_text("tick", self.x(value), bottom + 17, f"{value:,.6g}") for value in numbers]
        parts.append(_text("axis", self.left + self.width / 2, bottom + below, x_title))
        place = f'transform="translate({self.left - 56:.0f} {self.top + self.height / 2:.0f}) rotate(-90)"'
        parts.append(f'<text class="axis" {place} text-anchor="middle">{escaped(y_title)}</text>')
        return parts

    def time_axis(self, title: str) -> list[str]:
        """Vertical lines with their numbers, and what they are."""
        bottom = self.top + self.height
        parts = [_text("axis", self.left + self.width / 2, bottom + 38, title)]
        for value in ticks(self.right_value):
            x = self.x(value)
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{self.top}" y2="{bottom}"/>')
            parts.append(_text("tick", x, bottom + 17, f"{value:,.6g}"))
        return parts


def ticks(high: float) -> list[float]:
    """Round numbers from 0 up to `high`: five or fewer steps."""
    power = 10.0 ** math.floor(math.log10(high / 5)) if high > 0 else 1.0
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= high / 5 * 0.999)
    return [float(f"{index * step:.12g}") for index in range(int(high / step * 1.001) + 1)]


def legend(report: BenchReport) -> str:
    """The targets' marks and names, as HTML."""
    items = "".join(
        f'<li><svg class=key viewBox="-7 -7 14 14" aria-hidden=true>{_mark(index, 0, 0)}</svg>'
        f"{escaped(target.name)}</li>"
        for index, target in enumerate(report.targets)
    )
    return f"<ul class=legend>{items}</ul>\n"


def pareto(report: BenchReport) -> str:
    """Quality over speed, memory as the area; a dashed line joins what nothing else beats. "" for fewer than two."""
    measure = "mean_kl" if any("mean_kl" in target.metrics for target in report.targets) else "perplexity"
    points = []
    for index, target in enumerate(report.targets):
        quality = target.metrics.get(measure, 0.0 if target.name == report.baseline and measure == "mean_kl" else None)
        rates = [figures["output_tps"] for figures in target.scenarios.values() if "output_tps" in figures]
        speed = max(rates, default=None)
        if quality is not None and speed is not None and math.isfinite(quality):
            points.append((index, speed, quality))
    if len(points) < 2:
        return ""
    panel = _panel([(speed, quality) for _, speed, quality in points], height=320)
    titles = {"mean_kl": "KL divergence, nats a token (lower is better)", "perplexity": "perplexity (lower is better)"}
    parts = panel.frame("output tokens/s, of the fastest scenario (more is better)", titles[measure], 52)
    front, best = [], math.inf
    for _, speed, quality in sorted(points, key=lambda point: -point[1]):
        if quality < best:
            front.append((speed, quality))
            best = quality
    parts.append(f'<polyline class="front" points="{_path(panel, front)}"/>')
    sizes = _memory(report, [index for index, _, _ in points])
    largest = max(sizes.values()) or 1
    named: list[Point] = []
    for index, speed, quality in points:
        target, x, y = report.targets[index], panel.x(speed), panel.y(quality)
        radius = 34 * math.sqrt(sizes[index] / largest)
        size = bytes_text(sizes[index])
        words = f"{target.name}: {number_text(speed)} tokens/s, {measure} {number_text(quality)}, {size}"
        circle = f'<circle class="area s{index % 5}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"/>'
        parts.append(f"<g>{circle}{_mark(index, x, y)}<title>{escaped(words)}</title></g>")
        anchor, side = ("end", -1) if x > WIDTH * 0.7 else ("start", 1)
        x, y = x + side * (radius + 6), min(y, panel.top + panel.height - 18)  # names keep off the axis
        while any(abs(x - left) < 160 and abs(y - up) < 30 for left, up in named):  # and off each other
            y -= 4
        named.append((x, y))
        parts.append(_text("name", x, y - 4, target.name, anchor))
        parts.append(_text("tick", x, y + 12, size, anchor))
    return svg(parts, 414, "quality over speed, with memory as the area of the circles")


def latencies(report: BenchReport, scenario: str) -> str:
    """The shares of a scenario's requests that took at most so long: TTFT, TPOT and e2e. "" when there are none."""
    kinds = (("TTFT, ms", "ttft_s", 1000), ("TPOT, ms", "tpot_s", 1000), ("e2e, s", "e2e_s", 1))
    parts, width = [], (WIDTH - 16) / 3
    for column, (title, name, scale) in enumerate(kinds):
        lines: list[tuple[int, list[float]]] = []
        for index, target in enumerate(report.targets):
            found = (getattr(one, name) for one in target.requests.get(scenario, ()))
            if values := sorted(scale * value for value in found if value is not None):
                lines.append((index, values))
        if not lines:
            continue
        highest = max(values[-1] for _, values in lines)
        panel = Panel(70 + column * width, 14, width - 86, 220, _above(highest), 100)
        parts += panel.frame(title, "% of requests" if column == 0 else "")
        for index, values in lines:
            steps: list[Point] = [(values[0], 0.0)]
            for rank, value in enumerate(values):
                steps += [(value, 100 * rank / len(values)), (value, 100 * (rank + 1) / len(values))]
            steps.append((panel.right_value, 100.0))
            parts.append(f'<polyline class="line s{index % 5}" points="{_path(panel, steps)}"/>')
    return svg(parts, 290, f"distribution of latencies in {scenario}") if parts else ""


def load_curves(report: BenchReport) -> str:
    """Latency over throughput, a point for each load; "" unless a target was measured at two loads or more."""
    levels = [
        (entry["name"], float(entry["load"])) for entry in report.workload.get("scenarios", ()) if entry.get("load")
    ]
    if len(levels) < 2:
        return ""
    parts, width = [], (WIDTH - 10) / 2
    for column, (metric, title) in enumerate((("ttft_p50_ms", "TTFT p50, ms"), ("tpot_mean_ms", "TPOT mean, ms"))):
        lines = []
        for index, target in enumerate(report.targets):
            found = [(load, target.scenarios[name]) for name, load in levels if name in target.scenarios]
            lines.append((index, [(load, f["output_tps"], f[metric]) for load, f in found if metric in f]))
        points = [(speed, latency) for _, line in lines for _, speed, latency in line]
        if not points:
            continue
        panel = _panel(points, 74 + column * width, width - 96, 300)
        parts += panel.frame("output tokens/s", title)
        for index, line in lines:
            parts.append(f'<polyline class="line s{index % 5}" points="{_path(panel, [(s, t) for _, s, t in line])}"/>')
            for load, speed, latency in line:
                x, y = panel.x(speed), panel.y(latency)
                words = (
                    f"{report.targets[index].name} at {load:g}: {number_text(speed)} tokens/s, {title} {latency:.4g}"
                )
                parts.append(f"<g>{_mark(index, x, y)}<title>{escaped(words)}</title></g>")
                parts.append(_text("tick", x, y - 9, f"{load:g}"))
    return svg(parts, 376, "latency over throughput; numbers are the load: clients, or requests a second")


def timeline(target: TargetReport, index: int, scenario: str) -> str:
    """A bar for each request: pale until its first token, then solid. "" when there are none."""
    requests = sorted(target.requests.get(scenario, ()))[:ROWS]
    if not requests:
        return ""
    row = 14 if len(requests) <= 16 else 8
    end = max(one.sent_s + one.e2e_s for one in requests)
    panel = Panel(74, 8, WIDTH - 90, row * len(requests), _above(end), 1)
    bottom = panel.top + panel.height
    parts = panel.time_axis("seconds from the first request")
    for place, one in enumerate(requests):
        y, first, last = panel.top + place * row + 1, one.sent_s + one.ttft_s, one.sent_s + one.e2e_s
        words = f"{one.prompt_tokens} tokens in ({one.cached_tokens} cached), {one.output_tokens} out; sent at "
        words += f"{one.sent_s:.3f} s, TTFT {1000 * one.ttft_s:.1f} ms, e2e {one.e2e_s:.3f} s"
        bars = "".join(
            f'<rect class="{kind} s{index % 5}" x="{panel.x(start):.1f}" y="{y}" height="{row - 2}" '
            f'width="{max(0.5, panel.x(stop) - panel.x(start)):.1f}"/>'
            for kind, start, stop in (("wait", one.sent_s, first), ("run", first, last))
        )
        parts.append(f"<g>{bars}<title>{escaped(words)}</title></g>")
    parts.append(_text("tick", panel.left - 8, panel.top + row, "first", "end"))
    lowest = "last" if len(requests) == len(target.requests[scenario]) else f"{ROWS}th"
    parts.append(_text("tick", panel.left - 8, bottom, lowest, "end"))
    return svg(parts, int(bottom + 46), f"when the requests of {scenario} ran at {target.name}")


def starts(report: BenchReport) -> str:
    """A bar for each target's start, its stages side by side, the first token last. "" when there are none."""
    bars = []
    for target in report.targets:
        figures = target.scenarios.get(STARTUP, {})
        stages = [(name, spent) for name, spent in figures.items() if name.startswith(STAGE) and spent > 0]
        if stages:
            bars.append((target.name, [*stages, ("first_token_s", figures["first_token_s"] - figures["ready_s"])]))
    if not bars:
        return ""
    end = max(sum(spent for _, spent in stages) for _, stages in bars)
    panel = Panel(16, 8, WIDTH - 32, 58 * len(bars), _above(end), 1)
    bottom = panel.top + panel.height
    parts = panel.time_axis("seconds from the start of the command")
    for row, (name, stages) in enumerate(bars):
        y, at = panel.top + 58 * row, 0.0
        parts.append(_text("name", panel.left, y + 13, name, "start"))
        for index, (stage, spent) in enumerate(stages):
            x, width = panel.x(at), spent / panel.right_value * panel.width
            words = (metric_named(stage) or STARTUP_METRICS[stage]).title.removeprefix("of it: ")
            words = "first token" if stage == "first_token_s" else words
            shape = (
                f'<rect class="run s{index % 5}" x="{x:.1f}" y="{y + 20}" height="16" width="{max(0.5, width):.1f}"/>'
            )
            parts.append(f"<g>{shape}<title>{escaped(f'{words}: {spent:.3f} s')}</title></g>")
            if width > 7 * len(words):
                parts.append(_text("tick", x + 2, y + 49, words, "start"))
            at += spent
    return svg(parts, int(bottom + 46), "what the time from the command to the first token went into")


def as_file(drawing: str) -> str:
    """A drawing as a file of its own, with its rules and the light colours in them: few programs know variables."""
    start, rest = drawing.split(">", 1)
    rules = STYLE + COLORS
    light = dict(reversed(re.findall(r"(--\w+):(#\w+)", rules)))  # a name's first value
    drawn = "".join(
        re.findall(r"\.(?:grid|base|tick|axis|mark|line|area|front|wait|run|name|s\d)[^{}:]*\{[^}]*\}", rules)
    )
    style = re.sub(r"var\((--\w+)\)", lambda named: light[named[1]], drawn) + "text{font-family:sans-serif}"
    page = f'<rect width="100%" height="100%" fill="{light["--page"]}"/>'
    return f'{start} xmlns="http://www.w3.org/2000/svg"><style>{style}</style>{page}{rest}\n'


def _memory(report: BenchReport, indices: Sequence[int]) -> dict[int, float]:
    """Bytes that targets take, by the best measure that all of them have; 0 when there is none."""
    for name in ("peak_gpu_bytes", "peak_memory_bytes", "checkpoint_bytes"):
        if all(name in report.targets[index].metrics for index in indices):
            return {index: report.targets[index].metrics[name] for index in indices}
    return dict.fromkeys(indices, 0.0)


def _panel(points: Sequence[Point], left: float = 74, width: float = WIDTH - 90, height: float = 300) -> Panel:
    right, top = (_above(1.08 * max(values)) for values in zip(*points, strict=True))
    return Panel(left, 24, width, height, right, top)


def _above(value: float) -> float:
    """A little more than the largest value, so that nothing touches the edge."""
    return value * 1.04 if value > 0 else 1.0


def _path(panel: Panel, points: Sequence[Point]) -> str:
    return " ".join(f"{panel.x(x):.1f},{panel.y(y):.1f}" for x, y in points)


def _mark(index: int, x: float, y: float) -> str:
    shape = MARKS[index % len(MARKS)]
    return f'<path class="mark s{index % 5}" transform="translate({x:.1f} {y:.1f})" d="{shape}"/>'


def _text(kind: str, x: float, y: float, words: str, anchor: str = "middle") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escaped(words)}</text>'
