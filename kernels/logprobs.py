"""The logarithms of tokens' probabilities, and the most probable tokens. Legend as in `sampling`."""

from __future__ import annotations

import torch

from llmkit.kernels.sampling import Vocabulary


def report(
    logits: torch.Tensor, ids: torch.Tensor, count: int, vocabulary: Vocabulary
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log softmax of logits, float32 [n, V]: at ids, int64 [n], as float32 [n]; the `count` greatest of each row,
    in falling order, float32 [n, count]; and the tokens that have them, int64 [n, count]."""
    most = vocabulary.max(logits.amax(-1, keepdim=True))
    total = vocabulary.sum((logits - most).exp().sum(-1, keepdim=True)).log() + most
    columns = ids[:, None] - vocabulary.first
    here = (columns >= 0) & (columns < logits.shape[-1])
    own = logits.gather(-1, columns.where(here, 0)).where(here, float("-inf"))
    values, tokens = logits.topk(min(count, logits.shape[-1]))
    values, tokens = vocabulary.gather(values), vocabulary.gather(tokens + vocabulary.first)
    values, places = values.topk(min(count, values.shape[-1]))
    return (vocabulary.max(own) - total)[:, 0], values - total, tokens.gather(-1, places)
