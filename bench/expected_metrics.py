"""Which metrics a target will have, and why others will be missing, known before measuring."""

from __future__ import annotations

from collections.abc import Sequence

from llmkit.bench.bench_metrics import (
    AGENT_METRICS,
    CONDITIONAL_SPEED_METRICS,
    QUALITY_BOUND_METRICS,
    QUALITY_METRICS,
    SPEED_METRICS,
    STARTUP,
    STARTUP_METRICS,
    TASK_PREFIX,
)
from llmkit.bench.bench_options import BenchOptions
from llmkit.bench.bench_plan import BenchPlan, Target
from llmkit.bench.bench_report import require_single_target
from llmkit.bench.draft_counts import POSITION_PREFIX
from llmkit.bench.engine_settings import bench_engine_options
from llmkit.bench.gates import require_gate_metrics
from llmkit.bench.server_quality import PromptLogprobsClient
from llmkit.bench.startup import STARTUP_STAGES, stage_metric_name
from llmkit.bench.tool_accuracy.tool_results import TOOL_METRICS, TOOL_PREFIX, tool_metrics
from llmkit.common.errors import UsageError
from llmkit.runtime.engine.speculation import parse_speculation

# By the kind of a target: the metrics of starting and stopping it.
_LIFECYCLE_METRICS = {
    "served": ("ready_s", "peak_memory_bytes"),
    "offline": ("load_s", "peak_memory_bytes"),
}
_CLIENT_METRICS = ("client_us", "client_busy", "client_late_ms")
_GPU_ENERGY_METRICS = ("gpu_power_w", "energy_per_token_j")
_CPU_ENERGY_METRICS = ("cpu_power_w", "cpu_energy_per_token_j")
_DRAFT_METRICS = ("acceptance", "acceptance_length", "drafts")
_COST_METRICS = (
    "cost_per_million",
    "cost_per_million_total",
    "cost_per_million_input",
    "cost_per_million_output",
    "input_cost_share",
)
_GAUGE_METRICS = ("kv_cache_usage_max", "requests_waiting_max")


def check_gates_are_measurable(plan: BenchPlan) -> None:
    """Raises UsageError for a gate on a metric that will not be measured."""
    tested = [target for target in plan.targets if target.name != plan.baseline]
    for target in tested or plan.targets:
        require_gate_metrics(plan.gates, expected_metrics(plan, target), target.name)
    relative_gates = [gate for gate in plan.gates if gate.relative_to_baseline]
    if not relative_gates:
        return
    if plan.baseline is None:
        raise UsageError(
            f"gate {relative_gates[0].text!r} compares with a baseline",
            todo="Name one with --baseline",
        )
    if plan.saved_baseline is not None:
        baseline = require_single_target(plan.saved_baseline, plan.baseline)
        names = list(baseline.all_metrics())
    else:
        (baseline_target,) = (target for target in plan.targets if target.name == plan.baseline)
        names = expected_metrics(plan, baseline_target)
    require_gate_metrics(relative_gates, names, f"the baseline, {plan.baseline}")


def expected_metrics(plan: BenchPlan, target: Target) -> list[str]:
    """The full names of the metrics that a target will have."""
    names = list(target.report.metrics)
    if plan.options.quality and target.name in plan.quality_targets:
        names.append("perplexity")
        if target.checkpoint:
            names.append("load_s")
        names += _expected_comparison_metrics(plan, target)
    if plan.tasks:
        names += plan.tasks.metrics
    if target in plan.tool_targets:
        names += tool_metrics([case.right_result() for case in plan.tool_cases])
    if plan.measures_startup:
        stages = [stage_metric_name(stage) for stage in STARTUP_STAGES]
        names.append("peak_memory_bytes")
        names += [f"{STARTUP}.{metric}" for metric in (*STARTUP_METRICS, *stages)]
    elif plan.options.speed or plan.tasks or plan.tool_targets:
        names += _LIFECYCLE_METRICS.get(target.report.kind, ())
    if plan.options.speed and not plan.measures_startup:
        if plan.is_sweep:
            names += ("saturation_tps", "saturation_load")
        if plan.slo_goal is not None:
            names += ("slo_rate" if plan.slo_goal.is_rate else "slo_concurrency", "slo_output_tps")
        if target.checkpoint and plan.gpus.energy_j() is not None:
            names.append("peak_gpu_bytes")
        speed_metrics = [
            name
            for name in SPEED_METRICS
            if name not in CONDITIONAL_SPEED_METRICS or _has_conditional_metric(plan, target, name)
        ]
        if _has_conditional_metric(plan, target, "drafts"):
            num_drafts = bench_engine_options(plan.options).speculation.num_tokens
            speed_metrics += [f"{POSITION_PREFIX}{place}" for place in range(num_drafts)]
        if plan.agent_trace is not None:
            speed_metrics += AGENT_METRICS
        for scenario in plan.scenarios:
            names += [f"{scenario.name}.{metric}" for metric in speed_metrics]
    return list(dict.fromkeys(names))


def required_metrics(plan: BenchPlan, target: Target) -> list[str]:
    """The full names of the metrics that a measured target must have, for its gates.

    They are the expected ones, without those of levels that a sweep did not run because the target
    was saturated.
    """
    names = expected_metrics(plan, target)
    if not plan.is_sweep:
        return names
    not_run = {scenario.name for scenario in plan.scenarios} - target.report.scenarios.keys()
    return [name for name in names if name.rpartition(".")[0] not in not_run]


