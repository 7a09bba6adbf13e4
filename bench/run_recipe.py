"""Running a recipe: stage after stage in a work directory, each only when what it would write is not there already.

A stage's identity is a hash of its settings, of what it reads and of llmkit's version. It is written down when the
stage starts, after the output of an earlier identity was removed, and outputs appear only when they are complete: so
an output that is there is that of the identity written down, and whatever is not there is run, or resumed.
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

from llmkit.bench.environment import describe_environment
from llmkit.bench.gates import GateResult, parse_gate
from llmkit.bench.outputs import Outputs
from llmkit.bench.recipe import GATE, MODEL, QUANTIZED, Kind, Recipe, Stage, model_path
from llmkit.bench.report import BenchReport, TargetReport, read_report
from llmkit.checkpoint.errors import InputError, LlmkitError, OutputError
from llmkit.checkpoint.files import load_json, locate
from llmkit.checkpoint.manifest import load_manifest
from llmkit.checkpoint.output import locked, sibling, writing
from llmkit.checkpoint.text import finite
from llmkit.checkpoint.version import version
from llmkit.model.device import resolve_device

STATE = "state.json"
FORMAT_VERSION = 1
QUANTIZE_REPORT = "llmkit_report.json"
TIMED = {QUANTIZE_REPORT, "report.html"}  # of a checkpoint's files: they tell how long it took

Execute = Callable[[Stage, dict[str, Any], Path | None], dict[str, Any]]
"""Runs the command of a stage on settings whose models are paths, writing to the path; its result."""


@dataclass(frozen=True)
class Outcome:
    """How a stage ended. `gates` is set for gate stages only."""

    stage: str
    run: str
    outcome: str  # "done", "there already", "passed", "FAILED" or "left out"
    seconds: float = 0.0
    output: str | None = None
    result: dict[str, Any] = field(default_factory=dict)
    gates: list[GateResult] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


class Work:
    """The directory of a run: outputs under their stages' names, and what they are of."""

    def __init__(self, recipe: Recipe, folder: Path, kinds: Mapping[str, Kind]) -> None:
        """Raises OutputError when the folder holds something else, InputError when its state cannot be read."""
        self.recipe, self.folder, self.kinds = recipe, folder.expanduser().absolute(), kinds
        self.stages: dict[str, dict[str, Any]] = {}
        if self.folder.exists() and not self.folder.is_dir():
            raise OutputError(f"The output {folder} is a file", todo="Choose another with --output")
        if not (self.folder / STATE).is_file():
            if self.folder.is_dir() and any(self.folder.iterdir()):
                raise OutputError(
                    f"The output {folder} exists and is no run of a recipe", todo="Choose another with -o"
                )
            return
        state = load_json(self.folder / STATE)
        if state.get("format_version") != FORMAT_VERSION or not isinstance(state.get("stages"), dict):
            raise InputError(
                f"{self.folder / STATE} is not what this llmkit writes", todo="Choose another with --output"
            )
        if state.get("recipe") != recipe.name:
            raise OutputError(
                f"The output {folder} is that of recipe {state.get('recipe')}", todo="Choose another with --output"
            )
        self.stages = state["stages"]

    def output(self, stage: Stage) -> Path | None:
        """Where a stage writes."""
        form = self.kinds[stage.run].output if stage.run != GATE else ""
        return {"checkpoint": self.folder / stage.name, "report": self.folder / f"{stage.name}.json", "": None}[form]

    def resolved(self, stage: Stage) -> dict[str, Any]:
        """The settings, with paths in place of stages' names."""
        settings = dict(stage.settings)
        for key in self.kinds[stage.run].models:
            value = settings[key]
            settings[key] = [self.path(one) for one in value] if isinstance(value, list) else value and self.path(value)
        return settings

    def path(self, reference: str) -> str:
        """Where a model lies, or what a stage writes."""
        other = self.recipe.stages.get(reference)
        return str(self.output(other)) if other else model_path(self.recipe.model if reference == MODEL else reference)

    def identity(self, stage: Stage) -> str | None:
        """What decides a stage's output; None when that cannot be known: a server may answer differently next time.

        What it reads must be there.
        """
        kind, settings = self.kinds[stage.run], self.resolved(stage)
        named = replace(stage, settings=settings).references(kind.models)
        if settings.get("url") or any("://" in reference for _, reference in named):
            return None
        files = [(key, name) for key, name in stage.references(kind.files) if Path(name).expanduser().exists()]
        document = {
            "llmkit": version(),
            "run": stage.run,
            "settings": {key: value for key, value in settings.items() if key not in kind.models},
            "models": [(key, content(reference)) for key, reference in named],
            "files": [(key, _stamps(Path(name).expanduser())) for key, name in files],
        }
        if kind.output == "report":  # speed is of a machine
            document["machine"] = describe_environment(resolve_device(settings["device"]).type, torch.float32)
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()

    def is_there(self, stage: Stage) -> bool:
        """Whether the output is the one that the stage would write now."""
        output = self.output(stage)
        if output is None or not output.exists() or stage.name not in self.stages:
            return False
        read = [
            self.recipe.stages[name]
            for _, name in stage.references(self.kinds[stage.run].models)
            if name in self.recipe.stages
        ]
        if not all(self.is_there(other) for other in read):
            return False
        identity = self.identity(stage)
        return identity is not None and bool(self.stages[stage.name]["identity"] == identity)

    def begin(self, stage: Stage) -> None:
        """Remove what the stage wrote under another identity, then write the new one down."""
        output, identity = self.output(stage), self.identity(stage)
        if output is not None and output.exists() and stage.name in self.stages:
            shutil.rmtree(output) if output.is_dir() else output.unlink()
        self.stages[stage.name] = {"identity": identity, "run": stage.run, "settings": stage.settings}
        self._save()

    def finish(self, stage: Stage, seconds: float) -> None:
        """Write down how long it took."""
        self.stages[stage.name]["seconds"] = round(seconds, 3)
        self._save()

    def _save(self) -> None:
        state = {"format_version": FORMAT_VERSION, "recipe": self.recipe.name, "stages": self.stages}
        write_json(self.folder / STATE, state)


