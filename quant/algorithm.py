"""The parts of a calibrated method: a smoother, a quantizer, learned rounding and norm tuning.

A smoother moves scales from a linear's inputs into its weight (AWQ, SmoothQuant). A quantizer turns
a weight into quantized values (GPTQ, AWQ's clipping, round to nearest). Learned rounding
(AutoRound) improves the quantized values of a whole decoder layer, and norm tuning the norms of
the whole quantized model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from llmkit.checkpoint.quantized_weight import QuantizedWeight, Scheme
from llmkit.model.parameter import Parameter
from llmkit.quant.gguf_weight import GgufWeight
from llmkit.quant.input_stats import InputStats, StatKind
from llmkit.quant.parameter_writer import rows_by_tensor
from llmkit.quant.smoothing_mappings import SmoothingMapping


@dataclass(frozen=True)
class QuantTarget:
    """A linear layer to quantize."""

    parameter: Parameter  # its row of the parameter table
    name: str  # within its decoder layer: "attn.qkv"
    scheme: Scheme
    scale_dtype: torch.dtype  # the dtype that the output format stores scales in

    @cached_property
    def row_blocks(self) -> torch.Tensor | None:
        """The number of each row's block [out]; None where blocks have one row or all rows.

        Blocks begin with each checkpoint tensor, not with the runtime tensor.
        """
        size = self.scheme.block_rows
        if size in (1, -1):
            return None
        blocks = torch.empty(self.parameter.shape[0], dtype=torch.int64)
        first = 0
        for pieces in rows_by_tensor(self.parameter).values():
            rows = torch.cat([torch.arange(piece.start, piece.stop) for piece in pieces])
            blocks[rows] = first + torch.arange(len(rows)) // size
            first += -(-len(rows) // size)
        return blocks


@dataclass
class QuantizeResult:
    """A quantized weight and how it was made."""

    weight: QuantizedWeight | GgufWeight
    method: str
    # GPTQ only: what was added to the Hessian's diagonal, as a fraction of its mean.
    dampening_frac: float | None = None
    # Why the weight was rounded to nearest instead of by the chosen method.
    fallback: str | None = None
    # The fraction of the output's energy that is lost. None: `quantize_linear` computes it.
    error: float | None = None
    # The calibration tokens that the linear received. Set by `quantize_linear`.
    num_tokens: int = 0


@dataclass
class QuantizeJob:
    """One linear for a quantizer: its weight [out, in] and the statistics of its inputs."""

    target: QuantTarget
    weight: torch.Tensor
    input_stats: InputStats  # the quantizer may consume them
    fallback: str | None = None  # a reason to round to nearest instead


class Smoother(Protocol):
    """Finds scales that move from a linear's inputs into its weight."""

    @property
    def required_stats(self) -> frozenset[StatKind]:
        """The statistics of the inputs that must be collected."""

    def scales(
        self,
        target: QuantTarget,
        mapping: SmoothingMapping,
        weight: torch.Tensor,
        input_stats: InputStats,
    ) -> torch.Tensor | None:
        """The scales for a weight [out, in], one per output of the mapping's smooth layer.

        None when scaling does not reduce the error. No argument is changed.
        """


class Quantizer(Protocol):
    """Turns a weight into quantized values."""

    @property
    def required_stats(self) -> frozenset[StatKind]:
        """The statistics of the inputs that must be collected; empty when none are needed."""

    @property
    def true_sequential(self) -> bool:
        """Whether the inputs of `o` and `down` are collected again after the linears before them
        are quantized."""

    def quantize(
        self, target: QuantTarget, weight: torch.Tensor, input_stats: InputStats
    ) -> QuantizeResult:
        """Quantize a weight [out, in], which is not changed. `input_stats` may be consumed."""


# Runs a quantizer on independent jobs and yields the results in the order of the jobs.
Solver = Callable[[Quantizer, Iterable[QuantizeJob]], Iterator[QuantizeResult]]


@dataclass(frozen=True)
class AutoRound:
    """The settings of learned rounding (see `llmkit.quant.auto_round`)."""

    steps: int = 60
    tokens: int = 8192  # calibration tokens in a step; a step has at least one window
    # Of the first step, as a multiple of the rate that is best for weights that are not rounded; it
    # falls to 0. It is larger than 1, because most steps change no rounding.
    rate: float = 10.0
    # The share of the earlier layers' errors that a layer corrects. All of it would fit the
    # calibration text too closely.
    correction: float = 0.5


@dataclass(frozen=True)
class NormTuning:
    """The settings of norm tuning (see `llmkit.quant.norm_tuning`)."""

    steps: int = 32
    tokens: int = 1024  # calibration tokens in a step; a step has at least one window
    # Of Adam, falling to 0, as a fraction of the root of a norm's mean square.
    rate: float = 1e-3


@dataclass(frozen=True)
class Algorithm:
    """What a calibrated run does: smooth, quantize, learn the rounding, tune the norms."""

    quantizer: Quantizer
    smoother: Smoother | None = None
    auto_round: AutoRound | None = None
    norm_tuning: NormTuning | None = None

    @property
    def is_asymmetric(self) -> bool:
        """Whether weights correct the errors of earlier layers."""
        return "residual" in self.quantizer.required_stats

    @property
    def runs_dense_model(self) -> bool:
        """Whether the unquantized model runs beside the quantized one."""
        has_targets = self.auto_round is not None or self.norm_tuning is not None
        return has_targets or self.is_asymmetric

    @property
    def num_hidden_states(self) -> int:
        """How many hidden states of a window are kept at once.

        Those of the quantized model, those of the unquantized one, and a layer's inputs and targets
        while its rounding is learned.
        """
        return 1 + self.runs_dense_model + 2 * (self.auto_round is not None)

    @property
    def required_stats(self) -> frozenset[StatKind]:
        """The statistics of the inputs that the quantizer and the smoother need."""
        if self.smoother is None:
            return self.quantizer.required_stats
        return self.quantizer.required_stats | self.smoother.required_stats
