"""Running a recipe: its stages in order, in a directory, each only when its output is out of date.

A stage's fingerprint is a hash of its settings, its inputs and llmkit's version. When a stage
starts, the output of another fingerprint is removed and the new fingerprint is stored. An output
appears only when it is complete. So an existing output has the stored fingerprint, and a stage
without an output is run, or resumed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from llmkit.bench.bench_options import ReportOutputs
from llmkit.bench.bench_report import BenchReport, TargetReport, read_report
from llmkit.bench.environment import describe_environment
from llmkit.bench.gates import GateResult, parse_gate
from llmkit.bench.report_files import write_report
from llmkit.checkpoint.manifest import load_manifest
from llmkit.checkpoint.model_files import load_json
from llmkit.checkpoint.open_model_files import resolve_model
from llmkit.checkpoint.output_directory import output_lock, sibling, write_errors
from llmkit.common.errors import InputError, LlmkitError, OutputError
from llmkit.common.formatting import finite
from llmkit.common.version import version
from llmkit.model.device import resolve_device
from llmkit.pipeline.recipe import (
    ACCEPTANCE,
    GATE,
    MODEL,
    QUANTIZE_METRICS,
    Recipe,
    Stage,
    StageType,
    model_path,
)

STATE = "state.json"
FORMAT_VERSION = 1
QUANTIZE_REPORT = "llmkit_report.json"
# Files of a checkpoint that hold times, so that they differ from run to run.
TIMING_FILES = {QUANTIZE_REPORT, "report.html"}

StageExecutor = Callable[[Stage, dict[str, Any], Path | None], dict[str, Any]]
"""Runs a stage's command and returns its result.

The arguments are the stage, its settings with paths for models, and the output path.
"""


@dataclass(frozen=True)
class StageResult:
    """How a stage ended. `gates` is set for gate stages only."""

    stage: str
    run: str
    outcome: str  # "done", "there already", "passed", "FAILED" or "left out"
    seconds: float = 0.0
    output: str | None = None
    result: dict[str, Any] = field(default_factory=dict)
    gates: list[GateResult] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """A document for JSON."""
        return asdict(self)


class RunDirectory:
    """The directory of a run, with the stages' outputs and their fingerprints in `state.json`."""

    def __init__(self, recipe: Recipe, folder: Path, stage_types: Mapping[str, StageType]) -> None:
        """Raises OutputError when the folder holds other files or another recipe's run, and
        InputError when its state cannot be read."""
        self.recipe = recipe
        self.folder = folder.expanduser().absolute()
        self.stage_types = stage_types
        # By stage name: "identity" (the fingerprint), "run", "settings" and "seconds".
        self.stages: dict[str, dict[str, Any]] = {}
        if self.folder.exists() and not self.folder.is_dir():
            raise OutputError(f"The output {folder} is a file", todo="Choose another with --output")
        state_file = self.folder / STATE
        if not state_file.is_file():
            if self.folder.is_dir() and any(self.folder.iterdir()):
                raise OutputError(
                    f"The output {folder} exists and is not the run of a recipe",
                    todo="Choose another with -o",
                )
            return
        state = load_json(state_file)
        if state.get("format_version") != FORMAT_VERSION or not isinstance(
            state.get("stages"), dict
        ):
            raise InputError(
                f"{state_file} is not what this llmkit writes",
                todo="Choose another with --output",
            )
        if state.get("recipe") != recipe.name:
            raise OutputError(
                f"The output {folder} is that of recipe {state.get('recipe')}",
                todo="Choose another with --output",
            )
        self.stages = state["stages"]

    def output(self, stage: Stage) -> Path | None:
        """The path of a stage's output; None for a stage without one."""
        output = self.stage_types[stage.run].output if stage.run != GATE else ""
        if output == "checkpoint":
            return self.folder / stage.name
        if output == "report":
            return self.folder / f"{stage.name}.json"
        return None

    def resolved_settings(self, stage: Stage) -> dict[str, Any]:
        """The settings with paths instead of the names of stages and models."""
        settings = dict(stage.settings)
        for key in self.stage_types[stage.run].models:
            value = settings[key]
            if isinstance(value, list):
                settings[key] = [self.path(name) for name in value]
            elif value:
                settings[key] = self.path(value)
        return settings

    def path(self, reference: str) -> str:
        """The path of a model, or of a stage's output."""
        stage = self.recipe.stages.get(reference)
        if stage:
            return str(self.output(stage))
        return model_path(self.recipe.model if reference == MODEL else reference)

    def fingerprint(self, stage: Stage) -> str | None:
        """A hash of everything that decides a stage's output. The stage's inputs must exist.

        None for a stage that measures a server, which may answer differently next time.
        """
        stage_type = self.stage_types[stage.run]
        settings = self.resolved_settings(stage)
        models = replace(stage, settings=settings).references(stage_type.models)
        if settings.get("url") or any("://" in reference for _, reference in models):
            return None
        files = [
            (key, Path(name).expanduser())
            for key, name in stage.references(stage_type.files)
            if Path(name).expanduser().exists()
        ]
        document = {
            "llmkit": version(),
            "run": stage.run,
            "settings": {
                key: value for key, value in settings.items() if key not in stage_type.models
            },
            "models": [(key, content_fingerprint(reference)) for key, reference in models],
            "files": [(key, _file_stats(path)) for key, path in files],
        }
        if stage_type.output == "report":  # speed depends on the machine
            document["machine"] = describe_environment(
                resolve_device(settings["device"]).type, torch.float32
            )
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()

    def is_up_to_date(self, stage: Stage) -> bool:
        """Whether the output exists and has the stage's current fingerprint."""
        output = self.output(stage)
        if output is None or not output.exists() or stage.name not in self.stages:
            return False
        for _, name in stage.references(self.stage_types[stage.run].models):
            input_stage = self.recipe.stages.get(name)
            if input_stage and not self.is_up_to_date(input_stage):
                return False
        fingerprint = self.fingerprint(stage)
        return fingerprint is not None and bool(self.stages[stage.name]["identity"] == fingerprint)

    def begin_stage(self, stage: Stage) -> None:
        """Remove the output of another fingerprint and store the new fingerprint."""
        output = self.output(stage)
        fingerprint = self.fingerprint(stage)
        if output is not None and output.exists() and stage.name in self.stages:
            if output.is_dir():
                shutil.rmtree(output)
            else:
                output.unlink()
        self.stages[stage.name] = {
            "identity": fingerprint,
            "run": stage.run,
            "settings": stage.settings,
        }
        self._save()

    def finish_stage(self, stage: Stage, seconds: float) -> None:
        """Store how long the stage took."""
        self.stages[stage.name]["seconds"] = round(seconds, 3)
        self._save()

    def _save(self) -> None:
        state = {
            "format_version": FORMAT_VERSION,
            "recipe": self.recipe.name,
            "stages": self.stages,
        }
        write_json(self.folder / STATE, state)


