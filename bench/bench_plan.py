"""The plan of a benchmark: the targets, and the checked options. `bench_planner` makes it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from llmkit.bench.agentic.agent_trace import AgentTrace
from llmkit.bench.bench_metrics import STARTUP
from llmkit.bench.bench_options import BenchOptions
from llmkit.bench.bench_report import BenchReport, TargetReport
from llmkit.bench.cpu_energy import CpuEnergyMonitor
from llmkit.bench.eval_tasks import EvalTasks
from llmkit.bench.gates import Gate
from llmkit.bench.gpu_monitor import GpuMonitor
from llmkit.bench.load_client import Server
from llmkit.bench.model_costs import ModelCosts
from llmkit.bench.peak_performance import PeakPerformance
from llmkit.bench.server_quality import PromptLogprobsClient
from llmkit.bench.slo.slo_search import SloGoal
from llmkit.bench.tool_accuracy.tool_case import ToolCase
from llmkit.bench.workload import Scenario
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.model.spec import ModelSpec

SAVED_BASELINE = "baseline"  # the name of a baseline that was read from a report


@dataclass
class Target:
    """A checkpoint or a server, with its column of the report."""

    report: TargetReport
    checkpoint: Checkpoint | None = None
    spec: ModelSpec | None = None  # of the checkpoint
    server: Server | None = None
    # Set for a server that returns the log probabilities of prompts.
    prompt_logprobs: PromptLogprobsClient | None = None
    # Why it cannot be asked tool cases; "": it can.
    tools_refusal: str = ""
    # Set before the target is started, if `BenchPlan.has_utilization`.
    costs: ModelCosts | None = None

    @property
    def name(self) -> str:
        """Unique among the targets."""
        return self.report.name

    @property
    def context_tokens(self) -> int | None:
        """The longest request in tokens; None: not known."""
        if self.spec:
            return self.spec.max_position_embeddings
        return self.server.context_tokens if self.server else None


@dataclass
class BenchPlan:
    """Opened targets and checked options."""

    options: BenchOptions
    targets: list[Target]
    baseline: str | None  # the name of a target, or SAVED_BASELINE
    saved_baseline: BenchReport | None  # the baseline's report, when it was read from a file
    gates: list[Gate]
    device: str
    dtype: torch.dtype
    scenarios: tuple[Scenario, ...]
    slo: dict[str, float]  # upper bounds in seconds by latency
    peaks: PeakPerformance | None  # None: not measured on this device
    gpus: GpuMonitor  # monitors no device on a CPU
    cpus: CpuEnergyMonitor
    tasks: EvalTasks | None
    tool_cases: list[ToolCase] = field(default_factory=list)  # []: tool accuracy is not measured
    agent_trace: AgentTrace | None = None  # None: no sessions are played
    slo_goal: SloGoal | None = None  # None: no most load is searched
    notes: list[str] = field(default_factory=list)  # of the report
    # The names of targets that could not be measured, of a sweep over server options.
    left_out: list[str] = field(default_factory=list)

    @property
    def checkpoints(self) -> dict[str, Checkpoint]:
        """The checkpoints among the targets, by name."""
        return {target.name: target.checkpoint for target in self.targets if target.checkpoint}

    @property
    def quality_targets(self) -> dict[str, Checkpoint | PromptLogprobsClient]:
        """The targets whose quality can be measured, by name."""
        found = {
            target.name: target.checkpoint or target.prompt_logprobs for target in self.targets
        }
        return {name: target for name, target in found.items() if target is not None}

    @property
    def tool_targets(self) -> list[Target]:
        """The targets that are asked tool cases."""
        if not self.tool_cases:
            return []
        return [target for target in self.targets if not target.tools_refusal]

    @property
    def measures_startup(self) -> bool:
        """Whether starts are measured instead of a load (`--mode startup`)."""
        return (
            self.options.speed
            and self.options.load is not None
            and self.options.load.mode == STARTUP
        )

    @property
    def interleaved(self) -> bool:
        """Whether all targets run at the same time and take turns.

        On a CPU they do, because a shared machine's speed changes within minutes. On a GPU every
        server takes most of the memory, so that several checkpoints run one after the other. So do
        the points of a sweep over server options: there may be many.
        """
        if self.options.sweep_options:
            return False
        return self.device == "cpu" or len(self.checkpoints) < 2

    @property
    def is_sweep(self) -> bool:
        """Whether the scenarios are levels of a sweep, which may end early."""
        return self.options.load is not None and self.options.load.mode == "sweep"

    def max_request_tokens(self, target: Target) -> int | None:
        """The longest request that a target accepts, in tokens; None: not known."""
        limits = [target.context_tokens]
        if target.checkpoint:
            limits.append(self.options.max_model_len)
        return min((limit for limit in limits if limit is not None), default=None)

    def has_utilization(self, target: Target) -> bool:
        """Whether MBU and MFU are measured: for unsharded checkpoints, with measured peaks."""
        return (
            self.peaks is not None
            and target.checkpoint is not None
            and target.checkpoint.layout is None
        )
