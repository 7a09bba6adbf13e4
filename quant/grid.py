"""The quantization grid: how scales and zero points are chosen, and rounding to nearest.

Legend: `out` rows, `in` columns, `G` groups along `in`, `g` columns of a group. A quantized value q
is 0 .. 2^bits - 1 and represents (q - zero) * scale; zero is 2^(bits-1) on a symmetric grid. FP8
values are e4m3 numbers and FP4 values codes of E2M1; `float_scales` chooses their scales.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmkit.checkpoint.quantized_weight import QuantizedWeight, Scheme
from llmkit.kernels.activation_quant import FP8, quantize_static
from llmkit.quant.float_scales import fit_float_scales, fp4_codes

# The exponent of the range search's loss: a little more than 2 protects outliers. GPTQ uses 2.4.
ERROR_NORM = 2.4
_CPU_CHUNK = 1 << 17  # elements searched at a time: they stay in a core's cache
_ROUNDING_CHUNK = 1 << 21  # elements rounded at a time: temporary tensors stay small
_DEVICE_CHUNK = 1 << 24


@dataclass(frozen=True)
class Grid:
    """The scales and zero points of a weight."""

    scales: torch.Tensor  # [out, G], in the stored dtype
    zeros: torch.Tensor  # uint8 [out, G]
    scheme: Scheme
    global_scale: torch.Tensor | None = None  # float32 [1], of e4m3 scales

    def round(self, weight: torch.Tensor) -> QuantizedWeight:
        """Round a float32 weight [out, in] to the nearest values of the grid."""
        rows, columns = weight.shape
        q = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
        chunk_elements = _ROUNDING_CHUNK if weight.device.type == "cpu" else _DEVICE_CHUNK
        chunk = max(1, chunk_elements // columns)
        for start in range(0, rows, chunk):
            part = slice(start, start + chunk)
            if self.scheme.kind == "float":
                q[part] = self._float_codes(weight[part], self.scales[part])
            else:
                q[part] = self._integers(weight[part], part)
        return self.weight_of(q)

    def weight_of(self, q: torch.Tensor) -> QuantizedWeight:
        """The weight of quantized values, given as bytes [out, in]."""
        if self.scheme.is_fp8:
            q = q.view(FP8)
        return QuantizedWeight(
            q, self.scales, self.zeros, self.scheme, global_scale=self.global_scale
        )

    def codes(self, values: torch.Tensor) -> torch.Tensor:
        """The bytes of quantized values that are given as numbers."""
        if self.scheme.is_fp8:
            return values.to(FP8).view(torch.uint8)
        return fp4_codes(values) if self.scheme.is_fp4 else values.to(torch.uint8)

    def _integers(self, weight: torch.Tensor, part: slice) -> torch.Tensor:
        groups = weight.reshape(len(weight), self.scales.shape[1], -1)
        steps = groups / self.scales[part].float().unsqueeze(2)
        steps.round_().add_(self.zeros[part].float().unsqueeze(2))
        return steps.clamp_(0, (1 << self.scheme.bits) - 1).view(weight.shape)

    def _float_codes(self, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        scales = scales.float()
        if scales.shape[1] > 1:  # the last group may be smaller
            scales = scales.repeat_interleave(self.scheme.group_size, dim=1)
            scales = scales[:, : weight.shape[1]]
        value_type = "fp4" if self.scheme.is_fp4 else "fp8"
        return self.codes(quantize_static(weight, scales, value_type))


@dataclass(frozen=True)
class RangeSearch:
    """Which shrunken ranges are tried, as factors of the full range.

    The first pass tries factors from `min_factor` to 1, `coarse_step` apart. The second pass tries
    factors around each group's best one, `fine_step` apart.
    """

    # With 4 bits and more, where SmolLM2's best factors are 0.6 and more (at 2 bits 0.2).
    min_factor: float
    min_factor_of_few_bits: float  # with 2 and 3 bits
    coarse_step: float
    fine_step: float


FULL_SEARCH = RangeSearch(0.52, 0.2, 0.04, 0.01)


def fit_grid(
    weight: torch.Tensor,
    scheme: Scheme,
    dtype: torch.dtype,
    search: RangeSearch | None = None,
    importance: torch.Tensor | None = None,
    row_blocks: torch.Tensor | None = None,
    max_abs: torch.Tensor | None = None,
) -> Grid:
    """The grid of a float32 weight [out, in], its scales rounded to the stored `dtype`.

    Without `search` a group's range is [-absmax, absmax] on a symmetric grid, and [min, max]
    extended to zero otherwise. With `search` the range is shrunk by the factor with the smallest
    sum of |error|^2.4, weighted by `importance` [in] when given. `in` is a multiple of the group
    size (-1: the whole row). The scale of a group of zeros is the smallest normal number, never 0.
    Float grids: see `fit_float_scales`, also for `row_blocks` and `max_abs`.
    """
    rows, columns = weight.shape
    if scheme.kind == "float":
        scales, global_scale = fit_float_scales(
            weight,
            scheme,
            is_searched=search is not None,
            importance=importance,
            row_blocks=row_blocks,
            max_abs=max_abs,
        )
        if scheme.scale_format == "float":
            scales = _round_scales(scales, dtype).to(dtype)
        return Grid(scales, torch.zeros_like(scales, dtype=torch.uint8), scheme, global_scale)
    group_size = columns if scheme.group_size == -1 else scheme.group_size
    assert columns % group_size == 0, (columns, group_size)
    groups = weight.reshape(-1, group_size)
    scales = torch.empty(len(groups), 1, dtype=torch.float32, device=weight.device)
    zeros = torch.empty_like(scales)
    chunk_elements = _CPU_CHUNK if weight.device.type == "cpu" else _DEVICE_CHUNK
    chunk = max(1, chunk_elements // group_size)
    for start in range(0, len(groups), chunk):
        part = slice(start, start + chunk)
        group_importance = None
        if importance is not None:
            index = torch.arange(start, start + len(groups[part]), device=weight.device)
            group_in_row = index % (columns // group_size)
            group_importance = importance.view(-1, group_size)[group_in_row]
        scales[part], zeros[part] = _search_range(
            groups[part], group_importance, scheme, search, dtype
        )
    return Grid(scales.to(dtype).view(rows, -1), zeros.to(torch.uint8).view(rows, -1), scheme)


def round_to_nearest(
    weight: torch.Tensor,
    scheme: Scheme,
    dtype: torch.dtype,
    search: RangeSearch | None = None,
    row_blocks: torch.Tensor | None = None,
    max_abs: torch.Tensor | None = None,
) -> QuantizedWeight:
    """Quantize a weight [out, in] without calibration data: fit the grid, then round."""
    weight = weight.float()
    grid = fit_grid(weight, scheme, dtype, search, row_blocks=row_blocks, max_abs=max_abs)
    return grid.round(weight)


def full_range(groups: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """The lower and upper ends [n, 1] of the full range of groups [n, g], which includes zero."""
    if scheme.symmetric:
        high = groups.abs().amax(dim=1, keepdim=True)
        return -high, high
    low = groups.amin(dim=1, keepdim=True).clamp(max=0.0)
    high = groups.amax(dim=1, keepdim=True).clamp(min=0.0)
    return low, high


def scales_and_zeros(
    low: torch.Tensor, high: torch.Tensor, scheme: Scheme, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales and zero points, both float32, of grids that cover the range [low, high]."""
    max_q = (1 << scheme.bits) - 1
    scale = _round_scales((high - low) / max_q, dtype)
    if scheme.symmetric:
        return scale, torch.full_like(scale, scheme.half)
    return scale, (-low / scale).round_().clamp_(0, max_q)


