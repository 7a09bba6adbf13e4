"""What `--mode slo` found at a target, as the report stores it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SloProbe:
    """A load that was run. Latencies and throughput are those of its longest run."""

    load: float  # requests a second, or clients
    verdict: str  # "kept", "missed", "grows" (the queue does) or "undecided"
    is_pilot: bool  # one short run, which does not count for the attainment
    requests: int  # that were sent in all runs
    failed: int  # without a complete answer, of the requests that count
    attained: float  # the share within every bound, of the requests that count
    attained_low: float  # its interval
    attained_high: float
    growth: float  # seconds that the time to first token grows in a second
    output_tps: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    e2e_p50_ms: float
    tpot_p90_ms: float | None = None  # None: single tokens

    @property
    def interactivity(self) -> float | None:
        """Tokens a second of a user, of the slowest tenth."""
        return 1000 / self.tpot_p90_ms if self.tpot_p90_ms else None


@dataclass(frozen=True)
class SloResult:
    """The most load under an SLO. Loads are requests a second, or clients."""

    search: str  # "rate" or "concurrency"
    attained: float  # the share of requests that must keep every bound
    bounds_s: dict[str, float]  # by latency
    load: float = 0.0  # at which just that share keeps the bounds; 0: no load does
    low: float = 0.0  # the 95 % interval
    high: float = math.inf  # infinite: no load missed the bounds
    shown_low: float = 0.0  # the highest load that was shown, on its own, to keep the bounds
    shown_high: float = math.inf  # the lowest that was shown to miss them
    probes: list[SloProbe] = field(default_factory=list)  # by load
    missed_alone: str = ""  # which bounds a single request misses, with what was measured

    @property
    def unit(self) -> str:
        """Of the loads."""
        return "requests/s" if self.search == "rate" else "clients"

    @property
    def undecided(self) -> list[float]:
        """The loads that no number of requests allowed decided."""
        return [
            probe.load
            for probe in self.probes
            if probe.verdict == "undecided" and not probe.is_pilot
        ]
