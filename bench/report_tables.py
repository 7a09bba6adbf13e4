"""A benchmark report as tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from llmkit.bench.bench_metrics import (
    SPEED_METRICS,
    TARGET_METRICS,
    TASK_PREFIX,
    Metric,
    find_metric,
)
from llmkit.bench.confidence_intervals import STDERR_SUFFIX
from llmkit.bench.draft_counts import POSITION_PREFIX
from llmkit.bench.slo.slo_tables import (
    PROBES_HEAD,
    best_command,
    options_rows,
    probe_row,
    slo_sentences,
)
from llmkit.bench.tool_accuracy.tool_results import TOOL_PREFIX
from llmkit.common.formatting import count_text, same_decimals

if TYPE_CHECKING:
    from llmkit.bench.bench_report import BenchReport, TargetReport

_COLOR_THRESHOLD = 0.02  # ratios closer to one are not coloured
_ORDER = {name: index for index, name in enumerate(SPEED_METRICS)}  # other metrics come last


# Of half of an interval: farther from the value, its middle is not shown as the value's spread.
_MAX_OFF_CENTER = 0.25


def render_report(report: BenchReport) -> Group:
    """The table of metrics, the gates if there are any, and the notes."""
    speculation = [] if not drafting_rows(report) else [speculation_table(report)]
    searches = [part for target in report.targets for part in _slo_parts(target)]
    gates = [gate_table(report)] if report.gates else []
    notes = [escape(f"Note: {note}.") for note in report.notes]
    parts = [*searches, *_options_parts(report), *speculation, *gates, *notes]
    return Group(metric_table(report), *parts)


def metric_table(report: BenchReport) -> Table:
    """A table with a row for each metric and a column for each target.

    Targets other than the baseline have another column with the ratio to the baseline.
    """
    table = Table(
        title="llmkit bench", title_justify="left", caption=_caption(report), caption_justify="left"
    )
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
                cells.append(cell.value + cell.spread)
                if report.baseline and target.name != report.baseline:
                    ratio = cell.ratio
                    if cell.color:
                        ratio = f"[{cell.color}]{ratio}[/{cell.color}]"
                    cells.append(ratio)
            table.add_row(row.title, row.unit, *cells)
    return table


def gate_table(report: BenchReport) -> Table:
    """Every gate check with its value and limit, the failed ones first."""
    table = Table(title="gates", title_justify="left")
    for column in ("gate", "target", "metric", "value", "limit", "result"):
        table.add_column(column, justify="right" if column in ("value", "limit") else "left")
    for result in sorted(report.gates, key=lambda result: result.passed):
        value, limit = gate_number(result.value), gate_number(result.limit)
        if not (math.isnan(result.value) or math.isnan(result.limit)):
            value, limit = same_decimals([result.value, result.limit])
        verdict = "[green]pass[/green]" if result.passed else "[bold red]FAIL[/bold red]"
        table.add_row(
            escape(result.gate),
            escape(result.target),
            result.metric,
            value,
            limit,
            verdict,
        )
    return table


def _slo_parts(target: TargetReport) -> list[Table | str]:
    """The probes of the search for the most load under an SLO, and what it found."""
    if target.slo is None:
        return []
    title = f"SLO, {escape(target.name)}: loads in {target.slo.unit}"
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(PROBES_HEAD):
        table.add_column(column, justify="left" if index == len(PROBES_HEAD) - 1 else "right")
    for probe in target.slo.probes:
        table.add_row(*map(escape, probe_row(probe)))
    sentences = [escape(f"{sentence}.") for sentence in slo_sentences(target)]
    return [table, *sentences] if target.slo.probes else [*sentences]


def _options_parts(report: BenchReport) -> list[Table | Text]:
    """The combinations of server options and the command line of the best one."""
    rows = options_rows(report)
    if not rows:
        return []
    table = Table(title="server options", title_justify="left")
    for index, column in enumerate(rows[0]):
        table.add_column(column, justify="right" if index == 1 else "left")
    for row in rows[1:]:
        table.add_row(*map(escape, row))
    return [table, Text(f"Best: {best_command(report)}", overflow="fold")]


def speculation_table(report: BenchReport) -> Table:
    """A row for each load and target with drafts: how many are accepted, at each place."""
    head, *rows = drafting_rows(report)
    table = Table(title="speculation", title_justify="left")
    for index, column in enumerate(head):
        table.add_column(escape(column), justify="left" if index < 2 else "right")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def drafting_rows(report: BenchReport) -> list[list[str]]:
    """The table of speculation, its head first; [] where no target drafts."""
    drafting = [
        (scenario, target.name, values)
        for target in report.targets
        for scenario, values in target.scenarios.items()
        if values.get("drafts")
    ]
    if not drafting:
        return []
    num_places = max(
        sum(name.startswith(POSITION_PREFIX) for name in values) for _, _, values in drafting
    )
    places = [f"place {place}" for place in range(num_places)]
    rows = [["load", "target", "steps", "tokens of a step", "accepted", *places]]
    for scenario, target, values in drafting:
        shares = [values.get(f"{POSITION_PREFIX}{place}") for place in range(num_places)]
        rows.append(
            [
                scenario,
                target,
                f"{values['drafts']:,.0f}",
                f"{values['acceptance_length']:.2f}",
                f"{values['acceptance']:.1%}",
                *("-" if share is None else f"{share:.1%}" for share in shares),
            ]
        )
    return rows


class Cell(NamedTuple):
    """A target's value of a metric, as text."""

    value: str = "-"
    spread: str = ""  # half the width of the confidence interval
    ratio: str = ""  # to the baseline's value
    color: str = ""  # "green" for better, "red" for worse than the baseline


