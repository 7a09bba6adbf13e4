"""A report for CI systems and pull requests: JUnit XML, a Markdown summary, and CSV."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING
from xml.etree import ElementTree as Xml

from llmkit.bench.bench_metrics import TASK_PREFIX, find_metric
from llmkit.bench.gates import GateResult
from llmkit.bench.report_tables import gate_number, sections
from llmkit.bench.tool_accuracy.tool_results import TOOL_PREFIX

if TYPE_CHECKING:
    from llmkit.bench.bench_report import BenchReport

CSV_COLUMNS = ("target", "scenario", "metric", "unit", "value", "low", "high", "repetitions")


def junit(report: BenchReport) -> bytes:
    """JUnit XML with a test case for each gate check."""
    failed = [result for result in report.gates if not result.passed]
    suite = Xml.Element(
        "testsuite", name="llmkit bench", tests=str(len(report.gates)), failures=str(len(failed))
    )
    for result in report.gates:
        case = Xml.SubElement(
            suite,
            "testcase",
            classname=_printable(result.target),
            name=_printable(_check_name(result)),
        )
        if not result.passed:
            failure = Xml.SubElement(case, "failure", message=_printable(result.finding))
            failure.text = _printable(f"{result.target}: {result.finding}")
    document = Xml.Element("testsuites")
    document.append(suite)
    Xml.indent(document)
    return bytes(Xml.tostring(document, encoding="utf-8", xml_declaration=True))


def summary(report: BenchReport) -> str:
    """Markdown for a pull request: the gates, failed ones first, and the headline metrics."""
    lines = []
    if report.gates:
        failed = sum(not result.passed for result in report.gates)
        verdict = "all gate checks passed"
        if failed:
            verdict = f"{failed} of {len(report.gates)} gate checks failed"
        lines += [f"### llmkit bench: {verdict}", ""]
        lines += ["| | gate | target | metric | value | limit |", "|---|---|---|---|--:|--:|"]
        for result in sorted(report.gates, key=lambda result: result.passed):
            gate = f"`{result.gate.replace('|', ' ')}`"
            cells = [
                "pass" if result.passed else "**FAIL**",
                gate,
                _cell(result.target),
                result.metric,
                gate_number(result.value),
                gate_number(result.limit),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    else:
        lines += ["### llmkit bench", ""]
    headings = [
        f"{_cell(target.name)}{' (base)' if target.name == report.baseline else ''}"
        for target in report.targets
    ]
    lines += [f"| | unit | {' | '.join(headings)} |", f"|---|---|{'--:|' * len(headings)}"]
    for title, rows in sections(report):
        for row in rows:
            cells = [
                f"{cell.value} ({cell.ratio})" if cell.ratio else cell.value for cell in row.cells
            ]
            scenario = title.partition(":")[0]
            name = f"{scenario}: {row.title}" if scenario else row.title
            lines.append(f"| {_cell(name)} | {row.unit} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"- {_cell(note)}" for note in report.notes)]).rstrip() + "\n"


def csv_text(report: BenchReport) -> str:
    """All metrics as CSV, one in a row, with the confidence intervals of repeated ones."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for target in report.targets:
        for key, value in target.all_metrics().items():
            if key.startswith((TASK_PREFIX, TOOL_PREFIX)):
                scenario = ""
                name = key
            else:
                scenario, _, name = key.rpartition(".")
            metric = find_metric(key)
            repetitions = target.repetitions(key)
            low, high = target.interval(key) or ("", "")
            unit = metric.unit if metric else ""
            writer.writerow(
                (target.name, scenario, name, unit, value, low, high, len(repetitions) or 1)
            )
    return file.getvalue()


def _check_name(result: GateResult) -> str:
    """The gate, with the full name of the metric when the gate does not contain it."""
    return result.gate if result.metric in result.gate else f"{result.gate} [{result.metric}]"


def _cell(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _printable(text: str) -> str:
    """The text without control characters, which XML does not allow."""
    return "".join(c if c.isprintable() else " " for c in text)
