"""Quantizing activations to 8 bits: inputs of W8A8 linears, keys and values of a KV cache.

"Fake" quantization returns the dequantized values in the input's dtype. A product with them equals
the product with the 8-bit values, up to the order of summation. kind is "int" (int8) or "float"
(FP8 e4m3). Legend: T tokens, C channels.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
INT8_MAX = 127.0
MIN_SCALE = 1e-12  # avoids a division by zero for a token whose values are all 0


def fake_quantize_per_token(x: torch.Tensor, kind: str) -> torch.Tensor:
    """Quantize and dequantize x [..., C], with a scale for each token."""
    q, scale = quantize_per_token(x, kind)
    return q.mul_(scale).to(x.dtype)


def quantize_per_token(x: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize x [..., C]. A token's scale is max(abs(x)) / the largest 8-bit value.

    Returns the 8-bit values as float32 [..., C], and the scales, float32 [..., 1].
    """
    x = x.float()
    largest = INT8_MAX if kind == "int" else FP8_MAX
    scale = x.abs().amax(dim=-1, keepdim=True).div_(largest).clamp_(min=MIN_SCALE)
    if kind == "int":
        # No clamp: the scale comes from the largest magnitude, so that no value is out of range.
        return (x / scale).round_(), scale
    return quantize_static(x, scale, kind), scale


def fake_quantize_static(x: torch.Tensor, scale: torch.Tensor, kind: str) -> torch.Tensor:
    """Quantize and dequantize x with one given scale [1]; values out of range are clamped."""
    scale = scale.to(x.device)
    return quantize_static(x.float(), scale, kind).mul_(scale).to(x.dtype)


def fake_quantize_per_group(x: torch.Tensor, kind: str, group_size: int) -> torch.Tensor:
    """Quantize and dequantize x [..., C], with a scale for each token and group of channels.

    The last group is smaller where `group_size` does not divide C.
    """
    padded = pad(x, (0, -x.shape[-1] % group_size))
    groups = padded.unflatten(-1, (-1, group_size))
    return fake_quantize_per_token(groups, kind).flatten(-2)[..., : x.shape[-1]]


def quantize_static(x: torch.Tensor, scale: torch.Tensor, kind: str) -> torch.Tensor:
    """The 8-bit values of x, as float32. x: float32; scale: broadcasts to x."""
    steps = x / scale
    if kind == "int":
        return steps.round_().clamp_(-INT8_MAX - 1, INT8_MAX)
    return steps.clamp_(-FP8_MAX, FP8_MAX).to(FP8).float()
