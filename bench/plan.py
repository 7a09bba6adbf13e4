"""What the options of a run come to. Everything that can be refused is refused here, before anything is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from llmkit.bench.gates import Gate, parse_gate, require_measured
from llmkit.bench.load import Server, find_server
from llmkit.bench.metrics import SPEED_METRICS
from llmkit.bench.report import BenchReport, TargetReport, read_report, single_target
from llmkit.bench.targets import is_url, short_name
from llmkit.bench.workload import choose
from llmkit.checkpoint.errors import UsageError
from llmkit.checkpoint.source import Checkpoint, open_checkpoint
from llmkit.model.device import resolve_device
from llmkit.model.families import model_spec
from llmkit.model.spec import ModelSpec
from llmkit.runtime.load import DTYPES

SAVED = "baseline"  # the name of a baseline that was read from a report
_QUALITY = ("perplexity", "load_s")
_AGAINST_BASELINE = ("mean_kl", "p99_kl", "top1")
_STARTING = {"served": ("ready_s", "peak_memory_bytes"), "offline": ("load_s",)}


@dataclass
class BenchOptions:
    """What to measure and how. Scenarios are those of `workload.SCENARIOS`."""

    scenarios: tuple[str, ...] = ("quick",)
    rounds: int = 1  # repetitions of each scenario, with other text; figures are medians over them
    limit: int | None = None  # only the first so many requests of each scenario
    warmup: bool = True  # a few requests to each target before the first that counts
    speed: bool = True
    quality: bool = True  # of checkpoints; a server does not give its logits away
    offline: bool = False  # checkpoints run inside this process, not behind a server
    baseline: str | None = None  # a model, an address or a JSON report; None: the first target, when there are several
    gates: tuple[str, ...] = ()
    text: str = "builtin"  # what quality is measured on: as `load_text` takes it
    windows: int = 8  # at most; the same as those of the report of `llmkit quantize`
    window_tokens: int = 1024  # at most; shorter for a model with a shorter context
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"  # bfloat16 on CUDA, float32 on the CPU
    max_model_len: int | None = None  # of the checkpoints that are served or run offline
    tokenizer: str | None = None  # a checkpoint whose tokenizer makes the prompts; None: that of the first one
    model: str | None = None  # the name to ask servers for; None: the first they list


@dataclass
class Target:
    """One column of the report, before and while it is measured: a checkpoint or a server."""

    report: TargetReport
    checkpoint: Checkpoint | None = None
    spec: ModelSpec | None = None
    server: Server | None = None

    @property
    def name(self) -> str:
        """Unique among the targets."""
        return self.report.name

    @property
    def context_tokens(self) -> int | None:
        """The longest request, in tokens, where it is known."""
        return self.spec.max_positions if self.spec else self.server.context_tokens if self.server else None


@dataclass
class Plan:
    """Targets that were opened or asked, and options that go together."""

    options: BenchOptions
    targets: list[Target]
    baseline: str | None  # the name of a target, or SAVED
    saved: BenchReport | None  # the baseline's report, when it was read from a file
    gates: list[Gate]
    device: str
    dtype: torch.dtype
    notes: list[str] = field(default_factory=list)

    @property
    def checkpoints(self) -> dict[str, Checkpoint]:
        """The checkpoints among the targets, by name."""
        return {target.name: target.checkpoint for target in self.targets if target.checkpoint}

    @property
    def subjects(self) -> list[Target]:
        """The targets that gates are for: all but the baseline, or the only one."""
        return [target for target in self.targets if target.name != self.baseline] or self.targets


def make_plan(references: Sequence[str], options: BenchOptions) -> Plan:
    """Open checkpoints, ask servers and check every option.

    Raises UsageError for options that do not go together and gates on what is not going to be measured, InputError
    for a bad checkpoint or report, ShortageError for a missing device and a server that cannot be reached.
    """
    if not references:
        raise UsageError("there is nothing to bench", "Give a model or --url")
    if not options.speed and not options.quality:
        raise UsageError("neither speed nor quality is to be measured", todo="Leave one of them on")
    if options.windows < 1:
        raise UsageError(f"{options.windows} evaluation windows measure nothing", "1 or more were expected")
    choose(options.scenarios, options.rounds, options.limit)
    gates = [parse_gate(text) for text in options.gates]
    device = resolve_device(options.device).type
    dtype = _dtype(options.dtype, device)
    wanted, saved = list(dict.fromkeys(references)), None
    if options.baseline and options.baseline not in wanted:
        if options.baseline.endswith(".json"):
            saved = read_report(options.baseline)
            single_target(saved, options.baseline)
        else:
            wanted.insert(0, options.baseline)
    if options.offline and any(map(is_url, wanted)):
        raise UsageError("a server cannot be measured offline", todo="Drop --offline or the address")
    targets = [_open(reference, name, options) for reference, name in zip(wanted, _names(wanted), strict=True)]
    baseline = SAVED if saved else targets[0].name if len(targets) > 1 else None
    if options.baseline in wanted:
        baseline = targets[wanted.index(options.baseline)].name
    plan = Plan(options, targets, baseline, saved, gates, device, dtype)
    servers = [target.name for target in targets if target.server]
    if options.quality and servers:
        if not plan.checkpoints and not options.speed:
            raise UsageError("quality is measured on checkpoints, and all targets are servers")
        if plan.checkpoints:
            plan.notes.append(f"quality is measured on checkpoints only, not on {', '.join(servers)}")
    _check_gates_can_be_measured(plan)
    return plan


def _open(reference: str, name: str, options: BenchOptions) -> Target:
    if is_url(reference):
        server = find_server(reference, options.model)
        return Target(TargetReport(name, reference, "url"), server=server)
    checkpoint = open_checkpoint(reference)
    kind = "checkpoint" if not options.speed else "offline" if options.offline else "served"
    report = TargetReport(name, reference, kind, {"checkpoint_bytes": checkpoint.weight_bytes})
    return Target(report, checkpoint, model_spec(checkpoint.config))


def _names(references: Sequence[str]) -> list[str]:
    """Column heads: short where that is unambiguous, else the references themselves."""
    short = [short_name(reference) for reference in references]
    return [
        name if short.count(name) == 1 and name != SAVED else reference
        for name, reference in zip(short, references, strict=True)
    ]


def _check_gates_can_be_measured(plan: Plan) -> None:
    """Refuse a gate before the work and not after it."""
    for target in plan.subjects:
        require_measured(plan.gates, _measurable(plan, target), target.name)
    relative = [gate for gate in plan.gates if gate.of_baseline]
    if not relative:
        return
    if plan.baseline is None:
        raise UsageError(f"gate {relative[0].text!r} compares with a baseline", todo="Name one with --baseline")
    if plan.saved is not None:
        figures = list(single_target(plan.saved, SAVED).figures())
    else:
        figures = next(_measurable(plan, target) for target in plan.targets if target.name == plan.baseline)
    require_measured(relative, figures, f"the baseline, {plan.baseline}")


def _measurable(plan: Plan, target: Target) -> list[str]:
    """The metrics that a target is going to have."""
    names = list(target.report.metrics)
    if plan.options.quality and target.checkpoint:
        names += _QUALITY
        if plan.baseline in plan.checkpoints and target.name != plan.baseline:
            names += _AGAINST_BASELINE
    if plan.options.speed:
        names += _STARTING.get(target.report.kind, ())
        names += [f"{scenario}.{metric}" for scenario in plan.options.scenarios for metric in SPEED_METRICS]
    return list(dict.fromkeys(names))


def _dtype(name: str, device: str) -> torch.dtype:
    """The dtype quality is measured in. Raises UsageError for an unknown one."""
    dtypes = DTYPES | {"auto": torch.bfloat16 if device == "cuda" else torch.float32}
    if name not in dtypes:
        raise UsageError(f"dtype {name} is not known", f"One of {', '.join(dtypes)} was expected")
    return dtypes[name]
