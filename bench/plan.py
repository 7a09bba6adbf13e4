"""What the options of a run come to. Everything that can be refused is refused here, before anything is measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from llmkit.bench.costs import Costs
from llmkit.bench.gates import Gate, parse_gate
from llmkit.bench.gpu import Gpus
from llmkit.bench.load import Server, find_server
from llmkit.bench.loads import Load, load_scenarios
from llmkit.bench.measurable import absent, check_gates_can_be_measured
from llmkit.bench.metrics import STARTUP, parse_slo
from llmkit.bench.page_cache import STATES
from llmkit.bench.peaks import Peaks, known_peaks
from llmkit.bench.quality_url import Asked, way_to_ask
from llmkit.bench.report import BenchReport, TargetReport, read_report, single_target
from llmkit.bench.targets import is_url, short_name
from llmkit.bench.tasks import TaskOptions, Tasks
from llmkit.bench.workload import Scenario, choose
from llmkit.checkpoint.errors import UsageError
from llmkit.checkpoint.source import Checkpoint, open_checkpoint
from llmkit.model.device import resolve_device
from llmkit.model.families import model_spec
from llmkit.model.spec import ModelSpec
from llmkit.runtime.load import DTYPES

SAVED = "baseline"  # the name of a baseline that was read from a report


@dataclass
class BenchOptions:
    """What to measure and how. Scenarios are those of `workload.SCENARIOS`."""

    scenarios: tuple[str, ...] = ("quick",)
    load: Load | None = None  # in the place of scenarios
    data: str = "builtin"  # what prompts are made of: as `load_data` takes it
    slo: str | None = None  # bounds that goodput keeps: "ttft:200ms,tpot:50ms,e2e:2s"
    price_per_hour: float | None = None  # of the machine, in any currency
    rounds: int = 1  # repetitions of each scenario, with other text; figures are medians over them
    limit: int | None = None  # only the first so many requests of each scenario
    warmup: bool = True  # a few requests to each target before the first that counts
    speed: bool = True
    quality: bool = True  # of checkpoints, and of servers that tell of prompts' log probabilities
    tasks: TaskOptions | None = None  # what lm-evaluation-harness asks the servers
    page_cache: str = "warm"  # of STATES: where the weights are before a start is measured
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
    asked: Asked | None = None  # a server that tells of prompts
    costs: Costs | None = None  # of a checkpoint's tokens, where `Plan.counts`; set before it starts

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
    scenarios: tuple[Scenario, ...]
    slo: dict[str, float]  # seconds
    peaks: Peaks | None  # of the device, where they were measured
    gpus: Gpus  # none of them when the device is a CPU
    tasks: Tasks | None
    notes: list[str] = field(default_factory=list)

    @property
    def checkpoints(self) -> dict[str, Checkpoint]:
        """The checkpoints among the targets, by name."""
        return {target.name: target.checkpoint for target in self.targets if target.checkpoint}

    @property
    def scored(self) -> dict[str, Checkpoint | Asked]:
        """The targets whose quality can be measured, by name."""
        found = {target.name: target.checkpoint or target.asked for target in self.targets}
        return {name: one for name, one in found.items() if one is not None}

    @property
    def starts(self) -> bool:
        """Whether starts are what is measured for speed."""
        return self.options.speed and self.options.load is not None and self.options.load.mode == STARTUP

    @property
    def together(self) -> bool:
        """Whether all targets are up at once and take turns.

        On a CPU they are, because shared machines drift within minutes. On a GPU a server takes most of the memory, so
        that each of several checkpoints has it to itself.
        """
        return self.device == "cpu" or len(self.checkpoints) < 2

    def longest_request(self, target: Target) -> int | None:
        """In tokens, of a load, where it is known."""
        limits = (target.context_tokens, self.options.max_model_len if target.checkpoint else None)
        return min((limit for limit in limits if limit is not None), default=None)

    def counts(self, target: Target) -> bool:
        """Whether what its tokens cost can be set against measured peaks: a whole checkpoint's can."""
        return self.peaks is not None and target.checkpoint is not None and target.checkpoint.layout is None

    @property
    def sweeps(self) -> bool:
        """Whether the scenarios are levels of a sweep, which may end early."""
        return self.options.load is not None and self.options.load.mode == "sweep"


