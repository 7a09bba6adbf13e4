"""Compares a quantized model with its source: KL divergence, top-1 agreement, perplexity.

Legend: L tokens of a window, V vocabulary size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

_CHUNK_ELEMENTS = 1 << 24  # float32 logits that are compared at a time (64 MiB)
MAX_LOG_PERPLEXITY = 700.0  # exp of it is still a finite number


@dataclass(frozen=True)
class Quality:
    """Figures over all windows. Those that compare with a reference are None without one.

    The KL figures are of KL(reference || model), in nats per token.
    """

    perplexity: float
    reference_perplexity: float | None
    mean_kl: float | None
    p99_kl: float | None
    top1: float | None  # the fraction of positions where both predict the same token
    tokens: int  # positions compared
    median_kl: float | None = None
    p999_kl: float | None = None
    max_kl: float | None = None


def score_logits(
    logits: Iterable[torch.Tensor], reference: Iterable[torch.Tensor] | None, windows: torch.Tensor
) -> Quality:
    """Compare a model with its reference by their logits [L, V] of each window of [n, L].

    n is at least 1 and L at least 2.
    """
    loss = 0.0
    reference_loss = 0.0
    num_targets = 0
    num_agreeing = 0
    divergences: list[torch.Tensor] = []
    reference_logits: Iterable[torch.Tensor | None] = [None] * len(windows)
    if reference is not None:
        reference_logits = reference
    for window, model_window, reference_window in zip(
        windows, logits, reference_logits, strict=True
    ):
        chunk = max(1, _CHUNK_ELEMENTS // model_window.shape[-1])
        targets = window[1:].to(model_window.device)
        num_targets += len(targets)
        for start in range(0, len(window), chunk):
            rows = slice(start, start + chunk)
            model_log_probs = torch.log_softmax(model_window[rows].float(), dim=-1)
            loss += _cross_entropy(model_log_probs, targets[rows])
            if reference_window is None:
                continue
            reference_rows = reference_window[rows].to(model_log_probs.device).float()
            reference_log_probs = torch.log_softmax(reference_rows, dim=-1)
            reference_loss += _cross_entropy(reference_log_probs, targets[rows])
            agreeing = model_log_probs.argmax(dim=-1) == reference_log_probs.argmax(dim=-1)
            num_agreeing += int(agreeing.sum().item())
            kl = (reference_log_probs.exp() * (reference_log_probs - model_log_probs)).sum(dim=-1)
            divergences.append(kl.double().cpu())
    perplexity = _perplexity(loss, num_targets)
    if reference is None:
        return Quality(perplexity, None, None, None, None, windows.numel())
    all_kl = torch.cat(divergences)
    return Quality(
        perplexity,
        _perplexity(reference_loss, num_targets),
        all_kl.mean().item(),
        _percentile(all_kl, 0.99),
        num_agreeing / len(all_kl),
        windows.numel(),
        _percentile(all_kl, 0.5),
        _percentile(all_kl, 0.999),
        all_kl.max().item(),
    )


def _percentile(values: torch.Tensor, fraction: float) -> float:
    rank = max(1, math.ceil(fraction * len(values)))
    return values.kthvalue(rank).values.item()


def _cross_entropy(log_probs: torch.Tensor, targets: torch.Tensor) -> float:
    """The summed negative log-likelihood of the targets. A window's last position has none."""
    predicted = log_probs[: len(targets)]
    return -predicted.gather(1, targets.unsqueeze(1)).sum(dtype=torch.float64).item()


def _perplexity(loss: float, tokens: int) -> float:
    return math.exp(min(loss / tokens, MAX_LOG_PERPLEXITY))
