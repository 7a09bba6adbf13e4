"""The report of a benchmark: metrics, environment, workload and gates. It is stored as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from llmkit.bench.bench_metrics import tpot
from llmkit.bench.confidence_intervals import (
    STDERR_SUFFIX,
    Z_95,
    confidence_interval,
    means_differ,
    share_interval,
)
from llmkit.bench.gates import Gate, GateResult, check_gates, require_passed
from llmkit.bench.metric_definitions import DEFINITIONS
from llmkit.bench.slo.slo_result import SloResult
from llmkit.bench.tool_accuracy.tool_results import ToolCaseResult, mcnemar_differs, outcomes
from llmkit.common.errors import InputError

FORMAT_VERSION = 1
# Of the environment; reports of earlier versions do not have them.
_CPU_SETTINGS = ("cpu_flags", "threads", "cpu_level", "cpu_activations")
MetricValues = dict[str, int | float]  # by metric name


class RequestMetrics(NamedTuple):
    """The latencies and token counts of one request. Times are seconds."""

    sent_s: float  # after the first request of the run was sent
    ttft_s: float
    e2e_s: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None for a single token."""
        return tpot(self.ttft_s, self.e2e_s, self.output_tokens)


@dataclass
class TargetReport:
    """The metrics of one target. `find_metric` gives their titles and units."""

    name: str  # unique in a report
    reference: str  # as the user gave it
    kind: str  # "offline", "served", "url", or "checkpoint" when no speed was measured
    metrics: MetricValues = field(default_factory=dict)  # TARGET_METRICS and evaluation tasks
    # By scenario: the medians over its rounds, the metrics of each round, and the requests of the
    # last round.
    scenarios: dict[str, MetricValues] = field(default_factory=dict)
    rounds: dict[str, list[MetricValues]] = field(default_factory=dict)
    requests: dict[str, list[RequestMetrics]] = field(default_factory=dict)
    # Why metrics are missing. A key holds one or more names, separated by ", ".
    absent: dict[str, str] = field(default_factory=dict)
    # The most load under an SLO; None: it was not searched.
    slo: SloResult | None = None
    # Of a sweep over server options: those of this target's server, by flag.
    serve_options: dict[str, str] = field(default_factory=dict)
    gpus: int = 0  # that its server uses; 0: none, or not known
    # The checked answers to tool cases; empty when none were asked.
    tool_results: list[ToolCaseResult] = field(default_factory=list)

    def repetitions(self, key: str) -> list[float]:
        """The value of each round of the metric with this full name; empty for other metrics."""
        scenario, _, metric = key.rpartition(".")
        return [values[metric] for values in self.rounds.get(scenario, ()) if metric in values]

    def interval(self, key: str) -> tuple[float, float] | None:
        """The 95 % confidence interval of the metric with this full name; None: not known.

        It comes from repetitions, from the answers to tool cases, or from a standard error.
        """
        if self.slo is not None and key in ("slo_rate", "slo_concurrency"):
            return self.slo.low, self.slo.high
        passed = outcomes(self.tool_results, key)
        if passed:
            return share_interval(sum(passed.values()), len(passed))
        if f"{key}{STDERR_SUFFIX}" in self.metrics:
            half = Z_95 * self.metrics[f"{key}{STDERR_SUFFIX}"]
            return self.metrics[key] - half, self.metrics[key] + half
        return confidence_interval(self.repetitions(key))

    def all_metrics(self) -> dict[str, float]:
        """All metrics by full name: "perplexity", "online.output_tps"."""
        speed = {
            f"{scenario}.{metric}": value
            for scenario, values in self.scenarios.items()
            for metric, value in values.items()
        }
        return self.metrics | speed


