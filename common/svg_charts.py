"""SVG drawing primitives, shared by the charts of the quantize and the bench report.

No chart library is used. A page must hold its charts as plain SVG that loads and runs nothing, the
same report must always give the same bytes, and a library would add 30 MB or more for these few
shapes. Colours are CSS classes of `templates/charts.css`, so that a page's dark mode applies.

Lengths are in the drawing's units; every drawing is WIDTH units wide and well-formed XML.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmkit.common.markup import escaped

WIDTH = 960
# Paths around (0, 0): circle, square, triangle, diamond, cross.
MARKERS = (
    "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z",
    "M-4 -4h8v8h-8z",
    "M0 -5.2L5 4h-10z",
    "M0 -5.6L5.6 0L0 5.6L-5.6 0z",
    "M-4.5 -2h2.5v-2.5h4v2.5h2.5v4h-2.5v2.5h-4v-2.5h-2.5z",
)
SERIES_COLORS = 5  # the classes s0 to s4
TICK_LENGTH = 8  # between an axis and its numbers
_TEMPLATES = Path(__file__).parent / "templates"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

Point = tuple[float, float]


def svg(parts: Iterable[str], height: float, label: str) -> str:
    """A drawing from its parts. label: read aloud by screen readers."""
    start = (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'aria-label="{escaped(label)}">'
    )
    return "\n".join([start, *parts, "</svg>"])


def text(css_class: str, x: float, y: float, words: object, anchor: str = "middle") -> str:
    """A line of text whose `anchor` ("start", "middle" or "end") is at (x, y)."""
    return (
        f'<text class="{css_class}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
        f"{escaped(words)}</text>"
    )


def vertical_text(css_class: str, x: float, y: float, words: object) -> str:
    """Text that reads upwards, its middle at (x, y)."""
    return (
        f'<text class="{css_class}" transform="translate({x:.0f} {y:.0f}) rotate(-90)" '
        f'text-anchor="middle">{escaped(words)}</text>'
    )


def line(css_class: str, start: Point, end: Point) -> str:
    """A straight line."""
    (x1, y1), (x2, y2) = start, end
    return f'<line class="{css_class}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def polyline(css_class: str, points: Iterable[Point]) -> str:
    """A line through points."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="{css_class}" points="{path}"/>'


def rect(css_class: str, x: float, y: float, width: float, height: float, radius: int = 0) -> str:
    """A rectangle whose upper left corner is at (x, y)."""
    rounded = f' rx="{radius}"' if radius else ""
    return (
        f'<rect class="{css_class}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
        f'height="{height:.1f}"{rounded}/>'
    )


def circle(css_class: str, x: float, y: float, radius: float) -> str:
    """A circle around (x, y)."""
    return f'<circle class="{css_class}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"/>'


def marker(css_class: str, shape: str, x: float, y: float, tooltip: str = "") -> str:
    """A point's mark. shape: one of MARKERS."""
    attributes = f'class="mark {css_class}" transform="translate({x:.1f} {y:.1f})" d="{shape}"'
    if not tooltip:
        return f"<path {attributes}/>"
    return f"<path {attributes}><title>{escaped(tooltip)}</title></path>"


def group(shapes: str, tooltip: str, css_class: str = "") -> str:
    """Shapes that show `tooltip` under the mouse."""
    attribute = f' class="{css_class}"' if css_class else ""
    return f"<g{attribute}>{shapes}<title>{escaped(tooltip)}</title></g>"


def series_marker(index: int, x: float, y: float) -> str:
    """The mark of a series, in its colour and shape."""
    return marker(series_color(index), MARKERS[index % len(MARKERS)], x, y)


def series_color(index: int) -> str:
    """The CSS class of a series' colour."""
    return f"s{index % SERIES_COLORS}"


def legend(entries: Iterable[tuple[str, str, str]]) -> str:
    """A legend as HTML, from the CSS class, the shape and the name of each mark."""
    items = "".join(
        f'<li><svg class="key" viewBox="-7 -7 14 14" aria-hidden="true">'
        f'<path class="mark {css_class}" d="{shape}"/></svg>{escaped(name)}</li>'
        for css_class, shape, name in entries
    )
    return f'<ul class="legend">{items}</ul>\n'


