"""Symmetric grids: how a scale is chosen for a group of weights, and rounding to the nearest code.

Legend: `out` rows, `in` columns, `G` groups along `in`, `g` columns in a group. A code is 0 .. 2^bits - 1 and
stands for (code - 2^(bits-1)) * scale, so one step more lies below zero than above it.
"""

from __future__ import annotations

import torch

from llmkit.checkpoint.quantized import QuantizedWeight

NORM = 2.4  # of the range search: a little more than 2 protects the outliers (GPTQ's published setting)
MIN_SHRINK = 0.2
STEPS = 80  # shrinks tried between 1 and MIN_SHRINK, a hundredth apart
_CPU_CHUNK = 1 << 17  # elements searched at once: what stays in a core's cache
_DEVICE_CHUNK = 1 << 24


def levels(bits: int) -> tuple[int, int]:
    """The lowest and highest signed code: (-8, 7) for 4 bits."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def group_scales(
    weight: torch.Tensor,
    bits: int,
    group_size: int,
    *,
    search: bool,
    importance: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float16,
) -> torch.Tensor:
    """The scales [out, G] of a float32 weight [out, in], already rounded to the stored `dtype`.

    Without `search` a scale spans the group's largest magnitude, 2 * absmax / (2^bits - 1). With it, the range is
    shrunk by whatever factor gives the smallest sum of |error|^2.4, weighted by `importance` [in] when given. `in`
    must be a multiple of `group_size` (-1: the whole row). A group of zeros gets the smallest normal number, never 0.
    """
    rows, columns = weight.shape
    size = columns if group_size == -1 else group_size
    assert columns % size == 0, (columns, size)
    groups = weight.reshape(-1, size)
    full = groups.abs().amax(dim=1, keepdim=True) * (2.0 / ((1 << bits) - 1))
    if search:
        chunk = max(1, (_CPU_CHUNK if weight.device.type == "cpu" else _DEVICE_CHUNK) // size)
        for start in range(0, len(groups), chunk):
            part = slice(start, start + chunk)
            factors = None
            if importance is not None:
                of_row = torch.arange(start, start + len(groups[part]), device=weight.device) % (columns // size)
                factors = importance.view(-1, size)[of_row]
            full[part] = _best_range(groups[part], full[part], factors, bits, dtype)
    return _storable(full, dtype).to(dtype).view(rows, -1)


def nearest(weight: torch.Tensor, scales: torch.Tensor, bits: int, group_size: int) -> QuantizedWeight:
    """Round a float32 weight [out, in] to the nearest codes under `scales` [out, G]."""
    rows, columns = weight.shape
    low, high = levels(bits)
    steps = weight.reshape(rows, scales.shape[1], -1) / scales.float().unsqueeze(2)
    codes = steps.round_().clamp_(low, high).sub_(low).to(torch.uint8).view(rows, columns)
    return QuantizedWeight(codes, scales, symmetric_zeros(scales, bits), bits, group_size)


def round_to_nearest(
    weight: torch.Tensor, bits: int, group_size: int, *, search: bool, dtype: torch.dtype = torch.float16
) -> QuantizedWeight:
    """Quantize a weight [out, in] without any data: scales by `group_scales`, then the nearest codes."""
    weight = weight.float()
    return nearest(weight, group_scales(weight, bits, group_size, search=search, dtype=dtype), bits, group_size)


def symmetric_zeros(scales: torch.Tensor, bits: int) -> torch.Tensor:
    """The zero points [out, G] of a symmetric grid."""
    return torch.full(scales.shape, 1 << (bits - 1), dtype=torch.uint8, device=scales.device)


def _storable(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`scales` rounded to `dtype`, in float32, kept away from zero, subnormal numbers and infinity."""
    limits = torch.finfo(dtype)
    return scales.clamp(limits.tiny, limits.max).to(dtype).float()


def _best_range(
    groups: torch.Tensor, full: torch.Tensor, factors: torch.Tensor | None, bits: int, dtype: torch.dtype
) -> torch.Tensor:
    """For groups [n, g] and full-range scales [n, 1], the scales [n, 1] of least sum of factors * |error|^NORM."""
    low, high = levels(bits)
    best, best_loss = full.clone(), torch.full_like(full, torch.inf)
    work = torch.empty_like(groups)
    # The full range ends half a step below the largest positive weight; the first scale tried reaches it.
    reach = ((1 << bits) - 1) / ((1 << bits) - 2)
    for shrink in (reach, *(1.0 - step * (1.0 - MIN_SHRINK) / STEPS for step in range(STEPS + 1))):
        scale = _storable(full * shrink, dtype)
        torch.div(groups, scale, out=work)
        work.round_().clamp_(low, high).mul_(scale).sub_(groups).abs_()
        work.log2_().mul_(NORM).exp2_()  # |error|^NORM in a third of the time of pow, with 0 for 0
        if factors is not None:
            work.mul_(factors)
        loss = work.sum(dim=1, keepdim=True)
        better = loss < best_loss
        best = torch.where(better, scale, best)
        best_loss = torch.where(better, loss, best_loss)
    return best
