"""Round to nearest (RTN): the methods `rtn`, `int8` and `fp8`, and the fallback of the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmkit.kernels.activation_quant import FP8_MAX, MIN_SCALE
from llmkit.quant.algorithm import QuantizeResult, QuantTarget
from llmkit.quant.grid import RangeSearch, round_to_nearest
from llmkit.quant.input_stats import InputStats, StatKind


@dataclass(frozen=True)
class RtnQuantizer:
    """Rounds a weight to nearest; needs no calibration data."""

    search: RangeSearch | None = None
    required_stats: frozenset[StatKind] = frozenset()
    true_sequential: bool = False

    def quantize(
        self, target: QuantTarget, weight: torch.Tensor, input_stats: InputStats
    ) -> QuantizeResult:
        """Round to nearest."""
        quantized = round_to_nearest(weight, target.scheme, target.scale_dtype, self.search)
        return QuantizeResult(quantized, "rtn")


def static_input_scale(input_stats: InputStats) -> torch.Tensor:
    """The static scale [1] of FP8 inputs that covers the largest one observed; 1 without inputs."""
    max_abs = input_stats.max_abs.max() if input_stats.num_tokens else torch.tensor(FP8_MAX)
    return (max_abs / FP8_MAX).clamp(min=MIN_SCALE).reshape(1)
