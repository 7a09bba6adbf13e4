"""How much of a model's behaviour a compressed copy keeps: KL divergence, top-1 agreement, perplexity.

Legend: `L` tokens of a window, `V` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

_CHUNK = 1 << 24  # float32 logits compared at once (64 MiB)


@dataclass(frozen=True)
class Quality:
    """Figures over all windows; those that compare with a reference are None when there was none.

    The KLs: KL(reference || model) in nats per token. top1: the share of positions where both predict
    the same token. tokens: positions compared.
    """

    perplexity: float
    reference_perplexity: float | None
    mean_kl: float | None
    p99_kl: float | None
    top1: float | None
    tokens: int
    median_kl: float | None = None
    p999_kl: float | None = None
    max_kl: float | None = None


def score_logits(
    logits: Iterable[torch.Tensor], reference: Iterable[torch.Tensor] | None, windows: torch.Tensor
) -> Quality:
    """Compare a model with its reference by their logits [L, V] of each window of [n, L]; n and L - 1 at least 1."""
    loss, reference_loss, agree, targets = 0.0, 0.0, 0, 0
    divergences: list[torch.Tensor] = []
    others: Iterator[torch.Tensor | None] = iter(reference) if reference is not None else iter([None] * len(windows))
    for window, ours, theirs in zip(windows, logits, others, strict=True):
        rows = max(1, _CHUNK // ours.shape[-1])
        following = window[1:].to(ours.device)
        targets += len(following)
        for start in range(0, len(window), rows):
            part = slice(start, start + rows)
            own = torch.log_softmax(ours[part].float(), dim=-1)
            loss += _loss(own, following[part])
            if theirs is None:
                continue
            other = torch.log_softmax(theirs[part].to(own.device).float(), dim=-1)
            reference_loss += _loss(other, following[part])
            agree += int((own.argmax(dim=-1) == other.argmax(dim=-1)).sum().item())
            divergences.append((other.exp() * (other - own)).sum(dim=-1).double().cpu())
    perplexity = _perplexity(loss, targets)
    if reference is None:
        return Quality(perplexity, None, None, None, None, windows.numel())
    kl = torch.cat(divergences)
    median, p99, p999 = (kl.kthvalue(max(1, math.ceil(q * len(kl)))).values.item() for q in (0.5, 0.99, 0.999))
    return Quality(
        perplexity, _perplexity(reference_loss, targets), kl.mean().item(), p99, agree / len(kl), windows.numel(),
        median, p999, kl.max().item(),
    )  # fmt: skip


def _loss(log_probabilities: torch.Tensor, following: torch.Tensor) -> float:
    """The summed negative log-likelihood of the tokens that followed; a window's last position has none."""
    known = log_probabilities[: len(following)]
    return -known.gather(1, following.unsqueeze(1)).sum(dtype=torch.float64).item()


def _perplexity(loss: float, tokens: int) -> float:
    """exp(mean loss), at most e^700: the largest that is still a finite number."""
    return math.exp(min(loss / tokens, 700.0))
