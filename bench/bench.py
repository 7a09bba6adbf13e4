"""`bench`: measure targets for speed and quality and judge the figures by gates."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from llmkit.bench.costs import Costs, count_costs, utilization
from llmkit.bench.data import load_data, within
from llmkit.bench.environment import describe_environment
from llmkit.bench.gates import check_gates
from llmkit.bench.gpu import Gpus, energy_figures
from llmkit.bench.loads import saturated
from llmkit.bench.metrics import Run, client_figures, medians, require_complete, summarize
from llmkit.bench.offline import OfflineTarget
from llmkit.bench.plan import BenchOptions, Plan, Target, make_plan
from llmkit.bench.quality import evaluation, score_checkpoints
from llmkit.bench.report import BenchReport, RequestFigures, differences, single_target
from llmkit.bench.targets import ServedTarget, SpeedTarget, UrlTarget
from llmkit.bench.workload import WARMUP, Scenario, Workload, WorkloadRequest, build_workload, require_context
from llmkit.checkpoint.errors import InputError, UsageError
from llmkit.checkpoint.progress import Progress
from llmkit.checkpoint.source import Checkpoint, open_checkpoint
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.runtime.load import EngineOptions

__all__ = ["BenchOptions", "bench"]

CLIENT_BUSY = 0.8  # of a core: from here on the load client may be the bottleneck
CLIENT_LATE_MS = 20.0  # behind its schedule, or from here on


def bench(targets: Sequence[str], options: BenchOptions, progress: Progress) -> BenchReport:
    """Measure targets (checkpoints, or addresses of OpenAI-compatible servers) and check the gates.

    The gates' results are in the report; `BenchReport.require_gates` raises for those that failed. Raises as
    `make_plan` does, and InputError when requests fail or do not fit a target.
    """
    plan = make_plan(targets, options)
    report = BenchReport(
        [target.report for target in plan.targets],
        baseline=plan.baseline,
        environment=describe_environment(plan.device, plan.dtype),
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        notes=plan.notes,
        joined=not plan.together,
    )
    if options.speed:
        tokenizer = _tokenizer(plan)
        workload = _workload(plan, tokenizer)
        report.workload = {
            "sha256": workload.sha256,
            "tokenizer": tokenizer.reference,
            "data": options.data,
            "seed": options.seed,
            "rounds": options.rounds,
            "scenarios": workload.describe(),
        }
        if options.load is not None:
            report.workload["load"] = asdict(options.load)
        if options.slo:
            report.workload["slo"] = options.slo
        _require_same(plan, "workload", workload.sha256, "load, data, rounds, limit, seed and tokenizer")
        _measure_speed(plan, workload, progress)
        report.notes += _about_clients(report)
    if options.quality and plan.checkpoints:
        report.evaluation = _measure_quality(plan, progress)
    if plan.saved is not None and plan.baseline is not None:
        saved = single_target(plan.saved, plan.baseline)
        saved.name = plan.baseline
        report.targets.insert(0, saved)
        report.joined = True
        report.notes += differences(plan.saved, report)
    base = report.target(plan.baseline).figures() if plan.baseline else None
    report.gates = check_gates(plan.gates, {target.name: target.figures() for target in report.subjects()}, base)
    return report


def _workload(plan: Plan, tokenizer: Checkpoint) -> Workload:
    """The requests for all targets. Raises InputError when a checkpoint lacks the context or the vocabulary."""
    options = plan.options
    data = load_data(options.data, load_tokenizer(tokenizer), options.seed)
    contexts = [target.context_tokens for target in plan.targets if target.context_tokens is not None]
    if data.conversations and contexts:
        turns = max(scenario.turns for scenario in plan.scenarios)
        fitting = within(data, min(contexts), turns)
        if left_out := len(data.conversations) - len(fitting.conversations):
            plan.notes.append(f"{left_out} conversations longer than {min(contexts)} tokens were left out")
        data = fitting
    workload = build_workload(data, plan.scenarios, options.rounds, options.seed, options.limit)
    highest = max(max(r.prompt) for requests in workload.rounds for run in requests.values() for r in run)
    for target in plan.targets:
        if target.context_tokens is not None:
            require_context(workload, target.context_tokens, target.name)
        if target.spec is not None and highest >= target.spec.vocab:
            raise InputError(
                f"prompts have token ids up to {highest} and {target.name} has a vocabulary of {target.spec.vocab}",
                "All targets get the same prompts",
                "Bench models of one tokenizer together",
            )
    return workload


def _measure_speed(plan: Plan, workload: Workload, progress: Progress) -> None:
    """Each scenario and round with each target in turn, in reverse order on odd rounds."""
    groups = [plan.targets] if plan.together else [[target] for target in plan.targets]
    gpus = Gpus() if plan.device == "cuda" else Gpus(())
    counted = _costs(plan)
    progress.start("speed", len(plan.targets) * len(workload.rounds) * len(workload.scenarios), "runs")
    for group in groups:
        with _started(plan, group, progress) as running:
            for target, speed in running:
                if speed.context_tokens is not None:
                    require_context(workload, speed.context_tokens, target.name)
                if plan.options.warmup:
                    require_complete(speed.run(workload.warmup, WARMUP.clients).timelines, target.name, WARMUP.name)
            left = running
            for scenario in workload.scenarios:
                for number, requests in enumerate(workload.rounds):
                    for target, speed in left if number % 2 == 0 else left[::-1]:
                        _measure_run(plan, target, speed, scenario, requests[scenario.name], gpus, counted)
                        progress.advance(1, f"{scenario.name}, {target.name}")
                for target, _ in left:
                    report = target.report
                    report.scenarios[scenario.name] = medians(report.rounds[scenario.name])
                if plan.sweeps:
                    left = [entry for entry in left if not saturated(list(entry[0].report.scenarios.values()))]
    if plan.sweeps:
        for target in plan.targets:
            _saturation(target, workload.scenarios)
    progress.finish()


def _measure_run(
    plan: Plan,
    target: Target,
    speed: SpeedTarget,
    scenario: Scenario,
    requests: Sequence[WorkloadRequest],
    gpus: Gpus,
    counted: dict[str, Costs],
) -> None:
    """One run of a scenario; its figures go into the target's report."""
    before = gpus.energy_j()
    run = speed.run(requests, scenario.clients)
    after = gpus.energy_j()
    require_complete(run.timelines, target.name, scenario.name)
    figures = summarize(run.timelines, run.wall_s, plan.slo) | client_figures(run)
    if plan.options.price_per_hour is not None:
        figures["cost_per_million"] = plan.options.price_per_hour / 3600 * 1e6 / figures["output_tps"]
    if target.name in counted and plan.peaks is not None:
        figures |= utilization(counted[target.name], plan.peaks, run.timelines, run.wall_s)
    if target.checkpoint is not None:
        figures |= energy_figures(before, after, run.wall_s, int(figures["output_tokens"]))
        if (used := gpus.memory_bytes()) is not None:
            metrics = target.report.metrics
            metrics["peak_gpu_bytes"] = max(metrics.get("peak_gpu_bytes", 0.0), used)
    target.report.rounds.setdefault(scenario.name, []).append(figures)
    target.report.requests[scenario.name] = _request_figures(run)


