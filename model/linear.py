"""The linear layer of the decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import linear


class Linear(nn.Module):
    """y = x W' + b with a dense weight [out, in]; an nn.Module so that calibration can hook it."""

    if TYPE_CHECKING:  # nn.Module's own says that it returns anything

        def __call__(self, x: torch.Tensor) -> torch.Tensor: ...

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in]. Returns [..., out]."""
        return linear(x, self.weight, self.bias)
