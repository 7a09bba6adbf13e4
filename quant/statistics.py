"""What calibration keeps of the inputs of one linear layer.

Legend: `in` input features.
"""

from __future__ import annotations

import math
from collections.abc import Set
from typing import Literal

import torch

SAMPLE = 1024  # input rows kept as they are, spread over all the tokens
_ROWS = 1024  # of a weight that are multiplied at once
_STRIDE = 13  # of the rows that may be kept, so that all positions of several windows are among them

Need = Literal["magnitudes", "hessian", "sample"]


class Statistics:
    """Figures over all the inputs [..., in] added so far, in float32 on the inputs' device.

    hessian: 2/n X'X [in, in], the Hessian of the squared output error (when needed). largest, mean: the largest and
    mean magnitude of each feature [in]. sample: up to SAMPLE input rows [r, in] (when needed).
    """

    def __init__(self, features: int, needs: Set[Need], device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        self.hessian: torch.Tensor | None = None
        if "hessian" in needs:
            self.hessian = torch.zeros(features, features, dtype=torch.float32, device=device)
        self.largest = torch.zeros(features, dtype=torch.float32, device=device)
        self.mean = torch.zeros(features, dtype=torch.float32, device=device)
        self._sampling = "sample" in needs
        self._rows: list[torch.Tensor] = []
        self._kept = 0

    def add(self, inputs: torch.Tensor) -> None:
        """Take inputs [..., in] into the figures."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        if not len(rows):
            return
        total = self.tokens + len(rows)
        if self.hessian is not None:
            self.hessian.addmm_(rows.T, rows, beta=self.tokens / total, alpha=2.0 / total)
        self.mean.mul_(self.tokens / total)
        for part in rows.split(_ROWS):
            size = part.abs()
            torch.maximum(self.largest, size.amax(dim=0), out=self.largest)
            self.mean.add_(size.sum(dim=0), alpha=1.0 / total)
        if self._sampling and self._kept < SAMPLE:
            first = -self.tokens % _STRIDE
            self._rows.append(rows[first::_STRIDE][: SAMPLE - self._kept].clone())
            self._kept += len(self._rows[-1])
        self.tokens = total

    def take_hessian(self) -> torch.Tensor:
        """The Hessian, which is forgotten here: its caller may change it and let it go."""
        assert self.hessian is not None, "no Hessian was kept"
        hessian, self.hessian = self.hessian, None
        return hessian

    def copy(self) -> Statistics:
        """The same figures, to be kept while these are used up."""
        other = Statistics(len(self.largest), frozenset(), self.largest.device)
        other.tokens, other.largest, other.mean = self.tokens, self.largest, self.mean
        other.hessian = None if self.hessian is None else self.hessian.clone()
        other._rows = self._rows
        return other

    def to(self, device: torch.device | str) -> Statistics:
        """These figures on a device; themselves where they are there."""
        if self.largest.device == torch.device(device):
            return self
        other = self.copy()
        other.largest, other.mean = self.largest.to(device), self.mean.to(device)
        other.hessian = None if self.hessian is None else self.hessian.to(device)
        other._rows = [rows.to(device) for rows in self._rows]
        return other

    @property
    def sampled(self) -> bool:
        """Whether there are any rows in `sample`."""
        return bool(self._rows)

    @property
    def sample(self) -> torch.Tensor:
        """The rows kept [r, in]."""
        assert self._rows, "no rows were sampled"
        return torch.cat(self._rows)

    def divide(self, scales: torch.Tensor) -> None:
        """Make these the figures of the same inputs divided by `scales` [in]."""
        if self.hessian is not None:
            self.hessian.div_(scales).div_(scales[:, None])
        self.largest.div_(scales)
        self.mean.div_(scales)
        self._rows = [rows / scales for rows in self._rows]


def quadratic(weight: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(W H W') of a weight [out, in], some rows at a time."""
    parts = (weight[start : start + _ROWS] for start in range(0, len(weight), _ROWS))
    return sum(((part @ hessian) * part).sum().item() for part in parts)


def squares(values: torch.Tensor) -> float:
    """The sum of all squares, also where they overflow float32."""
    return float(torch.linalg.vector_norm(values, dtype=torch.float64).item()) ** 2


def share(lost: float, whole: float) -> float:
    """The part of the energy `whole` that is lost; 0 where there is none, NaN where it overflowed."""
    if not math.isfinite(whole):
        return math.nan
    return lost / whole if whole > 0 else 0.0
