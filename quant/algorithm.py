"""What calibrated methods are made of: scales moved across an edge, codes made of a weight, rounding learnt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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
    error: float | None = None  # the share of the output's energy that is lost, when the coder knows it
    tokens: int = 0  # of calibration that it saw


@dataclass
class Job:
    """A linear whose codes are wanted: its weight [out, in], and the figures of its inputs, which may be used up."""

    site: Site
    weight: torch.Tensor
    seen: Statistics
    fallback: str | None = None  # why it is to be rounded to the nearest codes


class Mover(Protocol):
    """Finds scales to move from a linear's inputs into its weight. `seen` are the figures of its inputs; no argument
    is changed."""

    @property
    def needs(self) -> frozenset[Need]:
        """What statistics have to keep."""

    def scales(self, site: Site, edge: Edge, weight: torch.Tensor, seen: Statistics) -> torch.Tensor | None:
        """Scales, one per output of the edge's source, to move into the weight [out, in]; None to leave it alone."""


class Coder(Protocol):
    """Makes codes of a weight, which is not changed. `seen` are the figures of its inputs; they may be used up."""

    @property
    def needs(self) -> frozenset[Need]:
        """What statistics have to keep; nothing when the inputs need not be seen."""

    @property
    def sequential(self) -> bool:
        """Whether the inputs of `o` and `down` are seen again once what comes before them is quantized."""

    def quantize(self, site: Site, weight: torch.Tensor, seen: Statistics) -> Quantized:
        """The codes of the weight [out, in]."""


Solve = Callable[[Coder, Iterable[Job]], Iterator[Quantized]]  # in the order of the jobs, none of which needs another


@dataclass(frozen=True)
class Learn:
    """How long and how fast the rounding of a layer is learnt (see `llmkit.quant.learn`)."""

    steps: int = 100
    tokens: int = 1024  # of a step, at least one window
    rounding_rate: float = 1.0  # a weight can move by this many codes in all, over 2
    scale_rate: float = 0.05  # and a scale by this share, over 2


@dataclass(frozen=True)
class Algorithm:
    """What a calibrated run does to every linear layer, in this order."""

    coder: Coder
    mover: Mover | None = None
    learn: Learn | None = None

    @property
    def needs(self) -> frozenset[Need]:
        """What statistics have to keep."""
        return self.coder.needs | (self.mover.needs if self.mover else frozenset())
