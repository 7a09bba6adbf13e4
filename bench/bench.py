"""`bench`: measure targets for speed and quality and judge the figures by gates."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from llmkit.bench.environment import describe_environment
from llmkit.bench.gates import check_gates
from llmkit.bench.metrics import medians, require_complete, summarize
from llmkit.bench.offline import OfflineTarget
from llmkit.bench.plan import BenchOptions, Plan, Target, make_plan
from llmkit.bench.quality import evaluation, score_checkpoints
from llmkit.bench.report import BenchReport, differences, single_target
from llmkit.bench.targets import ServedTarget, SpeedTarget, UrlTarget
from llmkit.bench.workload import WARMUP, Workload, build_workload, builtin_text, require_context
from llmkit.checkpoint.errors import InputError, UsageError
from llmkit.checkpoint.progress import Progress
from llmkit.checkpoint.source import Checkpoint, open_checkpoint
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.runtime.load import EngineOptions

__all__ = ["BenchOptions", "bench"]


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
    )
    if options.speed:
        tokenizer = _tokenizer(plan)
        workload = _workload(plan, tokenizer)
        report.workload = {
            "sha256": workload.sha256,
            "tokenizer": tokenizer.reference,
            "seed": options.seed,
            "rounds": options.rounds,
            "scenarios": workload.describe(),
        }
        _require_same(plan, "workload", workload.sha256, "scenarios, rounds, limit, seed and tokenizer")
        _measure_speed(plan, workload, progress)
    if options.quality and plan.checkpoints:
        report.evaluation = _measure_quality(plan, progress)
    if plan.saved is not None and plan.baseline is not None:
        saved = single_target(plan.saved, plan.baseline)
        saved.name = plan.baseline
        report.targets.insert(0, saved)
        report.notes += differences(plan.saved, report)
    base = report.target(plan.baseline).figures() if plan.baseline else None
    report.gates = check_gates(plan.gates, {target.name: target.figures() for target in report.subjects()}, base)
    return report


def _workload(plan: Plan, tokenizer: Checkpoint) -> Workload:
    """The requests for all targets. Raises InputError when a checkpoint lacks the context or the vocabulary."""
    options = plan.options
    tokens = load_tokenizer(tokenizer).encode(builtin_text(), add_special_tokens=False)
    workload = build_workload(tokens, options.scenarios, options.rounds, options.seed, options.limit)
    highest = max(tokens)
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
    """Each scenario and round with each target in turn, in reverse order on odd rounds.

    On a CPU all targets are up at once and take turns, because shared machines drift within minutes. On a GPU a
    server takes most of the memory, so that each of several checkpoints has it to itself.
    """
    together = plan.device == "cpu" or len(plan.checkpoints) < 2
    groups = [plan.targets] if together else [[target] for target in plan.targets]
    progress.start("speed", len(plan.targets) * len(workload.rounds) * len(workload.scenarios), "runs")
    for group in groups:
        with _started(plan, group, progress) as running:
            for target, speed in running:
                if speed.context_tokens is not None:
                    require_context(workload, speed.context_tokens, target.name)
                if plan.options.warmup:
                    _, timelines = speed.run(workload.warmup, WARMUP.clients)
                    require_complete(timelines, target.name, WARMUP.name)
            for number, requests in enumerate(workload.rounds):
                for scenario in workload.scenarios:
                    for target, speed in running if number % 2 == 0 else running[::-1]:
                        wall_s, timelines = speed.run(requests[scenario.name], scenario.clients)
                        require_complete(timelines, target.name, scenario.name)
                        rounds = target.report.rounds.setdefault(scenario.name, [])
                        rounds.append(summarize(timelines, wall_s))
                        progress.advance(1, f"{scenario.name}, {target.name}")
    for target in plan.targets:
        target.report.scenarios = {name: medians(rounds) for name, rounds in target.report.rounds.items()}
    progress.finish()


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
