"""The report as a page for people: one HTML file that loads nothing and runs nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmkit.bench.chart import COLORS, latencies, legend, load_curves, pareto, starts, timeline
from llmkit.bench.definitions import DEFINITIONS
from llmkit.bench.tables import number_text, sections
from llmkit.checkpoint.page import escaped, facts, figure, page, section, table

if TYPE_CHECKING:
    from llmkit.bench.report import BenchReport

_STYLE = """
.pass{color:#12875c}.fail{color:#c2361b;font-weight:650}
@media(prefers-color-scheme:dark){.pass{color:#35b587}.fail{color:#f08050}}
h3{margin:1.6rem 0 .2rem}
header details{margin-top:.8rem}
.figures td:nth-child(2),.figures th:nth-child(2){text-align:left;color:var(--soft)}
.gates td:nth-child(-n+4),.gates th:nth-child(-n+4){text-align:left}
@media(max-width:640px){.figures th,.figures td,.gates th,.gates td{font-size:.8rem;padding:.3rem}
.figures th:first-child{white-space:normal;min-width:6.5rem}.gates td:nth-child(2){white-space:normal;min-width:6rem}}
"""
TIMELINES = 12  # that are drawn
Drawings = dict[str, str]


def report_page(report: BenchReport) -> bytes:
    """A bench report as a self-contained HTML5 page in UTF-8; what was not measured is left out."""
    title = "llmkit bench: " + ", ".join(target.name for target in report.targets)
    parts = (_head(report), _gates(report), _notes(report), _figures(report), _charts(report), _details(report))
    return page(title, "".join(parts), COLORS + _STYLE)


def drawings(report: BenchReport) -> Drawings:
    """Every figure of the report by a name that is fit for a file."""
    found = {"pareto": pareto(report), "load": load_curves(report), "starts": starts(report)}
    for scenario in _scenarios(report):
        found[f"latencies-{scenario}"] = latencies(report, scenario)
    for scenario in _scenarios(report):
        for index, target in enumerate(report.targets):
            found[f"timeline-{scenario}-{index}"] = timeline(target, index, scenario)
    return {name: drawing for name, drawing in found.items() if drawing}


def _scenarios(report: BenchReport) -> list[str]:
    return list(dict.fromkeys(name for target in report.targets for name in target.scenarios))


def _head(report: BenchReport) -> str:
    environment = report.environment
    machine = [environment.get("gpu") or environment.get("cpu"), _cores(report), environment.get("dtype")]
    base = [f"compared with {report.baseline}"] if report.baseline and len(report.targets) > 1 else []
    lead = " · ".join(escaped(fact) for fact in [*machine, *base] if fact)
    command = " ".join(f"<span>{escaped(word)}</span>" for word in report.command.split(" "))
    shown = f'<pre tabindex=0 role=region aria-label="Command">{command}</pre>\n' if report.command else ""
    names = ", ".join(escaped(target.name) for target in report.targets)
    defined = f"<details><summary>What the figures are</summary>\n{facts(DEFINITIONS.items())}</details>\n"
    title = f"<p class=eyebrow>llmkit bench</p>\n<h1>{names}</h1>\n<p class=lead>{lead}</p>\n"
    return f"<header>\n{title}{shown}{defined}</header>\n"


def _cores(report: BenchReport) -> str:
    return f"{report.environment['cores']} cores" if report.environment.get("cores") else ""


def _gates(report: BenchReport) -> str:
    if not report.gates:
        return ""
    failed = sum(not result.passed for result in report.gates)
    verdict = f"{failed} of {len(report.gates)} checks failed" if failed else "all checks passed"
    rows = [
        ("pass" if r.passed else "FAIL", r.gate, r.target, r.metric, number_text(r.value), number_text(r.limit))
        for r in sorted(report.gates, key=lambda result: result.passed)
    ]
    shown = table(("Result", "Gate", "Target", "Metric", "Value", "Limit"), rows, "Gates", "gates")
    return section("Gates", f"<p class={'fail' if failed else 'pass'}>{verdict}</p>\n{shown}")


def _notes(report: BenchReport) -> str:
    items = "".join(f"<li>{escaped(note)}.</li>" for note in report.notes)
    return section("Notes", f"<ul>{items}</ul>\n") if items else ""


def _figures(report: BenchReport) -> str:
    """The tables of headline figures, one for the targets and one for each scenario."""
    head = ["", "Unit"]
    for target in report.targets:
        head += [target.name] + ([] if _is_base(report, target.name) else ["vs base"])
    parts = []
    for title, rows in sections(report):
        lines = []
        for row in rows:
            cells = []
            for target, cell in zip(report.targets, row.cells, strict=True):
                cells += [cell.figure + cell.spread] + ([] if _is_base(report, target.name) else [cell.ratio])
            lines.append((row.title, row.unit, *cells))
        if lines:
            shown = table(head, lines, "Figures", "figures")
            parts.append(f"<h3>{escaped(title or 'Quality, size and start')}</h3>\n{shown}")
    words = (
        "± and ~ (a difference that is no more than chance) at 95 %, over repetitions. " if _repeated(report) else ""
    )
    return section("Figures", f"<p>{words}All figures are in the JSON and CSV reports.</p>\n{''.join(parts)}")


def _is_base(report: BenchReport, name: str) -> bool:
    return report.baseline in (None, name)


def _repeated(report: BenchReport) -> bool:
    return any(len(rounds) > 1 for target in report.targets for rounds in target.rounds.values())


def _charts(report: BenchReport) -> str:
    found, key = drawings(report), legend(report)
    parts = []
    if "pareto" in found:
        words = (
            "Right and down is better. A circle's area is peak memory, or the checkpoint's size where that was not"
            " measured for all; the dashed line joins what no other target beats."
        )
        parts.append(section("Quality, speed and memory", f"<p>{words}</p>\n{figure(found['pareto'])}"))
    if "load" in found:
        words = "A point for each load; the number is clients, or requests a second."
        parts.append(section("Latency over throughput", f"<p>{words}</p>\n{key}{figure(found['load'])}"))
    if "starts" in found:
        words = "From the command that serves a checkpoint to the first token, by the medians of each stage."
        parts.append(section("Starts", f"<p>{words}</p>\n{figure(found['starts'])}"))
    cdfs = [(name.partition("-")[2], drawing) for name, drawing in found.items() if name.startswith("latencies-")]
    if cdfs:
        words = "The share of requests that took at most so long, of the last repetition. Left is better."
        parts.append(section("Latencies", f"<p>{words}</p>\n{key}{''.join(_folded(cdfs))}"))
    runs = [(name.partition("-")[2], drawing) for name, drawing in found.items() if name.startswith("timeline-")]
    if runs:
        words = "A bar for each request of the last repetition: pale until its first token, then solid."
        named = [(_run_name(report, name), drawing) for name, drawing in runs[:TIMELINES]]
        parts.append(section("Requests", f"<p>{words}</p>\n{''.join(_folded(named))}"))
    return "".join(parts)


def _run_name(report: BenchReport, name: str) -> str:
    scenario, _, index = name.rpartition("-")
    return f"{scenario}, {report.targets[int(index)].name}"


def _folded(named: list[tuple[str, str]]) -> Iterator[str]:
    """The first few in full, the others to be opened."""
    for index, (name, drawing) in enumerate(named):
        opened = " open" if index < 2 else ""
        yield f"<details{opened}><summary>{escaped(name)}</summary>\n{figure(drawing)}</details>\n"


def _details(report: BenchReport) -> str:
    rows = [(target.name, f"{target.reference} ({target.kind})") for target in report.targets]
    rows += [(key.replace("_", " "), str(value)) for key, value in report.environment.items() if value is not None]
    for name, document in (("workload", report.workload), ("evaluation", report.evaluation), ("tasks", report.tasks)):
        rows += [(f"{name}: {key}", _shown(value)) for key, value in document.items()]
    return section("How it was measured", facts([*rows, *_absent(report)]))


def _absent(report: BenchReport) -> Iterator[tuple[str, str]]:
    """What was not measured and why, once for all targets that it is true of."""
    named: dict[tuple[str, str], list[str]] = {}
    for target in report.targets:
        for one in target.absent.items():
            named.setdefault(one, []).append(target.name)
    for (names, why), targets in named.items():
        of = "" if len(targets) == len(report.targets) else f" of {', '.join(targets)}"
        yield "not measured", f"{names}{of}: {why}"


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
