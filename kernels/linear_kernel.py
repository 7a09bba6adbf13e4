"""The interface of the linear layers with packed weights, on CPUs and GPUs."""

from __future__ import annotations

from typing import Protocol

import torch


class LinearKernel(Protocol):
    """Multiplies inputs with a packed weight [out, in]."""

    nbytes: int  # the size of the packed weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in]. Returns [..., out] in x's dtype."""
