"""`bench`: measure targets for speed and quality and judge the figures by gates."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict

from llmkit.bench.data import load_data, within
from llmkit.bench.environment import describe_environment
from llmkit.bench.plan import BenchOptions, Plan, make_plan
from llmkit.bench.quality import evaluation, score
from llmkit.bench.report import BenchReport, differences, single_target
from llmkit.bench.speed import measure_running, measure_starts, prompts_tokenizer
from llmkit.bench.startup import describe_starts
from llmkit.bench.workload import Workload, build_workload, require_context
from llmkit.checkpoint.errors import InputError
from llmkit.checkpoint.progress import Progress
from llmkit.checkpoint.source import Checkpoint
from llmkit.checkpoint.tokenizer import load_tokenizer

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
        command=shlex.join(["llmkit", *sys.argv[1:]]),
        notes=plan.notes,
        joined=not plan.together,
    )
    if plan.starts:
        report.workload = describe_starts(options.rounds, options.page_cache)
        _require_same(plan, "workload", report.workload["sha256"], "repeats and page cache")
        measure_starts(plan, progress)
    workload = None
    if options.speed and not plan.starts:
        tokenizer = prompts_tokenizer(plan)
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
    if workload or plan.tasks:
        measure_running(plan, workload, report, progress)
        report.notes += _about_clients(report)
    if options.quality and plan.scored:
        report.evaluation = _measure_quality(plan, progress)
    if plan.saved is not None and plan.baseline is not None:
        saved = single_target(plan.saved, plan.baseline)
        saved.name = plan.baseline
        report.targets.insert(0, saved)
        report.joined = True
        report.notes += differences(plan.saved, report)
    report.judge(plan.gates)
    return report


def _workload(plan: Plan, tokenizer: Checkpoint) -> Workload:
    """The requests for all targets. Raises InputError when a checkpoint lacks the context or the vocabulary."""
    options = plan.options
    data = load_data(options.data, load_tokenizer(tokenizer), options.seed)
    longest = {target.name: plan.longest_request(target) for target in plan.targets}
    limits = [limit for limit in longest.values() if limit is not None]
    if data.conversations and limits:
        turns = max(scenario.turns for scenario in plan.scenarios)
        fitting = within(data, min(limits), turns)
        if left_out := len(data.conversations) - len(fitting.conversations):
            plan.notes.append(f"{left_out} conversations longer than {min(limits)} tokens were left out")
        data = fitting
    workload = build_workload(data, plan.scenarios, options.rounds, options.seed, options.limit)
    requests = [request for scenarios in workload.rounds for run in scenarios.values() for request in run]
    first = [request.prompt for request in requests if not request.follows]
    if data.conversations and len(set(first)) < len(first):
        again = len(first) - len(set(first))
        plan.notes.append(f"{again} of {len(first)} conversations were had before in this run: a prefix cache has them")
    highest = max(max(request.prompt) for request in requests)
    for target in plan.targets:
        if (limit := longest[target.name]) is not None:
            require_context(workload, limit, target.name)
        if target.spec is not None and highest >= target.spec.vocab:
            raise InputError(
                f"prompts have token ids up to {highest} and {target.name} has a vocabulary of {target.spec.vocab}",
                "All targets get the same prompts",
                "Bench models of one tokenizer together",
            )
    return workload


def _about_clients(report: BenchReport) -> list[str]:
    """A warning for every run in which our own client may have been what was measured."""
    return [
        f"the load client was busy {figures['client_busy']:.0%} of the time and {figures['client_late_ms']:.0f} ms"
        f" behind its schedule in {scenario} at {target.name}: it, not the server, may be what limits these figures"
        for target in report.targets
        for scenario, figures in target.scenarios.items()
        if figures.get("client_busy", 0.0) > CLIENT_BUSY or figures.get("client_late_ms", 0.0) > CLIENT_LATE_MS
    ]


def _measure_quality(plan: Plan, progress: Progress) -> dict[str, str | int]:
    """Score the targets; what the report says of the text they were scored on."""
    options, scored = plan.options, plan.scored
    baseline = plan.baseline if plan.baseline in scored else None
    # A server is asked for one token more than it is given.
    contexts = [c - (t.server is not None) for t in plan.targets if t.name in scored and (c := t.context_tokens)]
    first = next((one for one in (scored.get(baseline or ""), *scored.values()) if isinstance(one, Checkpoint)), None)
    tokenizer = load_tokenizer(first or prompts_tokenizer(plan))
    length = min([options.window_tokens, *contexts])
    chosen = evaluation(tokenizer, options.text, options.windows, length, options.seed)
    described = chosen.describe()
    _require_same(plan, "evaluation", str(described["sha256"]), "text, windows, seed and tokenizer")
    found = score(scored, baseline, chosen.windows, plan.dtype, plan.device, progress)
    for target in plan.targets:
        # When the engine has loaded the model in this process, that load_s stays.
        target.report.metrics = found.get(target.name, {}) | target.report.metrics
    if plan.checkpoints and any(checkpoint.layout for checkpoint in plan.checkpoints.values()):
        plan.notes.append("sharded checkpoints are scored as the whole that their parts make")
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
