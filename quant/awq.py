"""AWQ (Lin et al., 2023, arXiv 2306.00978): scale up the columns that matter before rounding, then clip.

Both searches measure the output error on the Hessian, tr(dW H dW'), so no forward passes are needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmkit.quant.algorithm import Quantized, Site
from llmkit.quant.edges import Edge
from llmkit.quant.grid import Grid, fit_grid, full_range, range_grid
from llmkit.quant.smoothquant import normalized
from llmkit.quant.statistics import Need, Statistics

ROWS = 512  # of a weight that the scale search looks at, evenly spread
CLIPS = tuple(1.0 - 0.05 * step for step in range(10))


@dataclass(frozen=True)
class AwqScales:
    """Which columns to scale up, and by how much."""

    ratios: int = 20  # tried of s = |x|^r / |w|^(1-r), next to no scaling at all
    needs: frozenset[Need] = frozenset({"hessian"})

    def scales(self, site: Site, edge: Edge, weight: torch.Tensor, seen: Statistics) -> torch.Tensor | None:
        """The scales of least output error; None when none is better than no scaling."""
        assert seen.hessian is not None
        hessian = seen.hessian
        part = weight[:: max(1, len(weight) // ROWS)]

        def lost(scales: torch.Tensor) -> float:
            scaled = part * scales
            delta = fit_grid(scaled, site.scheme, site.dtype).nearest(scaled).dequantize() / scales - part
            return ((delta @ hessian) * delta).sum().item()

        of_inputs, of_weights = edge.per_source(seen.mean), edge.per_source(_weight_share(weight, site))
        best, least = None, lost(torch.ones_like(seen.mean))
        for step in range(self.ratios):
            ratio = step / self.ratios
            scales = normalized(of_inputs.pow(ratio) / (of_weights.pow(1 - ratio) + 1e-4))
            if (loss := lost(edge.per_input(scales))) < least:
                best, least = scales, loss
        return best


@dataclass(frozen=True)
class Clipped:
    """The nearest codes, in ranges clipped where that lowers the output error."""

    needs: frozenset[Need] = frozenset({"hessian"})
    sequential: bool = False

    def quantize(self, site: Site, weight: torch.Tensor, seen: Statistics) -> Quantized:
        """Clip and round."""
        assert seen.hessian is not None
        grid = clipped(weight, seen.hessian, fit_grid(weight, site.scheme, site.dtype), kept_rows(site))
        return Quantized(grid.nearest(weight), "awq")


def kept_rows(site: Site) -> int:
    """How many of the first rows are not clipped: those of q and k, whose products amplify what is cut off."""
    parts = site.row.parts
    return sum(part.shape[0] for part in parts[:2]) if site.name == "attn.qkv" and len(parts) == 3 else 0


def clipped(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, keep: int) -> Grid:
    """`grid` with the range of every group after the first `keep` rows shrunk by the clip of least d' H_g d."""
    scheme = grid.scheme
    columns = weight.shape[1]
    size = columns if scheme.group_size == -1 else scheme.group_size
    blocks = torch.stack([hessian[i : i + size, i : i + size] for i in range(0, columns, size)])
    scales, zeros = grid.scales.clone(), grid.zeros.clone()
    for start in range(keep, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        scales[rows], zeros[rows] = _clipped_rows(weight[rows], blocks, grid)
    return Grid(scales, zeros, scheme)


def _clipped_rows(part: torch.Tensor, blocks: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points [rows, G] of some rows of a weight; blocks: the Hessian's diagonal ones [G, g, g]."""
    scheme, dtype = grid.scheme, grid.scales.dtype
    shape = (len(part), *blocks.shape[:2])
    low, high = full_range(part.reshape(-1, shape[2]), scheme)
    best: list[torch.Tensor] = []
    least = torch.full(shape[:2], torch.inf, device=part.device)
    for clip in CLIPS:
        scale, zero = (t.view(shape[:2]) for t in range_grid(low * clip, high * clip, scheme, dtype))
        tried = Grid(scale.to(dtype), zero.to(torch.uint8), scheme)
        delta = (tried.nearest(part).dequantize() - part).view(shape).transpose(0, 1)
        loss = ((delta @ blocks) * delta).sum(dim=2).T
        better = loss < least
        least = torch.where(better, loss, least)
        found = [tried.scales, tried.zeros]
        best = [torch.where(better, new, old) for new, old in zip(found, best, strict=True)] if best else found
    return best[0], best[1]


def _weight_share(weight: torch.Tensor, site: Site) -> torch.Tensor:
    """How large each column's weights are within their groups, [in]: the mean of |w| over the group's largest."""
    rows, columns = weight.shape
    size = columns if site.scheme.group_size == -1 else site.scheme.group_size
    groups = weight.abs().view(rows, -1, size)
    groups /= groups.amax(dim=2, keepdim=True) + 1e-6  # in place: a second copy would be the peak of a run
    return groups.view(rows, columns).mean(dim=0)
