"""Estimates a run's time, within a factor of about two, from shapes and a short measurement.

The estimate is for a machine that does nothing else: on a CPU, the processor time of a product is
measured, which other processes hardly change, and all threads are assumed to have a core.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from llmkit.kernels.cpu.float32_product import linear
from llmkit.model.parameter_table import parameters
from llmkit.model.spec import ModelSpec
from llmkit.quant.algorithm import Algorithm
from llmkit.quant.token_windows import EVALUATION_TOKENS

MATMUL_SIZE = 1024  # rows and columns of the matrix product that measures the machine
_MATMUL_FLOPS = 2 * MATMUL_SIZE**3
START_SECONDS = 5  # imports, the tokenizer and the calibration text
READ_BYTES_PER_S = 1e9  # reading, checking and hashing
# For each thread of a CPU.
ROUNDED_WEIGHTS_PER_S = 2e7  # without a range search
COMPENSATED_WEIGHTS_PER_S = 8e6  # with a Hessian, without a range search
SEARCHED_WEIGHTS_PER_S = 5.5e6  # with a range search
GPU_SPEEDUP = 50  # of rounding and searching
# A layer runs once to compute the next layer's inputs, and in part for each group of its linears.
CALIBRATION_PASSES = 2


@dataclass(frozen=True)
class Speed:
    """How fast this machine is."""

    flops_per_second: float  # of a float32 matrix product
    rounding: float  # a factor of the weights per second above


@dataclass(frozen=True)
class Work:
    """What a run does."""

    source_bytes: int
    tokens: int = 0  # of calibration text; 0 without calibration
    algorithm: Algorithm | None = None  # None: without calibration
    searches: bool = False  # ranges are searched
    eval_windows: int = 0  # 0 without an evaluation


def estimate_seconds(spec: ModelSpec, work: Work, speed: Speed) -> float:
    """The seconds of a run."""
    linears = [parameter for parameter in parameters(spec) if parameter.is_linear]
    all_weights = sum(math.prod(parameter.shape) for parameter in parameters(spec))
    weights = sum(math.prod(parameter.shape) for parameter in linears)
    weights_per_s = ROUNDED_WEIGHTS_PER_S
    # The tensors are read three times. The evaluation runs two models, with 2 operations a weight.
    seconds = START_SECONDS + 3 * work.source_bytes / READ_BYTES_PER_S
    flops = 2.0 * 2 * all_weights * work.eval_windows * EVALUATION_TOKENS
    algorithm = work.algorithm
    if algorithm is not None and work.tokens:
        # With experts, a token runs through the ones that it chooses.
        share = 1.0
        if spec.moe is not None:
            share = spec.moe.num_experts_per_tok / spec.moe.num_experts
        for parameter in linears:
            rows, columns = parameter.shape
            tokens = work.tokens * (1.0 if parameter.expert is None else share)
            flops += CALIBRATION_PASSES * 2 * rows * columns * tokens
            if "hessian" in algorithm.required_stats:
                flops += 2 * tokens * columns**2 + 2 * rows * columns**2
            if algorithm.is_asymmetric:
                flops += CALIBRATION_PASSES * 2 * rows * columns * tokens + 2 * tokens * columns**2
            if algorithm.smoother is not None:
                flops += 20 * 2 * min(512, rows) * columns**2
        if work.searches:
            weights_per_s = SEARCHED_WEIGHTS_PER_S
        elif "hessian" in algorithm.required_stats:
            weights_per_s = COMPENSATED_WEIGHTS_PER_S
        if algorithm.auto_round is not None:
            flops += algorithm.auto_round.steps * algorithm.auto_round.tokens * 6 * weights
        if algorithm.norm_tuning is not None:
            flops += algorithm.norm_tuning.steps * algorithm.norm_tuning.tokens * 6 * all_weights
    return seconds + flops / speed.flops_per_second + weights / (weights_per_s * speed.rounding)


def measure_speed(device: torch.device) -> Speed:
    """The speed of this device, from products of some hundredths of a second each."""
    if device.type != "cpu":
        return Speed(_MATMUL_FLOPS / _product_seconds(device, time.perf_counter), GPU_SPEEDUP)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = _product_seconds(device, time.thread_time)
    finally:
        torch.set_num_threads(threads)
    return Speed(threads * _MATMUL_FLOPS / seconds, threads)


@torch.no_grad()
def _product_seconds(device: torch.device, clock: Callable[[], float]) -> float:
    """The shortest time of a product of two matrices."""
    matrix = torch.ones(MATMUL_SIZE, MATMUL_SIZE, device=device)
    best_seconds = math.inf
    for _ in range(4):
        started = clock()
        linear(matrix, matrix)[0, 0].item()
        best_seconds = min(best_seconds, clock() - started)
    return best_seconds
