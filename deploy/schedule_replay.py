"""A check of planned replicas: a load is simulated with them, and with a constant number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any
from zoneinfo import ZoneInfo

from llmkit.bench.bench_metrics import calculate_metrics
from llmkit.bench.load_modes import gamma_arrivals
from llmkit.common.errors import InputError
from llmkit.deploy.capacity_planning import Demand, Engine
from llmkit.deploy.load_pattern import RateBin, RecordedLoad, local_minute
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

    Times are seconds since 1970. Raises InputError for a load without a request.
    """
    busiest = max(load.bins, key=lambda one: one.rate)
    if load.requests:
        before = sum(row.time_s < busiest.start_s for row in load.requests)
        first = _first_of_part(before, len(load.requests))
        return [demand.arrival(*row[:3]) for row in load.requests[first : first + MAX_REQUESTS]]
    counted = list(_counts(load.bins))
    total = sum(count for _, count in counted)
    if not total:
        raise InputError(
            "the recorded load has no request", "Rates above 0 were expected", "Give another load"
        )
    first = _first_of_part(
        sum(count for one, count in counted if one.start_s < busiest.start_s), total
    )
    arrivals: list[Arrival] = []
    end = 0  # requests until the end of a bin
    for one, count in counted:
        left_out = max(0, first - end)
        end += count
        wanted = min(count - left_out, MAX_REQUESTS - len(arrivals))
        if wanted > 0:
            # A bin may have more requests than memory holds: only those of a part are drawn.
            part = RateBin(
                one.start_s + one.seconds * left_out / count,
                one.seconds * wanted / count,
                one.rate,
            )
            arrivals += _drawn_arrivals(part, wanted, demand)
    return arrivals


def _first_of_part(before: int, total: int) -> int:
    """The number of the first request that is simulated, of `total`, `before` the busiest time."""
    return min(max(0, before - MAX_REQUESTS // 2), max(0, total - MAX_REQUESTS))


def _counts(bins: Sequence[RateBin]) -> Iterator[tuple[RateBin, int]]:
    """The number of requests of each bin. What is left of a request counts for the next bin."""
    owed = 0.0
    for one in bins:
        owed += one.rate * one.seconds
        count = math.floor(owed + 1e-9)
        owed -= count
        yield one, count


def _drawn_arrivals(one: RateBin, count: int, demand: Demand) -> list[Arrival]:
    """Requests at the rate of a bin, all of them within its time."""
    if not count:
        return []
    random = Random(f"{demand.seed}/replay/{one.start_s}")  # noqa: S311
    # The rate of the bin, or that of the requests that earlier bins left.
    rate = max(one.rate, count / one.seconds)
    times = gamma_arrivals(rate, demand.burstiness)(random, count)
    scale = one.seconds / max(one.seconds, times[-1])
    return [demand.draw_arrival(random, one.start_s + scale * at) for at in times]


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
