"""The timestamps of one answer, from which metrics, traces and the request log are computed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class RequestTimes:
    """When what happened to one answer: perf_counter seconds, 0 until it happens."""

    arrived: float = 0.0  # the HTTP request; set when the answer is sent to the engine
    sent: float = 0.0  # to the engine process
    first_token: float = 0.0
    last_token: float = 0.0  # the latest one so far
    queue_s: float = 0.0  # seconds in the engine's queue; set with the first output
    num_tokens: int = 0  # so far

    @property
    def ttft_s(self) -> float:
        """Seconds from the request's arrival to the first token."""
        return self.first_token - self.arrived

    @property
    def prefill_s(self) -> float:
        """Seconds from the first step to the first token."""
        return max(0.0, self.first_token - self.sent - self.queue_s)

    @property
    def decode_s(self) -> float:
        """Seconds from the first to the last token."""
        return self.last_token - self.first_token
