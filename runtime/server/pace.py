"""How fast something goes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

_SPAN_S = 30.0  # what is longer ago counts little


class Pace:
    """How many there were a second, lately. clock: seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        """Forget what was: nothing could be done meanwhile."""
        self._count = self._seconds = 0.0  # both with the same weights
        self._at = self._clock()

    def add(self, count: int) -> None:
        """So many more."""
        now = self._clock()
        kept = math.exp((self._at - now) / _SPAN_S)
        self._count = self._count * kept + count
        self._seconds = self._seconds * kept + _SPAN_S * (1 - kept)
        self._at = now

    def seconds(self, count: int) -> float | None:
        """How long so many take; None when that is not known."""
        return count * self._seconds / self._count if self._count else None
