"""SmoothQuant (Xiao et al., 2022, arXiv 2211.10438).

It moves outliers of quantized inputs into the weights. The published rule is s = max|x|^a /
max|w|^(1-a) with one `a` for the whole model. Here every mapping gets the `a` with the smallest
output error on sampled inputs, or no scaling when that is better.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmkit.model.linear import ActivationQuant
from llmkit.quant.algorithm import QuantTarget
from llmkit.quant.grid import FULL_SEARCH, round_to_nearest
from llmkit.quant.input_stats import InputStats, StatKind
from llmkit.quant.round_to_nearest import static_input_scale
from llmkit.quant.smoothing_mappings import SmoothingMapping

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class SmoothQuant:
    """The smoother of quantized inputs.

    FP8 inputs hardly gain from it: a float's rounding error is relative to its own value.
    """

    required_stats: frozenset[StatKind] = frozenset({"sample"})

    def scales(
        self,
        target: QuantTarget,
        mapping: SmoothingMapping,
        weight: torch.Tensor,
        input_stats: InputStats,
    ) -> torch.Tensor | None:
        """The scales with the smallest output error; None when they do not beat no scaling."""
        inputs = input_stats.sample
        exact = inputs @ weight.T
        scheme = target.scheme

        def output_error(scales: torch.Tensor) -> float:
            input_scale = None
            if scheme.has_input_scale:
                input_scale = static_input_scale(input_stats.max_abs / scales, scheme)
            round_inputs = ActivationQuant.of(scheme, input_scale)
            assert round_inputs is not None
            quantized = round_to_nearest(
                weight * scales,
                scheme,
                target.scale_dtype,
                FULL_SEARCH if scheme.scale_format != "float" else None,
                target.row_blocks,
            )
            output = round_inputs(inputs / scales) @ quantized.dequantize().T
            return (output - exact).square().sum().item()

        input_magnitudes = mapping.max_over_kv_group(input_stats.max_abs)
        weight_magnitudes = mapping.max_over_kv_group(weight.abs().amax(dim=0))
        best_scales = None
        best_error = output_error(torch.ones_like(input_stats.max_abs))
        for alpha in ALPHAS:
            scales = normalize_scales(
                input_magnitudes.pow(alpha) / weight_magnitudes.clamp(min=1e-5).pow(1 - alpha)
            )
            error = output_error(mapping.repeat_kv(scales))
            if error < best_error:
                best_scales = scales
                best_error = error
        return best_scales


def normalize_scales(scales: torch.Tensor) -> torch.Tensor:
    """Center scales around 1, so that the scaled tensors keep their range.

    A scale is 1 where the inputs were always zero.
    """
    usable = torch.isfinite(scales) & (scales > 0)
    scales = torch.where(usable, scales, torch.ones_like(scales)).clamp(1e-4, 1e4)
    return scales / (scales.max() * scales.min()).sqrt()