def make_plan(references: Sequence[str], options: BenchOptions) -> Plan:
    """Open checkpoints, ask servers and check every option.

    Raises UsageError for options that do not go together and gates on what is not going to be measured, InputError
    for a bad checkpoint or report, ShortageError for a missing device and a server that cannot be reached.
    """
    if not references:
        raise UsageError("there is nothing to bench", "Give a model or --url")
    if not options.speed and not options.quality and not options.tasks:
        raise UsageError("neither speed nor quality is to be measured", todo="Leave one of them on, or give --tasks")
    if options.windows < 1:
        raise UsageError(f"{options.windows} evaluation windows measure nothing", "1 or more were expected")
    scenarios = choose(options.scenarios, options.rounds, options.limit)
    if options.load is not None:
        scenarios = load_scenarios(options.load)
        if options.load.mode == STARTUP and (options.offline or any(map(is_url, references))):
            raise UsageError("only a checkpoint that is served can be started", todo="Drop --offline or the address")
    if options.page_cache not in STATES:
        raise UsageError(f"no such state of the page cache: {options.page_cache}", f"One of {', '.join(STATES)}")
    if options.tasks and options.offline:
        raise UsageError("--tasks asks a server, and --offline has none", todo="Drop one of them")
    slo = parse_slo(options.slo) if options.slo else {}
    if options.price_per_hour is not None and not 0 < options.price_per_hour < math.inf:
        raise UsageError(f"a price of {options.price_per_hour:g} per hour makes no costs", "More than 0 was expected")
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
    peaks, gpus = known_peaks(device, dtype), Gpus(None if device == "cuda" else ())
    tasks = Tasks(options.tasks) if options.tasks else None
    plan = Plan(options, targets, baseline, saved, gates, device, dtype, scenarios, slo, peaks, gpus, tasks)
    for target in targets:
        if options.quality and target.server and (way := way_to_ask(target.server)):
            target.asked = Asked(target.server, way)
    if options.quality and not plan.scored and not options.speed and not tasks:
        raise UsageError(
            "no target's quality can be measured: the servers tell nothing of a prompt's log probabilities"
        )
    if options.speed and plan.checkpoints and peaks is None and not plan.starts:
        plan.notes.append("no MBU and MFU: `llmkit doctor --peaks` has not measured this machine")
    check_gates_can_be_measured(plan)
    for target in targets:
        target.report.absent = absent(plan, target)
    return plan


def _open(reference: str, name: str, options: BenchOptions) -> Target:
    if is_url(reference):
        server = find_server(reference, options.model)
        return Target(TargetReport(name, reference, "url"), server=server)
    checkpoint = open_checkpoint(reference)
    kind = "checkpoint" if not (options.speed or options.tasks) else "offline" if options.offline else "served"
    report = TargetReport(name, reference, kind, {"checkpoint_bytes": checkpoint.weight_bytes})
    return Target(report, checkpoint, model_spec(checkpoint.config))


def _names(references: Sequence[str]) -> list[str]:
    """Column heads: short where that is unambiguous, else the references themselves."""
    short = [short_name(reference) for reference in references]
    fits = {name for name in short if short.count(name) == 1 and name != SAVED}
    names = [name if name in fits else reference for name, reference in zip(short, references, strict=True)]
    return [f"./{name}" if name == SAVED else name for name in names]


def _dtype(name: str, device: str) -> torch.dtype:
    """The dtype quality is measured in. Raises UsageError for an unknown one."""
    dtypes = DTYPES | {"auto": torch.bfloat16 if device == "cuda" else torch.float32}
    if name not in dtypes:
        raise UsageError(f"dtype {name} is not known", f"One of {', '.join(dtypes)} was expected")
    return dtypes[name]
