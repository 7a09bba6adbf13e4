"""The benchmark report as an HTML page.

This module turns the report into tables and charts; `templates/bench_report.html.jinja` lays them
out. What was not measured is left out of the page.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.bench.bench_charts import (
    latency_chart,
    load_chart,
    pareto_chart,
    start_chart,
    target_legend,
    timeline_chart,
)
from llmkit.bench.metric_definitions import DEFINITIONS
from llmkit.bench.report_tables import drafting_rows, gate_number, sections
from llmkit.bench.slo.slo_charts import interactivity_chart, slo_chart, verdict_legend
from llmkit.bench.slo.slo_tables import (
    PROBES_HEAD,
    best_command,
    options_rows,
    probe_row,
    slo_sentences,
)
from llmkit.bench.tool_accuracy.tool_report import FAILURES_HEAD, MAX_FAILURES, failure_rows
from llmkit.common.html_page import render_page

if TYPE_CHECKING:
    from llmkit.bench.bench_report import BenchReport
    from llmkit.bench.gates import GateResult

TEMPLATES = Path(__file__).parent / "templates"
MAX_TIMELINES = 12  # on a page
GATES_HEAD = ("Result", "Gate", "Target", "Metric", "Value", "Limit")


def report_page(report: BenchReport) -> bytes:
    """A benchmark report as a self-contained HTML5 page in UTF-8."""
    gates = sorted(report.gates, key=lambda result: result.passed)  # failed ones first
    return render_page(
        TEMPLATES,
        "bench_report.html.jinja",
        title="llmkit bench: " + ", ".join(target.name for target in report.targets),
        names=[target.name for target in report.targets],
        lead=_lead(report),
        command_line=report.command,
        definitions=list(DEFINITIONS.items()),
        gates_head=GATES_HEAD,
        gates=[_gate_row(result) for result in gates],
        gate_styles=["pass" if result.passed else "fail" for result in gates],
        num_failed_gates=sum(not result.passed for result in gates),
        notes=report.notes,
        metrics_head=_metrics_head(report),
        metric_tables=_metric_tables(report),
        speculation=drafting_rows(report),
        is_repeated=_is_repeated(report),
        legend=target_legend(report),
        pareto_chart=pareto_chart(report),
        load_chart=load_chart(report),
        interactivity_chart=interactivity_chart(report),
        slo_searches=_slo_searches(report),
        slo_legend=verdict_legend(),
        probes_head=PROBES_HEAD,
        options_rows=options_rows(report),
        best_command=best_command(report),
        start_chart=start_chart(report),
        latency_charts=_latency_charts(report),
        timeline_charts=_timeline_charts(report)[:MAX_TIMELINES],
        tool_failures_head=FAILURES_HEAD,
        tool_failures=failure_rows(report.targets)[:MAX_FAILURES],
        num_tool_failures=len(failure_rows(report.targets)),
        details=_details(report),
    )


def drawings(report: BenchReport) -> dict[str, str]:
    """Every chart of the report, by a name for its file."""
    charts = {
        "pareto": pareto_chart(report),
        "load": load_chart(report),
        "interactivity": interactivity_chart(report),
        "starts": start_chart(report),
    }
    for index, target in enumerate(report.targets):
        charts[f"slo-{index}"] = slo_chart(target)
    for scenario in _scenarios(report):
        charts[f"latencies-{scenario}"] = latency_chart(report, scenario)
    for scenario in _scenarios(report):
        for index, target in enumerate(report.targets):
            charts[f"timeline-{scenario}-{index}"] = timeline_chart(target, index, scenario)
    return {name: chart for name, chart in charts.items() if chart}


def _slo_searches(report: BenchReport) -> list[dict[str, Any]]:
    """The search for the most load under an SLO of each target: findings, chart and probes."""
    searches: list[dict[str, Any]] = []
    for target in report.targets:
        if target.slo is not None:
            rows = [probe_row(probe) for probe in target.slo.probes]
            sentences = slo_sentences(target)
            searches.append({"found": sentences, "chart": slo_chart(target), "rows": rows})
    return searches


def _latency_charts(report: BenchReport) -> list[tuple[str, str]]:
    """The charts of latencies with their titles."""
    charts = [(scenario, latency_chart(report, scenario)) for scenario in _scenarios(report)]
    return [(title, chart) for title, chart in charts if chart]


def _timeline_charts(report: BenchReport) -> list[tuple[str, str]]:
    """The charts of single requests with their titles."""
    charts = []
    for scenario in _scenarios(report):
        for index, target in enumerate(report.targets):
            chart = timeline_chart(target, index, scenario)
            charts.append((f"{scenario}, {target.name}", chart))
    return [(title, chart) for title, chart in charts if chart]


def _scenarios(report: BenchReport) -> list[str]:
    """The scenarios of all targets, each once."""
    names = [name for target in report.targets for name in target.scenarios]
    return list(dict.fromkeys(names))


def _lead(report: BenchReport) -> list[str]:
    """The machine, the dtype and the baseline."""
    environment = report.environment
    facts: list[Any] = [environment.get("gpu") or environment.get("cpu")]
    if environment.get("cores"):
        facts.append(f"{environment['cores']} cores")
    facts.append(environment.get("dtype"))
    if report.baseline and len(report.targets) > 1:
        facts.append(f"compared with {report.baseline}")
    return [str(fact) for fact in facts if fact]


def _gate_row(result: GateResult) -> Sequence[str]:
    """A row of the table of gates. Its mark says without colour whether the gate passed."""
    return (
        "✓ pass" if result.passed else "✗ FAIL",
        result.gate,
        result.target,
        result.metric,
        gate_number(result.value),
        gate_number(result.limit),
    )


def _metrics_head(report: BenchReport) -> list[str]:
    """The columns of a table of metrics: each target, and its ratio to the baseline."""
    head = ["", "Unit"]
    for target in report.targets:
        head.append(target.name)
        if _has_ratio(report, target.name):
            head.append("vs base")
    return head


def _metric_tables(report: BenchReport) -> list[tuple[str, list[list[str]]]]:
    """Tables of metrics with their titles: one for the targets and one for each scenario."""
    tables = []
    for title, rows in sections(report):
        lines = []
        for row in rows:
            line = [row.title, row.unit]
            for target, cell in zip(report.targets, row.cells, strict=True):
                line.append(cell.value + cell.spread)
                if _has_ratio(report, target.name):
                    line.append(cell.ratio)
            lines.append(line)
        if lines:
            tables.append((title or "Quality, size and start", lines))
    return tables


def _has_ratio(report: BenchReport, name: str) -> bool:
    """Whether a target is compared with the baseline."""
    return report.baseline is not None and name != report.baseline


def _is_repeated(report: BenchReport) -> bool:
    return any(len(rounds) > 1 for target in report.targets for rounds in target.rounds.values())


def _details(report: BenchReport) -> list[tuple[str, str]]:
    """How it was measured."""
    rows = [(target.name, f"{target.reference} ({target.kind})") for target in report.targets]
    for key, value in report.environment.items():
        if value is not None:
            rows.append((key.replace("_", " "), str(value)))
    for name, document in (
        ("workload", report.workload),
        ("evaluation", report.evaluation),
        ("tasks", report.tasks),
        ("tool cases", report.tool_cases),
    ):
        for key, value in document.items():
            rows.append((f"{name}: {key}", value if isinstance(value, str) else json.dumps(value)))
    return [*rows, *_not_measured(report)]


def _not_measured(report: BenchReport) -> Iterator[tuple[str, str]]:
    """The metrics that were not measured and why, once for all targets with the same reason."""
    targets_of: dict[tuple[str, str], list[str]] = {}
    for target in report.targets:
        for metrics_and_reason in target.absent.items():
            targets_of.setdefault(metrics_and_reason, []).append(target.name)
    for (metrics, reason), targets in targets_of.items():
        of_targets = "" if len(targets) == len(report.targets) else f" of {', '.join(targets)}"
        yield "not measured", f"{metrics}{of_targets}: {reason}"