def run_recipe(
    recipe: Recipe, folder: Path, kinds: Mapping[str, Kind], execute: Execute, say: Callable[[str], None], serve: bool
) -> list[Outcome]:
    """Run the stages in order until a gate fails; how each ended. Stages that serve are run with `serve` only.

    Raises what the commands do, the stage named, and OutputError when another run has the folder or it is in the way.
    """
    Work(recipe, folder, kinds)
    outcomes: list[Outcome] = []
    with locked(folder.expanduser().absolute()):
        work = Work(recipe, folder, kinds)
        with writing(work.folder):
            work.folder.mkdir(parents=True, exist_ok=True)
        for number, stage in enumerate(recipe.stages.values(), 1):
            title = f"{stage.name} ({number} of {len(recipe.stages)})"
            try:
                outcomes.append(_run_stage(work, stage, title, execute, say, serve))
            except LlmkitError as error:
                raise type(error)(f"stage {stage.name}: {error.what}", error.expected, error.todo) from error
            if any(not result.passed for result in outcomes[-1].gates):
                break
    return outcomes


def _run_stage(
    work: Work, stage: Stage, title: str, execute: Execute, say: Callable[[str], None], serve: bool
) -> Outcome:
    if stage.run == GATE:
        report = judge(work, stage)
        passed = all(result.passed for result in report.gates)
        files = [work.folder / f"{stage.name}{suffix}" for suffix in (".md", ".xml")]
        Outputs(summary=str(files[0]), junit=str(files[1])).write(report)
        say(f"{title}: {'passed' if passed else 'FAILED'}")
        return Outcome(stage.name, GATE, "passed" if passed else "FAILED", output=str(files[0]), gates=report.gates)
    output = work.output(stage)
    shown = None if output is None else str(output)
    if output is None and not serve:
        say(f"{title}: left out, run it with --serve")
        return Outcome(stage.name, stage.run, "left out")
    if output is not None and work.is_there(stage):
        say(f"{title}: skipped, {output} is there already")
        return Outcome(stage.name, stage.run, "there already", 0.0, shown)
    say(f"{title}: {stage.run}")
    started = time.perf_counter()
    if output is not None:
        work.begin(stage)
    result = execute(stage, work.resolved(stage), output)
    if work.kinds[stage.run].output == "report":
        assert output is not None
        write_json(output, result)
    seconds = time.perf_counter() - started
    if output is not None:
        work.finish(stage, seconds)
    return Outcome(stage.name, stage.run, "done", round(seconds, 3), shown, result)


def judge(work: Work, stage: Stage) -> BenchReport:
    """What the stage is on, with the results of its gates in the place of any others."""
    judged = work.recipe.stages[stage.settings["of"]]
    path = work.output(judged)
    assert path is not None
    report = read_report(path) if judged.run == "bench" else _quantize_report(judged.name, path)
    report.judge([parse_gate(text) for text in stage.settings["gates"]])
    return report


def _quantize_report(name: str, path: Path) -> BenchReport:
    """What `llmkit quantize` found, as a bench report: the source is the baseline."""
    document = load_json(path / QUANTIZE_REPORT)
    quality, sizes = document["quality"] or {}, document["sizes"]
    before: dict[str, Any] = {"checkpoint_bytes": sizes["source_bytes"]}
    after: dict[str, Any] = {"checkpoint_bytes": sizes["checkpoint_bytes"]}
    if quality:
        before["perplexity"] = quality["reference_perplexity"]
        after |= {metric: quality[metric] for metric in QUANTIZED}

    def target(called: str, reference: str, figures: Mapping[str, Any]) -> TargetReport:
        known = {metric: math.nan if value is None else value for metric, value in figures.items()}
        return TargetReport(called, reference, "checkpoint", known)

    targets = [target("source", document["source"], before), target(name, str(path), after)]
    return BenchReport(targets, baseline="source", command=document["command_line"])


def require_gates(outcomes: list[Outcome]) -> None:
    """Raises GateError, which names every figure that is worse than its gate allows."""
    BenchReport([], gates=[result for outcome in outcomes for result in outcome.gates]).require_gates()


def content(reference: str) -> Any:
    """What a model or report is, whatever its name and place: the manifest's digests, else the files' stamps."""
    if reference.endswith(".json") and Path(reference).is_file():
        return hashlib.sha256(Path(reference).read_bytes()).hexdigest()
    path = locate(reference)
    manifest = load_manifest(path) if path.is_dir() else None
    if manifest is None:
        return _stamps(path)
    return {name: entry["sha256"] for name, entry in manifest["files"].items() if name not in TIMED}


def _stamps(path: Path) -> list[tuple[str, int, int]]:
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def write_json(path: Path, document: Any) -> None:
    """Write a JSON file, all or nothing."""
    with writing(path):
        partial = sibling(path, ".partial")
        with partial.open("w", encoding="utf-8") as file:
            json.dump(finite(document), file, indent=2, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
