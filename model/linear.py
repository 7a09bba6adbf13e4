"""The linear layer of the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import linear

from llmkit.kernels.rounding import round_tensor, round_tokens


@dataclass(frozen=True)
class Rounding:
    """What values are rounded to before they are used: 8 bits of `kind` with a stored scale, or one for each token."""

    kind: str  # "int" or "float"
    scale: torch.Tensor | None = None  # float32 [1]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., C] in and out."""
        return round_tokens(x, self.kind) if self.scale is None else round_tensor(x, self.scale, self.kind)


class Linear(nn.Module):
    """y = round(x) W' + b with a dense weight [out, in]; an nn.Module so that calibration can hook it."""

    if TYPE_CHECKING:  # nn.Module's own says that it returns anything

        def __call__(self, x: torch.Tensor) -> torch.Tensor: ...

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, rounding: Rounding | None = None
    ) -> None:
        super().__init__()
        self.weight, self.bias, self.rounding = weight, bias, rounding

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in]. Returns [..., out]."""
        return linear(x if self.rounding is None else self.rounding(x), self.weight, self.bias)
