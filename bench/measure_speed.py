"""Running the plan's load, startups and evaluation tasks on its targets."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from llmkit.bench.agentic.agent_workload import AgentWorkload
from llmkit.bench.backends import Backend, ServedBackend, UrlBackend
from llmkit.bench.bench_metrics import (
    STARTUP,
    RunResult,
    calculate_client_metrics,
    calculate_metrics,
    median_metrics,
    require_complete,
)
from llmkit.bench.bench_plan import BenchPlan, Target
from llmkit.bench.bench_report import BenchReport, RequestMetrics, TargetReport
from llmkit.bench.cost_metrics import cost_metrics
from llmkit.bench.cpu_energy import cpu_energy_metrics
from llmkit.bench.draft_counts import acceptance_metrics
from llmkit.bench.engine_settings import bench_engine_options
from llmkit.bench.gpu_monitor import energy_metrics
from llmkit.bench.load_modes import is_saturated
from llmkit.bench.model_costs import count_model_costs, utilization
from llmkit.bench.offline_backend import OfflineBackend
from llmkit.bench.peak_performance import load_peaks
from llmkit.bench.server_samples import GaugeSampler
from llmkit.bench.slo.knee import knee
from llmkit.bench.slo.measure_slo import require_reachable, search_slo
from llmkit.bench.slo.slo_options import SLO
from llmkit.bench.slo.slo_workload import SloWorkload, slo_scenario
from llmkit.bench.slo.sweep_options import serve_words
from llmkit.bench.startup import measure_startup
from llmkit.bench.tool_accuracy.ask_tool_cases import ask_tool_cases
from llmkit.bench.tool_accuracy.tool_results import tool_metrics
from llmkit.bench.unfinished_report import partial_report
from llmkit.bench.workload import WARMUP, Scenario, Workload, check_context_length
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.hub import is_url as is_registry_url
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.common.errors import InputError, LlmkitError, UsageError
from llmkit.common.progress import Progress

T = TypeVar("T")
RunningTarget = tuple[Target, Backend]


def measure_startups(
    plan: BenchPlan, progress: Progress, measured: Sequence[TargetReport] = ()
) -> None:
    """Start every target once in each round. Odd rounds take the targets in reverse order.

    measured: the reports of targets that an earlier run has measured. They are not started.
    """
    waiting = _not_measured(plan, measured)
    progress.start(STARTUP, len(waiting) * plan.options.rounds, "starts")
    for round_number in range(plan.options.rounds):
        for target in _alternate(waiting, round_number):
            backend = _make_backend(plan, target)
            assert isinstance(backend, ServedBackend) and target.checkpoint
            metrics, peak_bytes = measure_startup(
                backend, target.checkpoint, plan.options.page_cache
            )
            report = target.report
            report.rounds.setdefault(STARTUP, []).append(metrics)
            report.scenarios[STARTUP] = median_metrics(report.rounds[STARTUP])
            report.metrics["peak_memory_bytes"] = max(
                report.metrics.get("peak_memory_bytes", 0.0), peak_bytes
            )
            progress.advance(1, target.name)
    progress.finish()


def measure_running_targets(
    plan: BenchPlan,
    workload: Workload | None,
    report: BenchReport,
    progress: Progress,
    save: Callable[[BenchReport], None] = lambda report: None,
    measured: Sequence[TargetReport] = (),
) -> None:
    """Start the targets, run the workload and then the evaluation tasks, and stop them.

    measured: the reports of targets that an earlier run has measured.
    Targets that are not interleaved are started one after the other. After each one, `save` gets
    the report of those that are measured. Of a sweep over server options, targets that cannot be
    measured are left out, and noted; when none can, the last one's error is raised.
    """
    done = list(measured)
    waiting = _not_measured(plan, measured)
    if workload:
        for target in waiting:
            # Counting plans an engine. It needs free memory, which a running server takes.
            if plan.has_utilization(target) and target.checkpoint and target.spec:
                target.costs = count_model_costs(
                    target.checkpoint,
                    target.spec,
                    plan.options.dtype,
                    plan.device,
                    plan.options.cpu_activations,
                )
    groups = [waiting] if plan.interleaved else [[target] for target in waiting]
    for group in groups:
        num_notes = len(plan.notes)
        try:
            with _running_backends(plan, group, progress) as running:
                _measure_group(plan, workload, running, report, progress)
        except LlmkitError as error:
            if not plan.options.sweep_options or len(plan.targets) == 1:
                raise
            plan.notes.append(f"{group[0].name} was left out: {error.what}")
            progress.message(plan.notes[-1])
            plan.left_out.append(group[0].name)
            plan.targets.remove(group[0])
            report.targets.remove(group[0].report)
            if report.baseline == group[0].name:
                report.baseline = plan.baseline = plan.targets[0].name
            continue
        done += [target.report for target in group]
        report.unfinished["notes"] += plan.notes[num_notes:]
        if not plan.interleaved:
            save(partial_report(report, done))


def _not_measured(plan: BenchPlan, measured: Sequence[TargetReport]) -> list[Target]:
    """The targets that no earlier run has measured."""
    names = {target.name for target in measured}
    return [target for target in plan.targets if target.name not in names]


def _measure_group(
    plan: BenchPlan,
    workload: Workload | None,
    running: list[RunningTarget],
    report: BenchReport,
    progress: Progress,
) -> None:
    """Measure targets that run."""
    if workload:
        _measure_speed(plan, workload, running, progress)
    if plan.tasks:
        for target, backend in running:
            _run_tasks(plan, target, backend, report, progress)
    for target, backend in running:
        if target in plan.tool_targets:
            _ask_tool_cases(plan, target, backend, progress)


def _run_tasks(
    plan: BenchPlan, target: Target, backend: Backend, report: BenchReport, progress: Progress
) -> None:
    """Run the evaluation tasks on one target."""
    assert plan.tasks and isinstance(backend, (UrlBackend, ServedBackend)) and backend.server
    progress.message(f"Tasks, {target.name}")
    tokenizer = target.checkpoint or tokenizer_checkpoint(plan)
    metrics, description = plan.tasks.run(backend.server, tokenizer, plan.options.seed)
    target.report.metrics |= metrics
    report.tasks = description


def _ask_tool_cases(plan: BenchPlan, target: Target, backend: Backend, progress: Progress) -> None:
    """Ask one target the tool cases and check its calls."""
    assert isinstance(backend, (UrlBackend, ServedBackend)) and backend.server
    assert plan.options.tool_cases
    results = ask_tool_cases(
        backend.server,
        plan.tool_cases,
        plan.options.tool_cases.max_tokens,
        progress,
        target.name,
    )
    target.report.tool_results = results
    target.report.metrics |= tool_metrics(results)


def _measure_speed(
    plan: BenchPlan, workload: Workload, running: list[RunningTarget], progress: Progress
) -> None:
    """Run each scenario and round on every target in turn, in reverse order on odd rounds."""
    progress.start("speed", len(running) * workload.num_rounds * len(workload.scenarios), "runs")
    for target, backend in running:
        if backend.context_tokens is not None:
            check_context_length(workload, backend.context_tokens, target.name)
        if plan.options.warmup:
            run = backend.run(workload.warmup, WARMUP.max_concurrency)
            require_complete(run.timelines, target.name, WARMUP.name)
    if isinstance(workload, SloWorkload):
        for target, backend in running:
            _search_slo(plan, workload, target, backend, progress)
        progress.finish()
        return
    unsaturated = running
    for scenario in workload.scenarios:
        for round_number in range(workload.num_rounds):
            for target, backend in _alternate(unsaturated, round_number):
                _measure_run(plan, target, backend, scenario, workload, round_number)
                progress.advance(1, f"{scenario.name}, {target.name}")
        for target, _ in unsaturated:
            report = target.report
            report.scenarios[scenario.name] = median_metrics(report.rounds[scenario.name])
        if plan.is_sweep:
            unsaturated = [
                (target, backend)
                for target, backend in unsaturated
                if not is_saturated(list(target.report.scenarios.values()))
            ]
    if plan.is_sweep:
        for target, _ in running:
            _record_saturation(target, workload.scenarios)
    progress.finish()


def _search_slo(
    plan: BenchPlan, workload: SloWorkload, target: Target, backend: Backend, progress: Progress
) -> None:
    """Search the most load of one target, and measure it at the load that was found."""
    assert plan.slo_goal is not None
    goal = plan.slo_goal
    report = target.report
    report.slo = search_slo(backend, workload, goal, progress)
    if len(plan.targets) == 1:
        require_reachable(target.name, report.slo)
    if report.slo.missed_alone:
        plan.notes.append(f"{target.name}: {report.slo.missed_alone}, of single requests")
    report.metrics["slo_rate" if goal.is_rate else "slo_concurrency"] = report.slo.load
    bend = knee([(probe.load, probe.e2e_p50_ms) for probe in report.slo.probes])
    if bend is not None:
        report.metrics["knee_load"] = bend
    if not report.slo.load:
        report.metrics["slo_output_tps"] = 0.0
        return
    count = goal.requests_of_a_run(report.slo.load)
    scenario = slo_scenario(workload.load, goal.is_rate, report.slo.load, count)
    found = workload.at(scenario, plan.options.rounds)
    for round_number in range(plan.options.rounds):
        try:
            _measure_run(plan, target, backend, scenario, found, round_number)
        except InputError as error:
            # The SLO allows failures that a run for metrics does not. The search is not lost.
            plan.notes.append(f"{target.name} has no metrics at its most load: {error.what}")
            report.rounds.pop(SLO, None)
            report.requests.pop(SLO, None)
            return
        progress.advance(1, f"{scenario.name}, {target.name}")
    report.scenarios[SLO] = median_metrics(report.rounds[SLO])
    report.metrics["slo_output_tps"] = report.scenarios[SLO]["output_tps"]


def _alternate(targets: Sequence[T], round_number: int) -> Sequence[T]:
    """The targets, in reverse order on odd rounds."""
    return targets if round_number % 2 == 0 else targets[::-1]


def _measure_run(
    plan: BenchPlan,
    target: Target,
    backend: Backend,
    scenario: Scenario,
    workload: Workload,
    round_number: int,
) -> None:
    """Run a scenario once and add its metrics to the target's report."""
    sampler: GaugeSampler | None = None
    if plan.options.server_metrics and isinstance(backend, (UrlBackend, ServedBackend)):
        assert backend.server
        sampler = GaugeSampler(backend.server.url)
    with sampler or contextlib.nullcontext():
        cpu_before_j = plan.cpus.energy_j()
        energy_before_j = plan.gpus.energy_j()
        start_s = time.perf_counter()
        run = _run_scenario(backend, scenario, workload, round_number)
        energy_after_j = plan.gpus.energy_j()
        energy_span_s = time.perf_counter() - start_s
        cpu_after_j = plan.cpus.energy_j()
    require_complete(run.timelines, target.name, scenario.name)
    metrics = calculate_metrics(run.timelines, run.wall_s, plan.slo)
    metrics |= calculate_client_metrics(run)
    metrics |= run.session_metrics
    plan.notes += [note for note in run.notes if note not in plan.notes]
    metrics |= acceptance_metrics(run.draft_counts)
    queue = run.queue_counts
    if queue is not None and queue.requests > 0:
        metrics["queue_mean_ms"] = 1000 * queue.seconds / queue.requests
    if sampler is not None:
        metrics |= sampler.metrics()
    if target.costs and plan.peaks:
        peaks = load_peaks(plan.device, target.costs.inputs) or plan.peaks
        metrics |= utilization(target.costs, peaks, run.timelines, run.wall_s)
    if target.checkpoint is not None:
        metrics |= energy_metrics(
            energy_before_j, energy_after_j, energy_span_s, int(metrics["output_tokens"])
        )
        metrics |= cpu_energy_metrics(
            cpu_before_j, cpu_after_j, energy_span_s, int(metrics["output_tokens"])
        )
        used_bytes = plan.gpus.memory_bytes()
        if used_bytes is not None:
            target_metrics = target.report.metrics
            peak_bytes = max(target_metrics.get("peak_gpu_bytes", 0.0), used_bytes)
            target_metrics["peak_gpu_bytes"] = peak_bytes
    queue_s = None if queue is None else queue.seconds
    metrics |= cost_metrics(plan.options, metrics, run.timelines, queue_s)
    target.report.rounds.setdefault(scenario.name, []).append(metrics)
    target.report.requests[scenario.name] = _request_metrics(run)


