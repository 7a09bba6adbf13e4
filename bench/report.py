"""The result of a run: what was measured, on what, and how it compares; as JSON and as one table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from llmkit.bench.definitions import DEFINITIONS
from llmkit.bench.gates import Gate, GateResult, check_gates
from llmkit.bench.intervals import ERROR, Z, differ, interval
from llmkit.bench.metrics import tpot
from llmkit.checkpoint.errors import GateError, InputError

if TYPE_CHECKING:
    from rich.console import Group

FORMAT_VERSION = 1
Figures = dict[str, int | float]


class RequestFigures(NamedTuple):
    """One request. Times are seconds, `sent_s` from the sending of the run's first."""

    sent_s: float
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
    """The figures of one target. Names and units are those of `metric_named`."""

    name: str  # unique in a report
    reference: str  # as the user gave it
    kind: str  # "offline", "served", "url", or "checkpoint" when no speed was measured
    metrics: Figures = field(default_factory=dict)
    scenarios: dict[str, Figures] = field(default_factory=dict)  # medians over the rounds
    rounds: dict[str, list[Figures]] = field(default_factory=dict)  # what the medians are of
    requests: dict[str, list[RequestFigures]] = field(default_factory=dict)  # those of the last round
    absent: dict[str, str] = field(default_factory=dict)  # figures that there are not, several a key, and why

    def repetitions(self, key: str) -> list[float]:
        """What the figure of this full name is the median of; empty for one that is measured once."""
        scenario, _, metric = key.rpartition(".")
        return [figures[metric] for figures in self.rounds.get(scenario, ()) if metric in figures]

    def figures(self) -> dict[str, float]:
        """All figures by full name: "perplexity", "online.output_tps"."""
        speed = {f"{name}.{metric}": v for name, figures in self.scenarios.items() for metric, v in figures.items()}
        return self.metrics | speed


