"""What every calibrated method has in common: it may move scales across an edge, and it makes codes of a weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from llmkit.checkpoint.quantized import QuantizedWeight, Scheme
from llmkit.model.layout import Parameter
from llmkit.quant.edges import Edge
from llmkit.quant.statistics import Need, Statistics


@dataclass(frozen=True)
class Site:
    """A linear layer that is to be quantized."""

    row: Parameter
    name: str  # within its decoder layer, "attn.qkv"
    scheme: Scheme
    dtype: torch.dtype  # that its scales are stored in


@dataclass
class Quantized:
    """A quantized weight and how it came about."""

    weight: QuantizedWeight
    method: str
    damp: float | None = None  # GPTQ: the share of the Hessian's mean diagonal that was added to it
    fallback: str | None = None  # why it was not quantized by the method asked for


class Algorithm(Protocol):
    """How a calibrated method treats one linear layer. `seen` are the figures of its inputs; no argument is changed."""

    @property
    def needs(self) -> frozenset[Need]:
        """What statistics have to keep; nothing when the inputs need not be seen."""

    @property
    def moves(self) -> bool:
        """Whether `scales` may return any."""

    @property
    def sequential(self) -> bool:
        """Whether the inputs of `o` and `down` are seen again once what comes before them is quantized."""

    def scales(self, site: Site, edge: Edge, weight: torch.Tensor, seen: Statistics) -> torch.Tensor | None:
        """Scales, one per output of the edge's source, to move into the weight [out, in]; None to leave it alone."""

    def quantize(self, site: Site, weight: torch.Tensor, seen: Statistics) -> Quantized:
        """The codes of the weight [out, in]."""
