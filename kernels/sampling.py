"""Sampling the next token. A row's result depends on its logits, its seed and its counter, on nothing else.

Legend: n rows, V vocabulary.
"""

from __future__ import annotations

import torch

_GOLDEN = -0x61C8864680B583EB  # 2^64 / phi as a signed integer: splitmix64's increment (Steele et al., 2014)
_MIX1, _MIX2 = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    counters: torch.Tensor,
) -> torch.Tensor:
    """One token id int64 [n] for each row of logits [n, V].

    temperature, top_p, min_p: float [n]; top_k, seeds, counters: int64 [n]. Temperature 0 takes the most probable
    token. Otherwise, after the temperature: the `top_k` most probable (0: all), of those the fewest that reach
    `top_p` together, of those the ones at least `min_p` times as probable as the first; then a draw by the Gumbel
    trick, with noise hashed from (seed, counter, token).
    """
    greedy = temperature == 0
    scaled = logits.float() / torch.where(greedy, 1.0, temperature)[:, None]
    ordered, ids = scaled.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    limit = torch.where(top_k > 0, top_k, logits.shape[-1])
    ordered = ordered.masked_fill(rank >= limit[:, None], float("-inf"))
    probability = ordered.softmax(-1)
    before = probability.cumsum(-1) - probability
    dropped = (before >= top_p[:, None]) | (probability < min_p[:, None] * probability[:, :1])
    dropped[:, 0] = False
    noise = -(-_uniform(seeds[:, None], counters[:, None], ids).log()).log()
    scores = ordered.double().masked_fill(dropped, float("-inf")) + noise
    place = torch.where(greedy, 0, scores.argmax(-1))
    return ids.gather(-1, place[:, None])[:, 0]


def _uniform(seeds: torch.Tensor, counters: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """float64 in (0, 1), one for each (seed, counter, token), broadcast."""
    bits = _mix(_mix(_mix(seeds) + counters) + tokens)
    return (_shift(bits, 12).double() + 0.5) * 2.0**-52


def _mix(x: torch.Tensor) -> torch.Tensor:
    """splitmix64, in wrapping 64-bit arithmetic."""
    x = x + _GOLDEN
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """A logical shift to the right; torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
