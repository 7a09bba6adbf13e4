"""Running the load of a plan on its targets: every scenario and round in turn, starts, and tasks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from llmkit.bench.costs import count_costs, utilization
from llmkit.bench.gpu import energy_figures
from llmkit.bench.loads import saturated
from llmkit.bench.metrics import STARTUP, Run, client_figures, medians, require_complete, summarize
from llmkit.bench.offline import OfflineTarget
from llmkit.bench.plan import Plan, Target
from llmkit.bench.report import BenchReport, RequestFigures
from llmkit.bench.startup import measure_start
from llmkit.bench.targets import ServedTarget, SpeedTarget, UrlTarget
from llmkit.bench.workload import WARMUP, Scenario, Workload, WorkloadRequest, require_context
from llmkit.checkpoint.errors import UsageError
from llmkit.checkpoint.progress import Progress
from llmkit.checkpoint.source import Checkpoint, open_checkpoint
from llmkit.runtime.load import EngineOptions


def measure_starts(plan: Plan, progress: Progress) -> None:
    """Every target's start, one at a time and in turn, in reverse order on odd rounds."""
    progress.start(STARTUP, len(plan.targets) * plan.options.rounds, "starts")
    for number in range(plan.options.rounds):
        for target in plan.targets if number % 2 == 0 else plan.targets[::-1]:
            speed = _speed_target(plan, target)
            assert isinstance(speed, ServedTarget) and target.checkpoint
            figures, peak = measure_start(speed, target.checkpoint, plan.options.page_cache)
            report = target.report
            report.rounds.setdefault(STARTUP, []).append(figures)
            report.scenarios[STARTUP] = medians(report.rounds[STARTUP])
            report.metrics["peak_memory_bytes"] = max(report.metrics.get("peak_memory_bytes", 0.0), peak)
            progress.advance(1, target.name)
    progress.finish()


def measure_running(plan: Plan, workload: Workload | None, report: BenchReport, progress: Progress) -> None:
    """What takes targets that run: speed, then tasks. On a GPU each checkpoint has it to itself."""
    for target in plan.targets if workload else ():
        if plan.counts(target) and target.checkpoint and target.spec:  # while there is room: servers take all they can
            target.costs = count_costs(target.checkpoint, target.spec, plan.dtype, plan.device)
    for group in [plan.targets] if plan.together else [[target] for target in plan.targets]:
        with _started(plan, group, progress) as running:
            if workload:
                _measure_speed(plan, workload, running, progress)
            for target, speed in running if plan.tasks else ():
                assert plan.tasks and isinstance(speed, (UrlTarget, ServedTarget)) and speed.server
                progress.message(f"Tasks, {target.name}")
                figures, about = plan.tasks.run(
                    speed.server, target.checkpoint or prompts_tokenizer(plan), plan.options.seed
                )
                target.report.metrics |= figures
                report.tasks = about


def _measure_speed(
    plan: Plan, workload: Workload, running: list[tuple[Target, SpeedTarget]], progress: Progress
) -> None:
    """Each scenario and round with each target in turn, in reverse order on odd rounds."""
    progress.start("speed", len(running) * len(workload.rounds) * len(workload.scenarios), "runs")
    for target, speed in running:
        if speed.context_tokens is not None:
            require_context(workload, speed.context_tokens, target.name)
        if plan.options.warmup:
            require_complete(speed.run(workload.warmup, WARMUP.clients).timelines, target.name, WARMUP.name)
    left = running
    for scenario in workload.scenarios:
        for number, requests in enumerate(workload.rounds):
            for target, speed in left if number % 2 == 0 else left[::-1]:
                _measure_run(plan, target, speed, scenario, requests[scenario.name])
                progress.advance(1, f"{scenario.name}, {target.name}")
        for target, _ in left:
            report = target.report
            report.scenarios[scenario.name] = medians(report.rounds[scenario.name])
        if plan.sweeps:
            left = [entry for entry in left if not saturated(list(entry[0].report.scenarios.values()))]
    if plan.sweeps:
        for target, _ in running:
            _saturation(target, workload.scenarios)
    progress.finish()


def _measure_run(
    plan: Plan, target: Target, speed: SpeedTarget, scenario: Scenario, requests: Sequence[WorkloadRequest]
) -> None:
    """One run of a scenario; its figures go into the target's report."""
    before, began = plan.gpus.energy_j(), time.perf_counter()
    run = speed.run(requests, scenario.clients)
    after, read_after_s = plan.gpus.energy_j(), time.perf_counter() - began
    require_complete(run.timelines, target.name, scenario.name)
    figures = summarize(run.timelines, run.wall_s, plan.slo) | client_figures(run)
    if plan.options.price_per_hour is not None:
        figures["cost_per_million"] = plan.options.price_per_hour / 3600 * 1e6 / figures["output_tps"]
    if target.costs and plan.peaks:
        figures |= utilization(target.costs, plan.peaks, run.timelines, run.wall_s)
    if target.checkpoint is not None:
        figures |= energy_figures(before, after, read_after_s, int(figures["output_tokens"]))
        if (used := plan.gpus.memory_bytes()) is not None:
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


def prompts_tokenizer(plan: Plan) -> Checkpoint:
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
