"""The search for the most load under an SLO: bracket, bisect, and say what stays undecided.

A load is a number of requests a second, or of clients. Loads are compared by their ratio.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from llmkit.bench.bench_metrics import RunResult
from llmkit.bench.slo.attainment import (
    Attainment,
    LoadRun,
    Verdict,
    judge_load,
    judge_run,
    mean_correlation,
    requests_to_decide,
)
from llmkit.bench.slo.threshold_fit import LoadCounts, Threshold, fit_threshold

# Runs a load: the load, the number of requests, and the run's index among those of the load.
Measure = Callable[[float, int, int], RunResult]

PILOT_REQUESTS = 64  # of a run that only looks for a load that misses the bounds
MIN_CLIENTS = 256  # that are tried, even if one run of them needs all requests of a load
_MIN_SENT_SHARE = 0.9  # of the wanted rate, below which the load client is the limit
_MIN_RUN_LATENCIES = 10.0  # a run lasts at least so many times the latency of a single request
_MIN_REQUESTS_PER_CLIENT = 8
_FIRST_SHARE = 5  # a load's first run has a fifth of its requests
_MAX_STEPS = 24  # of doubling or halving
_MAX_DISTANCE = 8  # from the threshold, in steps of half of the precision
_MIN_UTILIZATION = 0.05  # of one request at a time


@dataclass(frozen=True)
class SloGoal:
    """What is searched for, and how long."""

    slo: Mapping[str, float]  # upper bounds in seconds by latency
    attained: float  # the share of requests that must keep every bound
    is_rate: bool  # requests a second (open loop), or clients (closed loop)
    precision: float  # the search ends when the interval is this narrow, as a share
    max_probes: int
    max_requests: int  # of one load

    def requests_of_a_run(self, load: float, latency_s: float = 0.0) -> int:
        """The requests of the first run of a load: enough to decide, and for a steady state."""
        return self.steady_requests(load, requests_to_decide(self.attained), latency_s)

    def steady_requests(self, load: float, count: int, latency_s: float) -> int:
        """At least `count` requests, and enough for a run that reaches its steady state."""
        if self.is_rate:
            return max(count, math.ceil(load * _MIN_RUN_LATENCIES * latency_s))
        return max(count, math.ceil(_MIN_REQUESTS_PER_CLIENT * load))


@dataclass
class Probe:
    """A load with its runs and what they say."""

    load: float
    runs: list[LoadRun] = field(default_factory=list)
    results: list[RunResult] = field(default_factory=list)  # of the same runs
    verdict: Verdict = "undecided"
    is_pilot: bool = True  # too short to show that the bounds are kept

    @property
    def attainment(self) -> Attainment:
        """Of all runs together."""
        return Attainment.of(self.runs)


@dataclass(frozen=True)
class FoundLoad:
    """The result of a search."""

    load: float  # at which exactly the wanted share keeps the SLO; 0: no load keeps it
    low: float  # the 95 % interval
    high: float  # infinite: no load missed the SLO
    # Loads that were run: the highest that was shown, on its own, to keep the SLO (0: none was),
    # and the lowest that was shown to miss it (infinite: none was).
    shown_low: float
    shown_high: float


def default_max_requests(attained: float) -> int:
    """Requests of one load that usually decide on it."""
    return 4 * max(PILOT_REQUESTS, requests_to_decide(attained))


@dataclass
class SloSearch:
    """The search on one target. `find` runs it."""

    goal: SloGoal
    measure: Measure
    latency_s: float  # of a single request, from sending to the last token
    on_probe: Callable[[Probe], None] = lambda probe: None  # called after each probe
    probes: dict[float, Probe] = field(default_factory=dict)  # by load

    def find(self, start: float) -> FoundLoad:
        """Search for the most load, beginning near `start`."""
        self._bracket(self._rounded(start))
        while len(self._full_loads) < self.goal.max_probes:
            load = self._next_load()
            if load is None:
                break
            self.probe(load)
            if self.lowest_missing == math.inf and self.can_raise(load):
                self._find_missing(load)
        shown_low = max(self._loads("kept"), default=0.0)
        shown_high = min(self._loads("missed", "grows"), default=math.inf)
        threshold = self.threshold() or Threshold(shown_low, shown_low, shown_high)
        load = self._rounded(threshold.load) if threshold.load else 0.0
        low = threshold.low
        high = threshold.high
        if not self.goal.is_rate and load:  # whole clients
            load = max(1.0, math.floor(threshold.load))
            low = min(load, math.ceil(low))
            high = math.ceil(high) if high < math.inf else high
        return FoundLoad(load, low, high, shown_low, shown_high)

    def threshold(self) -> Threshold | None:
        """The load that keeps the SLO exactly; None while no load seems to keep, or to miss it."""
        low = self.highest_keeping
        high = self.lowest_missing
        if low == 0 or high == math.inf:
            return None
        shown_low = max(self._loads("kept"), default=low / 2)
        shown_high = min(self._loads("missed", "grows"), default=high * 2)
        if self.probes[high].verdict == "grows":
            # Where the queue begins to grow, misses of a run say little of those of a longer one.
            return Threshold(math.sqrt(low * high), min(shown_low, low), max(shown_high, high))
        full = [probe for probe in self.probes.values() if not probe.is_pilot]
        correlation = mean_correlation([run for probe in full for run in probe.runs])
        counts = []
        for probe in full:
            counted = sum(run.counted for run in probe.runs) / correlation
            kept = sum(run.kept for run in probe.runs) / correlation
            if probe.verdict != "grows":
                counts.append(LoadCounts(probe.load, kept, counted - kept))
        near = math.sqrt(low * high)
        # A little beyond what single loads have shown, in case that one of them is wrong.
        low_end = shown_low / (1 + self.goal.precision)
        high_end = shown_high * (1 + self.goal.precision)
        return fit_threshold(counts, self.goal.attained, near, low_end, high_end)

    @property
    def highest_keeping(self) -> float:
        """The highest load below all that miss the SLO by their estimate; 0: none."""
        missing = self.lowest_missing
        return max((load for load in self._full_loads if load < missing), default=0.0)

    @property
    def lowest_missing(self) -> float:
        """The lowest load that misses the SLO by its estimate, shown or not; infinite: none."""
        loads = (load for load, probe in self.probes.items() if self._seems_missed(probe))
        return min(loads, default=math.inf)

    @property
    def undecided(self) -> list[float]:
        """The loads that all their requests did not decide."""
        return sorted(self._loads("undecided"))

    def can_raise(self, load: float) -> bool:
        """Whether requests arrived as fast as they should have: the client is not the limit."""
        if not self.goal.is_rate:
            return load < max(MIN_CLIENTS, self.goal.max_requests // _MIN_REQUESTS_PER_CLIENT // 2)
        timelines = self.probes[load].results[-1].timelines
        sent_s = [timeline.sent_s for timeline in timelines]
        span_s = max(sent_s) - min(sent_s)
        return span_s == 0 or (len(sent_s) - 1) / span_s > _MIN_SENT_SHARE * load

    def pilot(self, load: float) -> Probe:
        """A short run of a load. Its verdict is undecided unless the bounds are clearly missed."""
        probe = self.probes.setdefault(load, Probe(load))
        self._run(probe, self._run_requests(load, PILOT_REQUESTS))
        if probe.attainment.decides(self.goal.attained) is False:
            probe.verdict = "missed"
        elif probe.runs[-1].grows:
            probe.verdict = "grows"
        self.on_probe(probe)
        return probe

    def probe(self, load: float) -> Probe:
        """Run a load until its verdict is known, or the requests of one load are used up."""
        probe = self.probes[load] = Probe(load, is_pilot=False)
        first = max(PILOT_REQUESTS, requests_to_decide(self.goal.attained))
        count = self._run_requests(load, max(first, self.goal.max_requests // _FIRST_SHARE))
        num_growing = 0
        while True:
            self._run(probe, count)
            verdict = judge_load(probe.runs, self.goal.attained, self.goal.precision / 5)
            num_growing = num_growing + 1 if verdict == "grows" else 0
            # A queue may grow for a while by chance; not for longer, once more.
            if verdict in ("kept", "missed") or num_growing == 2:
                probe.verdict = verdict
                break
            # All that is left in one run: every run begins with an empty queue.
            left = self.goal.max_requests - sum(run.sent for run in probe.runs)
            if left < count:
                break
            count = left
        if probe.verdict == "undecided" and probe.runs[-1].grows:
            probe.verdict = "grows"
        self.on_probe(probe)
        return probe

    def _run(self, probe: Probe, count: int) -> None:
        result = self.measure(probe.load, count, len(probe.runs))
        probe.results.append(result)
        probe.runs.append(judge_run(result, self.goal.slo, self.goal.is_rate))

    def _run_requests(self, load: float, count: int) -> int:
        return self.goal.steady_requests(load, count, self.latency_s)

    def _bracket(self, start: float) -> None:
        """Pilots of a load that does not seem to miss the SLO, and of a higher one that does."""
        if not self._seems_missed(self.pilot(start)):
            if self.can_raise(start):
                self._find_missing(start)
            return
        load = start
        for _ in range(_MAX_STEPS):
            lower = self._rounded(load / 2)
            if lower == load or not self._seems_missed(self.pilot(lower)):
                return
            load = lower

    def _find_missing(self, load: float) -> None:
        """Pilots of higher and higher loads, until one seems to miss the SLO."""
        for _ in range(_MAX_STEPS):
            load = self._rounded(2 * load)
            if self._seems_missed(self.pilot(load)) or not self.can_raise(load):
                return

    def _seems_missed(self, probe: Probe) -> bool:
        """Whether a load misses the SLO, shown or by the estimate of runs that do not show it."""
        if probe.verdict == "undecided" and not probe.is_pilot:
            return probe.attainment.share < self.goal.attained
        return probe.verdict in ("missed", "grows")

    def _next_load(self) -> float | None:
        """The next load to probe; None: the search has ended.

        First the interval between the highest load that seems to keep the SLO and the lowest that
        seems to miss it is halved. Then loads around the threshold are probed until its interval
        is as narrow as wanted.
        """
        high = self.lowest_missing
        low = max((load for load in self.probes if load < high), default=0.0)
        if low == 0:
            lower = self._rounded(high / 2)
            return lower if self._lowest_useful < lower < high else None
        if high < math.inf:
            middle = self._middle(low, high)
            if middle is not None:
                return middle
        for load in (low, high):
            if load < math.inf and self.probes[load].is_pilot:
                return load
        threshold = self.threshold()
        if threshold is None or threshold.high / threshold.low <= 1 + self.goal.precision:
            return None
        return self._near(threshold.load)

    def _near(self, center: float) -> float | None:
        """The load nearest to `center` that is half of the precision away from all that were run.

        None: all loads near it were run.
        """
        step = 1 + self.goal.precision / 2
        for distance in range(_MAX_DISTANCE):
            for load in (
                self._rounded(center * step**distance),
                self._rounded(center / step**distance),
            ):
                apart = [max(load, other) / min(load, other) for other in self._full_loads]
                if min(apart) >= math.sqrt(step):
                    return load
        return None

    def _middle(self, low: float, high: float) -> float | None:
        """The load in the middle; None where the two are as near as wanted."""
        middle = self._rounded(math.sqrt(low * high))
        is_wide = high / low > 1 + self.goal.precision
        return middle if is_wide and low < middle < high else None

    @property
    def _lowest_useful(self) -> float:
        """The lowest load worth a probe: requests that hardly ever meet, or one client."""
        return _MIN_UTILIZATION / self.latency_s if self.goal.is_rate else 0.5

    @property
    def _full_loads(self) -> list[float]:
        return [load for load, probe in self.probes.items() if not probe.is_pilot]

    def _loads(self, *verdicts: Verdict) -> list[float]:
        """The loads that were run in full, with one of these verdicts."""
        return [load for load in self._full_loads if self.probes[load].verdict in verdicts]

    def _rounded(self, load: float) -> float:
        """A rate with four digits, or a whole number of clients."""
        if self.goal.is_rate:
            return float(f"{load:.4g}")
        return float(max(1, round(load)))
