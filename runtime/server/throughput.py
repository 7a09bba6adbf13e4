"""Estimates a rate from recent events."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

_DECAY_S = 30.0  # time constant: older events count little


class Throughput:
    """Events per second, as an exponentially weighted average. `clock` returns seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        """Start again after a time without work, which must not lower the rate."""
        # Both sums have the same weights, so that their ratio is the rate.
        self._count = 0.0
        self._seconds = 0.0
        self._updated_at = self._clock()

    def add(self, count: int) -> None:
        """Record that `count` events have happened since the last call."""
        now = self._clock()
        weight = math.exp((self._updated_at - now) / _DECAY_S)
        self._count = self._count * weight + count
        self._seconds = self._seconds * weight + _DECAY_S * (1 - weight)
        self._updated_at = now

    def estimate_seconds(self, count: int) -> float | None:
        """Return how long `count` events will take; None when there is no data."""
        return count * self._seconds / self._count if self._count else None
