"""SmoothQuant (Xiao et al., 2022, arXiv 2211.10438): move the outliers of 8-bit inputs into the weights.

The published rule s = max|x|^a / max|w|^(1-a) with one `a` for the whole model becomes a search: for every edge the `a`
of least output error on sampled inputs, no scaling included.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmkit.kernels.rounding import round_tokens
from llmkit.quant.algorithm import Site
from llmkit.quant.edges import Edge
from llmkit.quant.grid import round_to_nearest
from llmkit.quant.statistics import Need, Statistics

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class SmoothQuant:
    """The scales of `int8 --activations`."""

    needs: frozenset[Need] = frozenset({"sample"})

    def scales(self, site: Site, edge: Edge, weight: torch.Tensor, seen: Statistics) -> torch.Tensor | None:
        """The scales of least error of the rounded product; None when scaling does not help."""
        inputs = seen.sample
        wanted = inputs @ weight.T

        def lost(scales: torch.Tensor) -> float:
            rounded = round_to_nearest(weight * scales, site.scheme, site.dtype).dequantize()
            return (round_tokens(inputs / scales, site.scheme.kind) @ rounded.T - wanted).square().sum().item()

        of_inputs = edge.per_source(seen.largest)
        of_weights = edge.per_source(weight.abs().amax(dim=0))
        best, least = None, lost(torch.ones_like(seen.largest))
        for alpha in ALPHAS:
            scales = normalized(of_inputs.pow(alpha) / of_weights.clamp(min=1e-5).pow(1 - alpha))
            if (loss := lost(edge.per_input(scales))) < least:
                best, least = scales, loss
        return best


def normalized(scales: torch.Tensor) -> torch.Tensor:
    """Scales around 1, so that what they divide keeps its range; 1 where nothing was ever seen."""
    usable = torch.isfinite(scales) & (scales > 0)
    scales = torch.where(usable, scales, torch.ones_like(scales)).clamp(1e-4, 1e4)
    return scales / (scales.max() * scales.min()).sqrt()
