"""How long an engine's steps take: fitted to what bench measured, or estimated from a GPU's data sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmkit.bench.report import RequestFigures
from llmkit.checkpoint.errors import InputError

LEAST_ROWS = 8  # requests that a fit needs
STEP_S = 0.3e-3  # of launches and scheduling, where nothing was measured
SUM_S = 10e-6  # of one sum over ranks, as well
EFFICIENCY = 0.7  # of a GPU's peaks, that is reached


@dataclass(frozen=True)
class Fitted:
    """fixed_s + request_s * requests + context_s * context + prompt_s * prompt."""

    fixed_s: float
    request_s: float
    context_s: float
    prompt_s: float
    error: float  # the median of what the fit is off for a request, as a share

    def seconds(self, requests: int, context: int, prompt: int) -> float:
        """See StepTime."""
        return self.fixed_s + requests * self.request_s + context * self.context_s + prompt * self.prompt_s


@dataclass(frozen=True)
class Roofline:
    """The slower of reading (weights, and keys and values) and computing, by the peaks of `tp` GPUs."""

    weight_bytes: int  # of one rank
    kv_bytes: float  # of a token, on one rank
    token_flops: float  # of a token, on one rank
    layers: int
    tp: int
    flops_per_s: float
    bytes_per_s: float

    def seconds(self, requests: int, context: int, prompt: int) -> float:
        """See StepTime."""
        read = (self.weight_bytes + (context + prompt) * self.kv_bytes) / self.bytes_per_s
        computed = (requests + prompt) * self.token_flops / self.flops_per_s
        sums = 2 * self.layers * SUM_S if self.tp > 1 else 0.0
        return STEP_S + sums + max(read, computed)


def fit(runs: Sequence[Sequence[RequestFigures]]) -> Fitted:
    """Least squares over the requests of runs, each of one replica.

    A row is the time per token of a request, or the time to the first token of one that was alone until then.
    Raises InputError when there is too little to fit.
    """
    rows, times = [], []
    for requests in runs:
        spans = _Spans(requests)
        for index, request in enumerate(requests):
            if request.output_tokens > 1:
                rows.append(spans.decoding(index))
                times.append((request.e2e_s - request.ttft_s) / (request.output_tokens - 1))
            if spans.alone(index):
                rows.append((1.0, 0.0, 0.0, float(request.prompt_tokens - request.cached_tokens)))
                times.append(request.ttft_s)
    if len(rows) < LEAST_ROWS or min(times, default=0.0) <= 0:
        todo = "Measure with `llmkit bench MODEL --mode sweep -o FILE`"
        raise InputError(f"the report holds {len(rows)} times of requests", f"At least {LEAST_ROWS} are needed", todo)
    measured = np.array(times)
    matrix = np.array(rows) / measured[:, None]  # each row counts by how far off it is as a share
    factors = _least_squares(matrix)
    error = float(np.median(np.abs(matrix @ factors - 1)))
    fixed_s, request_s, context_s, prompt_s = map(float, factors)
    return Fitted(fixed_s, request_s, context_s, prompt_s, error)


def _least_squares(matrix: np.ndarray) -> np.ndarray:
    """x >= 0 with matrix @ x near to ones: what would be negative is left out, the most negative first."""
    kept = list(range(matrix.shape[1]))
    while True:
        found = np.linalg.lstsq(matrix[:, kept], np.ones(len(matrix)), rcond=None)[0]
        if found.min() >= 0:
            break
        kept.pop(int(found.argmin()))
    factors = np.zeros(matrix.shape[1])
    factors[kept] = found
    return factors


class _Spans:
    """When the requests of one run waited and decoded."""

    def __init__(self, requests: Sequence[RequestFigures]) -> None:
        table = np.array([(r.sent_s, r.sent_s + r.ttft_s, r.sent_s + r.e2e_s) for r in requests])
        self.sent, self.first, self.last = table.T
        self.context = np.array([r.prompt_tokens + r.output_tokens / 2 for r in requests])
        self.prompt = np.array([float(r.prompt_tokens - r.cached_tokens) for r in requests])
        self.steps = np.array([max(1, r.output_tokens - 1) for r in requests])

    def decoding(self, index: int) -> tuple[float, float, float, float]:
        """Of the steps in which a request decoded, on average: 1, requests, their context, tokens of prompts."""
        begin, end = self.first[index], self.last[index]
        share = _overlap(self.first, self.last, begin, end) / (end - begin)
        computed = _overlap(self.sent, self.first, begin, end) / np.maximum(self.first - self.sent, 1e-9) * self.prompt
        return 1.0, float(share.sum()), float((share * self.context).sum()), float(computed.sum() / self.steps[index])

    def alone(self, index: int) -> bool:
        """Whether no other request was there before this one's first token."""
        others = _overlap(self.sent, self.last, self.sent[index], self.first[index]) > 0
        return int(others.sum()) == 1


def _overlap(begins: np.ndarray, ends: np.ndarray, begin: float, end: float) -> np.ndarray:
    shared: np.ndarray = np.minimum(ends, end) - np.maximum(begins, begin)
    return shared.clip(min=0.0)
