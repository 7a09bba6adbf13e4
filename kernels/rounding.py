"""Rounding what runs through a model to 8 bits: the inputs of W8A8 linear layers, keys and values of an 8-bit cache.

The functions that round give the rounded values themselves, in the dtype they came in: what a product of the 8-bit
codes gives, up to the order of summation. Legend: T tokens, C channels.
"""

from __future__ import annotations

import torch

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
INT8_MAX = 127.0
TINY = 1e-12  # the least scale, so that a token of zeros stays zeros


def round_tokens(x: torch.Tensor, kind: str) -> torch.Tensor:
    """x [..., C] with one scale per token, its largest magnitude over the largest code. kind: "int" or "float"."""
    codes, scale = token_codes(x, kind)
    return codes.mul_(scale).to(x.dtype)


def token_codes(x: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes of `round_tokens`, as float32 [..., C], and the scales, float32 [..., 1]."""
    x = x.float()
    scale = x.abs().amax(dim=-1, keepdim=True).div_(INT8_MAX if kind == "int" else FP8_MAX).clamp_(min=TINY)
    # No code is beyond the largest: the largest magnitude is its own scale's.
    return (x / scale).round_() if kind == "int" else tensor_codes(x, scale, kind), scale


def round_tensor(x: torch.Tensor, scale: torch.Tensor, kind: str) -> torch.Tensor:
    """x with one given scale [1]; what lies beyond the largest code is cut off."""
    scale = scale.to(x.device)
    return tensor_codes(x.float(), scale, kind).mul_(scale).to(x.dtype)


def tensor_codes(x: torch.Tensor, scale: torch.Tensor, kind: str) -> torch.Tensor:
    """The codes of `round_tensor`, as float32; x: float32, scale broadcast to it."""
    steps = x / scale
    if kind == "int":
        return steps.round_().clamp_(-INT8_MAX - 1, INT8_MAX)
    return steps.clamp_(-FP8_MAX, FP8_MAX).to(FP8).float()
