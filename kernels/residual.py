"""The residual stream."""

from __future__ import annotations

import torch

from llmkit.kernels import elementwise, native
from llmkit.kernels.jit import runs_triton
from llmkit.kernels.norm import rms_norm


def add(hidden: torch.Tensor, update: torch.Tensor, scale: float) -> torch.Tensor:
    """hidden + scale * update, both [T, H]."""
    if native.runs(hidden) and hidden.is_contiguous() and update.is_contiguous() and update.dtype == hidden.dtype:
        return native.add(hidden, update, scale)
    return torch.add(hidden, update, alpha=scale)


def add_norm(
    hidden: torch.Tensor, update: torch.Tensor | None, scale: float, weight: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum that `add` gives and its `rms_norm`. Without an update the sum is hidden, and without a weight both are
    the sum."""
    fits = runs_triton(hidden) and hidden.is_contiguous() and hidden.shape[1] <= elementwise.MOST_HIDDEN
    if fits and update is not None and weight is not None:
        return elementwise.add_norm(hidden, update.contiguous(), scale, weight, eps)
    if update is not None:
        hidden = add(hidden, update, scale)
    return hidden, hidden if weight is None else rms_norm(hidden, weight, eps)
