"""Quantizing activations: inputs of linear layers, keys and values of a KV cache.

"Fake" quantization returns the dequantized values in the input's dtype. A product with them equals
the product with the quantized values, up to the order of summation.
`value_type`: "int8", "fp8" (e4m3) or "fp4" (E2M1).
Legend: T tokens, C channels.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
FP4_MAX = 6.0
INT8_MAX = 127.0
# The largest value of each type.
MAX_VALUES = {"int8": INT8_MAX, "fp8": FP8_MAX, "fp4": FP4_MAX}
MIN_SCALE = 1e-12  # avoids a division by zero for a token whose values are all 0
# The exponents of the largest powers of two that e8m0 scales can hold.
_E8M0_EXPONENTS = (-127, 127)


def fake_quantize_per_token(x: torch.Tensor, value_type: str) -> torch.Tensor:
    """Quantize and dequantize x [..., C], with a scale for each token."""
    q, scale = quantize_per_token(x, value_type)
    return q.mul_(scale).to(x.dtype)


def quantize_per_token(x: torch.Tensor, value_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize x [..., C]. A token's scale is max(abs(x)) / the largest value of the type.

    Returns the quantized values as float32 [..., C], and the scales, float32 [..., 1].
    """
    x = x.float()
    largest = MAX_VALUES[value_type]
    scale = x.abs().amax(dim=-1, keepdim=True).div_(largest).clamp_(min=MIN_SCALE)
    if value_type == "int8":
        # No clamp: the scale comes from the largest magnitude, so that no value is out of range.
        return (x / scale).round_(), scale
    return quantize_static(x, scale, value_type), scale


def fake_quantize_static(x: torch.Tensor, scale: torch.Tensor, value_type: str) -> torch.Tensor:
    """Quantize and dequantize x with one given scale [1]; values out of range are clamped."""
    scale = scale.to(x.device)
    return quantize_static(x.float(), scale, value_type).mul_(scale).to(x.dtype)


def fake_quantize_per_group(
    x: torch.Tensor,
    value_type: str,
    group_size: int,
    scale_format: str = "float",
    global_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Quantize and dequantize x [..., C], with a scale for each token and group of channels.

    The last group is smaller where `group_size` does not divide C.
    scale_format, global_scale: see `group_scales`.
    """
    padded = pad(x, (0, -x.shape[-1] % group_size))
    groups = padded.unflatten(-1, (-1, group_size))
    if scale_format == "float":
        rounded = fake_quantize_per_token(groups, value_type)
    else:
        groups = groups.float()
        max_abs = groups.abs().amax(dim=-1, keepdim=True)
        scales = group_scales(max_abs, value_type, scale_format, global_scale)
        divisors = torch.where(scales == 0, 1.0, scales)
        rounded = quantize_static(groups, divisors, value_type).mul_(scales).to(x.dtype)
    return rounded.flatten(-2)[..., : x.shape[-1]]


def group_scales(
    max_abs: torch.Tensor,
    value_type: str,
    scale_format: str,
    global_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """The scales of groups with the largest magnitudes `max_abs`, float32, as a format holds them.

    e8m0: the power of two that OCP MX 1.0 takes: that of the largest magnitude over that of the
    type's largest value. Magnitudes between are clamped when they are rounded.
    e4m3: max_abs / the type's largest value, rounded to e4m3 times `global_scale`, float32 [1].
    The scale of a group with NaN or infinity is NaN.
    """
    if scale_format == "e8m0":
        # frexp: max_abs = mantissa * 2^exponent with a mantissa of at least 0.5.
        largest_exponent = {"fp8": 8, "fp4": 2}[value_type]
        exponents = torch.frexp(max_abs.float()).exponent - 1 - largest_exponent
        exponents = exponents.clamp_(*_E8M0_EXPONENTS)
        scales = torch.ldexp(torch.ones_like(max_abs, dtype=torch.float32), exponents)
    else:
        assert scale_format == "e4m3" and global_scale is not None
        steps = max_abs.float() / (MAX_VALUES[value_type] * global_scale)
        scales = steps.clamp_(max=FP8_MAX).to(FP8).float() * global_scale
    return torch.where(max_abs.isfinite(), scales, torch.nan)


def quantize_static(x: torch.Tensor, scale: torch.Tensor, value_type: str) -> torch.Tensor:
    """The quantized values of x, as float32. x: float32; scale: broadcasts to x."""
    steps = x / scale
    if value_type == "int8":
        return steps.round_().clamp_(-INT8_MAX - 1, INT8_MAX)
    if value_type == "fp4":
        return round_to_fp4(steps)
    return steps.clamp_(-FP8_MAX, FP8_MAX).to(FP8).float()


def round_to_fp4(x: torch.Tensor) -> torch.Tensor:
    """x rounded to the nearest values of E2M1, ties to even mantissas, clamped to -6 .. 6.

    The values are 0.5 apart up to 2, 1 apart up to 4, and 2 apart up to 6.
    """
    x = x.clamp(-FP4_MAX, FP4_MAX)
    magnitude = x.abs()
    steps = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return (x / steps).round_().mul_(steps)
