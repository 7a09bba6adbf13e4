"""How a report looks on a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from llmkit.bench.intervals import ERROR, Z, interval
from llmkit.bench.metrics import SPEED_METRICS, TARGET_METRICS, TASK, Metric, metric_named

if TYPE_CHECKING:
    from llmkit.bench.report import BenchReport, TargetReport

_ALIKE = 0.02  # ratios this close to one are not coloured
_ORDER = {name: place for place, name in enumerate(SPEED_METRICS)}  # others come after them


def render(report: BenchReport) -> Group:
    """The table of figures, the gates if there are any, and the notes."""
    gates = [gate_table(report)] if report.gates else []
    return Group(figure_table(report), *gates, *(escape(f"Note: {note}.") for note in report.notes))


def figure_table(report: BenchReport) -> Table:
    """One table: metrics as rows, targets as columns, each but the baseline with its ratio to it."""
    table = Table(title="llmkit bench", title_justify="left", caption=_caption(report), caption_justify="left")
    table.add_column("metric")
    table.add_column("unit")
    for target in report.targets:
        table.add_column(escape(target.name), justify="right", overflow="fold")
        if report.baseline and target.name != report.baseline:
            table.add_column("vs base", justify="right")
    for title, rows in sections(report):
        table.add_section()
        if title:
            table.add_row(f"[bold]{escape(title)}[/bold]")
        for row in rows:
            cells = []
            for target, cell in zip(report.targets, row.cells, strict=True):
                cells.append(cell.figure + cell.spread)
                if report.baseline and target.name != report.baseline:
                    cells.append(f"[{cell.color}]{cell.ratio}[/{cell.color}]" if cell.color else cell.ratio)
            table.add_row(row.title, row.unit, *cells)
    return table


def gate_table(report: BenchReport) -> Table:
    """Every gate check with its figure and limit, the failed ones first."""
    table = Table(title="gates", title_justify="left")
    for column in ("gate", "target", "metric", "value", "limit", "result"):
        table.add_column(column, justify="right" if column in ("value", "limit") else "left")
    for result in sorted(report.gates, key=lambda result: result.passed):
        word = "[green]pass[/green]" if result.passed else "[bold red]FAIL[/bold red]"
        figures = number_text(result.value), number_text(result.limit)
        table.add_row(escape(result.gate), escape(result.target), result.metric, *figures, word)
    return table


class Cell(NamedTuple):
    """A target's figure as text."""

    figure: str = "-"
    spread: str = ""  # half the width of its confidence interval
    ratio: str = ""  # to the baseline's
    color: str = ""  # "green" or "red" where that is better or worse


class Row(NamedTuple):
    """A metric, with a cell for each target."""

    title: str
    unit: str
    cells: list[Cell]


def sections(report: BenchReport) -> Iterator[tuple[str, list[Row]]]:
    """Headline figures that some target has: first those of the targets, then scenario by scenario."""
    present = {key for target in report.targets for key in target.figures()}
    tasks = sorted(key for key in present if key.startswith(TASK) and not key.endswith(ERROR))
    yield "", _rows(report, [name for name in (*TARGET_METRICS, *tasks) if name in present])
    for scenario in dict.fromkeys(name for target in report.targets for name in target.scenarios):
        found = dict.fromkeys(name for target in report.targets for name in target.scenarios.get(scenario, ()))
        names = sorted(found, key=lambda name: _ORDER.get(name, len(_ORDER)))
        yield f"{scenario}{_shape(report, scenario)}", _rows(report, [f"{scenario}.{name}" for name in names])


def _rows(report: BenchReport, keys: Iterable[str]) -> list[Row]:
    figures = [target.figures() for target in report.targets]
    rows = []
    for key in keys:
        metric = metric_named(key)
        if metric and metric.headline:
            unit, scale = _unit(metric, max(values[key] for values in figures if key in values))
            rows.append(Row(metric.title, unit, [_cell(report, one, key, metric, scale) for one in report.targets]))
    return rows


def _cell(report: BenchReport, target: TargetReport, key: str, metric: Metric, scale: float) -> Cell:
    value = target.figures().get(key)
    if value is None:
        return Cell()
    ratio, color = _ratio(report, target, key, metric)
    return Cell(number_text(value / scale), spread_text(target, key, scale), ratio, color)


def _shape(report: BenchReport, scenario: str) -> str:
    for entry in report.workload.get("scenarios", ()):
        if entry["name"] == scenario:
            if "about" in entry:
                return f": {entry['about']}"
            timed = entry.get("arrivals_per_s")
            pace = f"{timed:.3g} a second" if timed else f"{entry['clients']} at a time"
            return f": {entry['requests']} requests, {pace}"
    return ""


def _caption(report: BenchReport) -> str:
    environment, parts = report.environment, []
    if environment:
        parts.append(f"{environment.get('gpu') or environment.get('cpu')}, {environment.get('cores')} cores")
    if report.baseline and len(report.targets) > 1:
        parts.append(f"base: {report.baseline}")
    if report.workload:
        rounds = report.workload["rounds"]
        chance = ", ± and ~ (no more than chance) at 95 %"
        parts.append(f"medians of {rounds} rounds{chance}" if rounds > 1 else "one round")
        parts.append(f"workload {report.workload['sha256'][:12]}")
    return escape("; ".join(parts))


def _unit(metric: Metric, largest: float) -> tuple[str, float]:
    """The unit a row is shown in, and how many stored units it is."""
    if metric.unit == "bytes":
        return ("GiB", 2.0**30) if largest >= 2**30 else ("MiB", 2.0**20)
    if metric.unit == "share":
        return "%", 0.01
    return metric.unit, 1.0


def number_text(value: float) -> str:
    """Four significant digits; whole numbers from a thousand on."""
    return f"{value:,.0f}" if math.isfinite(value) and abs(value) >= 1000 else f"{value:.4g}"


def _ratio(report: BenchReport, target: TargetReport, key: str, metric: Metric) -> tuple[str, str]:
    """How many times the baseline's figure, and "green", "red" or "" for better, worse or neither.

    Blank where it says nothing; "~" before a difference that repetitions show to be no more than chance.
    """
    base = report.target(report.baseline).figures().get(key) if report.baseline else None
    value = target.figures().get(key)
    if target.name == report.baseline or value is None or not base or not math.isfinite(value / base):
        return "", ""
    ratio, differs = value / base, report.differs(target, key)
    text = f"{'~' if differs is False else ''}{ratio:.2f}x"
    if metric.better == "neither" or differs is False or abs(ratio - 1) <= _ALIKE:
        return text, ""
    return text, "green" if (ratio > 1) == (metric.better == "higher") else "red"


def spread_text(target: TargetReport, key: str, scale: float) -> str:
    """Half the width of the figure's confidence interval; blank where there is none."""
    low, high = interval(target.repetitions(key)) or (0.0, 0.0)
    half = ((high - low) / 2 + Z * target.metrics.get(f"{key}{ERROR}", 0.0)) / scale
    return f" ±{half:,.0f}" if half >= 100 else f" ±{half:.2g}" if half > 0 else ""
