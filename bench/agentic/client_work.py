"""The client's own work between an answer and the next request, and what it delays.

While the client parses an answer or writes a prompt, its event loop reads nothing: answers that
arrive meanwhile are recorded late.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

_P99_SHARE = 0.01  # of the moments, those with a longer delay than the 99th percentile


class ClientWork:
    """The stretches of time in which the client's work kept its event loop busy.

    Call `end` before every await and `begin` after it: only one stretch runs at a time.
    """

    def __init__(self) -> None:
        self.stretches_s: list[float] = []
        self._began_s: float | None = None

    def begin(self) -> None:
        """Begin a stretch, unless one has begun."""
        if self._began_s is None:
            self._began_s = time.perf_counter()

    def end(self) -> None:
        """End the stretch that has begun, if any."""
        if self._began_s is not None:
            self.stretches_s.append(time.perf_counter() - self._began_s)
            self._began_s = None


def work_metrics(stretches_s: Sequence[float], wall_s: float, num_turns: int) -> dict[str, float]:
    """The mean work of a turn, and by how much the event loop is late at a moment of the run.

    Something that arrives in a stretch waits for its end: with stretches B of a run of length T the
    mean delay is sum(B^2) / 2T, and the 99th percentile x has sum(max(0, B - x)) = T / 100.
    """
    return {
        "client_turn_ms": 1000 * sum(stretches_s) / num_turns,
        "client_lag_mean_ms": 1000 * sum(b * b for b in stretches_s) / (2 * wall_s),
        "client_lag_p99_ms": 1000 * _p99_delay(stretches_s, wall_s),
    }


def _p99_delay(stretches_s: Sequence[float], wall_s: float) -> float:
    """See `work_metrics`; 0 where the client works in less than 1 % of the time."""
    ordered = sorted(stretches_s, reverse=True)
    total_s = 0.0
    for count, stretch_s in enumerate(ordered, 1):
        total_s += stretch_s
        delay_s = (total_s - _P99_SHARE * wall_s) / count
        if count == len(ordered) or delay_s >= ordered[count]:
            return max(0.0, delay_s)
    return 0.0
