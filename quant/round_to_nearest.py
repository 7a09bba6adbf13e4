"""Round to nearest (RTN): the methods `rtn`, `int8` and `fp8`, and the fallback of the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmkit.checkpoint.quantized_weight import Scheme
from llmkit.kernels.activation_quant import FP8_MAX, MIN_SCALE
from llmkit.quant.algorithm import QuantizeResult, QuantTarget
from llmkit.quant.float_scales import nvfp4_global_scale
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
        quantized = round_to_nearest(
            weight, target.scheme, target.scale_dtype, self.search, target.row_blocks
        )
        return QuantizeResult(quantized, "rtn")


def static_input_scale(max_abs: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The stored scale [1] of inputs with these largest magnitudes; 1 if all of them are 0.

    Of FP8 inputs it is their scale, of FP4 ones the scale of their groups' e4m3 scales.
    """
    largest = max_abs.max()
    if not largest > 0:
        return torch.ones(1, device=largest.device)
    if scheme.inputs == "group":
        return nvfp4_global_scale(largest)
    return (largest / FP8_MAX).clamp(min=MIN_SCALE).reshape(1)
