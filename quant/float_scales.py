"""The scales of float grids: FP8 (e4m3) and FP4 (E2M1), in rows, groups, blocks, MX and NVFP4.

Legend: `out` rows, `in` columns, `G` groups along `in`, `g` columns of a group.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from llmkit.checkpoint.quantized_weight import Scheme
from llmkit.kernels.activation_quant import (
    FP4_MAX,
    FP8,
    FP8_MAX,
    MAX_VALUES,
    group_scales,
    quantize_static,
)

# Scales beside the first choice that the search tries, in steps of the scales' format. e8m0: a step
# is a factor of 2. e4m3: eight steps are.
SEARCH_STEPS = {"e8m0": (1,), "e4m3": (-2, -1, 1, 2, 3, 4, 5, 6)}
_MAX_E4M3_CODE = 126  # 448; 127 is not a number
_MIN_E8M0 = 2.0**-127
_MAX_E8M0 = 2.0**127
_CPU_CHUNK = 1 << 18  # elements searched at a time
_DEVICE_CHUNK = 1 << 24


def fit_float_scales(
    weight: torch.Tensor,
    scheme: Scheme,
    *,
    is_searched: bool = False,
    importance: torch.Tensor | None = None,
    row_blocks: torch.Tensor | None = None,
    max_abs: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The scales float32 [out, G] of a float32 weight [out, in], and NVFP4's global scale [1].

    A group's largest magnitude is at the end of the grid. With e8m0 it may be up to 4/3 of that
    (see `group_scales`).
    is_searched: scales next to that are tried, where the format has few of them: the smallest sum
        of squared errors, weighted by `importance` [in], is chosen.
    row_blocks: the number of each row's block [out]; None: counted from the first row.
    max_abs: the largest magnitude of the whole weight, if `weight` is only a part of it.
    """
    value_type = "fp4" if scheme.is_fp4 else "fp8"
    largest = _group_magnitudes(weight, scheme)
    if scheme.block_rows == -1:
        whole = largest.max() if max_abs is None else max_abs
        largest = whole.to(largest.device).expand_as(largest)
    elif scheme.block_rows > 1:
        largest = _block_magnitudes(largest, scheme.block_rows, row_blocks)
    if scheme.scale_format == "float":
        return largest / MAX_VALUES[value_type], None
    global_scale = None
    if scheme.scale_format == "e4m3":
        global_scale = nvfp4_global_scale(weight.abs().max() if max_abs is None else max_abs)
        global_scale = global_scale.to(weight.device)
    scales = group_scales(largest, value_type, scheme.scale_format, global_scale)
    scales = _neighbor(scales, 0, scheme, global_scale)
    if is_searched:
        scales = _search_neighbors(weight, scales, scheme, global_scale, importance)
    return scales, global_scale


def nvfp4_global_scale(max_abs: torch.Tensor) -> torch.Tensor:
    """The scale [1] of e4m3 scales for values of up to `max_abs`; 1 for zeros.

    It is the inverse of a float32 number, because some formats store that.
    """
    divisor = (FP8_MAX * FP4_MAX) / max_abs.float().reshape(1)
    return torch.where(divisor.isfinite(), 1.0 / divisor, 1.0)


def _group_magnitudes(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The largest magnitude of each group, [out, G]; the last group of a row may be smaller."""
    rows, columns = weight.shape
    size = columns if scheme.group_size == -1 else scheme.group_size
    groups = pad(weight, (0, -columns % size)).view(rows, -1, size)
    low, high = groups.aminmax(dim=2)
    return torch.maximum(-low, high)


def _block_magnitudes(
    largest: torch.Tensor, block_rows: int, row_blocks: torch.Tensor | None
) -> torch.Tensor:
    """For every row, the largest magnitudes of its block: [out, G] in and out."""
    if row_blocks is None:
        row_blocks = torch.arange(len(largest)) // block_rows
    row_blocks = row_blocks.to(largest.device)
    num_blocks = int(row_blocks.max()) + 1
    blocks = largest.new_zeros(num_blocks, largest.shape[1])
    index = row_blocks.unsqueeze(1).expand_as(largest)
    return blocks.scatter_reduce_(0, index, largest, "amax")[row_blocks]


def _neighbor(
    scales: torch.Tensor, steps: int, scheme: Scheme, global_scale: torch.Tensor | None
) -> torch.Tensor:
    """The scales that are `steps` above these in the scales' format, or the last ones, never 0."""
    if scheme.scale_format == "e8m0":
        return (scales * 2.0**steps).clamp_(_MIN_E8M0, _MAX_E8M0)
    assert global_scale is not None
    return round_to_e4m3(scales, global_scale, steps)


def round_to_e4m3(scales: torch.Tensor, global_scale: torch.Tensor, steps: int = 0) -> torch.Tensor:
    """Positive scales rounded to e4m3 times `global_scale`, or `steps` numbers above; never 0."""
    stored = (scales / global_scale).clamp(max=FP8_MAX).to(FP8)
    codes = stored.view(torch.uint8).int().add_(steps)
    return codes.clamp_(1, _MAX_E4M3_CODE).to(torch.uint8).view(FP8).float() * global_scale


def _search_neighbors(
    weight: torch.Tensor,
    scales: torch.Tensor,
    scheme: Scheme,
    global_scale: torch.Tensor | None,
    importance: torch.Tensor | None,
) -> torch.Tensor:
    """The best of `scales` [out, G] and the scales beside them."""
    rows, columns = weight.shape
    value_type = "fp4" if scheme.is_fp4 else "fp8"
    best_scales = scales.clone()
    chunk_elements = _CPU_CHUNK if weight.device.type == "cpu" else _DEVICE_CHUNK
    chunk = max(1, chunk_elements // columns)
    group_importance = None
    if importance is not None:
        group_importance = importance.view(-1, scheme.group_size)
    for start in range(0, rows, chunk):
        part = slice(start, start + chunk)
        groups = weight[part].view(-1, columns // scheme.group_size, scheme.group_size)
        best_loss = torch.full_like(scales[part], torch.inf)
        for steps in (0, *SEARCH_STEPS[scheme.scale_format]):
            tried = _neighbor(scales[part], steps, scheme, global_scale)
            divisors = tried.unsqueeze(2)
            errors = quantize_static(groups, divisors, value_type).mul_(divisors).sub_(groups)
            errors.square_()
            if group_importance is not None:
                errors.mul_(group_importance)
            loss = errors.sum(dim=2)
            better = loss < best_loss
            best_scales[part] = torch.where(better, tried, best_scales[part])
            best_loss = torch.where(better, loss, best_loss)
    return best_scales


def fp4_codes(values: torch.Tensor) -> torch.Tensor:
    """The codes, uint8, of float32 numbers that are FP4 values. -0 has a code of its own, 8."""
    magnitudes = values.abs()
    above_2 = torch.where(magnitudes < 4, magnitudes + 2, magnitudes / 2 + 4)
    codes = torch.where(magnitudes < 2, magnitudes * 2, above_2).to(torch.uint8)
    return codes | values.signbit().to(torch.uint8) << 3
