"""Root-mean-square normalisation (arXiv 1910.07467) and the residual stream that it reads."""

from __future__ import annotations

import torch
from torch.nn import functional

from llmkit.kernels import elementwise, native
from llmkit.kernels.jit import runs_triton


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last dimension, in float32.

    x: [..., size]; weight: [size], any offset (Gemma's 1 + w) already added. Returns x's shape and dtype.
    """
    if native.runs(x) and x.is_contiguous() and weight.dtype == x.dtype:
        return native.rms_norm(x, weight, eps)
    return functional.rms_norm(x, weight.shape, weight, eps)


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