def _run_scenario(
    backend: Backend, scenario: Scenario, workload: Workload, round_number: int
) -> RunResult:
    """Send the requests of a round, or play its sessions."""
    if isinstance(workload, AgentWorkload):
        assert isinstance(backend, (UrlBackend, ServedBackend))
        return backend.run_sessions(workload.loads[round_number][scenario.name])
    requests = workload.rounds[round_number][scenario.name]
    return backend.run(requests, scenario.max_concurrency)


def _request_metrics(run: RunResult) -> list[RequestMetrics]:
    """The metrics of each request of a run."""
    start_s = min(timeline.sent_s for timeline in run.timelines)
    return [
        RequestMetrics(
            t.sent_s - start_s, t.ttft_s, t.e2e_s, t.prompt_tokens, t.cached_tokens, t.output_tokens
        )
        for t in run.timelines
    ]


def _record_saturation(target: Target, scenarios: Sequence[Scenario]) -> None:
    """Set saturation_tps and saturation_load: the level of a sweep with the best throughput."""
    measured = [scenario for scenario in scenarios if scenario.name in target.report.scenarios]
    best = max(measured, key=lambda scenario: target.report.scenarios[scenario.name]["output_tps"])
    target.report.metrics["saturation_tps"] = target.report.scenarios[best.name]["output_tps"]
    target.report.metrics["saturation_load"] = best.load_level
    bend = knee(
        [
            (scenario.load_level, target.report.scenarios[scenario.name]["e2e_p50_ms"])
            for scenario in measured
        ]
    )
    if bend is not None:
        target.report.metrics["knee_load"] = bend