def run_recipe(
    recipe: Recipe,
    folder: Path,
    stage_types: Mapping[str, StageType],
    run_command: StageExecutor,
    report_progress: Callable[[str], None],
    serve: bool,
) -> list[StageResult]:
    """Run the stages in order until a gate fails. Returns how each of them ended.

    serve: whether to run stages that serve. Raises the errors of the commands, with the stage's
    name, and OutputError when the folder is in use by another run or holds something else.
    """
    RunDirectory(recipe, folder, stage_types)  # refuses a wrong folder before it is locked
    results: list[StageResult] = []
    with output_lock(folder.expanduser().absolute()):
        run_directory = RunDirectory(recipe, folder, stage_types)
        with write_errors(run_directory.folder):
            run_directory.folder.mkdir(parents=True, exist_ok=True)
        for number, stage in enumerate(recipe.stages.values(), 1):
            title = f"{stage.name} ({number} of {len(recipe.stages)})"
            try:
                result = _run_stage(
                    run_directory, stage, title, run_command, report_progress, serve
                )
            except LlmkitError as error:
                raise type(error)(
                    f"stage {stage.name}: {error.what}", error.expected, error.todo
                ) from error
            results.append(result)
            if any(not gate_result.passed for gate_result in result.gates):
                break
    return results


