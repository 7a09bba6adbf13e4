"""AWQ (Lin et al., 2023, arXiv 2306.00978): scale up the important columns, then clip ranges.

Both searches measure the output error with the Hessian, tr(dW H dW'). They run no forward passes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmkit.quant.algorithm import QuantizeResult, QuantTarget
from llmkit.quant.grid import Grid, fit_grid, full_range, scales_and_zeros
from llmkit.quant.input_stats import InputStats, StatKind
from llmkit.quant.smoothing_mappings import SmoothingMapping
from llmkit.quant.smoothquant import normalize_scales

# The scale search measures at most this many rows of a weight, evenly spread.
SCALE_SEARCH_ROWS = 256
CLIP_SEARCH_ROWS = 512  # rows that the clip search works on at a time
CLIP_FACTORS = tuple(1.0 - 0.05 * step for step in range(10))


@dataclass(frozen=True)
class AwqSmoother:
    """Searches the scales of the columns."""

    # The number of ratios r to try in s = |x|^r / |w|^(1-r), in addition to no scaling.
    n_grid: int = 20
    required_stats: frozenset[StatKind] = frozenset({"hessian"})

    def scales(
        self,
        target: QuantTarget,
        mapping: SmoothingMapping,
        weight: torch.Tensor,
        input_stats: InputStats,
    ) -> torch.Tensor | None:
        """The scales with the smallest output error; None when they do not beat no scaling."""
        assert input_stats.hessian is not None
        hessian = input_stats.hessian
        rows = weight[:: -(-len(weight) // SCALE_SEARCH_ROWS)]

        def output_error(scales: torch.Tensor) -> float:
            scaled = rows * scales
            grid = fit_grid(scaled, target.scheme, target.scale_dtype)
            delta = grid.round(scaled).dequantize() / scales - rows
            return ((delta @ hessian) * delta).sum().item()

        input_magnitudes = mapping.max_over_kv_group(input_stats.mean_abs)
        weight_magnitudes = mapping.max_over_kv_group(_normalized_weight_mean(weight, target))

        best_scales = None
        best_error = output_error(torch.ones_like(input_stats.mean_abs))
        for step in range(self.n_grid):
            ratio = step / self.n_grid
            scales = normalize_scales(
                input_magnitudes.pow(ratio) / (weight_magnitudes.pow(1 - ratio) + 1e-4)
            )
            error = output_error(mapping.repeat_kv(scales))
            if error < best_error:
                best_scales = scales
                best_error = error
        return best_scales


@dataclass(frozen=True)
class ClippingQuantizer:
    """Rounds to nearest, in ranges that are clipped where that lowers the output error."""

    required_stats: frozenset[StatKind] = frozenset({"hessian"})
    true_sequential: bool = False

    def quantize(
        self, target: QuantTarget, weight: torch.Tensor, input_stats: InputStats
    ) -> QuantizeResult:
        """Clip the ranges and round."""
        assert input_stats.hessian is not None
        grid = fit_grid(weight, target.scheme, target.scale_dtype)
        grid = clip_grid(weight, input_stats.hessian, grid, num_unclipped_rows(target))
        return QuantizeResult(grid.round(weight), "awq")


def num_unclipped_rows(target: QuantTarget) -> int:
    """How many of the first rows are not clipped.

    They are those of q and k: the products of queries and keys amplify clipping errors.
    """
    parts = target.parameter.sources
    if target.name == "attn.qkv" and len(parts) >= 3:  # Qwen3-Next has the gate's rows, too
        return sum(part.shape[0] for part in parts[:2])
    return 0


def clip_grid(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, num_unclipped: int) -> Grid:
    """`grid` with every group's range clipped by the factor with the smallest output error.

    The first `num_unclipped` rows keep their ranges. The error of a group is d' H_g d, with H_g the
    group's block on the Hessian's diagonal.
    """
    scheme = grid.scheme
    columns = weight.shape[1]
    size = columns if scheme.group_size == -1 else scheme.group_size
    blocks = torch.stack([hessian[i : i + size, i : i + size] for i in range(0, columns, size)])
    scales = grid.scales.clone()
    zeros = grid.zeros.clone()
    for start in range(num_unclipped, len(weight), CLIP_SEARCH_ROWS):
        rows = slice(start, start + CLIP_SEARCH_ROWS)
        scales[rows], zeros[rows] = _search_clip(weight[rows], blocks, grid)
    return Grid(scales, zeros, scheme)


def _search_clip(
    weight: torch.Tensor, hessian_blocks: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best scales and zero points [rows, G] of some rows of a weight.

    hessian_blocks [G, g, g]: the blocks on the Hessian's diagonal.
    """
    scheme = grid.scheme
    dtype = grid.scales.dtype
    num_groups, group_size = hessian_blocks.shape[:2]
    grouped_shape = (len(weight), num_groups, group_size)
    grid_shape = (len(weight), num_groups)
    low, high = full_range(weight.reshape(-1, group_size), scheme)
    best_scales: torch.Tensor | None = None
    best_zeros: torch.Tensor | None = None
    best_loss = torch.full(grid_shape, torch.inf, device=weight.device)
    for factor in CLIP_FACTORS:
        scale, zero = scales_and_zeros(low * factor, high * factor, scheme, dtype)
        scale = scale.view(grid_shape).to(dtype)
        zero = zero.view(grid_shape).to(torch.uint8)
        quantized = Grid(scale, zero, scheme).round(weight)
        delta = (quantized.dequantize() - weight).view(grouped_shape).transpose(0, 1)
        loss = ((delta @ hessian_blocks) * delta).sum(dim=2).T
        better = loss < best_loss
        best_loss = torch.where(better, loss, best_loss)
        if best_scales is None or best_zeros is None:
            best_scales = scale
            best_zeros = zero
        else:
            best_scales = torch.where(better, scale, best_scales)
            best_zeros = torch.where(better, zero, best_zeros)
    assert best_scales is not None and best_zeros is not None
    return best_scales, best_zeros


def _normalized_weight_mean(weight: torch.Tensor, target: QuantTarget) -> torch.Tensor:
    """Each column's mean [in] of |w|, relative to the largest |w| of its group."""
    rows, columns = weight.shape
    size = columns if target.scheme.group_size == -1 else target.scheme.group_size
    groups = weight.abs().view(rows, -1, size)
    # In place: a second copy would be the memory peak of a run.
    groups /= groups.amax(dim=2, keepdim=True) + 1e-6
    return groups.view(rows, columns).mean(dim=0)
