"""The chart of mixed precision: the KL divergence of choices of schemes against their size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from llmkit.common import svg_charts as draw
from llmkit.common.svg_charts import MARKERS, WIDTH
from llmkit.quant.quantize_charts import number

_CIRCLE, _SQUARE, *_ = MARKERS
# What the chart shows: the CSS class, the shape and the name of each mark.
_LEGEND = (
    ("s1", _CIRCLE, "written and measured on held-out text"),
    ("s0 hollow", _SQUARE, "one scheme for all layers, rounded, on the calibration text"),
)
_LEFT = 74
_RIGHT = 24
_TOP = 14
_BOTTOM = 46
_HEIGHT = 380
_LABEL_HEIGHT = 14
_LABEL_WIDTH = 90

Point = tuple[float, float]


def scheme_chart(report: Mapping[str, Any]) -> str:
    """KL on a log scale against bits per weight; "" without mixed precision.

    It shows all attempts, the choices of one scheme for all linears, and as a dashed line the best
    choices as the measurements of single linears predict them.
    """
    attempts = _points(report.get("attempts"))
    uniform = _points(report.get("uniform"))
    frontier = _points(report.get("frontier"))
    if not attempts or not frontier:
        return ""
    marks = attempts + uniform
    # The line falls to 0 where nothing is quantized: it ends a little below the lowest mark.
    floor = min(kl for _, kl in marks) / 3
    shown = [point for point in frontier if point[1] >= floor]
    plot = _LogPlot([*marks, *shown])
    parts = plot.axes("bits per weight, with scales", "mean KL, nats a token")
    parts.append(draw.polyline("front", [plot.place(point) for point in shown]))
    parts += _target_line(report, plot)
    names = [str(entry.get("scheme")) for entry in _finite(report.get("uniform"))]
    labels: list[Point] = []
    for name, point in zip(names, uniform, strict=True):
        x, y = plot.place(point)
        tooltip = f"{name} for all layers: {point[0]:.2f} bits, KL {point[1]:.4g}"
        parts.append(draw.marker("s0 hollow", _SQUARE, x, y, tooltip))
        at = _free_label((x, y), labels)
        labels.append(at)
        parts.append(draw.text("tick", at[0] + 10, at[1] + 4, name, "start"))
    for index, point in enumerate(attempts):
        is_last = index == len(attempts) - 1
        tooltip = f"attempt {index + 1}: {point[0]:.2f} bits, KL {point[1]:.4g}"
        parts.append(draw.marker("s1", _CIRCLE, *plot.place(point), tooltip))
        if is_last:
            parts.append(draw.circle("ring", *plot.place(point), 9))
    return draw.svg(parts, _HEIGHT, "mean KL of choices of schemes by bits per weight")


def scheme_legend() -> str:
    """The legend of the chart, as HTML."""
    return draw.legend(_LEGEND)


def _target_line(report: Mapping[str, Any], plot: _LogPlot) -> list[str]:
    """A line at the target of the run."""
    options = report.get("options") or {}
    kl = number(options.get("target_kl"))
    bits = number(options.get("target_bits"))
    if math.isfinite(kl) and plot.low <= math.log10(kl) <= plot.high:
        y = plot.place((plot.first_bits, kl))[1]
        return [
            draw.line("target", (_LEFT, y), (WIDTH - _RIGHT, y)),
            draw.text("tick", WIDTH - _RIGHT, y - 5, "target", "end"),
        ]
    if math.isfinite(bits) and plot.first_bits <= bits <= plot.last_bits:
        x = plot.place((bits, 10**plot.low))[0]
        return [
            draw.line("target", (x, _TOP), (x, _HEIGHT - _BOTTOM)),
            draw.text("tick", x - 5, _TOP + 10, "target", "end"),
        ]
    return []


class _LogPlot:
    """A plot with bits on a linear x axis and KL on a logarithmic y axis."""

    def __init__(self, points: Sequence[Point]) -> None:
        self.first_bits = math.floor(min(bits for bits, _ in points))
        self.last_bits = max(self.first_bits + 1, math.ceil(max(bits for bits, _ in points)))
        values = [kl for _, kl in points]
        self.ticks = draw.log_ticks(min(values), max(values))
        self.low = math.log10(self.ticks[0][0])
        self.high = math.log10(self.ticks[-1][0])

    def place(self, point: Point) -> Point:
        """Where a choice of some bits and some KL lies."""
        bits, kl = point
        share = (bits - self.first_bits) / (self.last_bits - self.first_bits)
        height = (math.log10(kl) - self.low) / (self.high - self.low)
        bottom = _HEIGHT - _BOTTOM
        return _LEFT + share * (WIDTH - _LEFT - _RIGHT), bottom - height * (bottom - _TOP)

    def axes(self, x_title: str, y_title: str) -> list[str]:
        """The grid, the numbers and the titles."""
        bottom = _HEIGHT - _BOTTOM
        parts = []
        powers = [tick for tick in self.ticks if tick[1].startswith("10")]
        for value, label in powers if len(powers) > 2 else self.ticks:
            y = self.place((self.first_bits, value))[1]
            parts.append(draw.line("grid", (_LEFT, y), (WIDTH - _RIGHT, y)))
            parts.append(draw.text("tick", _LEFT - 10, y + 4, label, "end"))
        parts.append(draw.line("base", (_LEFT, bottom), (WIDTH - _RIGHT, bottom)))
        for bits in range(self.first_bits, self.last_bits + 1):
            x = self.place((bits, self.ticks[0][0]))[0]
            parts.append(draw.text("tick", x, bottom + 18, bits))
        parts.append(draw.text("axis", (_LEFT + WIDTH - _RIGHT) / 2, bottom + 38, x_title))
        parts.append(draw.vertical_text("axis", 16, (bottom + _TOP) / 2, y_title))
        return parts


def _free_label(at: Point, taken: Sequence[Point]) -> Point:
    """A place for the label of a mark, below those that it would cover."""
    x, y = at
    for _ in taken:
        near = [
            other
            for other in taken
            if abs(other[0] - x) < _LABEL_WIDTH and abs(other[1] - y) < _LABEL_HEIGHT
        ]
        if not near:
            break
        y = max(other[1] for other in near) + _LABEL_HEIGHT
    return x, y


def _finite(entries: object) -> list[Mapping[str, Any]]:
    """The entries whose bits and KL can be drawn."""
    found: list[Mapping[str, Any]] = []
    for entry in entries if isinstance(entries, list) else []:
        kl = number(entry.get("mean_kl"))
        if math.isfinite(number(entry.get("mean_bits"))) and math.isfinite(kl) and kl > 0:
            found.append(entry)
    return found


def _points(entries: object) -> list[Point]:
    return [(float(entry["mean_bits"]), float(entry["mean_kl"])) for entry in _finite(entries)]
