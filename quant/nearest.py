"""Rounding to the nearest code: the methods `rtn`, `int8` and `fp8`, and what others fall back to."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmkit.checkpoint.quantized import FP8_MAX
from llmkit.kernels.rounding import TINY
from llmkit.quant.algorithm import Quantized, Site
from llmkit.quant.edges import Edge
from llmkit.quant.grid import Search, round_to_nearest
from llmkit.quant.statistics import Need, Statistics


@dataclass(frozen=True)
class Nearest:
    """Codes that need no data; of the inputs only a fixed scale is taken, where the scheme wants one."""

    search: Search | None = None
    needs: frozenset[Need] = frozenset()
    moves: bool = False
    sequential: bool = False

    def scales(self, site: Site, edge: Edge, weight: torch.Tensor, seen: Statistics) -> torch.Tensor | None:
        """None: the weights stay where they are."""
        return None

    def quantize(self, site: Site, weight: torch.Tensor, seen: Statistics) -> Quantized:
        """The nearest codes."""
        rounded = round_to_nearest(weight, site.scheme, site.dtype, self.search)
        if site.scheme.inputs == "tensor":
            largest = seen.largest.max() if seen.tokens else torch.tensor(FP8_MAX)
            rounded.input_scale = (largest / FP8_MAX).clamp(min=TINY).reshape(1)
        return Quantized(rounded, "rtn")
