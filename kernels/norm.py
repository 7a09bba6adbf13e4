"""Root-mean-square normalisation (arXiv 1910.07467)."""

from __future__ import annotations

import torch
from torch.nn import functional

from llmkit.kernels import native


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last dimension, in float32.

    x: [..., size]; weight: [size], any offset (Gemma's 1 + w) already added. Returns x's shape and dtype.
    """
    if native.runs(x) and x.is_contiguous() and weight.dtype == x.dtype:
        return native.rms_norm(x, weight, eps)
    return functional.rms_norm(x, weight.shape, weight, eps)
