"""Grids: how scales and zero points are chosen for groups of weights, and rounding to the nearest code.

Legend: `out` rows, `in` columns, `G` groups along `in`, `g` columns in a group. A code is 0 .. 2^bits - 1 and
stands for (code - zero) * scale; zero is 2^(bits-1) on a symmetric grid. FP8 codes are e4m3 numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmkit.checkpoint.quantized import QuantizedWeight, Scheme
from llmkit.kernels.rounding import FP8, FP8_MAX

NORM = 2.4  # of the range search: a little more than 2 protects the outliers (GPTQ's published setting)
_CPU_CHUNK = 1 << 17  # elements searched at once: what stays in a core's cache
_DEVICE_CHUNK = 1 << 24


@dataclass(frozen=True)
class Grid:
    """Where the codes of a weight lie."""

    scales: torch.Tensor  # [out, G], of the stored dtype
    zeros: torch.Tensor  # uint8 [out, G]
    scheme: Scheme

    def nearest(self, weight: torch.Tensor) -> QuantizedWeight:
        """Round a float32 weight [out, in] to the nearest codes."""
        rows, columns = weight.shape
        codes = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
        count = max(1, _DEVICE_CHUNK // columns)
        for start in range(0, rows, count):
            part = slice(start, start + count)
            steps = weight[part].reshape(-1, self.scales.shape[1], columns // self.scales.shape[1])
            steps = steps / self.scales[part].float().unsqueeze(2)
            if self.scheme.kind == "float":
                steps = steps.clamp_(-FP8_MAX, FP8_MAX).to(FP8).view(torch.uint8)
            else:
                steps.round_().add_(self.zeros[part].float().unsqueeze(2)).clamp_(0, (1 << self.scheme.bits) - 1)
            codes[part] = steps.view(-1, columns)
        if self.scheme.kind == "float":
            codes = codes.view(FP8)
        return QuantizedWeight(codes, self.scales, self.zeros, self.scheme)


@dataclass(frozen=True)
class Search:
    """Which shrunken ranges are tried: multiples of the full range from `least` to 1, `step` apart, and then for every
    group those next to its best, `fine` apart."""

    least: float
    step: float
    fine: float


FULL_SEARCH = Search(0.2, 0.04, 0.01)


def fit_grid(
    weight: torch.Tensor,
    scheme: Scheme,
    dtype: torch.dtype,
    search: Search | None = None,
    importance: torch.Tensor | None = None,
) -> Grid:
    """The grid of a float32 weight [out, in], its scales already rounded to the stored `dtype`.

    Without `search` a scale spans the group's whole range: [-absmax, absmax] on a symmetric grid, [min, max] with
    zero in it on any other. With it, the range is shrunk by whatever factor gives the smallest sum of |error|^2.4,
    weighted by `importance` [in] when given. `in` must be a multiple of the group size (-1: the whole row). A group
    of zeros gets the smallest normal number for a scale, never 0.
    """
    rows, columns = weight.shape
    size = columns if scheme.group_size == -1 else scheme.group_size
    assert columns % size == 0, (columns, size)
    groups = weight.reshape(-1, size)
    if scheme.kind == "float":
        scales = _storable(groups.abs().amax(dim=1, keepdim=True) / FP8_MAX, dtype)
        zeros = torch.zeros_like(scales)
    else:
        scales = torch.empty(len(groups), 1, dtype=torch.float32, device=weight.device)
        zeros = torch.empty_like(scales)
        chunk = max(1, (_CPU_CHUNK if weight.device.type == "cpu" else _DEVICE_CHUNK) // size)
        for start in range(0, len(groups), chunk):
            part = slice(start, start + chunk)
            factors = None
            if importance is not None:
                of_row = torch.arange(start, start + len(groups[part]), device=weight.device) % (columns // size)
                factors = importance.view(-1, size)[of_row]
            scales[part], zeros[part] = _best_range(groups[part], factors, scheme, search, dtype)
    return Grid(scales.to(dtype).view(rows, -1), zeros.to(torch.uint8).view(rows, -1), scheme)


def round_to_nearest(
    weight: torch.Tensor, scheme: Scheme, dtype: torch.dtype, search: Search | None = None
) -> QuantizedWeight:
    """Quantize a weight [out, in] without any data: a grid by `fit_grid`, then the nearest codes."""
    weight = weight.float()
    return fit_grid(weight, scheme, dtype, search).nearest(weight)


def full_range(groups: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """The ends [n, 1] of what the weights of groups [n, g] take up, zero included; alike on a symmetric grid."""
    if scheme.symmetric:
        high = groups.abs().amax(dim=1, keepdim=True)
        return -high, high
    return groups.amin(dim=1, keepdim=True).clamp(max=0.0), groups.amax(dim=1, keepdim=True).clamp(min=0.0)


def range_grid(
    low: torch.Tensor, high: torch.Tensor, scheme: Scheme, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales and zero points, both float32, of grids that span [low, high]."""
    scale = _storable((high - low) / ((1 << scheme.bits) - 1), dtype)
    if scheme.symmetric:
        return scale, torch.full_like(scale, scheme.half)
    return scale, (-low / scale).round_().clamp_(0, (1 << scheme.bits) - 1)


def _storable(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`scales` rounded to `dtype`, in float32, kept away from zero, subnormal numbers and infinity."""
    limits = torch.finfo(dtype)
    return scales.clamp(limits.tiny, limits.max).to(dtype).float()


def _best_range(
    groups: torch.Tensor, factors: torch.Tensor | None, scheme: Scheme, search: Search | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """For groups [n, g], the scales and zero points [n, 1] of least sum of factors * |error|^NORM."""
    low, high = full_range(groups, scheme)
    if search is None:
        return range_grid(low, high, scheme, dtype)
    top = (1 << scheme.bits) - 1
    best_scale, best_zero = range_grid(low, high, scheme, dtype)
    best_shrink = torch.ones_like(low)
    best_loss = torch.full_like(low, torch.inf)
    work = torch.empty_like(groups)

    def attempt(shrink: torch.Tensor | float) -> None:
        nonlocal best_scale, best_zero, best_shrink, best_loss
        scale, zero = range_grid(low * shrink, high * shrink, scheme, dtype)
        torch.div(groups, scale, out=work)
        work.round_().add_(zero).clamp_(0, top).sub_(zero).mul_(scale).sub_(groups).abs_()
        work.log2_().mul_(NORM).exp2_()  # |error|^NORM in a third of the time of pow, with 0 for 0
        if factors is not None:
            work.mul_(factors)
        loss = work.sum(dim=1, keepdim=True)
        better = loss < best_loss
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
        best_shrink = torch.where(better, shrink, best_shrink)
        best_loss = torch.where(better, loss, best_loss)

    if scheme.symmetric:  # the full range ends half a step below the largest positive weight: one that reaches it
        attempt(top / (top - 1))
    for step in range(round((1.0 - search.least) / search.step) + 1):
        attempt(1.0 - search.step * step)
    middle = best_shrink
    for step in range(1, round(search.step / search.fine) // 2 + 1):
        attempt(middle + search.fine * step)
        attempt(middle - search.fine * step)
    return best_scale, best_zero
