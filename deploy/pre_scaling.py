"""Replicas ahead of a daily or weekly pattern: how many each hour needs, as cron triggers of KEDA.

KEDA takes the largest number of all triggers that are active. A replica takes a while until it is
ready, so that each minute requests what the hours need that begin before a replica which starts now
would be ready.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from llmkit.common.errors import InputError, UsageError
from llmkit.common.progress import Progress
from llmkit.deploy.capacity_planning import Demand, Engine, fewest_replicas, plan_replicas
from llmkit.deploy.load_pattern import HOURS, Period

DAY_MINUTES = 24 * 60
# Rates are rounded up to powers of this number, and replicas planned for each of these.
LEVEL_RATIO = 1.05
KEDA_MAX_REPLICAS = 100  # KEDA's maxReplicaCount of an object that has none


class CronWindow(NamedTuple):
    """A time of each day, or of some days of the week, with its number of replicas."""

    start: int  # minute of the day
    end: int  # minute of the day; before the start: on a later day
    days: tuple[int, ...]  # on which it starts, 0 is Monday; (): each day
    days_after: int  # the end's day, after that of the start
    replicas: int

    def cron(self, minute: int, days_after: int) -> str:
        """The cron expression of a minute of a day so many days after the start."""
        # Cron counts days from Sunday.
        days = sorted((day + days_after + 1) % 7 for day in self.days)
        return f"{minute % 60} {minute // 60} * * {','.join(map(str, days)) or '*'}"


@dataclass(frozen=True)
class ReplicaSchedule:
    """The replicas that each hour needs, and those that each minute requests."""

    period: Period
    time_zone: str
    hours: tuple[int, ...]  # replicas that the rate of each hour needs
    lead_minutes: int  # from requesting a replica until it is ready

    @cached_property
    def requested(self) -> list[int]:
        """The replicas that each minute of the period requests."""
        minutes = len(self.hours) * 60
        return [
            max(
                self.hours[hour % len(self.hours)]
                for hour in range(minute // 60, (minute + self.lead_minutes) // 60 + 1)
            )
            for minute in range(minutes)
        ]

    @cached_property
    def ready(self) -> list[int]:
        """The replicas that are ready in each minute: requested all the lead time before it."""
        requested = self.requested
        return [
            min(
                requested[(minute - before) % len(requested)]
                for before in range(min(self.lead_minutes, len(requested)) + 1)
            )
            for minute in range(len(requested))
        ]

    @cached_property
    def base(self) -> int:
        """The fewest replicas that any minute requests."""
        return min(self.requested)

    @property
    def mean(self) -> float:
        """The mean number of requested replicas."""
        return sum(self.requested) / len(self.requested)

    def windows(self) -> list[CronWindow]:
        """The times with more replicas than `base`, in the order of their starts.

        Times of the same minutes on several days of a week are one window.
        """
        days_of: dict[CronWindow, list[int]] = defaultdict(list)
        for start, length, count in self._runs():
            if count == self.base:
                continue
            end = start + length
            one = CronWindow(
                start % DAY_MINUTES,
                end % DAY_MINUTES,
                (),
                end // DAY_MINUTES - start // DAY_MINUTES,
                count,
            )
            if self.period == "week" and length >= DAY_MINUTES:
                # With several days, the end of one such window could be that of another.
                one = one._replace(days=(start // DAY_MINUTES,))
            days_of[one].append(start // DAY_MINUTES)
        windows = []
        for one, days in days_of.items():
            if self.period == "week":
                one = one._replace(days=tuple(sorted(days)))
            windows.append(one)
        return sorted(windows, key=lambda one: (one.days[:1], one.start))

    def _runs(self) -> list[tuple[int, int, int]]:
        """Start, length in minutes and replicas of each time without a change."""
        requested = self.requested
        minutes = len(requested)
        changes = [
            minute for minute in range(minutes) if requested[minute] != requested[minute - 1]
        ]
        if not changes:
            return [(0, minutes, requested[0])]
        following = [*changes[1:], changes[0] + minutes]
        return [
            (start, end - start, requested[start])
            for start, end in zip(changes, following, strict=True)
        ]


def plan_schedule(
    engine: Engine,
    demand: Demand,
    rates: Sequence[float],
    period: Period,
    time_zone: str,
    lead_s: float,
    min_replicas: int,
    progress: Progress,
) -> ReplicaSchedule:
    """The replicas for the rate of each hour of a period, at least `min_replicas`.

    Raises UsageError when no number of replicas keeps the bounds.
    """
    assert len(rates) == HOURS[period]
    levels = sorted({_rounded_up(rate) for rate in rates if rate > 0})
    needed = {0.0: min_replicas}
    for rate, replicas in _replicas_of_levels(engine, demand, levels, progress).items():
        needed[rate] = max(min_replicas, replicas)
    return ReplicaSchedule(
        period,
        time_zone,
        tuple(needed[_rounded_up(rate)] for rate in rates),
        math.ceil(lead_s / 60),
    )


def _replicas_of_levels(
    engine: Engine, demand: Demand, levels: Sequence[float], progress: Progress
) -> dict[float, int]:
    """The fewest replicas for each of these rates, which rise.

    More load never needs fewer replicas. So what is found for two levels bounds the search for
    those between them, and where both need the same, nothing is left to search.
    """
    if not levels:
        return {}

    def at(rate: float) -> Demand:
        return replace(demand, rate=rate)

    progress.start("replicas", len(levels), "rates")
    highest = plan_replicas(engine, at(levels[-1]))
    if highest is None:
        raise UsageError(
            f"no number of replicas keeps the bounds of --slo at {levels[-1]:g} requests a second",
            todo="Loosen them, or take a faster GPU or TP",
        )
    replicas = [highest.replicas] * len(levels)
    replicas[0] = fewest_replicas(engine, at(levels[0]), 0, highest.replicas)
    progress.advance(min(2, len(levels)), f"{levels[-1]:g}/s: {highest.replicas}")
    between = [(0, len(levels) - 1)]
    while between:
        low, high = between.pop()
        if high - low < 2:
            continue
        middle = (low + high) // 2
        if replicas[low] == replicas[high]:
            replicas[low + 1 : high] = [replicas[low]] * (high - low - 1)
            progress.advance(high - low - 1, f"{levels[high]:g}/s: {replicas[high]}")
            continue
        replicas[middle] = fewest_replicas(
            engine, at(levels[middle]), replicas[low] - 1, replicas[high]
        )
        progress.advance(1, f"{levels[middle]:g}/s: {replicas[middle]}")
        between += [(low, middle), (middle, high)]
    progress.finish()
    return dict(zip(levels, replicas, strict=True))


def _rounded_up(rate: float) -> float:
    """The rate, rounded up to a power of LEVEL_RATIO."""
    if rate <= 0:
        return 0.0
    power = math.ceil(math.log(rate, LEVEL_RATIO) - 1e-9)
    return float(f"{LEVEL_RATIO**power:.12g}")


def scaled_object(schedule: ReplicaSchedule, base: dict[str, Any], source: str) -> dict[str, Any]:
    """A KEDA ScaledObject with the schedule's cron triggers before those of `base`.

    Cron triggers of `base` are replaced, and its other triggers still add replicas for what the
    pattern does not foresee. source: where it came from, for messages. Raises InputError for an
    object that is no ScaledObject.
    """
    spec = base.get("spec")
    if base.get("kind") != "ScaledObject" or not isinstance(spec, dict):
        raise InputError(
            f"{source} has kind {base.get('kind')}", "A ScaledObject of KEDA was expected"
        )
    triggers = spec.get("triggers") or []
    most = spec.get("maxReplicaCount", KEDA_MAX_REPLICAS)
    if (
        not isinstance(triggers, list)
        or not all(isinstance(one, dict) for one in triggers)
        or not isinstance(most, int)
    ):
        raise InputError(
            f"the spec of {source} is none of KEDA's",
            "A list of triggers and a whole number as maxReplicaCount were expected",
        )
    crons = [
        {
            "type": "cron",
            "metadata": {
                "timezone": schedule.time_zone,
                "start": window.cron(window.start, 0),
                "end": window.cron(window.end, window.days_after),
                "desiredReplicas": str(window.replicas),
            },
        }
        for window in schedule.windows()
    ]
    changed = {
        "minReplicaCount": schedule.base,
        "maxReplicaCount": max(*schedule.requested, most),
        "triggers": crons + [one for one in triggers if one.get("type") != "cron"],
    }
    return base | {"spec": spec | changed}
