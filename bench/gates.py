"""Gates: conditions on metrics that decide whether a benchmark passes."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from llmkit.bench.bench_metrics import (
    AGENT_METRICS,
    ROUTE_METRICS,
    SPEED_METRICS,
    STARTUP_METRICS,
    TARGET_METRICS,
    TASK_PREFIX,
    find_metric,
)
from llmkit.common.errors import GateError, UsageError
from llmkit.common.formatting import nearest

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_NUMBER = r"[0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?|\.[0-9]+(?:[eE][+-]?[0-9]+)?"
_GATE = re.compile(
    rf"(?P<metric>[A-Za-z0-9_.-]+)(?P<operator><=|>=|<|>)"
    rf"(?:(?P<number>{_NUMBER})|(?P<share>{_NUMBER})x"
    rf"|(?:(?P<before>{_NUMBER})\*)?baseline(?:\*(?P<after>{_NUMBER}))?)"
)


@dataclass(frozen=True)
class Gate:
    """`metric operator number`, or `metric operator factor * baseline`."""

    text: str  # as the user wrote it
    metric: str  # known to `find_metric`; "output_tps" is on every scenario
    operator: str
    number: float
    relative_to_baseline: bool = False  # the limit is `number` times the baseline's value

    @property
    def canonical(self) -> str:
        """The form that reports have: "mean_kl<=0.02", "output_tps>=0.9*baseline"."""
        limit = f"{self.number:.12g}"
        if self.relative_to_baseline:
            limit = "baseline" if self.number == 1 else f"{limit}*baseline"
        return f"{self.metric}{self.operator}{limit}"


@dataclass(frozen=True)
class GateResult:
    """The result of a gate for one metric of one target."""

    gate: str  # see `Gate.canonical`
    target: str
    metric: str  # the full name, with the scenario: "online.output_tps"
    value: float  # NaN: it was not measured
    limit: float  # NaN: the baseline has no such metric
    passed: bool

    @property
    def finding(self) -> str:
        """The value and the limit in words."""
        found = "was not measured" if math.isnan(self.value) else f"is {self.value:.6g}"
        limit = f"limit {self.limit:.6g}"
        if math.isnan(self.limit):
            limit = "the baseline has none"
        return f"{self.metric} {found} ({self.gate}, {limit})"


def parse_gate(text: str) -> Gate:
    """Parse "mean_kl<=0.02", "output_tps>=0.9*baseline" or "online.ttft_p99_ms<baseline".

    "output_tps>=0.9x" means the same as "output_tps>=0.9*baseline". Blanks are ignored.
    Raises UsageError for another form and for an unknown metric.
    """
    match = _GATE.fullmatch("".join(text.split()))
    if match is None:
        raise UsageError(
            f"gate {text!r} is not understood",
            'Expected "metric<=number", "metric>=factor*baseline" or the short form'
            ' "metric>=factorx" of the latter, with <= >= < or >',
        )
    metric = match["metric"]
    if find_metric(metric) is None:
        known = [
            *TARGET_METRICS,
            *SPEED_METRICS,
            *AGENT_METRICS,
            *STARTUP_METRICS,
            *ROUTE_METRICS,
            "task.NAME.METRIC",
            "tool.CATEGORY.accuracy",
        ]
        raise UsageError(
            f"gate {text!r} names no metric",
            nearest(metric.rpartition(".")[2], known, "Metrics are"),
        )
    if match["number"] is not None:
        return Gate(text, metric, match["operator"], float(match["number"]))
    factor = float(match["share"] or match["before"] or 1) * float(match["after"] or 1)
    return Gate(text, metric, match["operator"], factor, relative_to_baseline=True)


def require_gate_metrics(gates: Sequence[Gate], measured: Sequence[str], target: str) -> None:
    """Raises UsageError for a gate on a metric that is not among `measured` of a target.

    A gate that checks nothing must not pass.
    """
    for gate in gates:
        if not _matching_metrics(gate, measured):
            raise UsageError(
                f"gate {gate.text!r} is on {gate.metric}, which is not measured for {target}",
                f"Measured are {', '.join(measured) or 'no metrics'}",
            )


def check_gates(
    gates: Sequence[Gate],
    metrics: Mapping[str, Mapping[str, float]],
    baseline: Mapping[str, float] | None,
    expected: Mapping[str, Sequence[str]] | None = None,
    not_compared: Collection[str] = (),
) -> list[GateResult]:
    """Check every gate on every target, in the given order.

    metrics: by target, the values by full metric name. baseline: the same of the baseline.
    expected: by target, the full names that the run should have measured; None: those in `metrics`.
    not_compared: scenarios that a gate relative to the baseline skips unless it names them: those
    that a sweep did not run with the baseline, since it was saturated.
    A gate without a scenario is checked in every scenario that is expected or measured. A metric
    that is missing there or in the baseline is NaN, and NaN never passes: whether a gate can be
    measured is checked before (`require_gate_metrics`), and what was measured must not be lost.
    Raises UsageError for a gate that compares with a baseline when there is none.
    """
    results = []
    for target, measured in metrics.items():
        for gate in gates:
            names = list(dict.fromkeys([*(expected or {}).get(target, ()), *measured]))
            matching = _matching_metrics(gate, names)
            if gate.relative_to_baseline:
                matching = [
                    name
                    for name in matching
                    if name == gate.metric or name.rpartition(".")[0] not in not_compared
                ]
            for metric in matching or [gate.metric]:
                limit = gate.number
                if gate.relative_to_baseline:
                    limit *= _baseline_value(gate, metric, baseline)
                value = measured.get(metric, math.nan)
                passed = _OPERATORS[gate.operator](value, limit)
                results.append(GateResult(gate.canonical, target, metric, value, limit, passed))
    return results


def require_passed(results: Sequence[GateResult]) -> None:
    """Raises GateError, which lists the failed gate checks."""
    failed = [result for result in results if not result.passed]
    if failed:
        details = "; ".join(f"{result.target}: {result.finding}" for result in failed)
        raise GateError(f"{len(failed)} of {len(results)} gate checks failed: {details}")


def _baseline_value(gate: Gate, metric: str, baseline: Mapping[str, float] | None) -> float:
    if baseline is None:
        raise UsageError(f"gate {gate.text!r} compares with the baseline, and there is no baseline")
    return baseline.get(metric, math.nan)


def _matching_metrics(gate: Gate, measured: Sequence[str]) -> list[str]:
    """The full names of the gate's metric: itself, or one for each scenario.

    A task's metric is named in full: "perplexity" is not "task.lambada.perplexity".
    """
    return [
        name
        for name in measured
        if name == gate.metric
        or (name.endswith(f".{gate.metric}") and not name.startswith(TASK_PREFIX))
    ]