@dataclass
class BenchReport:
    """Everything a run of `bench` found. `to_json` and `from_json` are inverses."""

    targets: list[TargetReport]
    baseline: str | None = None  # the name of the target that ratios refer to
    environment: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    workload: dict[str, Any] = field(default_factory=dict)  # sha256, seed, rounds, scenarios; empty: no speed
    evaluation: dict[str, Any] = field(default_factory=dict)  # text, windows, sha256; empty: no quality
    tasks: dict[str, Any] = field(default_factory=dict)  # what lm-evaluation-harness ran; empty: nothing
    gates: list[GateResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    joined: bool = False  # targets that took no turns: of several runs, or on one GPU after the other

    def target(self, name: str) -> TargetReport:
        """The target of that name, which must exist."""
        return next(target for target in self.targets if target.name == name)

    def subjects(self) -> list[TargetReport]:
        """The targets under test: all but the baseline, or the only one."""
        return [target for target in self.targets if target.name != self.baseline] or self.targets

    def differs(self, target: TargetReport, key: str) -> bool | None:
        """Whether a figure differs from the baseline's by more than chance at the 5 % level; None when not known."""
        if self.baseline is None:
            return None
        other, error = self.target(self.baseline), f"{key}{ERROR}"
        if error in target.metrics and error in other.metrics:
            spread = math.hypot(target.metrics[error], other.metrics[error])
            return abs(target.metrics[key] - other.metrics[key]) > Z * spread
        ours, base = target.repetitions(key), other.repetitions(key)
        return differ(ours, base, paired=not self.joined)

    def judge(self, gates: Sequence[Gate]) -> None:
        """Check the gates on the targets under test, in the place of any others. Raises as `check_gates` does."""
        base = self.target(self.baseline).figures() if self.baseline else None
        self.gates = check_gates(gates, {target.name: target.figures() for target in self.subjects()}, base)

    def require_gates(self) -> None:
        """Raises GateError, which names every figure that is worse than its gate allows."""
        failed = [result for result in self.gates if not result.passed]
        if failed:
            told = "; ".join(f"{r.target}: {r.metric} is {r.value:.6g} ({r.gate}, limit {r.limit:.6g})" for r in failed)
            raise GateError(f"{len(failed)} of {len(self.gates)} gate checks failed: {told}")

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready document; infinite and undefined figures are the strings "Infinity" and "NaN"."""
        document: dict[str, Any] = _encode({"format_version": FORMAT_VERSION, **asdict(self)})
        for target, entry in zip(self.targets, document["targets"], strict=True):
            keys = [key for key in target.figures() if len(target.repetitions(key)) > 1]
            entry["intervals"] = {key: _encode(interval(target.repetitions(key))) for key in keys}
        return document | {"definitions": DEFINITIONS}

    @staticmethod
    def from_json(document: Mapping[str, Any]) -> BenchReport:
        """The inverse of `to_json`. Raises InputError for anything else."""
        try:
            if document["format_version"] != FORMAT_VERSION:
                raise InputError(
                    f"the report has format version {document['format_version']}", f"Version {FORMAT_VERSION} is read"
                )
            report = TypeAdapter(BenchReport).validate_python(dict(document))
            names = [target.name for target in report.targets]
            if not names or len(set(names)) < len(names) or report.baseline not in {None, *names}:
                raise ValueError(f"targets {names}, baseline {report.baseline}")
        except (KeyError, TypeError, ValueError) as error:
            told = f"{type(error).__name__}: {error}"
            if isinstance(error, ValidationError):
                first = error.errors()[0]
                told = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
            raise InputError(
                f"this is no report of llmkit bench ({told})", todo="Write one with `llmkit bench --json`"
            ) from error
        return report

    def renderable(self) -> Group:
        """The table, the gates if there are any, and the notes, to be printed by rich."""
        from llmkit.bench.tables import render

        return render(self)


def read_report(path: str | Path) -> BenchReport:
    """Read a JSON report. Raises InputError when it is missing or none."""
    try:
        document = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"report {path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"report {path} is not JSON ({error})", todo="Write one with `llmkit bench --json`") from error
    try:
        return BenchReport.from_json(document)
    except InputError as error:
        raise InputError(f"{path}: {error.what}", error.expected, error.todo) from error


def single_target(report: BenchReport, source: str) -> TargetReport:
    """The one target a saved report is about. Raises InputError when there are several."""
    subjects = report.subjects()
    if len(subjects) != 1:
        raise InputError(
            f"{source} holds {len(subjects)} targets ({', '.join(target.name for target in subjects)})",
            "A baseline is one target",
        )
    return subjects[0]


def compare_reports(a: BenchReport, b: BenchReport) -> BenchReport:
    """Both reports' targets side by side, with the first of `a` as the baseline; notes say what does not compare.

    A name that both reports have is marked with " (a)" and " (b)".
    """
    shared = {target.name for target in a.targets} & {target.name for target in b.targets}
    targets = []
    for report, mark in ((a, "a"), (b, "b")):
        for target in report.targets:
            name = f"{target.name} ({mark})" if target.name in shared else target.name
            targets.append(TargetReport(**{**vars(target), "name": name}))
    index = [target.name for target in a.targets].index(a.baseline) if a.baseline else 0
    same_work = a.workload.get("sha256") == b.workload.get("sha256")
    return BenchReport(
        targets,
        baseline=targets[index].name,
        environment=a.environment if a.environment == b.environment else {},
        workload=a.workload if same_work else {},
        evaluation=a.evaluation if a.evaluation == b.evaluation else {},
        tasks=a.tasks if a.tasks == b.tasks else {},
        notes=differences(a, b),
        joined=True,
    )


def differences(a: BenchReport, b: BenchReport) -> list[str]:
    """Why figures of two reports do not compare, a sentence each."""
    notes = []
    if a.workload and b.workload and a.workload["sha256"] != b.workload["sha256"]:
        notes.append("the workloads differ: speed does not compare")
    if a.evaluation and b.evaluation and a.evaluation["sha256"] != b.evaluation["sha256"]:
        notes.append("the evaluation windows differ: quality does not compare")
    if a.tasks and b.tasks and a.tasks != b.tasks:
        notes.append("the tasks, or their versions and sizes, differ: their figures do not compare")
    for name in ("cpu", "cores", "gpu", "torch", "dtype", "device"):
        ours, theirs = a.environment.get(name), b.environment.get(name)
        if ours != theirs:
            notes.append(f"{name} differs ({ours} and {theirs}): speed does not compare")
    if a.workload and b.workload:
        notes.append("measured at different times: on a machine that others share, trust one run of bench with both")
    return notes


def _encode(value: Any) -> Any:
    """JSON has no word for infinities and NaN; as strings `float` reads them back."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {name: _encode(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_encode(item) for item in value]
    return value
