"""Quantizes weights to GGUF's types: scales weighted by the Hessian's diagonal, then GPTQ.

llama.cpp's importance matrix is the Hessian's diagonal, too. GPTQ then rounds the columns one after
the other on these scales, so that later columns make up for the errors of earlier ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from llmkit.checkpoint.gguf_blocks import GGUF_TYPES, GgufBlocks
from llmkit.checkpoint.quantized_weight import Scheme
from llmkit.model.gguf_export import GgufPlace
from llmkit.quant.algorithm import QuantizeResult, QuantTarget
from llmkit.quant.gguf_plan import round_dense
from llmkit.quant.gguf_scales import fit_blocks
from llmkit.quant.gguf_weight import GgufWeight, MovedTensor, Stored
from llmkit.quant.gptq import gptq
from llmkit.quant.grid import Grid
from llmkit.quant.input_stats import (
    InputStats,
    StatKind,
    lost_fraction,
    output_energy,
    sum_of_squares,
)
from llmkit.quant.parameter_writer import rows_by_tensor

# The scale of a group whose real scale is 0: all its weights are rounded to zero.
_ALL_ZERO = 1e30


@dataclass(frozen=True)
class GgufQuantizer:
    """Quantizes each checkpoint tensor to its type.

    types: of each tensor of the file. places: of the checkpoint tensors in the file.
    calibrated: with the statistics of inputs.
    """

    types: Mapping[str, str]
    places: Mapping[str, GgufPlace]
    calibrated: bool = True
    dampening_frac: float = 0.01
    true_sequential: bool = True

    @property
    def required_stats(self) -> frozenset[StatKind]:
        """The Hessian, if calibrated."""
        return frozenset({"hessian"}) if self.calibrated else frozenset()

    def without_calibration(self) -> GgufQuantizer:
        """The same types, rounded to nearest."""
        return replace(self, calibrated=False)

    def quantize(
        self, target: QuantTarget, weight: torch.Tensor, input_stats: InputStats
    ) -> QuantizeResult:
        """Quantize a weight [out, in], and measure its error."""
        weight = weight.float()
        all_rows = rows_by_tensor(target.parameter)
        parts: dict[str, Stored | MovedTensor] = {}
        fractions: list[float] = []
        fallback = None
        in_rows = {name: self._type_of(name) for name in all_rows if self._has_rows(name)}
        for kind in dict.fromkeys(in_rows.values()):
            names = [name for name in in_rows if in_rows[name] == kind]
            dense = {name: _gather(weight, all_rows[name]) for name in names}
            if kind not in GGUF_TYPES:
                parts |= {name: round_dense(values, kind) for name, values in dense.items()}
                continue
            together = torch.cat(list(dense.values()))
            blocks, fraction = self._blocks(together, kind, input_stats)
            if self.calibrated:
                fractions += [] if fraction is None else [fraction]
                if fraction is None:
                    fallback = "its Hessian is not positive definite even with the most damping"
            sizes = [len(values) for values in dense.values()]
            parts |= dict(zip(names, blocks.split(sizes), strict=True))
        for name, rows in all_rows.items():
            if name not in in_rows:
                parts[name] = self._moved(name, _gather(weight, rows), input_stats)
        quantized = GgufWeight((weight.shape[0], weight.shape[1]), parts, all_rows, target.scheme)
        method = "gptq" if self.calibrated and fallback is None else "rtn"
        error = _error(weight, quantized.dequantize(), input_stats)
        return QuantizeResult(quantized, method, max(fractions, default=None), fallback, error)

    def _type_of(self, name: str) -> str:
        return self.types[self.places[name].name]

    def _has_rows(self, name: str) -> bool:
        return self.places[name].moves_rows_only

    def _moved(self, name: str, values: torch.Tensor, input_stats: InputStats) -> MovedTensor:
        """A tensor whose values are not in its own rows.

        One whose columns are in another order is calibrated on inputs in that order. Others, such
        as the transposed keys of a latent attention, are not calibrated.
        """
        place = self.places[name]
        if place.move is not None and place.move.kind == "columns":
            (ordered,) = place.arrange(values)
            (order,) = place.arrange(torch.arange(values.shape[1], device=values.device)[None])
            blocks, _ = self._blocks(ordered, self._type_of(name), input_stats.ordered(order[0]))
            return MovedTensor(place, (blocks,))
        return encode_moved(place, values, self.types)

    def _blocks(
        self, weight: torch.Tensor, kind: str, input_stats: InputStats
    ) -> tuple[GgufBlocks, float | None]:
        """The blocks of a weight, and the dampening of GPTQ, if it ran."""
        if self.calibrated:
            return self._gptq(weight, kind, input_stats)
        return fit_blocks(weight, GGUF_TYPES[kind]), None

    def _gptq(
        self, weight: torch.Tensor, kind: str, input_stats: InputStats
    ) -> tuple[GgufBlocks, float | None]:
        """The blocks of a weight, and the dampening that was used; None: it was rounded."""
        stats = input_stats.clone()
        assert stats.hessian is not None
        diagonal = stats.hessian.diagonal()
        dead = diagonal == 0
        importance = diagonal.clone()
        if bool(dead.any()):
            diagonal[dead] = 1.0
            weight = weight.masked_fill(dead, 0.0)
        blocks = fit_blocks(weight, GGUF_TYPES[kind], importance)
        size = blocks.type.group
        scales = blocks.group_scales
        grid = Grid(
            scales.masked_fill(scales == 0, _ALL_ZERO),
            torch.full_like(scales, blocks.type.zero, dtype=torch.uint8),
            Scheme(blocks.type.bits, size, symmetric=not blocks.type.has_min),
        )
        # Minima are subtracted from all values of a group, so that the grid begins at zero.
        shifted = weight + blocks.group_minima.repeat_interleave(size, dim=1)
        rounded, fraction, _ = gptq(shifted, stats, grid, dampening_frac=self.dampening_frac)
        return blocks.with_values(rounded.q.clamp(min=blocks.type.min_q)), fraction


def encode_moved(place: GgufPlace, values: torch.Tensor, types: Mapping[str, str]) -> MovedTensor:
    """A checkpoint tensor in the order and the types of the file, without calibration."""
    stored = []
    for name, part in zip(place.names, place.arrange(values.float()), strict=True):
        kind = types[name]
        rows = part.reshape(-1, part.shape[-1])
        is_packed = kind in GGUF_TYPES
        stored.append(fit_blocks(rows, GGUF_TYPES[kind]) if is_packed else round_dense(part, kind))
    return MovedTensor(place, tuple(stored))


def _error(weight: torch.Tensor, quantized: torch.Tensor, input_stats: InputStats) -> float:
    """The fraction of the output's energy that is lost; of the weights' own without a Hessian."""
    if input_stats.hessian is None or not input_stats.num_tokens:
        return lost_fraction(sum_of_squares(weight - quantized), sum_of_squares(weight))
    lost = output_energy(weight - quantized, input_stats.hessian)
    return lost_fraction(lost, output_energy(weight, input_stats.hessian))


def _gather(values: torch.Tensor, rows: Sequence[slice]) -> torch.Tensor:
    return torch.cat([values[piece] for piece in rows])
