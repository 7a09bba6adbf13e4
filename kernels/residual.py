"""The residual stream."""

from __future__ import annotations

import torch

from llmkit.kernels import native


def add(hidden: torch.Tensor, update: torch.Tensor, scale: float) -> torch.Tensor:
    """hidden + scale * update, both [T, H]."""
    if native.runs(hidden) and hidden.is_contiguous() and update.is_contiguous() and update.dtype == hidden.dtype:
        return native.add(hidden, update, scale)
    return torch.add(hidden, update, alpha=scale)