@contextlib.contextmanager
def _running_backends(
    plan: BenchPlan, group: Sequence[Target], progress: Progress
) -> Iterator[list[RunningTarget]]:
    """Start the backends of the targets one after the other, and stop them in any case."""
    with contextlib.ExitStack() as stack:
        running = []
        for target in group:
            backend = _make_backend(plan, target)

            def stop(target: Target = target, backend: Backend = backend) -> None:
                target.report.metrics |= backend.stop()

            stack.callback(stop)
            if target.server is None:
                progress.message(f"Starting {target.name}")
            target.report.metrics |= backend.start()
            running.append((target, backend))
        yield running


def _make_backend(plan: BenchPlan, target: Target) -> Backend:
    options = plan.options
    if target.server is not None:
        return UrlBackend(target.name, target.server)
    assert target.spec is not None and target.checkpoint is not None
    reference = target.report.reference
    if is_registry_url(reference):
        # The copy is there: no start asks the registry.
        reference = str(target.checkpoint.path)
    context_tokens = target.spec.max_position_embeddings
    if options.offline:
        engine_options = bench_engine_options(options, plan.device)
        return OfflineBackend(target.name, reference, context_tokens, engine_options)
    arguments = ["--device", plan.device, "--dtype", options.dtype]
    arguments += ["--cpu-activations", options.cpu_activations]
    if options.threads is not None:
        arguments += ["--threads", str(options.threads)]
    if options.max_model_len is not None:
        arguments += ["--max-model-len", str(options.max_model_len)]
    if options.speculate:
        arguments += ["--speculate", str(options.speculate)]
    if options.draft_model is not None:
        arguments += ["--draft-model", options.draft_model]
    if options.synthetic_acceptance_rates:
        rates = ",".join(f"{rate:g}" for rate in options.synthetic_acceptance_rates)
        arguments += ["--synthetic-accept-rates", rates]
    if options.synthetic_acceptance_length is not None:
        length = f"{options.synthetic_acceptance_length:g}"
        arguments += ["--synthetic-accept-length", length]
    # Of an option that is given twice, the command line takes the last one.
    arguments += serve_words(target.report.serve_options)
    return ServedBackend(target.name, reference, context_tokens, arguments)


def tokenizer_checkpoint(plan: BenchPlan) -> Checkpoint:
    """The checkpoint whose tokenizer makes the prompts.

    It is that of --tokenizer, else the first checkpoint among the targets, else the one that the
    first server says it serves. Raises UsageError when there is none.
    """
    if plan.options.tokenizer:
        return open_checkpoint(plan.options.tokenizer)
    for checkpoint in plan.checkpoints.values():
        return checkpoint
    server = plan.targets[0].server
    assert server is not None
    for reference in filter(None, (server.root, server.model)):
        # Only on this machine: a server cannot make bench download a model.
        if Path(reference).exists():
            return open_checkpoint(Path(reference))
    raise UsageError(
        f"which tokenizer makes the prompts for {server.url} is not known"
        f" (its model is {server.model})",
        todo="Name its checkpoint with --tokenizer",
    )