def _round_scales(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`scales` rounded to `dtype`, as float32; zeros, subnormals and infinities are clamped."""
    limits = torch.finfo(dtype)
    return scales.clamp(limits.tiny, limits.max).to(dtype).float()


def _search_range(
    groups: torch.Tensor,
    importance: torch.Tensor | None,
    scheme: Scheme,
    search: RangeSearch | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales and zero points [n, 1] of groups [n, g] with the smallest loss.

    The loss is the sum of importance * |error|^ERROR_NORM.
    """
    low, high = full_range(groups, scheme)
    if search is None:
        return scales_and_zeros(low, high, scheme, dtype)
    max_q = (1 << scheme.bits) - 1
    best_scale, best_zero = scales_and_zeros(low, high, scheme, dtype)
    best_factor = torch.ones_like(low)
    best_loss = torch.full_like(low, torch.inf)
    steps = torch.empty_like(groups)
    errors = torch.empty_like(groups)

    def try_factor(factor: torch.Tensor | float) -> None:
        nonlocal best_scale, best_zero, best_factor, best_loss
        scale, zero = scales_and_zeros(low * factor, high * factor, scheme, dtype)
        torch.div(groups, scale, out=steps)
        torch.round(steps, out=errors)
        if scheme.symmetric:
            errors.clamp_(-scheme.half, max_q - scheme.half)
        else:
            errors.add_(zero).clamp_(0, max_q).sub_(zero)
        # |error|^ERROR_NORM in a third of the time of pow; 0 stays 0.
        errors.sub_(steps).abs_().log2_().mul_(ERROR_NORM).exp2_()
        if importance is not None:
            errors.mul_(importance)
        loss = errors.sum(dim=1, keepdim=True) * scale.pow(ERROR_NORM)
        better = loss < best_loss
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
        best_factor = torch.where(better, factor, best_factor)
        best_loss = torch.where(better, loss, best_loss)

    if scheme.symmetric:
        # The symmetric grid ends half a step below the largest positive weight. This factor
        # reaches it.
        try_factor(max_q / (max_q - 1))
    min_factor = search.min_factor if scheme.bits >= 4 else search.min_factor_of_few_bits
    for step in range(round((1.0 - min_factor) / search.coarse_step) + 1):
        try_factor(1.0 - search.coarse_step * step)
    coarse_best = best_factor
    for step in range(1, round(search.coarse_step / search.fine_step) // 2 + 1):
        try_factor(coarse_best + search.fine_step * step)
        try_factor(coarse_best - search.fine_step * step)
    return best_scale, best_zero
