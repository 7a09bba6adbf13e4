"""Estimates a run's time, within a factor of about two, from shapes and a short measurement."""

from __future__ import annotations

import math
import time

import torch

from llmkit.model.parameter_table import parameters
from llmkit.model.spec import ModelSpec
from llmkit.quant.algorithm import Algorithm
from llmkit.quant.token_windows import EVALUATION_TOKENS

MATMUL_SIZE = 1024  # rows and columns of the matrix product that measures the machine
READ_BYTES_PER_S = 1e9  # reading, checking and hashing
ROUNDED_WEIGHTS_PER_S = 2e7  # on a CPU, without a range search
SEARCHED_WEIGHTS_PER_S = 3e6  # on a CPU, with a range search
GPU_SPEEDUP = 50  # of rounding and searching


def estimate_seconds(
    spec: ModelSpec,
    source_bytes: int,
    tokens: int,
    algorithm: Algorithm | None,
    eval_windows: int,
    device: torch.device,
) -> float:
    """The seconds of a run.

    tokens: of calibration text; 0 without calibration.
    eval_windows: windows of the evaluation; 0 without one.
    """
    linears = [parameter for parameter in parameters(spec) if parameter.is_linear]
    all_weights = sum(math.prod(parameter.shape) for parameter in parameters(spec))
    weights = sum(math.prod(parameter.shape) for parameter in linears)
    flops_per_second = measure_flops_per_second(device)
    speedup = 1 if device.type == "cpu" else GPU_SPEEDUP
    # The tensors are read three times. The evaluation runs two models, with 2 operations a weight.
    seconds = 3 * source_bytes / READ_BYTES_PER_S
    seconds += 2 * 2 * all_weights * eval_windows * EVALUATION_TOKENS / flops_per_second
    if algorithm is None or not tokens:
        return seconds + weights / (ROUNDED_WEIGHTS_PER_S * speedup)
    # A layer runs once to compute the next layer's inputs, and in part for its own statistics.
    flops = 2 * weights * tokens * 2.7
    for parameter in linears:
        rows, columns = parameter.shape
        if "hessian" in algorithm.required_stats:
            flops += 2 * tokens * columns**2 + 2 * rows * columns * columns
        if algorithm.smoother is not None:
            flops += 20 * 2 * min(512, rows) * columns**2
    if algorithm.auto_round is not None:
        flops += algorithm.auto_round.steps * algorithm.auto_round.tokens * 6 * weights
    return seconds + flops / flops_per_second + weights / (SEARCHED_WEIGHTS_PER_S * speedup)


def measure_flops_per_second(device: torch.device) -> float:
    """The speed of a float32 matrix product on this device."""
    matrix = torch.ones(MATMUL_SIZE, MATMUL_SIZE, device=device)
    best_seconds = math.inf
    for _ in range(4):
        started = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        best_seconds = min(best_seconds, time.perf_counter() - started)
    return 2 * MATMUL_SIZE**3 / best_seconds
