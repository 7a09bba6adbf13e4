"""The search for the most load under an SLO, and a sweep over server options, as text."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from llmkit.bench.slo.option_points import ranked_targets, ranking_metric, serve_command
from llmkit.common.formatting import milliseconds_text

if TYPE_CHECKING:
    from llmkit.bench.bench_report import BenchReport, TargetReport
    from llmkit.bench.slo.slo_result import SloProbe, SloResult

PROBES_HEAD = (
    "load",
    "requests",
    "in bounds",
    "interval",
    "TTFT p50",
    "TTFT p99",
    "TPOT p90",
    "tokens/s",
    "verdict",
)
_VERDICTS = {
    "kept": "keeps the SLO",
    "missed": "misses it",
    "grows": "the queue grows",
    "undecided": "undecided",
}


def slo_sentences(target: TargetReport) -> list[str]:
    """What the search found at a target."""
    result = target.slo
    if result is None:
        return []
    bounds = ", ".join(
        f"{name} {milliseconds_text(1000 * bound)}" for name, bound in result.bounds_s.items()
    )
    goal = f"{result.attained:.4g} of the requests within {bounds}"
    if result.missed_alone:
        return [f"{target.name}: no load has {goal}; alone, {result.missed_alone}"]
    if not result.load:
        lowest = ""
        if result.shown_high < math.inf:
            lowest = f" below {result.shown_high:.4g} {result.unit}"
        return [f"{target.name}: no load{lowest} was shown to have {goal}"]
    if result.high == math.inf:
        return [
            f"{target.name}: at least {result.load:.4g} {result.unit} with {goal}; no load that"
            " the client could send missed it"
        ]
    sentences = [
        f"{target.name}: {result.load:.4g} {result.unit} (95 %: {result.low:.4g} to"
        f" {result.high:.4g}) with {goal}"
    ]
    sentences.append(_shown(result))
    return sentences


def _shown(result: SloResult) -> str:
    """What was decided of single loads."""
    low = f"{result.shown_low:.4g} keeps the SLO"
    if not result.shown_low:
        low = "no load was shown to keep the SLO"
    high = f"{result.shown_high:.4g} misses it"
    if result.shown_high == math.inf:
        high = "none was shown to miss it"
    sentence = f"Of single loads, {low}, and {high}"
    if result.undecided and result.shown_low and result.shown_high < math.inf:
        sentence += f"; undecided between {result.shown_low:.4g} and {result.shown_high:.4g}"
    elif result.undecided:
        sentence += f"; undecided from {result.undecided[0]:.4g} to {result.undecided[-1]:.4g}"
    return sentence


def probe_row(probe: SloProbe) -> tuple[str, ...]:
    """A row under PROBES_HEAD."""
    verdict = _VERDICTS[probe.verdict]
    if probe.verdict == "grows":
        verdict += f" by {1000 * probe.growth:.0f} ms a second"
    if probe.is_pilot:
        verdict = "short run" if probe.verdict == "undecided" else f"{verdict} (short run)"
    if probe.failed:
        verdict += f", {probe.failed} failed"
    tpot = "-" if probe.tpot_p90_ms is None else milliseconds_text(probe.tpot_p90_ms)
    return (
        f"{probe.load:.4g}",
        f"{probe.requests:,}",
        f"{probe.attained:.2%}",
        f"{probe.attained_low:.1%} to {probe.attained_high:.1%}",
        milliseconds_text(probe.ttft_p50_ms),
        milliseconds_text(probe.ttft_p99_ms),
        tpot,
        f"{probe.output_tps:,.4g}",
        verdict,
    )


def options_rows(report: BenchReport) -> list[tuple[str, ...]]:
    """The combinations of server options, the best first, their head before them; [] without."""
    ranked = ranked_targets(report)
    if not ranked:
        return []
    head = ("server options", _score_title(report), "verdict")
    rows: list[tuple[str, ...]] = [head]
    for position, (target, score, on_front, ties) in enumerate(ranked):
        verdict = "best" if position == 0 else "loses"
        if ties:
            verdict = "no worse than chance"
        elif position and on_front:
            verdict = "on the front"
        rows.append((target.name, f"{score:,.4g}", verdict))
    return rows


def best_command(report: BenchReport) -> str:
    """The command line of the best combination of server options; "" without a sweep."""
    ranked = ranked_targets(report)
    return serve_command(ranked[0].target) if ranked else ""


def _score_title(report: BenchReport) -> str:
    titles = {
        "slo_rate": "requests/s under the SLO",
        "slo_concurrency": "clients under the SLO",
        "goodput": "goodput, requests/s",
        "output_tps": "output tokens/s",
    }
    per_gpu = " a GPU" if any(target.gpus for target in report.targets) else ""
    return titles[ranking_metric(report)] + per_gpu