@dataclass
class BenchReport:
    """The results of one benchmark. `to_json` and `from_json` are inverses."""

    targets: list[TargetReport]
    baseline: str | None = None  # the name of the target that ratios refer to
    environment: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    # sha256, seed, rounds, scenarios; empty when no speed was measured.
    workload: dict[str, Any] = field(default_factory=dict)
    # Text, windows, sha256; empty when no quality was measured.
    evaluation: dict[str, Any] = field(default_factory=dict)
    # Of lm-evaluation-harness: versions and questions; empty without tasks.
    tasks: dict[str, Any] = field(default_factory=dict)
    # Of tool cases: sources, categories, sha256; empty when none were asked.
    tool_cases: dict[str, Any] = field(default_factory=dict)
    gates: list[GateResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    # Whether the targets took no turns: they are from several runs, or ran one after the other on
    # a GPU.
    joined: bool = False
    # Of a run that did not end: "key", by which another run continues it, and the "notes" of the
    # measured targets; empty when it ended.
    unfinished: dict[str, Any] = field(default_factory=dict)

    def target(self, name: str) -> TargetReport:
        """The target with this name, which must exist."""
        return next(target for target in self.targets if target.name == name)

    def tested_targets(self) -> list[TargetReport]:
        """The targets under test: all but the baseline, or the only target."""
        return [target for target in self.targets if target.name != self.baseline] or self.targets

    def differs(self, target: TargetReport, key: str) -> bool | None:
        """Whether a metric differs from the baseline's at the 5 % level; None when not known."""
        if self.baseline is None:
            return None
        baseline = self.target(self.baseline)
        passed = outcomes(target.tool_results, key)
        if passed:
            return mcnemar_differs(passed, outcomes(baseline.tool_results, key))
        error_key = f"{key}{STDERR_SUFFIX}"
        if error_key in target.metrics and error_key in baseline.metrics:
            error = math.hypot(target.metrics[error_key], baseline.metrics[error_key])
            return abs(target.metrics[key] - baseline.metrics[key]) > Z_95 * error
        return means_differ(
            target.repetitions(key), baseline.repetitions(key), paired=not self.joined
        )

    def check_gates(
        self,
        gates: Sequence[Gate],
        left_out: Sequence[str] = (),
        expected: Mapping[str, Sequence[str]] | None = None,
        scenarios: Collection[str] = (),
    ) -> None:
        """Check the gates on the targets under test and store the results in `gates`.

        left_out: targets that could not be measured, whose gates fail. expected: by target, the
        metrics that should be there; a gate on a missing one fails. scenarios: the levels of a
        sweep; those that the baseline did not run, since it was saturated, are not compared.
        Raises as `llmkit.bench.gates.check_gates` does.
        """
        metrics = {target.name: target.all_metrics() for target in self.tested_targets()}
        metrics |= {name: {} for name in left_out}
        baseline = self.target(self.baseline) if self.baseline else None
        not_compared = set(scenarios) - baseline.scenarios.keys() if baseline else ()
        baseline_metrics = baseline.all_metrics() if baseline else None
        self.gates = check_gates(gates, metrics, baseline_metrics, expected, not_compared)

    def require_gates(self) -> None:
        """Raises GateError, which lists the failed gate checks."""
        require_passed(self.gates)

    def to_json(self) -> dict[str, Any]:
        """A document for JSON. Infinities and NaN become strings such as "Infinity" and "NaN"."""
        document: dict[str, Any] = _json_safe({"format_version": FORMAT_VERSION, **asdict(self)})
        for target, entry in zip(self.targets, document["targets"], strict=True):
            intervals = {key: target.interval(key) for key in target.all_metrics()}
            entry["intervals"] = {
                key: _json_safe(interval)
                for key, interval in intervals.items()
                if interval is not None
            }
        return document | {"definitions": DEFINITIONS}

    @staticmethod
    def from_json(document: Mapping[str, Any]) -> BenchReport:
        """The inverse of `to_json`. Raises InputError for another document."""
        try:
            if document["format_version"] != FORMAT_VERSION:
                raise InputError(
                    f"the report has format version {document['format_version']}",
                    f"Version {FORMAT_VERSION} is read",
                )
            report = TypeAdapter(BenchReport).validate_python(dict(document))
            names = [target.name for target in report.targets]
            if not names or len(set(names)) < len(names) or report.baseline not in {None, *names}:
                raise ValueError(f"targets {names}, baseline {report.baseline}")
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            if isinstance(error, ValidationError):
                first = error.errors()[0]
                reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
            raise InputError(
                f"this is not a report of llmkit bench ({reason})",
                todo="Write one with `llmkit bench --json`",
            ) from error
        return report


def read_report(path: str | Path) -> BenchReport:
    """Read a JSON report. Raises InputError for a missing file and one that is no report."""
    try:
        document = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"report {path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"report {path} is not JSON ({error})", todo="Write one with `llmkit bench --json`"
        ) from error
    try:
        return BenchReport.from_json(document)
    except InputError as error:
        raise InputError(f"{path}: {error.what}", error.expected, error.todo) from error


