"""Rows of every kind for sampling on a GPU, for the interpreter and for a CUDA device."""

from __future__ import annotations

from itertools import product

import torch

Arguments = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]


def sampling_arguments(size: int, seed: int = 0, copies: int = 1) -> Arguments:
    """Arguments of `sample`: all filters combined; logits peaked, flat, or with ties."""
    draw = torch.Generator().manual_seed(seed)
    asked = list(product((0.0, 1e-6, 0.7), (0, 7, size + 1), (1.0, 0.9, 0.3), (0.0, 0.05))) * copies
    temperature, top_k, top_p, min_p = torch.tensor(asked, dtype=torch.float64).T
    logits = torch.randn(len(asked), size, generator=draw) * 3
    logits[1::3] *= 0.01
    logits[2::3] = logits[2::3].round()
    seeds = torch.randint(-(1 << 62), 1 << 62, (len(asked),), generator=draw)
    counters = torch.randint(0, 5000, (len(asked),), generator=draw)
    return (
        logits,
        temperature.float(),
        top_k.long(),
        top_p.float(),
        min_p.float(),
        seeds,
        counters,
    )
