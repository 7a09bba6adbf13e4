"""How much text a run calibrates on when `--samples` or `--seq-len` is not given."""

from __future__ import annotations

import math

import torch

from llmkit.model.parameter_table import parameters
from llmkit.model.spec import ModelSpec

WINDOW_TOKENS = 2048
GPU_WINDOWS = 128  # twice as many change little
# As much text in many short windows gives a better model than in few long ones (measured, see
# docs/benchmarks.md). The first token of a window has by far the largest activations, and short
# windows give it more weight in the Hessian.
CPU_WINDOW_TOKENS = 256
MAX_TOKENS = GPU_WINDOWS * WINDOW_TOKENS
MIN_WINDOWS = 8  # so that the text has some variety
MIN_TOKENS = 16_384
# A Hessian [inputs, inputs] of fewer tokens than inputs is singular; with this many it is stable.
TOKENS_PER_INPUT = 8


def default_seq_len(samples: int | None, device: torch.device) -> int:
    """The tokens of a calibration window. A number of windows that is given has long ones."""
    if samples is None and device.type == "cpu":
        return CPU_WINDOW_TOKENS
    return WINDOW_TOKENS


def default_windows(spec: ModelSpec, seq_len: int, device: torch.device) -> int:
    """The number of calibration windows of a model.

    On a GPU GPU_WINDOWS. A CPU is slower by a factor of 100, so that it gets what the widest linear
    needs. The result depends on nothing that changes from run to run, such as the machine's load:
    the same command writes the same bytes.
    """
    if device.type != "cpu":
        return GPU_WINDOWS
    num_tokens = min(needed_tokens(spec), MAX_TOKENS)
    return max(math.ceil(num_tokens / seq_len), MIN_WINDOWS)


def needed_tokens(spec: ModelSpec) -> int:
    """The calibration tokens that every linear of the model needs, at least MIN_TOKENS."""
    most = MIN_TOKENS
    for parameter in parameters(spec):
        if not parameter.is_linear:
            continue
        tokens = TOKENS_PER_INPUT * parameter.shape[1]
        if parameter.expert is not None and spec.moe is not None:
            # An expert sees only the tokens that choose it.
            tokens = tokens * spec.moe.num_experts // spec.moe.num_experts_per_tok
        most = max(most, tokens)
    return most
