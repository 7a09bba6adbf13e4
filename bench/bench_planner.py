"""Making the plan of a benchmark. Everything that can be refused is refused before measuring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from llmkit.bench.agentic.agent_modes import agentic_scenarios
from llmkit.bench.backends import is_url, short_name
from llmkit.bench.bench_metrics import STARTUP, parse_slo
from llmkit.bench.bench_options import AGENTIC, BenchOptions
from llmkit.bench.bench_plan import SAVED_BASELINE, BenchPlan, Target
from llmkit.bench.bench_report import BenchReport, TargetReport, read_report, require_single_target
from llmkit.bench.cost_metrics import check_cost_options, check_power
from llmkit.bench.cpu_energy import CpuEnergyMonitor
from llmkit.bench.engine_settings import bench_engine_options
from llmkit.bench.eval_tasks import EvalTasks
from llmkit.bench.expected_metrics import check_gates_are_measurable, missing_metrics
from llmkit.bench.gates import parse_gate
from llmkit.bench.gpu_monitor import GpuMonitor
from llmkit.bench.load_client import query_server
from llmkit.bench.load_modes import load_scenarios
from llmkit.bench.page_cache import PAGE_CACHE_STATES
from llmkit.bench.peak_performance import PeakPerformance, load_peaks, measure_peaks
from llmkit.bench.server_quality import PromptLogprobsClient, detect_prompt_logprobs_api
from llmkit.bench.slo.slo_plan import count_gpus, slo_goal, slo_scenarios, sweep_points
from llmkit.bench.slo.sweep_options import ServePoint, point_name, serve_options
from llmkit.bench.tool_accuracy.load_tool_cases import load_tool_cases
from llmkit.bench.tool_accuracy.tool_support import why_no_tools
from llmkit.bench.workload import Scenario, select_scenarios
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.common.errors import UsageError
from llmkit.common.options import changed_options
from llmkit.kernels.cpu import cpu_kernels
from llmkit.model.device import resolve_device
from llmkit.model.families import checkpoint_spec, require_native
from llmkit.runtime.engine_plan import DTYPES

# The fields of BenchOptions that mean nothing without requests.
_LOAD_OPTIONS = (
    "data",
    "limit",
    "slo",
    "server_metrics",
    "price_per_hour",
    "utilization",
    "power",
    "price_per_kwh",
)


def make_plan(references: Sequence[str], options: BenchOptions) -> BenchPlan:
    """Check every option, open the checkpoints and query the servers.

    Raises UsageError for options that exclude each other and for gates on metrics that will not be
    measured, InputError for a bad checkpoint or report, and ShortageError for a missing device and
    a server that cannot be reached.
    """
    references, saved_baseline = _with_baseline(references, options.baseline)
    scenarios = _check_options(references, options)
    agent_trace = None
    if options.load is not None and options.load.mode == AGENTIC:
        scenarios, agent_trace = agentic_scenarios(options.load, options.limit)
    slo = parse_slo(options.slo) if options.slo else {}
    goal = slo_goal(options, slo)
    if goal is not None:
        scenarios = slo_scenarios(options)
    points = sweep_points(options, has_servers=any(map(is_url, references)))
    if points:
        # What bench scores is the checkpoint, which server options do not change.
        options = replace(options, quality=False)
    check_cost_options(options)
    gates = [parse_gate(text) for text in options.gates]
    device = resolve_device(options.device).type
    dtype = _resolve_dtype(options.dtype, device)
    if options.offline and any(map(is_url, references)):
        raise UsageError(
            "a server cannot be measured offline", todo="Drop --offline or the address"
        )
    targets = [
        _open_target(reference, name, options)
        for reference, name in zip(references, _column_names(references), strict=True)
    ]
    if points:
        targets = _swept_targets(targets, points)
    baseline = None
    if options.baseline in references:
        index = references.index(options.baseline)
        baseline = targets[index * max(1, len(points))].name
    elif saved_baseline:
        baseline = SAVED_BASELINE
    elif len(targets) > 1:
        baseline = targets[0].name
    serves = options.speed and (options.load is None or options.load.mode != STARTUP)
    has_checkpoints = any(target.checkpoint for target in targets)
    peaks = _peaks(device, dtype, is_used=serves and has_checkpoints)
    synthetic_notes = _synthetic_acceptance_notes(targets, options)
    tasks = EvalTasks(options.tasks) if options.tasks else None
    tool_cases = []
    if options.tool_cases:
        tool_cases = load_tool_cases(options.tool_cases.sources, options.tool_cases.limit)
    plan = BenchPlan(
        options,
        targets,
        baseline,
        saved_baseline,
        gates,
        device,
        dtype,
        scenarios,
        slo,
        peaks,
        GpuMonitor(None if device == "cuda" else ()),
        CpuEnergyMonitor(),
        tasks,
        tool_cases,
        agent_trace,
        goal,
    )
    for target in targets:
        target.report.gpus = count_gpus(device, target.report.serve_options)
    if points:
        plan.notes.append(
            f"{len(points)} combinations of server options, each on a server of its own, one after"
            " the other; quality is not measured"
        )
    for target in targets:
        if tool_cases:
            source = target.checkpoint or target.server
            assert source is not None
            target.tools_refusal = why_no_tools(source, tool_cases)
            if target.tools_refusal:
                plan.notes.append(
                    f"{target.name} was not asked the tool cases: {target.tools_refusal}"
                )
    plan.notes += synthetic_notes
    check_power(
        options,
        has_servers=any(target.server for target in targets),
        has_counters=plan.gpus.energy_j() is not None or plan.cpus.energy_j() is not None,
    )
    if options.quality:
        for target in targets:
            if target.server is None:
                continue
            api = detect_prompt_logprobs_api(target.server)
            if api:
                target.prompt_logprobs = PromptLogprobsClient(target.server, api)
    if (
        plan.tool_cases
        and not plan.tool_targets
        and not (options.speed or options.quality or tasks)
    ):
        reasons = "; ".join(f"{target.name}: {target.tools_refusal}" for target in targets)
        raise UsageError(
            f"no target can be asked tool cases ({reasons})",
            "A chat template with tools and a known dialect of calls were expected",
            "Start `llmkit serve` with --chat-template and --tool-parser, and give its --url",
        )
    has_others = options.speed or tasks or plan.tool_targets
    if options.quality and not plan.quality_targets and not has_others:
        raise UsageError(
            "no target's quality can be measured: the servers return no log probabilities of a"
            " prompt's tokens"
        )
    if options.speed and plan.checkpoints and peaks is None and not plan.measures_startup:
        plan.notes.append("no MBU and MFU: `llmkit doctor --peaks` has not measured this machine")
    check_gates_are_measurable(plan)
    for target in targets:
        target.report.absent = missing_metrics(plan, target)
    return plan


def _with_baseline(
    references: Sequence[str], baseline: str | None
) -> tuple[list[str], BenchReport | None]:
    """The targets, with a baseline that is measured in the same run, and a baseline's report.

    Raises UsageError without any target, InputError for a file that is no report of one target.
    """
    if not references:
        raise UsageError("there is nothing to bench", "Give a model or --url")
    targets = list(dict.fromkeys(references))
    if baseline is None or baseline in targets:
        return targets, None
    if is_url(baseline) or not baseline.endswith(".json"):
        return [baseline, *targets], None
    report = read_report(baseline)
    require_single_target(report, baseline)
    return targets, report


def _swept_targets(targets: Sequence[Target], points: Sequence[ServePoint]) -> list[Target]:
    """A target for each checkpoint and combination of server options."""
    swept = []
    for target in targets:
        for point in points:
            name = point_name(point)
            if len(targets) > 1:
                name = f"{target.name}, {name}"
            report = replace(
                target.report,
                name=name,
                metrics=dict(target.report.metrics),
                serve_options=serve_options(point),
            )
            swept.append(Target(report, target.checkpoint, target.spec))
    return swept


def _synthetic_acceptance_notes(targets: Sequence[Target], options: BenchOptions) -> list[str]:
    """A note for each target whose draft tokens are accepted by a draw.

    Raises UsageError for tasks and tool cases, which would score answers that are not the model's.
    """
    own_rates = ",".join(f"{rate:g}" for rate in bench_engine_options(options).acceptance_rates)
    notes = []
    for target in targets:
        rates = own_rates
        if target.server is not None:
            rates = target.server.synthetic_acceptance or ""
        if not rates:
            continue
        if options.tasks or options.tool_cases:
            option = "--tasks" if options.tasks else "--tool-cases"
            raise UsageError(
                f"{target.name} accepts draft tokens by a draw, and {option} would score its"
                " answers",
                "They are not the model's",
                f"Drop {option} or synthetic acceptance",
            )
        notes.append(
            f"{target.name} accepts draft tokens by a draw ({rates} at their places): its speed is"
            " that of this acceptance, and its answers are not the model's"
        )
    return notes


def _peaks(device: str, dtype: torch.dtype, is_used: bool) -> PeakPerformance | None:
    """The peaks of this device.

    is_used: measure a CPU's, which takes a moment, when they were not measured before.
    """
    peaks = load_peaks(device, dtype)
    if peaks is None and is_used and device == "cpu" and cpu_kernels.library is not None:
        measure_peaks(device)
        peaks = load_peaks(device, dtype)
    return peaks


def _check_options(references: Sequence[str], options: BenchOptions) -> tuple[Scenario, ...]:
    """Raises UsageError for options that exclude each other. Returns the scenarios."""
    if not (options.speed or options.quality or options.tasks or options.tool_cases):
        raise UsageError(
            "neither speed nor quality is to be measured",
            todo="Leave one of them on, or give --tasks or --tool-cases",
        )
    if options.windows < 1:
        raise UsageError(
            f"{options.windows} evaluation windows measure nothing", "1 or more were expected"
        )
    scenarios = select_scenarios(options.scenarios, options.rounds, options.limit)
    if options.load is not None:
        scenarios = load_scenarios(options.load)
        if options.load.mode == STARTUP and (options.offline or any(map(is_url, references))):
            raise UsageError(
                "only a checkpoint that is served can be started",
                todo="Drop --offline or the address",
            )
        if options.load.mode == AGENTIC and options.offline:
            raise UsageError(
                "--mode agentic asks a server, and --offline has none", todo="Drop one of them"
            )
    if not options.speed and options.load is not None:
        raise UsageError("--no-speed does not go with --mode and its options", "One of them")
    is_start = options.load is not None and options.load.mode == STARTUP
    if is_start or not options.speed:
        names = _LOAD_OPTIONS if is_start else (*_LOAD_OPTIONS, "rounds")
        for label in changed_options(options, names):
            other = "--mode startup" if is_start else "--no-speed"
            raise UsageError(f"{label} does not go with {other}", "It needs a load")
    if options.server_metrics and options.offline:
        raise UsageError(
            "--server-metrics asks a server, and --offline has none", todo="Drop one of them"
        )
    if options.page_cache not in PAGE_CACHE_STATES:
        raise UsageError(
            f"no such state of the page cache: {options.page_cache}",
            f"One of {', '.join(PAGE_CACHE_STATES)}",
        )
    if options.offline and (options.tasks or options.tool_cases):
        option = "--tasks" if options.tasks else "--tool-cases"
        raise UsageError(f"{option} asks a server, and --offline has none", todo="Drop one of them")
    return scenarios


def _open_target(reference: str, name: str, options: BenchOptions) -> Target:
    if is_url(reference):
        server = query_server(reference, options.model)
        return Target(TargetReport(name, reference, "url"), server=server)
    checkpoint = open_checkpoint(reference)
    if not (options.speed or options.tasks or options.tool_cases):
        kind = "checkpoint"
    elif options.offline:
        kind = "offline"
    else:
        kind = "served"
    report = TargetReport(name, reference, kind, {"checkpoint_bytes": checkpoint.weight_bytes})
    spec = checkpoint_spec(checkpoint)
    if options.require_native:
        require_native(spec, "--require-native")
    return Target(report, checkpoint, spec)


def _column_names(references: Sequence[str]) -> list[str]:
    """Unique names of the targets: short ones, or the references where a short one is ambiguous."""
    short_names = [short_name(reference) for reference in references]
    names = []
    for reference, short in zip(references, short_names, strict=True):
        name = short
        if short_names.count(short) > 1 or short == SAVED_BASELINE:
            name = reference
        names.append(f"./{name}" if name == SAVED_BASELINE else name)
    return names


def _resolve_dtype(name: str, device: str) -> torch.dtype:
    """The dtype in which quality is measured. Raises UsageError for an unknown name."""
    dtypes = DTYPES | {"auto": torch.bfloat16 if device == "cuda" else torch.float32}
    if name not in dtypes:
        raise UsageError(f"dtype {name} is not known", f"One of {', '.join(dtypes)} was expected")
    return dtypes[name]
