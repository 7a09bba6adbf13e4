"""A check of planned replicas: a load is simulated with them, and with a constant number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any
from zoneinfo import ZoneInfo

from llmkit.bench.bench_metrics import calculate_metrics
from llmkit.bench.load_modes import gamma_arrivals
from llmkit.deploy.capacity_planning import Demand, Engine
from llmkit.deploy.load_pattern import RecordedLoad, local_minute
from llmkit.deploy.pre_scaling import ReplicaSchedule
from llmkit.deploy.queue_simulation import Arrival, SimulatedReplica, simulate

# A longer load is cut to so many requests around its busiest time.
MAX_REQUESTS = 30_000


@dataclass(frozen=True)
class Replay:
    """A part of a load, simulated with some replicas."""

    name: str
    fewest: int
    most: int
    mean: float  # requested replicas
    attained: float  # share of the requests that keep all bounds
    ttft_p99_ms: float

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "name": self.name,
            "fewest_replicas": self.fewest,
            "most_replicas": self.most,
            "replica_hours_per_day": 24 * self.mean,
            "attained": self.attained,
            "ttft_p99_ms": self.ttft_p99_ms,
        }


def replay_arrivals(load: RecordedLoad, demand: Demand) -> list[Arrival]:
    """The requests of a load at their times, or drawn at its rates; at most MAX_REQUESTS.

    Times are seconds since 1970.
    """
    if load.requests:
        arrivals = [demand.arrival(*row[:3]) for row in load.requests]
    else:
        random = Random(f"{demand.seed}/replay")  # noqa: S311
        arrivals = []
        for one in load.bins:
            count = round(one.rate * one.seconds)
            if not count:
                continue
            times = gamma_arrivals(one.rate, demand.burstiness)(random, count)
            # Exactly this number of requests in exactly this time.
            scale = one.seconds / max(one.seconds, times[-1])
            arrivals += [demand.draw_arrival(random, one.start_s + scale * at) for at in times]
    if len(arrivals) <= MAX_REQUESTS:
        return arrivals
    busiest = max(load.bins, key=lambda one: one.rate)
    before = sum(arrival.at_s < busiest.start_s for arrival in arrivals)
    first = min(max(0, before - MAX_REQUESTS // 2), len(arrivals) - MAX_REQUESTS)
    return arrivals[first : first + MAX_REQUESTS]


def replay(
    engine: Engine,
    demand: Demand,
    arrivals: Sequence[Arrival],
    schedule: ReplicaSchedule,
    zone: ZoneInfo,
) -> list[Replay]:
    """Simulate the schedule, its largest number at all times, and its mean number at all times."""
    requested = schedule.requested
    ready = schedule.ready
    most = max(requested)

    def num_ready(at_s: float) -> int:
        return ready[local_minute(at_s, zone, schedule.period)]

    by_schedule = _simulate(engine, demand, arrivals, most, num_ready)
    replays = [Replay("by schedule", min(requested), most, schedule.mean, *by_schedule)]
    for name, count in (
        ("always the most", most),
        ("always the mean", max(1, round(schedule.mean))),
    ):
        figures = _simulate(engine, demand, arrivals, count)
        replays.append(Replay(name, count, count, count, *figures))
    return replays


def _simulate(
    engine: Engine,
    demand: Demand,
    arrivals: Sequence[Arrival],
    count: int,
    num_ready: Callable[[float], int] | None = None,
) -> tuple[float, float]:
    """The share of the requests that keep all bounds, and the p99 of TTFT in milliseconds."""
    # A replica that was never used has a clock of 0; times count from the first request.
    start_s = arrivals[0].at_s
    shifted = [Arrival(one.at_s - start_s, one.prompt, one.output, one.cached) for one in arrivals]
    replicas = [SimulatedReplica(engine.step, engine.limits) for _ in range(count)]
    ready = None if num_ready is None else lambda at_s: num_ready(at_s + start_s)
    timelines = simulate(shifted, replicas, ready)
    figures = calculate_metrics(timelines, 1.0, demand.slo)
    return figures["goodput"] / len(timelines), figures["ttft_p99_ms"]
