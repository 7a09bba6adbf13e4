"""A queue in front of engines that batch continuously, step by step: what requests would wait and when tokens come."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from llmkit.bench.metrics import RequestTimeline


class StepTime(Protocol):
    """How long a step of one replica takes."""

    def seconds(self, requests: int, context: int, prompt: int) -> float:
        """Of a step that decodes so many `requests` with `context` tokens before them, and `prompt` tokens beside."""


@dataclass(frozen=True)
class Arrival:
    """A request: when it comes, in seconds, and its tokens. cached: of the prompt, those that need no computing."""

    at_s: float
    prompt: int
    output: int
    cached: int = 0


@dataclass(frozen=True)
class Limits:
    """Of a replica's engine. kv_tokens: that its cache holds."""

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    kv_tokens: int = 1 << 60


@dataclass
class Replica:
    """One engine: prompts in the order in which they come, in chunks of what a step has left beside the decodes.

    A request is let in when its prompt fits the cache; its answer is assumed to fit too where it did at admission, so
    preemption is not simulated: `peak_kv` above the limit tells that there would be some.
    """

    step: StepTime
    limits: Limits
    clock: float = 0.0
    peak_kv: int = 0  # tokens
    busy_s: float = 0.0
    done: list[RequestTimeline] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._waiting: deque[_Request] = deque()
        self._prefilling: deque[_Request] = deque()
        self._ends: list[tuple[int, int, _Request]] = []  # by the decode step that is their last
        self._steps = 0  # that decoded
        self._context = 0  # tokens before the requests that decode
        self._kv = 0
        self._count = 0

    @property
    def in_flight(self) -> int:
        """Requests that came and are not finished."""
        return len(self._waiting) + len(self._prefilling) + len(self._ends)

    def add(self, arrival: Arrival) -> None:
        """A request comes. Not before the last one, and after `advance` to its time."""
        self.clock = max(self.clock, arrival.at_s)
        self._count += 1
        self._waiting.append(_Request(arrival, self._count, arrival.prompt - arrival.cached))

    def advance(self, until_s: float) -> None:
        """Run steps until none is left to begin before `until_s`."""
        while self.in_flight and self.clock < until_s:
            self._run()

    def _run(self) -> None:
        limits, decoding = self.limits, len(self._ends)
        budget = limits.max_num_batched_tokens - decoding
        while (
            self._waiting
            and decoding + len(self._prefilling) < limits.max_num_seqs
            and (self._kv + self._waiting[0].arrival.prompt <= limits.kv_tokens or not self._kv)
        ):
            self._kv += self._waiting[0].arrival.prompt
            self._prefilling.append(self._waiting.popleft())
        computed, first = 0, []
        while self._prefilling and computed < budget:
            request = self._prefilling[0]
            part = min(request.left, budget - computed)
            request.left -= part
            computed += part
            if request.left:
                break
            first.append(self._prefilling.popleft())
        spent = self.step.seconds(decoding, self._context, computed)
        self.clock += spent
        self.busy_s += spent
        self._decoded(decoding)
        for request in first:
            self._first_token(request)
        self.peak_kv = max(self.peak_kv, self._kv)

    def _decoded(self, decoding: int) -> None:
        """Each request that decodes has a token more; those with their last one are finished."""
        if not decoding:
            return
        self._steps += 1
        self._context += decoding
        self._kv += decoding
        while self._ends and self._ends[0][0] <= self._steps:
            request = heapq.heappop(self._ends)[2]
            total = request.arrival.prompt + request.arrival.output
            self._context -= total - 1
            self._kv -= total - 1
            self._finish(request)

    def _first_token(self, request: _Request) -> None:
        request.first_s = self.clock
        output, prompt = request.arrival.output, request.arrival.prompt
        if output == 1:
            self._kv -= prompt
            self._finish(request)
            return
        heapq.heappush(self._ends, (self._steps + output - 1, request.number, request))
        self._context += prompt

    def _finish(self, request: _Request) -> None:
        arrival = request.arrival
        arrivals = (request.first_s, self.clock) if arrival.output > 1 else (request.first_s,)
        timeline = RequestTimeline(
            str(request.number), arrival.at_s, arrivals, arrival.prompt, arrival.cached, arrival.output
        )
        self.done.append(timeline)


@dataclass
class _Request:
    arrival: Arrival
    number: int
    left: int  # tokens of the prompt that are not computed
    first_s: float = 0.0


def simulate(arrivals: Sequence[Arrival], replicas: Sequence[Replica]) -> list[RequestTimeline]:
    """Send each request to the replica with the fewest in flight; what became of them, once all are finished."""
    for arrival in arrivals:
        for replica in replicas:
            replica.advance(arrival.at_s)
        min(replicas, key=lambda one: one.in_flight).add(arrival)
    for replica in replicas:
        replica.advance(float("inf"))
    return [timeline for replica in replicas for timeline in replica.done]
