"""The time of an engine's step, fitted to a report of bench or estimated from a data sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmkit.bench.bench_report import RequestMetrics
from llmkit.common.errors import InputError

# The fewest measured times that a fit needs.
MIN_ROWS = 8
# Assumed times of launches and scheduling in a step, and of one all-reduce.
STEP_OVERHEAD_S = 0.3e-3
ALL_REDUCE_S = 10e-6
# The assumed share of a GPU's peaks that is reached.
EFFICIENCY = 0.7


@dataclass(frozen=True)
class FittedStepTime:
    """fixed_s + request_s * requests + context_s * context + prompt_s * prompt."""

    fixed_s: float
    request_s: float
    context_s: float
    prompt_s: float
    error: float  # median error of a request's time, as a share

    def seconds(self, requests: int, context: int, prompt: int) -> float:
        """See StepTime."""
        return (
            self.fixed_s
            + requests * self.request_s
            + context * self.context_s
            + prompt * self.prompt_s
        )


@dataclass(frozen=True)
class RooflineStepTime:
    """The longer of reading (weights, keys and values) and computing, at the peaks of `tp` GPUs."""

    weight_bytes: int  # of one rank
    kv_bytes: float  # of a token, on one rank
    token_flops: float  # of a token, on one rank
    layers: int
    tp: int
    flops_per_s: float
    bytes_per_s: float
    state_bytes: float = 0.0  # of a request's recurrent state, on one rank

    def seconds(self, requests: int, context: int, prompt: int) -> float:
        """See StepTime."""
        moved = self.weight_bytes + (context + prompt) * self.kv_bytes
        moved += 2 * requests * self.state_bytes  # read and written
        read = moved / self.bytes_per_s
        computed = (requests + prompt) * self.token_flops / self.flops_per_s
        all_reduces = 2 * self.layers * ALL_REDUCE_S if self.tp > 1 else 0.0
        return STEP_OVERHEAD_S + all_reduces + max(read, computed)


def fit_step_time(runs: Sequence[Sequence[RequestMetrics]]) -> FittedStepTime:
    """Least squares over the requests of runs, each of one replica.

    A row is a request's time per token, or the time to the first token of a request that ran alone.
    Raises InputError for too few rows.
    """
    rows = []
    times = []
    for requests in runs:
        spans = _Spans(requests)
        for index, request in enumerate(requests):
            if request.output_tokens > 1:
                rows.append(spans.decoding(index))
                times.append((request.e2e_s - request.ttft_s) / (request.output_tokens - 1))
            if spans.alone(index):
                rows.append((1.0, 0.0, 0.0, float(request.prompt_tokens - request.cached_tokens)))
                times.append(request.ttft_s)
    if len(rows) < MIN_ROWS or min(times, default=0.0) <= 0:
        todo = "Measure with `llmkit bench MODEL --mode sweep -o FILE`"
        raise InputError(
            f"the report holds {len(rows)} times of requests",
            f"At least {MIN_ROWS} are needed",
            todo,
        )
    measured = np.array(times)
    matrix = np.array(rows) / measured[:, None]  # so that the error is a share of each time
    factors = _least_squares(matrix)
    error = float(np.median(np.abs(matrix @ factors - 1)))
    fixed_s, request_s, context_s, prompt_s = map(float, factors)
    return FittedStepTime(fixed_s, request_s, context_s, prompt_s, error)


def _least_squares(matrix: np.ndarray) -> np.ndarray:
    """The x >= 0 that makes matrix @ x close to ones.

    Negative factors are removed one after the other, the most negative first.
    """
    kept = list(range(matrix.shape[1]))
    while True:
        solution = np.linalg.lstsq(matrix[:, kept], np.ones(len(matrix)), rcond=None)[0]
        if solution.min() >= 0:
            break
        kept.pop(int(solution.argmin()))
    factors = np.zeros(matrix.shape[1])
    factors[kept] = solution
    return factors


class _Spans:
    """The times in which the requests of one run waited and decoded."""

    def __init__(self, requests: Sequence[RequestMetrics]) -> None:
        table = np.array([(r.sent_s, r.sent_s + r.ttft_s, r.sent_s + r.e2e_s) for r in requests])
        self.sent, self.first, self.last = table.T
        self.context = np.array([r.prompt_tokens + r.output_tokens / 2 for r in requests])
        self.prompt = np.array([float(r.prompt_tokens - r.cached_tokens) for r in requests])
        self.steps = np.array([max(1, r.output_tokens - 1) for r in requests])

    def decoding(self, index: int) -> tuple[float, float, float, float]:
        """The average step in which a request decoded.

        It is a row of the fit: 1, requests, context tokens, prompt tokens.
        """
        begin = self.first[index]
        end = self.last[index]
        share = _overlap(self.first, self.last, begin, end) / (end - begin)
        computed = (
            _overlap(self.sent, self.first, begin, end)
            / np.maximum(self.first - self.sent, 1e-9)
            * self.prompt
        )
        return (
            1.0,
            float(share.sum()),
            float((share * self.context).sum()),
            float(computed.sum() / self.steps[index]),
        )

    def alone(self, index: int) -> bool:
        """Whether no other request ran before this one's first token."""
        others = _overlap(self.sent, self.last, self.sent[index], self.first[index]) > 0
        return int(others.sum()) == 1


def _overlap(begins: np.ndarray, ends: np.ndarray, begin: float, end: float) -> np.ndarray:
    shared: np.ndarray = np.minimum(ends, end) - np.maximum(begins, begin)
    return shared.clip(min=0.0)
