"""Gates: conditions on figures that turn a measurement into a pass or a failure."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from llmkit.bench.metrics import SPEED_METRICS, STARTUP_METRICS, TARGET_METRICS, metric_named
from llmkit.checkpoint.errors import UsageError
from llmkit.checkpoint.text import nearest

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_NUMBER = r"[0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?|\.[0-9]+(?:[eE][+-]?[0-9]+)?"
_GATE = re.compile(
    rf"(?P<metric>[A-Za-z0-9_.-]+)(?P<operator><=|>=|<|>)"
    rf"(?:(?P<number>{_NUMBER})|(?:(?P<before>{_NUMBER})\*)?baseline(?:\*(?P<after>{_NUMBER}))?)"
)


@dataclass(frozen=True)
class Gate:
    """`metric operator number`, or `metric operator factor * baseline`."""

    text: str  # as the user wrote it
    metric: str  # a name that `metric_named` knows; those of scenarios with or without "scenario."
    operator: str
    number: float
    of_baseline: bool = False  # `number` multiplies the baseline's figure


@dataclass(frozen=True)
class GateResult:
    """One gate on one figure of one target."""

    gate: str
    target: str
    metric: str  # with its scenario: "online.output_tps"
    value: float
    limit: float
    passed: bool


def parse_gate(text: str) -> Gate:
    """Read "mean_kl<=0.02", "output_tps>=0.9*baseline" or "online.ttft_p99_ms<baseline"; blanks do not matter.

    Raises UsageError for another form and for a metric that does not exist.
    """
    match = _GATE.fullmatch("".join(text.split()))
    if match is None:
        raise UsageError(
            f"gate {text!r} is not understood",
            'Expected "metric<=number" or "metric>=factor*baseline", with <= >= < or >',
        )
    metric = match["metric"]
    if metric_named(metric) is None:
        known = [*TARGET_METRICS, *SPEED_METRICS, *STARTUP_METRICS, "task.NAME.METRIC"]
        raise UsageError(f"gate {text!r} names no metric", nearest(metric.rpartition(".")[2], known, "Metrics are"))
    if match["number"] is not None:
        return Gate(text, metric, match["operator"], float(match["number"]))
    factor = float(match["before"] or 1) * float(match["after"] or 1)
    return Gate(text, metric, match["operator"], factor, of_baseline=True)


def require_measured(gates: Sequence[Gate], measured: Sequence[str], target: str) -> None:
    """Raises UsageError for a gate on none of the metrics `measured` of a target: an empty gate is never a pass."""
    for gate in gates:
        if not _matching(gate, measured):
            raise UsageError(
                f"gate {gate.text!r} is on {gate.metric}, which is not measured for {target}",
                f"Measured are {', '.join(measured) or 'no metrics'}",
            )


def check_gates(
    gates: Sequence[Gate], figures: Mapping[str, Mapping[str, float]], baseline: Mapping[str, float] | None
) -> list[GateResult]:
    """Check every gate on every target's figures (by full metric name), in the order given.

    Raises UsageError when a gate finds no figure, or needs one that the baseline lacks. NaN never passes.
    """
    results = []
    for target, measured in figures.items():
        require_measured(gates, list(measured), target)
        for gate in gates:
            for metric in _matching(gate, list(measured)):
                limit = gate.number
                if gate.of_baseline:
                    if baseline is None or metric not in baseline:
                        reason = "there is no baseline" if baseline is None else f"the baseline has no {metric}"
                        raise UsageError(f"gate {gate.text!r} compares with the baseline, and {reason}")
                    limit *= baseline[metric]
                passed = _OPERATORS[gate.operator](measured[metric], limit)
                results.append(GateResult(gate.text, target, metric, measured[metric], limit, passed))
    return results


def _matching(gate: Gate, measured: Sequence[str]) -> list[str]:
    """The metric itself, or that metric of every scenario."""
    return [name for name in measured if name == gate.metric or name.endswith(f".{gate.metric}")]