class Row(NamedTuple):
    """A metric with a cell for each target."""

    title: str
    unit: str
    cells: list[Cell]


def sections(report: BenchReport) -> Iterator[tuple[str, list[Row]]]:
    """The rows of headline metrics, by section: the targets' own, then one for each scenario."""
    present = {key for target in report.targets for key in target.all_metrics()}
    tasks = sorted(
        key for key in present if key.startswith(TASK_PREFIX) and not key.endswith(STDERR_SUFFIX)
    )
    categories = sorted(key for key in present if key.startswith(TOOL_PREFIX))
    known = (*TARGET_METRICS, *categories, *tasks)
    yield "", _rows(report, [name for name in known if name in present])
    for scenario in dict.fromkeys(name for target in report.targets for name in target.scenarios):
        present_names = dict.fromkeys(
            name for target in report.targets for name in target.scenarios.get(scenario, ())
        )
        names = sorted(present_names, key=lambda name: _ORDER.get(name, len(_ORDER)))
        title = f"{scenario}{_load_description(report, scenario)}"
        yield title, _rows(report, [f"{scenario}.{name}" for name in names])


def _rows(report: BenchReport, keys: Iterable[str]) -> list[Row]:
    metrics = [target.all_metrics() for target in report.targets]
    rows = []
    for key in keys:
        metric = find_metric(key)
        if metric and metric.headline:
            unit, scale = _unit(metric, max(values[key] for values in metrics if key in values))
            present = [values[key] / scale for values in metrics if key in values]
            texts = iter(same_decimals(present))
            cells = []
            for target, values in zip(report.targets, metrics, strict=True):
                if key not in values:
                    cells.append(Cell())
                    continue
                ratio, color = _ratio(report, target, key, metric)
                cells.append(Cell(next(texts), spread_text(target, key, scale), ratio, color))
            rows.append(Row(metric.title, unit, cells))
    return rows


def _load_description(report: BenchReport, scenario: str) -> str:
    """The number of requests and their rate or concurrency, as part of a section's title."""
    for entry in report.workload.get("scenarios", ()):
        if entry["name"] == scenario:
            if "about" in entry:
                return f": {entry['about']}"
            rate = entry.get("arrivals_per_s")
            pace = f"{rate:.3g} a second" if rate else f"{entry['clients']} at a time"
            return f": {count_text(entry['requests'], 'requests')}, {pace}"
    return ""


def _caption(report: BenchReport) -> str:
    environment = report.environment
    parts = []
    if environment:
        parts.append(
            f"{environment.get('gpu') or environment.get('cpu')}, {environment.get('cores')} cores"
        )
    if report.baseline and len(report.targets) > 1:
        parts.append(f"base: {report.baseline}")
    if report.workload:
        rounds = report.workload["rounds"]
        chance = ", ± and ~ (no more than chance) at 95 %"
        parts.append(f"medians of {rounds} rounds{chance}" if rounds > 1 else "one round")
        parts.append(f"workload {report.workload['sha256'][:12]}")
    return escape("; ".join(parts))


def _unit(metric: Metric, largest: float) -> tuple[str, float]:
    """The unit that a row is shown in, and its size in the stored unit."""
    if metric.unit == "bytes":
        return ("GiB", 2.0**30) if largest >= 2**30 else ("MiB", 2.0**20)
    if metric.unit == "share":
        return "%", 0.01
    return metric.unit, 1.0


def gate_number(value: float) -> str:
    """A value or limit of a gate; "-" for what was not measured."""
    return "-" if math.isnan(value) else number_text(value)


def number_text(value: float) -> str:
    """Four significant digits; whole numbers from a thousand on."""
    if math.isfinite(value) and abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _ratio(report: BenchReport, target: TargetReport, key: str, metric: Metric) -> tuple[str, str]:
    """The ratio to the baseline's value as text, and its color.

    The text is empty without a finite ratio. It begins with "~" when the repetitions do not differ
    significantly. The color is "green" for better, "red" for worse, or "".
    """
    if target.name == report.baseline or not report.baseline:
        return "", ""
    baseline_value = report.target(report.baseline).all_metrics().get(key)
    value = target.all_metrics().get(key)
    if value is None or not baseline_value or not math.isfinite(value / baseline_value):
        return "", ""
    ratio = value / baseline_value
    differs = report.differs(target, key)
    text = f"{'~' if differs is False else ''}{ratio:.2f}x"
    if metric.better == "neither" or differs is False or abs(ratio - 1) <= _COLOR_THRESHOLD:
        return text, ""
    is_better = (ratio > 1) == (metric.better == "higher")
    return text, "green" if is_better else "red"


def spread_text(target: TargetReport, key: str, scale: float) -> str:
    """Half the width of a metric's confidence interval; empty without one.

    Both ends of an interval that is not around the value, such as that of a share near 100 %.
    """
    low, high = target.interval(key) or (0.0, 0.0)
    half = (high - low) / 2 / scale
    if half == math.inf:
        return ""  # of a search that no load ended
    if not target.repetitions(key) and half > 0:
        apart = abs((low + high) / 2 - target.metrics.get(key, math.nan)) / scale
        if apart > _MAX_OFF_CENTER * half:
            return f" ({low / scale:.3g} to {high / scale:.3g})"
    if half >= 100:
        return f" ±{half:,.0f}"
    return f" ±{half:.2g}" if half > 0 else ""
