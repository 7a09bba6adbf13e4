"""A simulation of queues and continuous batching: the time of each request's tokens."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from llmkit.bench.bench_metrics import RequestTimeline


class StepTime(Protocol):
    """How long a step of one replica takes."""

    def seconds(self, requests: int, context: int, prompt: int) -> float:
        """The time of a step.

        requests, context: the decoding requests, and their tokens together. prompt: prompt tokens.
        """


@dataclass(frozen=True)
class Arrival:
    """A request that arrives at `at_s` seconds, with its numbers of tokens."""

    at_s: float
    prompt: int
    output: int
    cached: int = 0  # prompt tokens in the prefix cache


@dataclass(frozen=True)
class Limits:
    """The limits of a replica's engine."""

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    kv_tokens: int = 1 << 60  # tokens that the KV cache holds


@dataclass
class SimulatedReplica:
    """One engine with chunked prefill.

    Prompts are computed in the order of arrival, with the tokens that decodes leave over. A request
    is admitted when its prompt fits in the KV cache. Preemption is not simulated: `peak_kv` above
    the limit shows that there would be some.
    """

    step: StepTime
    limits: Limits
    clock: float = 0.0
    peak_kv: int = 0  # tokens
    busy_s: float = 0.0
    finished: list[RequestTimeline] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._waiting: deque[_Request] = deque()
        self._prefilling: deque[_Request] = deque()
        # A heap of the decoding requests: (last decode step, number, request).
        self._decoding: list[tuple[int, int, _Request]] = []
        self._decode_steps = 0
        self._context_tokens = 0  # of the decoding requests
        self._kv_tokens = 0
        self._num_requests = 0

    @property
    def in_flight(self) -> int:
        """Requests that have arrived and are not finished."""
        return len(self._waiting) + len(self._prefilling) + len(self._decoding)

    def add(self, arrival: Arrival) -> None:
        """Adds a request, in the order of arrival, after `advance` to its time."""
        self.clock = max(self.clock, arrival.at_s)
        self._num_requests += 1
        self._waiting.append(_Request(arrival, self._num_requests, arrival.prompt - arrival.cached))

    def advance(self, until_s: float) -> None:
        """Runs all steps that start before `until_s`."""
        while self.in_flight and self.clock < until_s:
            self._step()

    def _step(self) -> None:
        limits = self.limits
        decoding = len(self._decoding)
        budget = limits.max_num_batched_tokens - decoding
        while (
            self._waiting
            and decoding + len(self._prefilling) < limits.max_num_seqs
            and (
                self._kv_tokens + self._waiting[0].arrival.prompt <= limits.kv_tokens
                or not self._kv_tokens
            )
        ):
            self._kv_tokens += self._waiting[0].arrival.prompt
            self._prefilling.append(self._waiting.popleft())
        prompt_tokens = 0
        prefilled = []
        while self._prefilling and prompt_tokens < budget:
            request = self._prefilling[0]
            chunk = min(request.uncomputed_tokens, budget - prompt_tokens)
            request.uncomputed_tokens -= chunk
            prompt_tokens += chunk
            if request.uncomputed_tokens:
                break
            prefilled.append(self._prefilling.popleft())
        step_s = self.step.seconds(decoding, self._context_tokens, prompt_tokens)
        self.clock += step_s
        self.busy_s += step_s
        self._decode(decoding)
        for request in prefilled:
            self._first_token(request)
        self.peak_kv = max(self.peak_kv, self._kv_tokens)

    def _decode(self, decoding: int) -> None:
        """Adds a token to each decoding request; requests with their last token finish."""
        if not decoding:
            return
        self._decode_steps += 1
        self._context_tokens += decoding
        self._kv_tokens += decoding
        while self._decoding and self._decoding[0][0] <= self._decode_steps:
            request = heapq.heappop(self._decoding)[2]
            total = request.arrival.prompt + request.arrival.output
            self._context_tokens -= total - 1
            self._kv_tokens -= total - 1
            self._finish(request)

    def _first_token(self, request: _Request) -> None:
        request.first_token_s = self.clock
        output = request.arrival.output
        prompt = request.arrival.prompt
        if output == 1:
            self._kv_tokens -= prompt
            self._finish(request)
            return
        heapq.heappush(self._decoding, (self._decode_steps + output - 1, request.number, request))
        self._context_tokens += prompt

    def _finish(self, request: _Request) -> None:
        arrival = request.arrival
        arrivals = (
            (request.first_token_s, self.clock) if arrival.output > 1 else (request.first_token_s,)
        )
        timeline = RequestTimeline(
            str(request.number),
            arrival.at_s,
            arrivals,
            arrival.prompt,
            arrival.cached,
            arrival.output,
        )
        self.finished.append(timeline)


@dataclass
class _Request:
    arrival: Arrival
    number: int
    uncomputed_tokens: int  # of the prompt
    first_token_s: float = 0.0


def simulate(
    arrivals: Sequence[Arrival],
    replicas: Sequence[SimulatedReplica],
    num_ready: Callable[[float], int] | None = None,
) -> list[RequestTimeline]:
    """Sends each request to the replica with the fewest in flight.

    num_ready: how many replicas, the first ones, take new requests at a time; the others finish
    what they have. None: all of them.

    Returns the timelines of all requests.
    """
    for arrival in arrivals:
        for replica in replicas:
            replica.advance(arrival.at_s)
        count = len(replicas) if num_ready is None else num_ready(arrival.at_s)
        min(replicas[:count], key=lambda replica: replica.in_flight).add(arrival)
    for replica in replicas:
        replica.advance(float("inf"))
    return [timeline for replica in replicas for timeline in replica.finished]
