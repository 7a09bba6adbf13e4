"""Rounding to the nearest code: the methods `rtn`, `int8` and `fp8`, and what others fall back to."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmkit.kernels.rounding import FP8_MAX, TINY
from llmkit.quant.algorithm import Quantized, Site
from llmkit.quant.grid import Search, round_to_nearest
from llmkit.quant.statistics import Need, Statistics


@dataclass(frozen=True)
class Nearest:
    """Codes that need no data."""

    search: Search | None = None
    needs: frozenset[Need] = frozenset()
    sequential: bool = False

    def quantize(self, site: Site, weight: torch.Tensor, seen: Statistics) -> Quantized:
        """The nearest codes."""
        return Quantized(round_to_nearest(weight, site.scheme, site.dtype, self.search), "rtn")


def fixed_scale(seen: Statistics) -> torch.Tensor:
    """The scale [1] of FP8 inputs that reaches the largest one seen; 1 when none was."""
    largest = seen.largest.max() if seen.tokens else torch.tensor(FP8_MAX)
    return (largest / FP8_MAX).clamp(min=TINY).reshape(1)