def _expected_comparison_metrics(plan: BenchPlan, target: Target) -> Sequence[str]:
    """The quality metrics against the baseline that a target will have."""
    if target.name == plan.baseline or plan.baseline is None:
        return ()
    compared = [plan.quality_targets.get(name) for name in (plan.baseline, target.name)]
    if None in compared:
        return ()
    clients = [entry for entry in compared if isinstance(entry, PromptLogprobsClient)]
    if any(client.api != "ids" for client in clients):
        return ()
    return QUALITY_BOUND_METRICS if clients else QUALITY_METRICS


def _has_conditional_metric(plan: BenchPlan, target: Target, metric: str) -> bool:
    """Whether a target will have a metric of CONDITIONAL_SPEED_METRICS."""
    if metric in _CLIENT_METRICS:
        return target.report.kind != "offline"
    if metric in ("mbu", "mfu"):
        return plan.has_utilization(target)
    if metric in _GPU_ENERGY_METRICS:
        return target.checkpoint is not None and plan.gpus.energy_j() is not None
    if metric in _CPU_ENERGY_METRICS:
        return target.checkpoint is not None and plan.cpus.energy_j() is not None
    if metric in _COST_METRICS:
        return plan.options.price_per_hour is not None or plan.options.price_per_kwh is not None
    if metric == "kwh_per_million":
        return plan.options.power is not None
    # Of servers that run already it is not known before what their /metrics has.
    if metric == "queue_mean_ms":
        return target.report.kind == "served"
    if metric in _GAUGE_METRICS:
        return target.report.kind == "served" and plan.options.server_metrics
    if metric in _DRAFT_METRICS:
        return target.checkpoint is not None and drafts_always(plan.options)
    assert metric == "goodput"
    return bool(plan.slo)


def drafts_always(options: BenchOptions) -> bool:
    """Whether checkpoints surely draft tokens, which no text decides."""
    return options.draft_model is not None or parse_speculation(options.speculate).method == "mtp"


def missing_metrics(plan: BenchPlan, target: Target) -> dict[str, str]:
    """The metrics that a target will not have, with the reason.

    A key holds the names of one or more metrics, separated by ", ".
    """
    options = plan.options
    is_server = target.server is not None
    offline = target.report.kind == "offline"
    expected = {
        name if name.startswith((TASK_PREFIX, TOOL_PREFIX)) else name.rpartition(".")[2]
        for name in expected_metrics(plan, target)
    }
    no_server_metric = "of a server that runs already" if is_server else ""
    not_served = no_server_metric or "nothing was served"
    if no_server_metric:
        no_speed = no_server_metric
    elif options.speed and not plan.measures_startup:
        no_speed = ""
    else:
        no_speed = "no load was run"
    if plan.peaks and not is_server:
        no_utilization = "on several ranks"
    else:
        no_utilization = "llmkit doctor --peaks has not measured this machine"
    if plan.device == "cpu":
        no_gpu = no_server_metric or "no GPU"
    else:
        no_gpu = no_server_metric or "NVML, of the extra gpu, gives no figures"
    if options.quality:
        no_perplexity = "the server returns no log probabilities of a prompt's tokens"
    else:
        no_perplexity = "--no-quality"
    if "perplexity" not in expected:
        no_comparison = no_perplexity
    elif expected & set(QUALITY_BOUND_METRICS):
        no_comparison = "a server returns only its most probable tokens"
    elif target.name == plan.baseline:
        no_comparison = "the baseline"
    else:
        no_comparison = "no baseline with log probabilities"
    no_ready = "--offline starts no server" if offline else "nothing was served"
    no_tools = "no --tool-cases"
    if plan.tool_cases:
        no_tools = target.tools_refusal or "no such cases"
    reasons = (
        (("checkpoint_bytes", "peak_memory_bytes"), not_served),
        (("ready_s",), no_server_metric or no_ready),
        (("load_s",), no_server_metric or "measured with quality, or --offline"),
        (("mbu", "mfu"), no_speed or no_utilization),
        ((*_GPU_ENERGY_METRICS, "peak_gpu_bytes"), no_speed or no_gpu),
        (_CLIENT_METRICS, "--offline has no client" if offline else no_speed),
        (
            _DRAFT_METRICS,
            no_speed or "no --draft-model and no --speculate mtp; other drafts may find nothing",
        ),
        (("goodput",), "no --slo" if options.speed else no_speed),
        (_CPU_ENERGY_METRICS, no_speed or "no readable counters in /sys/class/powercap"),
        (_COST_METRICS, "no --price-per-hour" if options.speed else no_speed),
        (("kwh_per_million",), "no --power" if options.speed else no_speed),
        (("queue_mean_ms",), "--offline has no server" if offline else no_speed),
        (_GAUGE_METRICS, no_speed or "no --server-metrics, or no server"),
        (("perplexity",), no_perplexity),
        (QUALITY_METRICS, no_comparison),
        (TOOL_METRICS, no_tools),
    )
    missing = {}
    for names, reason in reasons:
        absent_names = [name for name in names if name not in expected]
        if absent_names:
            missing[", ".join(absent_names)] = reason
    return missing