@dataclass(frozen=True)
class Plot:
    """A plot's place in a drawing, and its linear axes, which begin at 0."""

    left: float
    top: float
    width: float
    height: float
    max_x: float  # the value at the right edge
    max_y: float  # the value at the upper edge

    @property
    def right(self) -> float:
        """The right edge."""
        return self.left + self.width

    @property
    def bottom(self) -> float:
        """The lower edge."""
        return self.top + self.height

    def x(self, value: float) -> float:
        """Where a value lies on the x axis."""
        return self.left + value / self.max_x * self.width

    def y(self, value: float) -> float:
        """Where a value lies on the y axis."""
        return self.top + self.height - value / self.max_y * self.height

    def points(self, values: Iterable[Point]) -> list[Point]:
        """Pairs of values as points of the drawing."""
        return [(self.x(x), self.y(y)) for x, y in values]

    def axes(self, x_title: str, y_title: str, x_title_below: float = 38) -> list[str]:
        """Grid, numbers and titles. x_title_below: how far below the axis the x title stands."""
        parts = [line("base", (self.left, self.bottom), (self.right, self.bottom))]
        for value in linear_ticks(self.max_y):
            y = self.y(value)
            parts.append(line("grid", (self.left, y), (self.right, y)))
            parts.append(text("tick", self.left - TICK_LENGTH, y + 4, f"{value:,.6g}", "end"))
        parts += [
            text("tick", self.x(value), self.bottom + 17, f"{value:,.6g}")
            for value in linear_ticks(self.max_x)
        ]
        middle_x = self.left + self.width / 2
        middle_y = self.top + self.height / 2
        parts.append(text("axis", middle_x, self.bottom + x_title_below, x_title))
        parts.append(vertical_text("axis", self.left - 56, middle_y, y_title))
        return parts

    def time_axis(self, title: str) -> list[str]:
        """Vertical lines with their numbers, and the axis' title."""
        parts = [text("axis", self.left + self.width / 2, self.bottom + 38, title)]
        for value in linear_ticks(self.max_x):
            x = self.x(value)
            parts.append(line("grid", (x, self.top), (x, self.bottom)))
            parts.append(text("tick", x, self.bottom + 17, f"{value:,.6g}"))
        return parts


def with_headroom(value: float) -> float:
    """The end of an axis whose largest value is `value`: 4% more, so that no mark touches it."""
    return value * 1.04 if value > 0 else 1.0


def linear_ticks(high: float) -> list[float]:
    """Round numbers from 0 up to `high`, in five steps or fewer."""
    power = 10.0 ** math.floor(math.log10(high / 5)) if high > 0 else 1.0
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= high / 5 * 0.999)
    return [float(f"{index * step:.12g}") for index in range(int(high / step * 1.001) + 1)]


def log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Ticks at 1, 2 and 5 times powers of ten, with their labels.

    The first tick is the last one at or below `low`, the last tick the first one above `high`.
    """
    first_power = math.floor(math.log10(low)) - 1
    last_power = math.floor(math.log10(high)) + 1
    ticks = [
        (float(f"{factor}e{power}"), _power_label(factor, power))
        for power in range(first_power, last_power + 1)
        for factor in (1, 2, 5)
    ]
    start = max(index for index, (value, _) in enumerate(ticks) if value <= low)
    stop = min(index for index, (value, _) in enumerate(ticks) if value > high)
    return ticks[start : stop + 1]


def _power_label(factor: int, power: int) -> str:
    label = "10" + str(power).translate(_SUPERSCRIPTS)
    return label if factor == 1 else f"{factor}·{label}"


def standalone_svg(drawing: str) -> str:
    """A drawing as a file, with its CSS rules.

    CSS variables, which few programs support, are replaced by the light colours.
    """
    page_css = (_TEMPLATES / "page.css").read_text(encoding="utf-8")
    chart_css = (_TEMPLATES / "charts.css").read_text(encoding="utf-8")
    # The first definition of a variable is the light colour.
    declarations = re.findall(r"(--\w+): *(#\w+)", page_css + chart_css)
    colors = dict(reversed(declarations))
    rules = _class_rules(chart_css)
    style = re.sub(r"var\((--\w+)\)", lambda variable: colors[variable[1]], rules)
    style += "text{font-family:sans-serif}"
    background = f'<rect width="100%" height="100%" fill="{colors["--page"]}"/>'
    start, rest = drawing.split(">", 1)
    return f'{start} xmlns="http://www.w3.org/2000/svg"><style>{style}</style>{background}{rest}\n'


def _class_rules(css: str) -> str:
    """The rules of classes, without spaces around punctuation."""
    rules: Sequence[str] = re.findall(r"^\.[^{}]*\{[^}]*\}", css, re.MULTILINE)
    return re.sub(r"\s*([{}:;,])\s*", r"\1", "".join(rules)).replace(";}", "}")