def require_single_target(report: BenchReport, source: str) -> TargetReport:
    """The only target under test of a saved report. Raises InputError when there are several."""
    targets = report.tested_targets()
    if len(targets) != 1:
        names = ", ".join(target.name for target in targets)
        raise InputError(
            f"{source} holds {len(targets)} targets ({names})", "A baseline is one target"
        )
    return targets[0]


def compare_reports(a: BenchReport, b: BenchReport) -> BenchReport:
    """One report with the targets of both.

    The baseline is that of `a`, or its first target. A name that both reports have gets the suffix
    " (a)" or " (b)". The notes say which metrics cannot be compared.
    """
    shared_names = {target.name for target in a.targets} & {target.name for target in b.targets}
    targets = []
    for report, suffix in ((a, "a"), (b, "b")):
        for target in report.targets:
            name = f"{target.name} ({suffix})" if target.name in shared_names else target.name
            targets.append(replace(target, name=name))
    index = [target.name for target in a.targets].index(a.baseline) if a.baseline else 0
    same_workload = a.workload.get("sha256") == b.workload.get("sha256")
    return BenchReport(
        targets,
        baseline=targets[index].name,
        environment=a.environment if a.environment == b.environment else {},
        workload=a.workload if same_workload else {},
        evaluation=a.evaluation if a.evaluation == b.evaluation else {},
        tasks=a.tasks if a.tasks == b.tasks else {},
        tool_cases=a.tool_cases if a.tool_cases == b.tool_cases else {},
        notes=comparability_notes(a, b),
        joined=True,
    )


def comparability_notes(a: BenchReport, b: BenchReport) -> list[str]:
    """Why metrics of two reports cannot be compared, one sentence each."""
    notes = []
    if a.workload and b.workload and a.workload["sha256"] != b.workload["sha256"]:
        notes.append("the workloads differ: speed does not compare")
    if a.evaluation and b.evaluation and a.evaluation["sha256"] != b.evaluation["sha256"]:
        notes.append("the evaluation windows differ: quality does not compare")
    if a.tasks and b.tasks and a.tasks != b.tasks:
        notes.append("the tasks, or their versions and sizes, differ: their figures do not compare")
    if a.tool_cases and b.tool_cases and a.tool_cases["sha256"] != b.tool_cases["sha256"]:
        notes.append("the tool cases differ: tool accuracy does not compare")
    for name in ("cpu", "cores", "gpu", "torch", "dtype", "device", *_CPU_SETTINGS):
        value_a = a.environment.get(name)
        value_b = b.environment.get(name)
        is_unknown = name in _CPU_SETTINGS and None in (value_a, value_b)
        if value_a != value_b and not is_unknown:
            notes.append(f"{name} differs ({value_a} and {value_b}): speed does not compare")
    if a.workload and b.workload:
        notes.append(
            "measured at different times: on a machine that others share, trust one run of bench"
            " with both"
        )
    return notes


def _json_safe(value: Any) -> Any:
    """The value with infinities and NaN, which JSON lacks, as strings that `float` reads."""
    if isinstance(value, float) and not math.isfinite(value):
        if math.isnan(value):
            return "NaN"
        return "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {name: _json_safe(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_json_safe(item) for item in value]
    return value