def _request_figures(run: Run) -> list[RequestFigures]:
    """Each request of a run, its times from the first one's sending on."""
    began = min(timeline.sent_s for timeline in run.timelines)
    return [
        RequestFigures(t.sent_s - began, t.ttft_s, t.e2e_s, t.prompt_tokens, t.cached_tokens, t.output_tokens)
        for t in run.timelines
    ]


def _saturation(target: Target, scenarios: Sequence[Scenario]) -> None:
    """saturation_tps and saturation_load: the level of a sweep with the highest output throughput."""
    measured = [scenario for scenario in scenarios if scenario.name in target.report.scenarios]
    best = max(measured, key=lambda scenario: target.report.scenarios[scenario.name]["output_tps"])
    target.report.metrics["saturation_tps"] = target.report.scenarios[best.name]["output_tps"]
    target.report.metrics["saturation_load"] = best.load


def _about_clients(report: BenchReport) -> list[str]:
    """A warning for every run in which our own client may have been what was measured."""
    return [
        f"the load client was busy {figures['client_busy']:.0%} of the time and {figures['client_late_ms']:.0f} ms"
        f" behind its schedule in {scenario} at {target.name}: it, not the server, may be what limits these figures"
        for target in report.targets
        for scenario, figures in target.scenarios.items()
        if figures.get("client_busy", 0.0) > CLIENT_BUSY or figures.get("client_late_ms", 0.0) > CLIENT_LATE_MS
    ]


