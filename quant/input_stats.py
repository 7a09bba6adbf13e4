"""Statistics of one linear layer's inputs, collected during calibration.

Legend: `in` input features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from typing import Literal

import torch

from llmkit.kernels.cpu.float32_product import add_gram_matrix, add_inner_product

MAX_SAMPLE_ROWS = 1024  # input rows that are kept, spread over all the tokens
# Every 13th token is a candidate for the sample, so that it holds all positions of several windows.
_SAMPLE_STRIDE = 13
_CHUNK_ROWS = 1024  # rows processed at a time
# The first token of a window counts as this many in the Hessian and the residual. All tokens after
# it attend to it (it is the attention sink), so that an error there is in all of their outputs.
FIRST_TOKEN_WEIGHT = 32

StatKind = Literal["magnitudes", "hessian", "residual", "sample"]


class InputStats:
    """Statistics of all the inputs [..., in] added so far, in float32 on the inputs' device.

    hessian: 2/n X'X [in, in], the Hessian of the squared output error; None unless it is required.
    residual: 2/n (X_dense - X)'X [in, in], with the inputs X_dense that the linear has in the
    unquantized model; None unless it is required.
    In both, a window's first token counts as FIRST_TOKEN_WEIGHT tokens, in n too.
    max_abs, mean_abs: the largest and the mean magnitude of each feature [in].
    sample: up to MAX_SAMPLE_ROWS input rows [r, in], when they are required.
    """

    def __init__(
        self,
        features: int,
        required_stats: Set[StatKind],
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_tokens = 0
        self._weight = 0  # n: the number of tokens, with the weight of first tokens
        self.hessian: torch.Tensor | None = None
        if "hessian" in required_stats:
            self.hessian = torch.zeros(features, features, dtype=torch.float32, device=device)
        self.residual: torch.Tensor | None = None
        if "residual" in required_stats:
            self.residual = torch.zeros(features, features, dtype=torch.float32, device=device)
        self.max_abs = torch.zeros(features, dtype=torch.float32, device=device)
        self.mean_abs = torch.zeros(features, dtype=torch.float32, device=device)
        self._needs_sample = "sample" in required_stats
        self._sample_parts: list[torch.Tensor] = []
        self._num_sampled = 0

    def add(
        self,
        inputs: torch.Tensor,
        dense_inputs: torch.Tensor | None = None,
        first_tokens: Sequence[int] = (),
    ) -> None:
        """Update the statistics with inputs [..., in].

        dense_inputs: those of the same tokens in the unquantized model, for the residual.
        first_tokens: the rows, of all that are added here, of the first tokens of windows.
        """
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        if not len(rows):
            return
        total = self.num_tokens + len(rows)
        weight = self._weight + len(rows) + (FIRST_TOKEN_WEIGHT - 1) * len(first_tokens)
        of_token = 2.0 / weight
        of_first = of_token * (FIRST_TOKEN_WEIGHT - 1)  # in addition
        first = list(first_tokens)
        if self.hessian is not None:
            add_gram_matrix(self.hessian, rows, self._weight / weight, of_token)
            if first:
                add_gram_matrix(self.hessian, rows[first], 1.0, of_first)
        if self.residual is not None:
            assert dense_inputs is not None
            moved = dense_inputs.reshape(rows.shape).float() - rows
            add_inner_product(self.residual, moved, rows, self._weight / weight, of_token)
            if first:
                add_inner_product(self.residual, moved[first], rows[first], 1.0, of_first)
        self.mean_abs.mul_(self.num_tokens / total)
        for chunk in rows.split(_CHUNK_ROWS):
            magnitudes = chunk.abs()
            torch.maximum(self.max_abs, magnitudes.amax(dim=0), out=self.max_abs)
            self.mean_abs.add_(magnitudes.sum(dim=0), alpha=1.0 / total)
        if self._needs_sample and self._num_sampled < MAX_SAMPLE_ROWS:
            begin = -self.num_tokens % _SAMPLE_STRIDE
            missing = MAX_SAMPLE_ROWS - self._num_sampled
            self._sample_parts.append(rows[begin::_SAMPLE_STRIDE][:missing].clone())
            self._num_sampled += len(self._sample_parts[-1])
        self.num_tokens = total
        self._weight = weight

    def take_hessian(self) -> torch.Tensor:
        """Return the Hessian and drop it here, so that the caller can change it and free it."""
        assert self.hessian is not None, "no Hessian was collected"
        hessian = self.hessian
        self.hessian = None
        return hessian

    def take_residual(self) -> torch.Tensor | None:
        """Return the residual, if there is one, and drop it here."""
        residual = self.residual
        self.residual = None
        return residual

    def clone(self) -> InputStats:
        """A copy that stays valid when a quantizer consumes this one."""
        copy = InputStats(len(self.max_abs), frozenset(), self.max_abs.device)
        copy.num_tokens = self.num_tokens
        copy._weight = self._weight
        copy.max_abs = self.max_abs
        copy.mean_abs = self.mean_abs
        copy.hessian = None if self.hessian is None else self.hessian.clone()
        copy.residual = self.residual
        copy._sample_parts = self._sample_parts
        return copy

    def ordered(self, order: torch.Tensor) -> InputStats:
        """The statistics of the same inputs with the features `order` [in], without samples."""
        copy = self.clone()
        copy.max_abs = self.max_abs[order]
        copy.mean_abs = self.mean_abs[order]
        copy.hessian = None if self.hessian is None else self.hessian[order][:, order]
        copy.residual = None if self.residual is None else self.residual[order][:, order]
        copy._sample_parts = []
        return copy

    def to(self, device: torch.device | str) -> InputStats:
        """The same statistics on `device`; this object when it is already there."""
        if self.max_abs.device == torch.device(device):
            return self
        copy = self.clone()
        copy.max_abs = self.max_abs.to(device)
        copy.mean_abs = self.mean_abs.to(device)
        copy.hessian = None if self.hessian is None else self.hessian.to(device)
        copy.residual = None if self.residual is None else self.residual.to(device)
        copy._sample_parts = [rows.to(device) for rows in self._sample_parts]
        return copy

    @property
    def has_sample(self) -> bool:
        """Whether `sample` has any rows."""
        return bool(self._sample_parts)

    @property
    def sample(self) -> torch.Tensor:
        """The sampled input rows [r, in]."""
        assert self._sample_parts, "no rows were sampled"
        return torch.cat(self._sample_parts)

    def divide_inputs(self, scales: torch.Tensor) -> None:
        """Turn these into the statistics of the same inputs divided by `scales` [in]."""
        if self.hessian is not None:
            self.hessian.div_(scales).div_(scales[:, None])
        if self.residual is not None:
            self.residual.div_(scales).div_(scales[:, None])
        self.max_abs.div_(scales)
        self.mean_abs.div_(scales)
        self._sample_parts = [rows / scales for rows in self._sample_parts]


def fill_unseen_experts(input_stats: Mapping[str, InputStats]) -> None:
    """Give experts without tokens the largest inputs of the layer's other experts.

    The stored scale of their inputs then is one that engines can share among experts.
    input_stats: by linear, such as "mlp.experts.3.down".
    """
    experts: dict[str, list[InputStats]] = {}
    for name, stats in input_stats.items():
        if ".experts." in name:
            kind = name.rpartition(".")[2]
            experts.setdefault(kind, []).append(stats)
    for found in experts.values():
        max_abs = torch.stack([stats.max_abs for stats in found]).amax(dim=0)
        for stats in found:
            if not stats.num_tokens:
                stats.max_abs = max_abs


def output_energy(weight: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(W H W') of a weight [out, in], computed a chunk of rows at a time."""
    total = 0.0
    for start in range(0, len(weight), _CHUNK_ROWS):
        chunk = weight[start : start + _CHUNK_ROWS]
        total += ((chunk @ hessian) * chunk).sum().item()
    return total


def sum_of_squares(values: torch.Tensor) -> float:
    """The sum of all squares; finite even where the squares overflow float32."""
    return float(torch.linalg.vector_norm(values, dtype=torch.float64).item()) ** 2


def lost_fraction(lost: float, total: float) -> float:
    """lost / total; 0 when the total is 0, NaN when it overflowed."""
    if not math.isfinite(total):
        return math.nan
    return lost / total if total > 0 else 0.0
