"""Cases of the FP8 block linear for a process in which Triton interprets kernels."""

from __future__ import annotations

import torch

from llmkit.kernels.fp8_block_linear import Fp8BlockLinear, quantize_groups


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


def run_quantize_groups(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_groups(x, group_size)
