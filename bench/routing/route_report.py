"""The result of `llmkit bench route`: curves, metrics and gates, as JSON, table, page and chart."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.bench.gates import GateResult, require_passed
from llmkit.bench.routing.route_curve import CurvePoint
from llmkit.common import svg_charts as draw
from llmkit.common.html_page import render_page
from llmkit.common.svg_charts import MARKERS, WIDTH, Plot, series_color, with_headroom

if TYPE_CHECKING:
    from rich.console import Group

_TEMPLATES = Path(__file__).parent / "templates"
_HEAD = ("Route", "Large calls", "Quality", "Gap kept", "Cost")
_TABLE_SHARES = (0.1, 0.25, 0.5, 0.75)
_MEASURES = {
    "exact": "the same text as the large tier's answer",
    "likelihood": "likelihood under the large tier, beside its own answer",
    "embedding": "cosine of the embeddings of both answers",
    "reference": "answers that contain the right one",
}
METRIC_TEXTS = {
    "route_gap": "part of the gap kept at route_large, first tokens",
    "route_gap_whole": "the same, whole answer",
    "route_gap_learned": "the same, learned router",
    "route_large": "share of large calls",
    "route_quality": "mean quality at route_large",
    "route_cost": "cost, 1: all requests go to the large tier",
    "route_auc": "chance that a good answer is surer than a bad one",
    "small_quality": "mean quality of the small tier",
    "large_quality": "mean quality of the large tier",
}


@dataclass(frozen=True)
class RouteReport:
    """What a route of two tiers keeps of the large tier's quality, at which cost."""

    tiers: tuple[str, str]
    measure: str
    num_prompts: int
    metrics: dict[str, float]
    # By name; "random" and "oracle" are what the others are compared with.
    curves: dict[str, list[CurvePoint]]
    # By measure: the gap that is kept at the chosen share. The route is fitted to `measure`.
    gaps: dict[str, float]
    price_text: str
    notes: list[str] = field(default_factory=list)
    gates: list[GateResult] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """A document for JSON. NaN is null."""
        document: dict[str, Any] = _json_safe(asdict(self))
        return document

    def require_gates(self) -> None:
        """Raises GateError, which lists the failed gates."""
        require_passed(self.gates)

    def rows(self) -> list[tuple[str, ...]]:
        """The curves at a few shares, for a table."""
        return [
            (name, *_point_words(point))
            for name, points in self.curves.items()
            for point in points
            if any(math.isclose(point.share, share, abs_tol=0.02) for share in _TABLE_SHARES)
        ]

    @property
    def lead(self) -> list[str]:
        """What was measured, in a line."""
        small, large = self.tiers
        return [
            f"{self.num_prompts} prompts",
            f"{small} before {large}",
            f"quality: {_MEASURES[self.measure]}",
            self.price_text,
        ]


def route_chart(report: RouteReport) -> str:
    """Cost over quality, a line for each way to choose."""
    points = [point for curve in report.curves.values() for point in curve]
    lowest = min(point.quality for point in points)
    highest = max(point.quality for point in points)
    span = max(highest - lowest, 1e-9)
    max_x = with_headroom(max(point.cost for point in points))
    # The axes begin at 0, and so quality is drawn as what is gained over the small tier.
    plot = Plot(74, 14, WIDTH - 96, 340, max_x, with_headroom(span))
    parts = plot.axes(
        "cost (1: all requests go to the large tier)", "quality above the small tier's"
    )
    for index, (name, curve) in enumerate(report.curves.items()):
        places = plot.points((point.cost, point.quality - lowest) for point in curve)
        parts.append(draw.polyline(f"line {series_color(index)}", places))
        for point, (x, y) in zip(curve, places, strict=True):
            words = ", ".join(
                f"{head.lower()} {word}"
                for head, word in zip(_HEAD[1:], _point_words(point), strict=True)
            )
            parts.append(draw.group(draw.series_marker(index, x, y), f"{name}: {words}"))
    return draw.svg(parts, 410, "cost against quality of the route")


def route_legend(report: RouteReport) -> str:
    """The marks of the chart's lines, as HTML."""
    return draw.legend(
        (series_color(index), MARKERS[index % len(MARKERS)], name)
        for index, name in enumerate(report.curves)
    )


def report_page(report: RouteReport) -> bytes:
    """The report as a self-contained HTML5 page in UTF-8."""
    return render_page(
        _TEMPLATES,
        "route_report.html.jinja",
        title=f"llmkit bench route: {', '.join(report.tiers)}",
        names=report.tiers,
        lead=report.lead,
        legend=route_legend(report),
        chart=route_chart(report),
        head=_HEAD,
        rows=report.rows(),
        metrics=[(METRIC_TEXTS[name], _number(value)) for name, value in report.metrics.items()],
        gaps=[(_MEASURES[name], _number(value)) for name, value in report.gaps.items()],
        gates=[
            (gate.gate, "passed" if gate.passed else "failed", _number(gate.value))
            for gate in report.gates
        ],
        notes=report.notes,
    )


def json_text(report: RouteReport) -> bytes:
    """The report's JSON file."""
    return f"{json.dumps(report.to_json(), indent=1, ensure_ascii=False)}\n".encode()


def render_report(report: RouteReport) -> Group:
    """The report for a terminal."""
    from rich.console import Group
    from rich.table import Table

    curves = Table(*_HEAD, box=None, padding=(0, 2, 0, 0))
    for row in report.rows():
        curves.add_row(*row)
    figures = Table("Figure", "Value", "Meaning", box=None, padding=(0, 2, 0, 0))
    for name, value in report.metrics.items():
        figures.add_row(name, _number(value), METRIC_TEXTS[name])
    for name, value in report.gaps.items():
        figures.add_row(f"gap kept by {name}", _number(value), _MEASURES[name])
    return Group(" · ".join(report.lead), "", curves, "", figures, *report.notes)


def _point_words(point: CurvePoint) -> tuple[str, ...]:
    return (
        f"{100 * point.share:.0f} %",
        f"{point.quality:.3f}",
        _number(point.gap),
        f"{point.cost:.2f}",
    )


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _json_safe(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json_safe(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_json_safe(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value
