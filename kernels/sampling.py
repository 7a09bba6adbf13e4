"""Sampling the next token. A row's result depends on its logits, its seed and its counter, on nothing else.

Legend: n rows, V vocabulary. The parameters lie on the CPU: they say which work a step needs without waiting for the
device. Sorting and hashing a vocabulary cost as much as a small model's layer, so each filter sees only the rows that
ask for it.
"""

from __future__ import annotations

import torch

_GOLDEN = -0x61C8864680B583EB  # 2^64 / phi as a signed integer: splitmix64's increment (Steele et al., 2014)
_MIX1, _MIX2 = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
_BIAS1, _BIAS2 = 0x7FEB352D, 0x846CA68B - 2**32  # lowbias32 (Wellons, "Prospecting for Hash Functions", 2018)
_NUCLEUS = 1024  # tokens among which a nucleus is looked for before the whole vocabulary is sorted


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    counters: torch.Tensor,
) -> torch.Tensor:
    """One token id int64 [n] for each row of logits, float32 [n, V], on their device.

    On the CPU: temperature, top_p, min_p: float32 [n]; top_k, seeds, counters: int64 [n]. Temperature 0 takes the
    most probable token. Otherwise, after the temperature and in the order of transformers: the `top_k` most probable
    (0: all), of those the fewest that reach `top_p` together, of those the ones at least `min_p` times as probable
    as the first; tokens as probable as the last one kept stay too. Then a draw by the Gumbel trick, with noise
    hashed from (seed, counter, token).
    """
    ids = logits.argmax(-1)
    drawn = temperature.nonzero()[:, 0]
    if not len(drawn):
        return ids
    top_k, top_p, min_p = top_k[drawn], top_p[drawn], min_p[drawn]
    rows = drawn.to(logits.device)
    chosen = logits[rows]
    # The most probable token gets 0, so that no temperature, however small, makes an infinity.
    scaled = (chosen - chosen.amax(-1, keepdim=True)) / temperature[drawn, None].to(logits.device)
    for keep, values, asked in (
        (_top_k, top_k, (top_k > 0) & (top_k < logits.shape[-1])),
        (_top_p, top_p, top_p < 1),
        (_min_p, min_p, min_p > 0),
    ):
        if asked.any():
            where = asked.nonzero()[:, 0].to(logits.device)
            scaled[where] = keep(scaled[where], values[asked])
    ids[rows] = (scaled - _log_exponential(seeds[drawn], counters[drawn], scaled)).argmax(-1)
    return ids


def _top_k(scaled: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Only the k most probable tokens of each row."""
    most = scaled.topk(int(k.max())).values
    return _not_below(scaled, scaled, most.gather(-1, (k[:, None] - 1).to(scaled.device)))


def _top_p(scaled: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Only the fewest most probable tokens of each row that have probability p together."""
    p = p[:, None].to(scaled.device)
    probability = scaled.softmax(-1)
    most = probability.topk(min(_NUCLEUS, scaled.shape[-1])).values
    floor = _nucleus_floor(most, p)
    wide = (most.sum(-1) < p[:, 0]).nonzero()[:, 0]
    if len(wide):
        floor[wide] = _nucleus_floor(probability[wide].sort(descending=True).values, p[wide])
    return _not_below(scaled, probability, floor)


def _nucleus_floor(ordered: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """The smallest probability [n, 1] in the nucleus, from probabilities in falling order."""
    before = ordered.cumsum(-1) - ordered
    size = (before < p).sum(-1, keepdim=True).clamp_min(1)
    return ordered.gather(-1, size - 1)


def _min_p(scaled: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """Only the tokens at least `least` times as probable as the first, whose scaled logit is 0."""
    return _not_below(scaled, scaled, least.log()[:, None].to(scaled.device))


def _not_below(scaled: torch.Tensor, measure: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
    return scaled.masked_fill(measure < floor, float("-inf"))


def _log_exponential(seeds: torch.Tensor, counters: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """log of independent Exponential(1) draws, shaped as `like` [n, V]: minus a Gumbel draw.

    The token with the least E / probability wins, so small draws matter: E = -log(1 - u) with u > 0 keeps float32's
    relative precision there.
    """
    bits = _hash(_key(seeds, counters).to(like.device), like.shape[-1])
    u = ((bits & 0x7FFFFFFF).float() + 0.5) * 2.0**-31
    return u.clamp_max_(1 - 2.0**-24).neg_().log1p_().neg_().log_()


def _hash(key: torch.Tensor, tokens: int) -> torch.Tensor:
    """lowbias32 of the token under a key of 2 words: int32 [n, 2] -> int32 [n, tokens]; arithmetic wraps."""
    x = torch.arange(tokens, dtype=torch.int32, device=key.device) + key[:, :1]
    x ^= _shift(x, 16)
    x *= _BIAS1
    x ^= _shift(x, 15)
    x *= _BIAS2
    x ^= _shift(x, 16)
    return x.bitwise_xor_(key[:, 1:])


def _key(seeds: torch.Tensor, counters: torch.Tensor) -> torch.Tensor:
    """64 bits of each (seed, counter), as int32 [n, 2]."""
    return _splitmix(_splitmix(seeds) + counters)[:, None].view(torch.int32)


def _splitmix(x: torch.Tensor) -> torch.Tensor:
    """splitmix64 of int64, in wrapping arithmetic."""
    x = x + _GOLDEN
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """A logical shift to the right; torch's own keeps the sign."""
    return (x >> bits).bitwise_and_((1 << (x.element_size() * 8 - bits)) - 1)
