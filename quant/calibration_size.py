"""How much text a run calibrates on when `--samples` is not given."""

from __future__ import annotations

import math

import torch

from llmkit.model.parameter_table import parameters
from llmkit.model.spec import ModelSpec

MAX_WINDOWS = 128  # the default on a GPU; twice as many change little
MIN_WINDOWS = 8  # so that the text has some variety
MIN_TOKENS = 16_384
# A Hessian [inputs, inputs] of fewer tokens than inputs is singular; with this many it is stable.
TOKENS_PER_INPUT = 8


def default_windows(spec: ModelSpec, seq_len: int, device: torch.device) -> int:
    """The calibration windows of a model.

    On a GPU MAX_WINDOWS. A CPU is slower by a factor of 100, so that it gets what the widest linear
    needs. The result depends on nothing that changes from run to run, such as the machine's load:
    the same command writes the same bytes.
    """
    if device.type != "cpu":
        return MAX_WINDOWS
    windows = math.ceil(needed_tokens(spec) / seq_len)
    return min(max(windows, MIN_WINDOWS), MAX_WINDOWS)


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
