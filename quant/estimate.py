"""How long a run will take, from its shapes and a short measurement of this machine: within a factor of two or so."""

from __future__ import annotations

import math
import time

import torch

from llmkit.model.layout import parameters
from llmkit.model.spec import ModelSpec
from llmkit.quant.algorithm import Algorithm
from llmkit.quant.tokens import EVALUATION_TOKENS

SIZE = 1024  # of the product that the machine is measured with
READ = 1e9  # bytes a second: reading, checking and hashing
ROUNDING = 2e7  # weights a second that a CPU rounds without a range search
SEARCH = 3e6  # and with one


def seconds(
    spec: ModelSpec,
    source_bytes: int,
    tokens: int,
    algorithm: Algorithm | None,
    eval_windows: int,
    device: torch.device,
) -> float:
    """Seconds of a run: `tokens` of calibration text (0 without), windows to evaluate on (0 without)."""
    linears = [row for row in parameters(spec) if row.linear]
    weights = sum(math.prod(row.shape) for row in linears)
    ends = sum(math.prod(row.shape) for row in parameters(spec)) - weights
    rate = flops_per_second(device)
    faster = 1 if device.type == "cpu" else 50
    total = 3 * source_bytes / READ + 2 * 2 * (weights + ends) * eval_windows * EVALUATION_TOKENS / rate
    if algorithm is None or not tokens:
        return total + weights / (ROUNDING * faster)
    flops = 2 * weights * tokens * 2.7  # a layer is run once for what comes next, and in part for its own statistics
    if "hessian" in algorithm.needs:
        flops += sum(2 * tokens * row.shape[1] ** 2 + 2 * math.prod(row.shape) * row.shape[1] for row in linears)
    if algorithm.mover is not None:
        flops += sum(20 * 2 * min(512, row.shape[0]) * row.shape[1] ** 2 for row in linears)
    if algorithm.learn is not None:
        flops += algorithm.learn.steps * algorithm.learn.tokens * 6 * weights
    return total + flops / rate + weights / (SEARCH * faster)


def flops_per_second(device: torch.device) -> float:
    """What a float32 product does here."""
    one = torch.ones(SIZE, SIZE, device=device)
    best = math.inf
    for _ in range(4):
        started = time.perf_counter()
        (one @ one)[0, 0].item()
        best = min(best, time.perf_counter() - started)
    return 2 * SIZE**3 / best
