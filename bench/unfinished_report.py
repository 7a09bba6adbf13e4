"""Continuing a benchmark of which an interrupted run has measured some targets."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from llmkit.bench.bench_plan import BenchPlan
from llmkit.bench.bench_report import BenchReport, TargetReport, read_report
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.common.errors import InputError, OutputError
from llmkit.common.options import option_fields

# Gates are checked at the end. The names of the targets stand for the combinations of a sweep.
_NOT_COMPARED = {"--gate", "--sweep-options"}


class UnfinishedRun(NamedTuple):
    """A file with the report of a run that did not end."""

    path: str
    report: BenchReport


def read_unfinished(path: str) -> UnfinishedRun | None:
    """The unfinished run in a file; None: there is none, and the file may be replaced."""
    if not Path(path).is_file():
        return None
    try:
        report = read_report(path)
    except InputError:
        return None
    return UnfinishedRun(path, report) if report.unfinished else None


def run_key(plan: BenchPlan, report: BenchReport) -> dict[str, Any]:
    """What must be the same for a run to continue another, by names that errors can show.

    report: with its environment, workload and tool cases.
    """
    options = plan.options
    key: dict[str, Any] = {
        "targets": [target.name for target in plan.targets],
        "models": [target.report.reference for target in plan.targets],
        "files": [_file_digest(checkpoint) for checkpoint in plan.checkpoints.values()],
        "served models": [target.server.model for target in plan.targets if target.server],
        "--mode": None if options.load is None else options.load.mode,
    }
    for group in (options, options.load, options.slo_search, options.tasks, options.tool_cases):
        if group is not None:
            key |= _values(group)
    key |= report.environment
    key["workload"] = report.workload.get("sha256")
    key["tool cases"] = report.tool_cases.get("sha256")
    document: dict[str, Any] = json.loads(json.dumps(key))
    return document


def continue_run(
    plan: BenchPlan, report: BenchReport, unfinished: UnfinishedRun
) -> list[TargetReport]:
    """Put the targets that an interrupted run has measured in the plan and the report.

    report: its `unfinished` has the key of this run. Returns the measured targets.
    Raises OutputError for a run with other options, models, prompts or another machine.
    """
    path, saved = unfinished
    earlier = saved.unfinished.get("key", {})
    key = report.unfinished["key"]
    differing = [name for name in {**earlier, **key} if earlier.get(name) != key.get(name)]
    if differing:
        changes = [f"{name} {_text(earlier, name)}, here {_text(key, name)}" for name in differing]
        raise OutputError(
            f"{path} has an unfinished run of another kind ({'; '.join(changes)})",
            "What it has measured must not be lost",
            "Repeat its command to continue it, remove the file, or choose another output",
        )
    measured = {target.name: target for target in saved.targets}
    for target in plan.targets:
        target.report = measured.get(target.name, target.report)
    report.targets = [target.report for target in plan.targets]
    report.tasks = saved.tasks
    notes = saved.unfinished.get("notes", [])
    report.unfinished["notes"] += notes
    plan.notes += [note for note in notes if note not in plan.notes]
    return [target.report for target in plan.targets if target.name in measured]


def partial_report(report: BenchReport, measured: Sequence[TargetReport]) -> BenchReport:
    """The report of the targets that are measured."""
    names = [target.name for target in measured]
    return replace(
        report,
        targets=[target for target in report.targets if target.name in names],
        baseline=report.baseline if report.baseline in names else None,
        notes=[*report.notes, f"{len(names)} of {len(report.targets)} targets were measured"],
        unfinished={**report.unfinished, "notes": [*report.unfinished["notes"]]},
    )


def _file_digest(checkpoint: Checkpoint) -> str:
    """Twelve digits that change when the config or a weight file is written again."""
    stamps = json.dumps(sorted(checkpoint.stamps.items()))
    return hashlib.sha256(stamps.encode()).hexdigest()[:12]


def _values(options: Any) -> dict[str, Any]:
    """The values of an object's options by label."""
    return {
        field.label: functools.reduce(getattr, field.path, options)
        for field in option_fields(type(options))
        if field.label not in _NOT_COMPARED
    }


def _text(key: Mapping[str, Any], name: str) -> str:
    value = key.get(name)
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
