"""Rounding what runs through a model to 8 bits: the inputs of W8A8 linear layers, keys and values of an 8-bit cache.

Each function gives the rounded values themselves, in the dtype they came in: what a product of the 8-bit codes gives,
up to the order of summation. Legend: T tokens, C channels.
"""

from __future__ import annotations

import torch

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
INT8_MAX = 127.0
TINY = 1e-12  # the least scale, so that a token of zeros stays zeros


def round_tokens(x: torch.Tensor, kind: str) -> torch.Tensor:
    """x [..., C] with one scale per token, its largest magnitude over the largest code. kind: "int" or "float"."""
    scale = x.float().abs().amax(dim=-1, keepdim=True).div_(INT8_MAX if kind == "int" else FP8_MAX).clamp_(min=TINY)
    return _round(x, scale, kind)


def round_tensor(x: torch.Tensor, scale: torch.Tensor, kind: str) -> torch.Tensor:
    """x with one given scale [1]; what lies beyond the largest code is cut off."""
    return _round(x, scale.to(x.device), kind)


def _round(x: torch.Tensor, scale: torch.Tensor, kind: str) -> torch.Tensor:
    steps = x.float() / scale
    if kind == "int":
        return steps.round_().clamp_(-INT8_MAX - 1, INT8_MAX).mul_(scale).to(x.dtype)
    return steps.clamp_(-FP8_MAX, FP8_MAX).to(FP8).float().mul_(scale).to(x.dtype)