def _costs(plan: Plan) -> dict[str, Costs]:
    """What tokens cost the checkpoints, by target, where that can be set against measured peaks."""
    return {
        target.name: count_costs(target.checkpoint, target.spec, plan.dtype, plan.device)
        for target in plan.targets
        if target.checkpoint and target.spec and plan.counts(target)
    }


@contextlib.contextmanager
def _started(plan: Plan, group: Sequence[Target], progress: Progress) -> Iterator[list[tuple[Target, SpeedTarget]]]:
    """The group's targets, started one after the other; stopped in any case."""
    with contextlib.ExitStack() as stack:
        running = []
        for target in group:
            speed = _speed_target(plan, target)

            def stop(target: Target = target, speed: SpeedTarget = speed) -> None:
                target.report.metrics |= speed.stop()

            stack.callback(stop)
            if target.server is None:
                progress.message(f"Starting {target.name}")
            target.report.metrics |= speed.start()
            running.append((target, speed))
        yield running


def _speed_target(plan: Plan, target: Target) -> SpeedTarget:
    options = plan.options
    if target.server is not None:
        return UrlTarget(target.name, target.server)
    assert target.spec is not None
    if options.offline:
        engine = EngineOptions(dtype=options.dtype, device=plan.device, max_model_len=options.max_model_len)
        return OfflineTarget(target.name, target.report.reference, target.spec.max_positions, engine)
    arguments = ["--device", plan.device, "--dtype", options.dtype]
    if options.max_model_len is not None:
        arguments += ["--max-model-len", str(options.max_model_len)]
    return ServedTarget(target.name, target.report.reference, target.spec.max_positions, arguments)


def _measure_quality(plan: Plan, progress: Progress) -> dict[str, str | int]:
    """Score the checkpoints; what the report says of the text they were scored on."""
    options, checkpoints = plan.options, plan.checkpoints
    baseline = plan.baseline if plan.baseline in checkpoints else None
    length = min(options.window_tokens, *(target.spec.max_positions for target in plan.targets if target.spec))
    tokenizer = load_tokenizer(checkpoints[baseline or next(iter(checkpoints))])
    chosen = evaluation(tokenizer, options.text, options.windows, length, options.seed)
    described = chosen.describe()
    _require_same(plan, "evaluation", str(described["sha256"]), "text, windows, seed and tokenizer")
    scored = score_checkpoints(checkpoints, baseline, chosen.windows, plan.dtype, plan.device, progress)
    for target in plan.targets:
        # When the engine has loaded the model in this process, that load_s stays.
        target.report.metrics = scored.get(target.name, {}) | target.report.metrics
    return described


def _require_same(plan: Plan, what: str, sha256: str, options: str) -> None:
    """Raises InputError when a saved baseline was measured on something else."""
    saved = getattr(plan.saved, what, None)
    if saved and saved.get("sha256") != sha256:
        raise InputError(
            f"baseline {plan.options.baseline} was measured with another {what}"
            f" (SHA-256 {str(saved.get('sha256'))[:12]}, here {sha256[:12]})",
            "Figures compare only for the same work",
            f"Use its {options}, which it lists",
        )


def _tokenizer(plan: Plan) -> Checkpoint:
    """Whose tokenizer makes the prompts: what was asked for, else a checkpoint, else what a server says it serves.

    Raises UsageError when none is known.
    """
    if plan.options.tokenizer:
        return open_checkpoint(plan.options.tokenizer)
    for checkpoint in plan.checkpoints.values():
        return checkpoint
    server = plan.targets[0].server
    assert server is not None
    for reference in filter(None, (server.root, server.model)):
        # On this machine only: a server's word is no reason to download a model.
        if Path(reference).exists():
            return open_checkpoint(Path(reference))
    raise UsageError(
        f"which tokenizer makes the prompts for {server.url} is not known (its model is {server.model})",
        todo="Name its checkpoint with --tokenizer",
    )
