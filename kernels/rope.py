"""Rotary position embedding (arXiv 2104.09864), in the layout of Hugging Face: halves, not pairs."""

from __future__ import annotations

import torch

from llmkit.kernels import native


def rotate_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotate the first 2R dimensions of each head where they are, in float32; the others stay.

    x: [T, N, D]; cos, sin: float32 [T, 1, 2R], the second half of cos as the first, and of sin its negative first.
    """
    size = cos.shape[-1]
    compact = x.stride()[1:] == (x.shape[2], 1)
    if compact and native.runs(x):
        native.rotate(x, cos, sin)
        return
    x = x[..., :size]
    wide = x.float()  # x itself when that is its dtype
    other = wide.roll(size // 2, -1)
    wide.mul_(cos).addcmul_(other, sin)
    if wide is not x:
        x.copy_(wide)
