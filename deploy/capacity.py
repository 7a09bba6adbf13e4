"""`llmkit plan`: how many replicas a load needs, on how many GPUs each, and what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from llmkit.bench.costs import token_flops
from llmkit.bench.loads import gamma_arrivals
from llmkit.bench.metrics import RequestTimeline, summarize
from llmkit.bench.report import BenchReport, single_target
from llmkit.checkpoint.errors import InputError, ShortageError, UsageError
from llmkit.deploy.simulate import Arrival, Limits, Replica, StepTime, simulate
from llmkit.deploy.step_time import EFFICIENCY, Roofline, fit
from llmkit.shard.capacity import GPUS, UTILIZATION, gpu_bytes, gpu_name, layout_figures, working_sizes
from llmkit.shard.shard import checked_spec
from llmkit.shard.source import Source

MOST_REPLICAS = 4096
LEAST_REQUESTS, SPAN_S = 1_000, 120.0  # that are simulated: as many as come in the span, but not fewer


@dataclass(frozen=True)
class Demand:
    """What is asked of the whole. Lengths are tokens, least and most; slo bounds are seconds."""

    rate: float  # requests a second
    input_tokens: tuple[int, int]
    output_tokens: tuple[int, int]
    slo: dict[str, float]
    attained: float = 0.99  # the share of requests that have to keep all bounds
    burstiness: float = 1.0  # see `bench --burstiness`
    cached: float = 0.0  # the share of prompts' tokens that come from the prefix cache
    seed: int = 0

    def arrivals(self) -> list[Arrival]:
        """The requests that are simulated."""
        random = Random(f"{self.seed}/capacity")  # noqa: S311
        count = max(LEAST_REQUESTS, round(self.rate * SPAN_S))
        found = []
        for at_s in gamma_arrivals(self.rate, self.burstiness)(random, count):
            prompt, output = random.randint(*self.input_tokens), random.randint(*self.output_tokens)
            found.append(Arrival(at_s, prompt, output, min(prompt - 1, int(prompt * self.cached))))
        return found


@dataclass(frozen=True)
class Engine:
    """A replica: what its steps take, what it can hold, and the GPUs that it takes."""

    name: str
    gpus: int
    step: StepTime
    limits: Limits


@dataclass(frozen=True)
class Need:
    """What an engine needs for a demand. figures: as bench names them. kv_share: of the cache, at its fullest."""

    engine: Engine
    replicas: int
    attained: float
    figures: dict[str, float]
    busy: float  # the share of the time in which a replica runs steps
    kv_share: float

    @property
    def gpus(self) -> int:
        """Of all replicas."""
        return self.replicas * self.engine.gpus

    def to_json(self, price_per_hour: float | None) -> dict[str, Any]:
        """JSON-ready. price_per_hour: of one GPU, or of a replica where no GPU is named."""
        found: dict[str, Any] = {
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
            found |= {
                "price_per_hour": per_hour,
                "cost_per_million": per_hour / 3600 / self.figures["output_tps"] * 1e6,
            }
        return found


FIGURES = ("ttft_p50_ms", "ttft_p99_ms", "tpot_mean_ms", "tpot_p99_ms", "e2e_p99_ms", "output_tps")


def need(engine: Engine, demand: Demand) -> Need | None:
    """The fewest replicas that keep the bounds for the share of requests that is asked for; None: not even many do."""
    arrivals = demand.arrivals()
    most = 1
    while (found := _try(engine, demand, arrivals, most)).attained < demand.attained:
        if most >= MOST_REPLICAS or (most > 1 and found.busy < 0.02):
            return None
        most *= 2
    least = most // 2  # too few, or none
    while most - least > 1:
        middle = (least + most) // 2
        tried = _try(engine, demand, arrivals, middle)
        if tried.attained >= demand.attained:
            most, found = middle, tried
        else:
            least = middle
    return found


def predict(engine: Engine, demand: Demand, replicas: int) -> Need:
    """What so many replicas would make of a demand."""
    return _try(engine, demand, demand.arrivals(), replicas)


def engines(source: Source, gpu: str, tps: Sequence[int], limits: Limits) -> list[Engine]:
    """A model on so many GPUs of one kind, by their data sheet; those on which it does not fit are left out.

    Raises UsageError for an unknown GPU, ShortageError where it fits on none.
    """
    name = gpu_name(gpu)
    memory = gpu_bytes(name)
    flops, bandwidth = EFFICIENCY * GPUS[name].flops_per_s, EFFICIENCY * GPUS[name].bytes_per_s
    spec = checked_spec(source)
    valid = {one["tp"] for one in working_sizes(source)}
    found = []
    for tp in sorted(set(tps) & valid):
        report = layout_figures(source, tp, memory=memory)
        if report["tokens"] < limits.max_num_batched_tokens // 8:
            continue
        rank = max(report["ranks"], key=lambda one: one["bytes"])
        step = Roofline(
            rank["bytes"], rank["kv_bytes_per_token"], token_flops(spec) / tp, len(spec.layers), tp, flops, bandwidth
        )
        found.append(Engine(f"TP {tp}", tp, step, replace(limits, kv_tokens=report["tokens"])))
    if not found:
        raise ShortageError(
            f"the model does not fit on {max(tps)} x {name} ({UTILIZATION:.0%} of each), with any TP that works",
            f"TP that works: {', '.join(map(str, sorted(valid)))}",
            "Name a larger GPU or more with --tp, or see `llmkit deploy vllm` for several machines",
        )
    return found


def measured_engine(report: BenchReport, source: str, limits: Limits, gpus: int) -> Engine:
    """A replica that takes the time that bench measured. Raises InputError where the report does not tell it."""
    target = single_target(report, source)
    runs = [requests for requests in target.requests.values() if requests]
    if not runs:
        raise InputError(f"{source} holds no requests", todo="Measure with `llmkit bench MODEL --mode sweep -o FILE`")
    return Engine(f"as measured ({target.name})", gpus, fit(runs), limits)


def ranked(found: Sequence[Need]) -> list[Need]:
    """The fewest GPUs first. Raises UsageError for none."""
    if not found:
        raise UsageError(
            "no number of replicas keeps the bounds of --slo", todo="Loosen them, or take a faster GPU or TP"
        )
    return sorted(found, key=lambda one: (one.gpus, one.replicas))


def _try(engine: Engine, demand: Demand, arrivals: Sequence[Arrival], count: int) -> Need:
    replicas = [Replica(engine.step, engine.limits) for _ in range(count)]
    timelines = simulate(arrivals, replicas)
    wall = max(replica.clock for replica in replicas)
    figures = summarize(timelines, wall, demand.slo)
    return Need(
        engine,
        count,
        figures.get("goodput", 0.0) * wall / len(timelines) if demand.slo else _steady(timelines, demand),
        figures,
        sum(replica.busy_s for replica in replicas) / wall / count,
        max(replica.peak_kv for replica in replicas) / engine.limits.kv_tokens,
    )


def _steady(timelines: Sequence[RequestTimeline], demand: Demand) -> float:
    """Without bounds: 1 where the queue does not grow: the last quarter waits at most twice as long as the first."""
    ordered = sorted(timelines, key=lambda one: one.sent_s)
    quarter = len(ordered) // 4
    first, last = (sum(one.ttft_s for one in part) / quarter for part in (ordered[:quarter], ordered[-quarter:]))
    return 1.0 if last <= 2 * first else 0.0
