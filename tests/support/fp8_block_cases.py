"""Cases of the FP8 block linear for a process in which Triton interprets kernels."""

from __future__ import annotations

import torch

from llmkit.kernels.activation_quant import FP8
from llmkit.kernels.fp8_block_linear import Fp8BlockLinear
from llmkit.kernels.fused_experts import FusedExperts
from llmkit.kernels.input_quant import InputQuant, ScaleFormat, quantize_input


def run_fp8_block_linear(
    x: torch.Tensor,
    q: torch.Tensor,
    scales: torch.Tensor,
    group_size: int,
    bias: torch.Tensor | None,
    splits: int,
    quantize_inputs: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The product and the dense weight."""
    linear = Fp8BlockLinear(q, scales, group_size, bias, quantize_inputs=quantize_inputs)
    return linear(x, splits), linear.dequantize()


def run_quantize_groups(
    x: torch.Tensor, group_size: int, scale_format: ScaleFormat = "float"
) -> tuple[torch.Tensor, torch.Tensor]:
    got = quantize_input(x, InputQuant(FP8, group_size, scale_format))
    return got.values, got.scales


def run_fp8_experts(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    stacks: tuple[torch.Tensor, torch.Tensor],
    scales: tuple[torch.Tensor, torch.Tensor],
    first: int,
    count: int,
    group_size: int,
    quantize_inputs: bool,
) -> torch.Tensor:
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    experts = FusedExperts(
        *stacks,
        first,
        count,
        False,
        None,
        None,
        *scales,
        group_size=group_size,
        input_quant=InputQuant(FP8, group_size) if quantize_inputs else None,
    )
    return experts(x, chosen, weights)