def _run_stage(
    run_directory: RunDirectory,
    stage: Stage,
    title: str,
    run_command: StageExecutor,
    report_progress: Callable[[str], None],
    serve: bool,
) -> StageResult:
    if stage.run == GATE:
        return _run_gate(run_directory, stage, title, report_progress)
    output = run_directory.output(stage)
    if output is None and not serve:
        report_progress(f"{title}: left out, run it with --serve")
        return StageResult(stage.name, stage.run, "left out")
    shown_output = None if output is None else str(output)
    if output is not None and run_directory.is_up_to_date(stage):
        report_progress(f"{title}: skipped, {output} is there already")
        return StageResult(stage.name, stage.run, "there already", 0.0, shown_output)
    report_progress(f"{title}: {stage.run}")
    start_s = time.perf_counter()
    if output is not None:
        run_directory.begin_stage(stage)
    result = run_command(stage, run_directory.resolved_settings(stage), output)
    if run_directory.stage_types[stage.run].output == "report":
        assert output is not None
        write_json(output, result)
    seconds = time.perf_counter() - start_s
    if output is not None:
        run_directory.finish_stage(stage, seconds)
    return StageResult(stage.name, stage.run, "done", round(seconds, 3), shown_output, result)


def _run_gate(
    run_directory: RunDirectory, stage: Stage, title: str, report_progress: Callable[[str], None]
) -> StageResult:
    report = evaluate_gates(run_directory, stage)
    passed = all(result.passed for result in report.gates)
    verdict = "passed" if passed else "FAILED"
    summary = run_directory.folder / f"{stage.name}.md"
    junit = run_directory.folder / f"{stage.name}.xml"
    write_report(report, ReportOutputs(summary=str(summary), junit=str(junit)))
    report_progress(f"{title}: {verdict}")
    return StageResult(stage.name, GATE, verdict, output=str(summary), gates=report.gates)


def evaluate_gates(run_directory: RunDirectory, stage: Stage) -> BenchReport:
    """The report of the stage that a gate is on, with the results of the gate's conditions."""
    judged = run_directory.recipe.stages[stage.settings["of"]]
    path = run_directory.output(judged)
    assert path is not None
    report = read_report(path) if judged.run == "bench" else _quantize_report(judged.name, path)
    report.check_gates([parse_gate(text) for text in stage.settings["gates"]])
    return report


def _quantize_report(name: str, path: Path) -> BenchReport:
    """The report of `llmkit quantize` as a bench report, with the source as the baseline."""
    document = load_json(path / QUANTIZE_REPORT)
    quality = document["quality"] or {}
    sizes = document["sizes"]
    before: dict[str, Any] = {"checkpoint_bytes": sizes["source_bytes"]}
    after: dict[str, Any] = {"checkpoint_bytes": sizes["checkpoint_bytes"]}
    if quality:
        before["perplexity"] = quality["reference_perplexity"]
        after |= {metric: quality[metric] for metric in QUANTIZE_METRICS}
    if ACCEPTANCE in quality:
        before[ACCEPTANCE] = quality[f"reference_{ACCEPTANCE}"]
        after[ACCEPTANCE] = quality[ACCEPTANCE]

    def target(name: str, reference: str, metrics: Mapping[str, Any]) -> TargetReport:
        values = {metric: math.nan if value is None else value for metric, value in metrics.items()}
        return TargetReport(name, reference, "checkpoint", values)

    targets = [target("source", document["source"], before), target(name, str(path), after)]
    return BenchReport(targets, baseline="source", command=document["command_line"])


def require_gates(results: list[StageResult]) -> None:
    """Raises GateError, which lists the failed gate checks."""
    gates = [gate_result for result in results for gate_result in result.gates]
    BenchReport([], gates=gates).require_gates()


def content_fingerprint(reference: str) -> Any:
    """A fingerprint of the content of a model or report; it does not depend on the path.

    It is the digests of the manifest or the digest of a report, or else the files' sizes and times.
    """
    if reference.endswith(".json") and Path(reference).is_file():
        return hashlib.sha256(Path(reference).read_bytes()).hexdigest()
    path = resolve_model(reference)
    manifest = load_manifest(path) if path.is_dir() else None
    if manifest is None:
        return _file_stats(path)
    return {
        name: entry["sha256"]
        for name, entry in manifest["files"].items()
        if name not in TIMING_FILES
    }


def _file_stats(path: Path) -> list[tuple[str, int, int]]:
    """The name, size and modification time of a file, or of each file in a directory."""
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def write_json(path: Path, document: Any) -> None:
    """Write a JSON file atomically."""
    with write_errors(path):
        partial = sibling(path, ".partial")
        with partial.open("w", encoding="utf-8") as file:
            json.dump(finite(document), file, indent=2, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
