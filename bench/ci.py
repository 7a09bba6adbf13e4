"""A report for machines and pull requests: JUnit XML, a Markdown summary, and CSV."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING
from xml.etree import ElementTree as Xml

from llmkit.bench.gates import GateResult
from llmkit.bench.intervals import interval
from llmkit.bench.metrics import TASK, metric_named
from llmkit.bench.tables import number_text, sections

if TYPE_CHECKING:
    from llmkit.bench.report import BenchReport

CSV_COLUMNS = ("target", "scenario", "metric", "unit", "value", "low", "high", "repetitions")


def junit(report: BenchReport) -> bytes:
    """A test case for each gate check, failed where it did not pass, in the form that CI systems read."""
    failed = [result for result in report.gates if not result.passed]
    suite = Xml.Element("testsuite", name="llmkit bench", tests=str(len(report.gates)), failures=str(len(failed)))
    for result in report.gates:
        case = Xml.SubElement(suite, "testcase", classname=_printable(result.target), name=_printable(_check(result)))
        if not result.passed:
            told = f"{result.metric} is {result.value:.6g}, the limit is {result.limit:.6g}"
            Xml.SubElement(case, "failure", message=told).text = _printable(f"{result.target}: {told} ({result.gate})")
    document = Xml.Element("testsuites")
    document.append(suite)
    Xml.indent(document)
    return bytes(Xml.tostring(document, encoding="utf-8", xml_declaration=True))


def summary(report: BenchReport) -> str:
    """Markdown for a pull request: the gates, failed ones first, and the headline figures."""
    lines = []
    if report.gates:
        failed = sum(not result.passed for result in report.gates)
        verdict = f"{failed} of {len(report.gates)} gate checks failed" if failed else "all gate checks passed"
        lines += [f"### llmkit bench: {verdict}", ""]
        lines += ["| | gate | target | metric | value | limit |", "|---|---|---|---|--:|--:|"]
        for result in sorted(report.gates, key=lambda result: result.passed):
            gate = f"`{result.gate.replace('|', ' ')}`"
            words = ("pass" if result.passed else "**FAIL**", gate, _cell(result.target))
            figures = number_text(result.value), number_text(result.limit)
            lines.append(f"| {' | '.join((*words, result.metric, *figures))} |")
        lines.append("")
    else:
        lines += ["### llmkit bench", ""]
    heads = [f"{_cell(target.name)}{' (base)' if target.name == report.baseline else ''}" for target in report.targets]
    lines += [f"| | unit | {' | '.join(heads)} |", f"|---|---|{'--:|' * len(heads)}"]
    for title, rows in sections(report):
        for row in rows:
            cells = [f"{cell.figure} ({cell.ratio})" if cell.ratio else cell.figure for cell in row.cells]
            scenario = title.partition(":")[0]
            name = f"{scenario}: {row.title}" if scenario else row.title
            lines.append(f"| {_cell(name)} | {row.unit} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"- {_cell(note)}" for note in report.notes)]).rstrip() + "\n"


def csv_text(report: BenchReport) -> str:
    """All figures, one a row, in the units they are stored in, with the intervals of those that were repeated."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for target in report.targets:
        for key, value in target.figures().items():
            scenario, _, name = ("", "", key) if key.startswith(TASK) else key.rpartition(".")
            metric = metric_named(key)
            repetitions = target.repetitions(key)
            low, high = interval(repetitions) or ("", "")
            unit = metric.unit if metric else ""
            writer.writerow((target.name, scenario, name, unit, value, low, high, len(repetitions) or 1))
    return file.getvalue()


def _check(result: GateResult) -> str:
    return result.gate if result.metric in result.gate else f"{result.gate} [{result.metric}]"


def _cell(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _printable(text: str) -> str:
    """XML cannot hold control characters."""
    return "".join(c if c.isprintable() else " " for c in text)
