"""`llmkit bench`: measure the speed and quality of targets and check the gates."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict

from llmkit.bench.agentic.agent_trace import AgentTrace
from llmkit.bench.agentic.agent_workload import (
    AgentWorkload,
    build_agent_workload,
    keep_fitting,
)
from llmkit.bench.bench_options import BenchOptions
from llmkit.bench.bench_plan import BenchPlan, Target
from llmkit.bench.bench_planner import make_plan
from llmkit.bench.bench_report import BenchReport, comparability_notes, require_single_target
from llmkit.bench.environment import describe_environment
from llmkit.bench.expected_metrics import required_metrics
from llmkit.bench.measure_speed import (
    measure_running_targets,
    measure_startups,
    tokenizer_checkpoint,
)
from llmkit.bench.model_quality import make_evaluation, score_targets
from llmkit.bench.prompt_dataset import drop_long_conversations, load_prompt_dataset
from llmkit.bench.slo.slo_workload import SloWorkload
from llmkit.bench.startup import describe_startup
from llmkit.bench.tool_accuracy.tool_report import describe_tool_cases, tool_notes
from llmkit.bench.unfinished_report import UnfinishedRun, continue_run, run_key
from llmkit.bench.workload import Workload, build_workload, check_context_length
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.common.errors import InputError
from llmkit.common.formatting import milliseconds_text
from llmkit.common.progress import Progress
from llmkit.kernels.cpu import cpu_kernels
from llmkit.model.families import FALLBACK

# Above these the load client itself may limit the measured speed.
MAX_CLIENT_BUSY = 0.8  # of a core
MAX_CLIENT_LATE_MS = 20.0  # behind its schedule
MAX_CLIENT_SHARE = 0.05  # of a figure, which the client's own work is in
# Of --mode agentic: what the client's work adds, and the figures that it is in.
_FIGURES_WITH_CLIENT = {
    "client_turn_ms": ("e2e_mean_ms",),  # of a turn with the work before the next one
    "client_lag_mean_ms": ("ttft_mean_ms", "ttfo_mean_ms"),
    "client_lag_p99_ms": ("ttft_p99_ms", "ttfo_p99_ms", "itl_p99_ms"),
}


def bench(
    targets: Sequence[str],
    options: BenchOptions,
    progress: Progress,
    save: Callable[[BenchReport], None] = lambda report: None,
    unfinished: UnfinishedRun | None = None,
) -> BenchReport:
    """Measure targets (checkpoints, or addresses of OpenAI-compatible servers) and check the gates.

    save: called after each target that is measured alone, with the report of those measured.
    unfinished: what `save` got in an interrupted run, which this one continues.

    The report has the results of the gates; `BenchReport.require_gates` raises for failed ones.
    Raises as `make_plan` does, InputError when requests fail or do not fit a target, and
    OutputError for an unfinished run with other options.
    """
    threads = cpu_kernels.use_threads(options.threads)  # with which the plan measures a CPU's peaks
    plan = make_plan(targets, options)
    options = plan.options
    environment = describe_environment(plan.device, plan.dtype)
    if plan.device == "cpu":
        environment |= {"threads": threads.count, "cpu_activations": options.cpu_activations}
        environment["cpu_level"] = cpu_kernels.level()
    report = BenchReport(
        [target.report for target in plan.targets],
        baseline=plan.baseline,
        environment=environment,
        command=shlex.join(["llmkit", *sys.argv[1:]]),
        notes=plan.notes,
        joined=not plan.interleaved,
    )
    if plan.measures_startup:
        report.workload = describe_startup(options.rounds, options.page_cache)
        _check_same_sha256(plan, "workload", report.workload["sha256"], "repeats and page cache")
    for target in plan.targets:
        if target.spec is not None and target.spec.transformers is not None:
            progress.message(f"{target.name}: {FALLBACK}")
            report.notes.append(f"{target.name}: {FALLBACK}")
    workload = None
    if options.speed and not plan.measures_startup:
        tokenizer = tokenizer_checkpoint(plan)
        workload = _build_workload(plan, tokenizer)
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
        _check_same_sha256(
            plan, "workload", workload.sha256, "load, data, rounds, limit, seed and tokenizer"
        )
    if plan.tool_targets and options.tool_cases:
        report.tool_cases = describe_tool_cases(
            options.tool_cases.sources, plan.tool_cases, options.tool_cases.max_tokens
        )
        _check_same_sha256(
            plan, "tool_cases", report.tool_cases["sha256"], "tool cases, limit and max tokens"
        )
    report.unfinished = {"key": run_key(plan, report), "notes": []}
    measured = [] if unfinished is None else continue_run(plan, report, unfinished)
    if measured:
        progress.message(f"{len(measured)} of {len(plan.targets)} targets are measured already")
    if plan.measures_startup:
        measure_startups(plan, progress, measured)
    if workload or plan.tasks or plan.tool_targets:
        measure_running_targets(plan, workload, report, progress, save, measured)
        report.notes += _client_warnings(report)
        report.notes += tool_notes(report.targets, report.baseline)
    if options.quality and plan.quality_targets:
        report.evaluation = _measure_quality(plan, progress)
    if plan.saved_baseline is not None and plan.baseline is not None:
        baseline = require_single_target(plan.saved_baseline, plan.baseline)
        baseline.name = plan.baseline
        report.targets.insert(0, baseline)
        report.joined = True
        report.notes += comparability_notes(plan.saved_baseline, report)
    report.unfinished = {}
    required = {target.name: required_metrics(plan, target) for target in plan.targets}
    levels = [scenario.name for scenario in plan.scenarios] if plan.is_sweep else []
    report.check_gates(plan.gates, plan.left_out, required, levels)
    return report


def _build_workload(plan: BenchPlan, tokenizer: Checkpoint) -> Workload:
    """The requests that every target gets.

    Raises InputError when a target's context is too short or its vocabulary too small for them.
    """
    options = plan.options
    if plan.agent_trace is not None:
        return _build_agent_workload(plan, tokenizer, plan.agent_trace)
    data = load_prompt_dataset(options.data, load_tokenizer(tokenizer), options.seed)
    max_tokens = {target.name: plan.max_request_tokens(target) for target in plan.targets}
    limits = [limit for limit in max_tokens.values() if limit is not None]
    if data.conversations and limits:
        turns = max(scenario.turns for scenario in plan.scenarios)
        fitting = drop_long_conversations(data, min(limits), turns)
        num_dropped = len(data.conversations) - len(fitting.conversations)
        if num_dropped:
            plan.notes.append(
                f"{num_dropped} conversations longer than {min(limits)} tokens were left out"
            )
        data = fitting
    workload = build_workload(data, plan.scenarios, options.rounds, options.seed, options.limit)
    if plan.slo_goal is not None and options.load is not None:
        workload = SloWorkload.of(workload, data, options.load)
    requests = [
        request for scenarios in workload.rounds for run in scenarios.values() for request in run
    ]
    first_prompts = [request.prompt for request in requests if not request.is_follow_up]
    num_repeated = len(first_prompts) - len(set(first_prompts))
    if data.conversations and num_repeated:
        plan.notes.append(
            f"{num_repeated} of {len(first_prompts)} conversations repeat earlier ones of this run:"
            " a prefix cache has them"
        )
    max_token_id = max(max(request.prompt) for request in requests)
    for target in plan.targets:
        limit = max_tokens[target.name]
        if limit is not None:
            check_context_length(workload, limit, target.name)
        _check_vocabulary(target, max_token_id)
    return workload


def _build_agent_workload(
    plan: BenchPlan, checkpoint: Checkpoint, trace: AgentTrace
) -> AgentWorkload:
    """The sessions that every target gets. Raises InputError when none fits a target."""
    options = plan.options
    assert options.load
    tokenizer = load_tokenizer(checkpoint)
    data = load_prompt_dataset(options.data, tokenizer, options.seed)
    num_sessions = len(trace.roots)
    for target in plan.targets:
        limit = plan.max_request_tokens(target)
        if limit is not None:
            trace = keep_fitting(trace, limit, target.name)
        _check_vocabulary(target, max(data.tokens))
    if len(trace.roots) < num_sessions:
        plan.notes.append(
            f"{num_sessions - len(trace.roots)} of {num_sessions} sessions are longer than a"
            " target's context and were left out"
        )
    return build_agent_workload(
        trace,
        plan.scenarios,
        data,
        tokenizer,
        options.load.hash_block_tokens,
        options.load.history == "trace",
        options.rounds,
        options.seed,
    )


def _check_vocabulary(target: Target, max_token_id: int) -> None:
    """Raises InputError when a target has not the tokens of the prompts."""
    if target.spec is not None and max_token_id >= target.spec.vocab_size:
        raise InputError(
            f"prompts have token ids up to {max_token_id} and {target.name} has a vocabulary"
            f" of {target.spec.vocab_size}",
            "All targets get the same prompts",
            "Bench models of one tokenizer together",
        )


def _client_warnings(report: BenchReport) -> list[str]:
    """A warning for every scenario in which the load client may have limited the speed."""
    warnings = []
    for target in report.targets:
        for scenario, metrics in target.scenarios.items():
            busy = metrics.get("client_busy", 0.0)
            late_ms = metrics.get("client_late_ms", 0.0)
            if busy > MAX_CLIENT_BUSY or late_ms > MAX_CLIENT_LATE_MS:
                warnings.append(
                    f"the load client was busy {busy:.0%} of the time and"
                    f" {milliseconds_text(late_ms)} behind its schedule in {scenario} at"
                    f" {target.name}: it, not the server, may be what limits these figures"
                )
            shares = [
                f"{metrics[client] / metrics[figure]:.0%} of {figure}"
                for client, figures in _FIGURES_WITH_CLIENT.items()
                for figure in figures
                if metrics.get(figure, 0.0) > 0
                and metrics.get(client, 0.0) > MAX_CLIENT_SHARE * metrics[figure]
            ]
            if shares:
                warnings.append(
                    "the load client's own work on answers and prompts is as long as"
                    f" {', '.join(shares)} in {scenario} at {target.name}: fewer sessions at once"
                    " disturb the figures less"
                )
    return warnings


def _measure_quality(plan: BenchPlan, progress: Progress) -> dict[str, str | int]:
    """Measure the quality of the targets. Returns the report's description of the evaluation."""
    options = plan.options
    quality_targets = plan.quality_targets
    baseline = plan.baseline if plan.baseline in quality_targets else None
    # By default the baseline's tokenizer makes the windows, or else the first checkpoint's.
    candidates = list(quality_targets.values())
    if baseline is not None:
        candidates.insert(0, quality_targets[baseline])
    checkpoints = [target for target in candidates if isinstance(target, Checkpoint)]
    tokenizer = load_tokenizer(checkpoints[0] if checkpoints else tokenizer_checkpoint(plan))
    window_tokens = options.window_tokens
    for target in plan.targets:
        if target.name in quality_targets and target.context_tokens:
            # A server generates one token after the window.
            reserved = 1 if target.server is not None else 0
            window_tokens = min(window_tokens, target.context_tokens - reserved)
    evaluation = make_evaluation(
        tokenizer, options.text, options.windows, window_tokens, options.seed
    )
    description = evaluation.describe()
    _check_same_sha256(
        plan, "evaluation", str(description["sha256"]), "text, windows, seed and tokenizer"
    )
    metrics = score_targets(
        quality_targets,
        baseline,
        evaluation.windows,
        options.dtype,
        plan.device,
        progress,
        options.cpu_activations,
    )
    for target in plan.targets:
        # A load_s that the engine measured in this process stays.
        target.report.metrics = metrics.get(target.name, {}) | target.report.metrics
    if any(checkpoint.layout for checkpoint in plan.checkpoints.values()):
        plan.notes.append("sharded checkpoints are scored unsharded")
    return description


def _check_same_sha256(plan: BenchPlan, part: str, sha256: str, options: str) -> None:
    """Raises InputError when the saved baseline has another workload or evaluation.

    part: "workload" or "evaluation". options: the command's options that decide it.
    """
    saved = getattr(plan.saved_baseline, part, None)
    if saved and saved.get("sha256") != sha256:
        raise InputError(
            f"baseline {plan.options.baseline} was measured with another {part}"
            f" (SHA-256 {str(saved.get('sha256'))[:12]}, here {sha256[:12]})",
            "Figures compare only for the same work",
            f"Use its {options}, which it lists",
        )
