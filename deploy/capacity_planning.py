"""`llmkit plan`: how many replicas a load needs, on how many GPUs each, and what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch

from llmkit.bench.bench_metrics import RequestTimeline, calculate_metrics
from llmkit.bench.bench_report import BenchReport, require_single_target
from llmkit.bench.load_modes import gamma_arrivals
from llmkit.bench.model_costs import count_model_costs, token_flops
from llmkit.bench.peak_performance import load_peaks, measure_peaks
from llmkit.common.errors import InputError, ShortageError, UsageError
from llmkit.deploy.queue_simulation import Arrival, Limits, SimulatedReplica, StepTime, simulate
from llmkit.deploy.step_time import EFFICIENCY, RooflineStepTime, fit_step_time
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine_plan import plan_engine
from llmkit.shard.layout_capacity import (
    GPUS,
    UTILIZATION,
    gpu_bytes,
    gpu_name,
    layout_figures,
    working_sizes,
)
from llmkit.shard.shard_checkpoint import validated_spec
from llmkit.shard.shard_source import ShardSource

MAX_REPLICAS = 4096
# The simulation has the requests of SIMULATED_S seconds, but at least MIN_REQUESTS.
MIN_REQUESTS = 1_000
SIMULATED_S = 120.0
# The figures of a plan, by the names of `llmkit bench`.
FIGURES = ("ttft_p50_ms", "ttft_p99_ms", "tpot_mean_ms", "tpot_p99_ms", "e2e_p99_ms", "output_tps")


@dataclass(frozen=True)
class Demand:
    """The load of all replicas.

    Lengths are tokens, lowest and highest. The bounds of `slo` are seconds.
    """

    rate: float  # requests a second
    input_tokens: tuple[int, int]
    output_tokens: tuple[int, int]
    slo: dict[str, float]
    attained: float = 0.99  # share of the requests that must keep all bounds
    burstiness: float = 1.0  # see `bench --burstiness`
    cached: float = 0.0  # share of the prompt tokens that are in the prefix cache
    seed: int = 0
    # Recorded numbers of prompt and output tokens, from which requests are drawn; (): the ranges.
    lengths: tuple[tuple[int, int], ...] = ()

    def arrivals(self) -> list[Arrival]:
        """The simulated requests."""
        random = Random(f"{self.seed}/capacity")  # noqa: S311
        count = max(MIN_REQUESTS, round(self.rate * SIMULATED_S))
        times = gamma_arrivals(self.rate, self.burstiness)(random, count)
        return [self.draw_arrival(random, at_s) for at_s in times]

    def draw_arrival(self, random: Random, at_s: float) -> Arrival:
        """A request at this time, with drawn lengths."""
        if self.lengths:
            prompt, output = random.choice(self.lengths)
        else:
            prompt = random.randint(*self.input_tokens)
            output = random.randint(*self.output_tokens)
        return self.arrival(at_s, prompt, output)

    def arrival(self, at_s: float, prompt: int, output: int) -> Arrival:
        """A request with this share of its prompt in the prefix cache."""
        # The last prompt token is always computed.
        return Arrival(at_s, prompt, output, min(prompt - 1, int(prompt * self.cached)))


@dataclass(frozen=True)
class Engine:
    """A kind of replica: its GPUs, its step times and its limits."""

    name: str
    gpus: int
    step: StepTime
    limits: Limits


@dataclass(frozen=True)
class CapacityPlan:
    """A number of replicas, and the result of their simulation."""

    engine: Engine
    replicas: int
    attained: float  # share of the requests that keep all bounds
    figures: dict[str, float]  # by the names of `llmkit bench`
    busy: float  # share of the time in which a replica runs steps
    kv_share: float  # highest share of the KV cache in use

    @property
    def gpus(self) -> int:
        """GPUs of all replicas."""
        return self.replicas * self.engine.gpus

    def to_json(self, price_per_hour: float | None) -> dict[str, Any]:
        """JSON-ready. price_per_hour: of one GPU, or of a replica when no GPU is named."""
        document: dict[str, Any] = {
            "engine": self.engine.name,
            "replicas": self.replicas,
            "gpus": self.gpus,
            "attained": self.attained,
            "busy": self.busy,
            "kv_share": self.kv_share,
            **{name: self.figures[name] for name in FIGURES if name in self.figures},
        }
        if price_per_hour is not None:
            per_hour = price_per_hour * (self.gpus or self.replicas)
            document |= {
                "price_per_hour": per_hour,
                "cost_per_million": per_hour / 3600 / self.figures["output_tps"] * 1e6,
            }
        return document


def plan_replicas(engine: Engine, demand: Demand) -> CapacityPlan | None:
    """The fewest replicas that keep the bounds for `demand.attained` of the requests.

    None when no number of replicas does.
    """
    arrivals = demand.arrivals()
    # Double the replicas until they are enough.
    enough = 1
    plan = _simulate(engine, demand, arrivals, enough)
    while plan.attained < demand.attained:
        if enough >= MAX_REPLICAS or (enough > 1 and plan.busy < 0.02):
            return None
        enough *= 2
        plan = _simulate(engine, demand, arrivals, enough)
    return _fewest_between(engine, demand, arrivals, enough // 2, plan)


def fewest_replicas(engine: Engine, demand: Demand, too_few: int, enough: int) -> int:
    """The fewest replicas that keep the bounds: more than `too_few`, at most `enough`.

    That `enough` are enough is not checked.
    """
    if enough - too_few == 1:
        return enough
    arrivals = demand.arrivals()
    middle = (too_few + enough) // 2
    plan = _simulate(engine, demand, arrivals, middle)
    if plan.attained < demand.attained:
        return fewest_replicas(engine, demand, middle, enough)
    return _fewest_between(engine, demand, arrivals, too_few, plan).replicas


def _fewest_between(
    engine: Engine, demand: Demand, arrivals: Sequence[Arrival], too_few: int, plan: CapacityPlan
) -> CapacityPlan:
    """The plan with the fewest replicas, between `too_few` and those of a plan that is enough."""
    while plan.replicas - too_few > 1:
        middle = (too_few + plan.replicas) // 2
        middle_plan = _simulate(engine, demand, arrivals, middle)
        if middle_plan.attained >= demand.attained:
            plan = middle_plan
        else:
            too_few = middle
    return plan


def predict(engine: Engine, demand: Demand, replicas: int) -> CapacityPlan:
    """The result of a given number of replicas."""
    return _simulate(engine, demand, demand.arrivals(), replicas)


def engines(source: ShardSource, gpu: str, tps: Sequence[int], limits: Limits) -> list[Engine]:
    """An engine for each TP size that the model fits on, with step times from the GPU's data sheet.

    Raises UsageError for an unknown GPU, ShortageError when the model fits on no TP size.
    """
    name = gpu_name(gpu)
    memory = gpu_bytes(name)
    flops = EFFICIENCY * GPUS[name].flops_per_s
    bandwidth = EFFICIENCY * GPUS[name].bytes_per_s
    spec = validated_spec(source)
    valid = {size["tp"] for size in working_sizes(source)}
    fitting = []
    for tp in sorted(set(tps) & valid):
        report = layout_figures(source, tp, memory=memory)
        if report["tokens"] < limits.max_num_batched_tokens // 8:
            continue
        largest = max(report["ranks"], key=lambda rank: rank["bytes"])
        step = RooflineStepTime(
            largest["bytes"],
            largest["kv_bytes_per_token"],
            token_flops(spec) / tp,
            len(spec.layers),
            tp,
            flops,
            bandwidth,
            largest["state_bytes_per_request"],
        )
        fitting.append(Engine(f"TP {tp}", tp, step, replace(limits, kv_tokens=report["tokens"])))
    if not fitting:
        raise ShortageError(
            f"the model does not fit on {max(tps)} x {name} ({UTILIZATION:.0%} of each), with any "
            "TP that works",
            f"TP that works: {', '.join(map(str, sorted(valid)))}",
            "Name a larger GPU or more with --tp, or see `llmkit deploy vllm` for several machines",
        )
    return fitting


def cpu_engine(source: ShardSource, limits: Limits) -> Engine:
    """An engine on this machine's CPU, with step times from its measured peaks.

    They are measured now if they were not before. Raises as `plan_engine` does.
    """
    checkpoint = source.checkpoint
    spec = validated_spec(source)
    memory = plan_engine(checkpoint, EngineOptions(device="cpu")).memory
    costs = count_model_costs(checkpoint, spec, "auto", "cpu")
    if load_peaks("cpu", costs.inputs) is None:
        measure_peaks("cpu")
    peaks = load_peaks("cpu", costs.inputs)
    assert peaks is not None
    step = RooflineStepTime(
        costs.dense_bytes + costs.expert_bytes,
        costs.kv_bytes,
        costs.token_flops,
        len(spec.layers),
        1,
        EFFICIENCY * peaks.flops_per_s,
        EFFICIENCY * peaks.bytes_per_s,
        spec.recurrent_bytes_per_sequence(torch.float32.itemsize),
    )
    return Engine("CPU", 0, step, replace(limits, kv_tokens=memory.num_blocks * memory.block_size))


def measured_engine(report: BenchReport, source: str, limits: Limits, gpus: int) -> Engine:
    """A replica with step times fitted to a report of bench. Raises InputError for a report without
    requests.
    """
    target = require_single_target(report, source)
    runs = [requests for requests in target.requests.values() if requests]
    if not runs:
        raise InputError(
            f"{source} holds no requests",
            todo="Measure with `llmkit bench MODEL --mode sweep -o FILE`",
        )
    return Engine(f"as measured ({target.name})", gpus, fit_step_time(runs), limits)


def ranked(plans: Sequence[CapacityPlan]) -> list[CapacityPlan]:
    """The plans, those with the fewest GPUs first. Raises UsageError for none."""
    if not plans:
        raise UsageError(
            "no number of replicas keeps the bounds of --slo",
            todo="Loosen them, or take a faster GPU or TP",
        )
    return sorted(plans, key=lambda plan: (plan.gpus, plan.replicas))


def _simulate(
    engine: Engine, demand: Demand, arrivals: Sequence[Arrival], count: int
) -> CapacityPlan:
    replicas = [SimulatedReplica(engine.step, engine.limits) for _ in range(count)]
    timelines = simulate(arrivals, replicas)
    duration_s = max(replica.clock for replica in replicas)
    figures = calculate_metrics(timelines, duration_s, demand.slo)
    if demand.slo:
        attained = figures.get("goodput", 0.0) * duration_s / len(timelines)
    else:
        attained = 1.0 if _queue_is_stable(timelines) else 0.0
    return CapacityPlan(
        engine,
        count,
        attained,
        figures,
        busy=sum(replica.busy_s for replica in replicas) / duration_s / count,
        kv_share=max(replica.peak_kv for replica in replicas) / engine.limits.kv_tokens,
    )


def _queue_is_stable(timelines: Sequence[RequestTimeline]) -> bool:
    """Whether the last quarter of the requests waits at most twice as long as the first."""
    ordered = sorted(timelines, key=lambda timeline: timeline.sent_s)
    quarter = len(ordered) // 4
    first_s = sum(timeline.ttft_s for timeline in ordered[:quarter])
    last_s = sum(timeline.ttft_s for timeline in ordered[-quarter:])
    return last_s <= 2 * first_s
