"""A server with known times, simulated and over HTTP, and the exact rate that keeps a bound."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import numpy

from llmkit.bench.bench_metrics import RequestTimeline, RunResult
from llmkit.bench.workload import WorkloadRequest, group_conversations

MAX_LOAD = 0.99  # of the slots, up to which the queue is calculated


class FixedTimeServer:
    """Slots with one queue: a request holds a slot until its last token.

    Its first token comes `ttft_s` after it got a slot, and each further token `tpot_s` later.
    """

    def __init__(self, slots: int, ttft_s: float, tpot_s: float) -> None:
        self.slots = slots
        self.ttft_s = ttft_s
        self.tpot_s = tpot_s
        self.requests = 0  # that it was sent

    def service_s(self, output_tokens: int) -> float:
        """How long a request holds a slot."""
        return self.ttft_s + (output_tokens - 1) * self.tpot_s

    def run(self, requests: Sequence[WorkloadRequest], max_concurrency: int) -> RunResult:
        """What a load client measures, in virtual time. See `Backend.run`."""
        self.requests += len(requests)
        assert len(group_conversations(requests)) == len(requests), "one turn each"
        clients = [0.0] * min(max_concurrency, len(requests))  # when each is free
        slots = [0.0] * self.slots
        timelines = []
        for request in requests:
            sent_s = max(heapq.heappop(clients), request.send_at_s or 0.0)
            start_s = max(sent_s, heapq.heappop(slots))
            first_s = start_s + self.ttft_s
            arrivals = tuple(first_s + index * self.tpot_s for index in range(request.max_tokens))
            heapq.heappush(slots, arrivals[-1])
            heapq.heappush(clients, arrivals[-1])
            timelines.append(
                RequestTimeline(
                    request.id, sent_s, arrivals, len(request.prompt), 0, request.max_tokens
                )
            )
        wall_s = max(timeline.arrivals_s[-1] for timeline in timelines)
        return RunResult(wall_s, timelines)


def share_without_longer_wait(rate: float, slots: int, service_s: float, wait_s: float) -> float:
    """P(W <= wait_s) in the M/D/c queue, exactly.

    G. J. Franx, "A simple solution for the M/D/c waiting time distribution", Operations Research
    Letters 29 (2001).
    """
    offered = rate * service_s
    if offered >= slots:
        return 0.0
    intervals = math.floor(wait_s / service_s) + 1
    remainder = rate * (intervals * service_s - wait_s)
    queue = _queue_lengths(offered, slots)
    cumulative = numpy.cumsum(queue)
    most = intervals * slots - 1
    total = 0.0
    for index in range(most + 1):
        poisson = math.exp(-remainder + index * math.log(remainder) - math.lgamma(index + 1))
        total += float(cumulative[min(most - index, len(cumulative) - 1)]) * poisson
    return total


def _queue_lengths(offered: float, slots: int) -> numpy.ndarray:
    """The stationary probabilities of 0, 1, 2 ... waiting requests."""
    # One service time later, all that were in service have left, and arrivals have come.
    # Long queues are the rarer by about exp(-2 * idle) for each further request.
    idle = 1 - offered / slots
    size = int(slots + 15 / idle + 10 * math.sqrt(offered) + 20)
    states = numpy.arange(size)
    logs = numpy.array([math.lgamma(state + 1) for state in states])
    arrivals = numpy.exp(-offered + states * math.log(offered) - logs)
    transitions = numpy.zeros((size, size))
    for state in states:
        left = max(0, state - slots)
        transitions[state, left:] = arrivals[: size - left]
        transitions[state, -1] += 1 - transitions[state].sum()
    system = transitions.T - numpy.eye(size)
    system[-1] = 1.0
    wanted = numpy.zeros(size)
    wanted[-1] = 1.0
    probabilities = numpy.linalg.solve(system, wanted)
    return numpy.concatenate(([probabilities[: slots + 1].sum()], probabilities[slots + 1 :]))


def highest_rate(slots: int, service_s: float, wait_s: float, share: float) -> float:
    """The rate at which exactly `share` of the requests wait no longer than `wait_s`."""
    low = 0.0
    high = MAX_LOAD * slots / service_s
    if share_without_longer_wait(high, slots, service_s, wait_s) >= share:
        return high
    for _ in range(40):
        middle = (low + high) / 2
        if share_without_longer_wait(middle, slots, service_s, wait_s) >= share:
            low = middle
        else:
            high = middle
    return low
