"""Sampling the next token, and its probability: by a row's logits, seed and counter, and nothing else.

Legend: n rows, V vocabulary, of which a rank may have a part. The parameters lie on the CPU: they say which work a step
needs without waiting for the device. Sorting and hashing a vocabulary cost as much as a small model's layer, so each
filter sees only the rows that ask for it.
"""

from __future__ import annotations

import torch

from llmkit.kernels.jit import sent

_GOLDEN = -0x61C8864680B583EB  # 2^64 / phi as a signed integer: splitmix64's increment (Steele et al., 2014)
_MIX1, _MIX2 = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
_BIAS1, _BIAS2 = 0x7FEB352D, 0x846CA68B - 2**32  # lowbias32 (Wellons, "Prospecting for Hash Functions", 2018)
_NUCLEUS = 1024  # tokens among which a nucleus is looked for before the whole vocabulary is sorted


class Vocabulary:
    """What the ranks that share a vocabulary, its columns, find out together; here for one that has all of it."""

    first = 0  # the token of its first column

    def argmax(self, x: torch.Tensor) -> torch.Tensor:
        """The token of the greatest value of each row [n, V], the first of equals: int64 [n]."""
        return x.argmax(-1)

    def max(self, x: torch.Tensor) -> torch.Tensor:
        """The greatest of the ranks' values, one by one."""
        return x

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' values, one by one; `x` may be overwritten."""
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """The ranks' columns [n, k] side by side."""
        return x

    def finite(self, x: torch.Tensor) -> torch.Tensor:
        """Whether all of a row [n, V] is finite: bool [n]."""
        return self.max((~torch.isfinite(x.sum(-1))).float()) == 0


ALONE = Vocabulary()


def sample(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor,
    seeds: torch.Tensor, counters: torch.Tensor, vocabulary: Vocabulary = ALONE,
) -> torch.Tensor:  # fmt: skip
    """One token id int64 [n] for each row of logits, float32 [n, V], on their device.

    On the CPU: temperature, top_p, min_p: float32 [n]; top_k, seeds, counters: int64 [n]. Temperature 0 takes the
    most probable token. Otherwise, after the temperature and in the order of transformers: the `top_k` most probable
    (0: all), of those the fewest that reach `top_p` together, of those the ones at least `min_p` times as probable
    as the first; tokens as probable as the last one kept stay too. Then a draw by the Gumbel trick, with noise
    hashed from (seed, counter, token). With a part of the `vocabulary` it gives what all ranks choose together.
    """
    ids = vocabulary.argmax(logits)
    drawn = temperature.nonzero()[:, 0]
    if not len(drawn):
        return ids
    top_k, top_p, min_p = top_k[drawn], top_p[drawn], min_p[drawn]
    rows = sent(drawn, logits.device)
    chosen = logits[rows]
    # The most probable token gets 0, so that no temperature, however small, makes an infinity.
    scaled = (chosen - vocabulary.max(chosen.amax(-1, keepdim=True))) / sent(temperature[drawn, None], logits.device)
    for keep, values, asked in ((_top_k, top_k, top_k > 0), (_top_p, top_p, top_p < 1), (_min_p, min_p, min_p > 0)):
        if asked.any():
            where = sent(asked.nonzero()[:, 0], logits.device)
            scaled[where] = keep(scaled[where], values[asked], vocabulary)
    noise = _log_exponential(seeds[drawn], counters[drawn], scaled, vocabulary.first)
    ids[rows] = vocabulary.argmax(scaled - noise)
    return ids


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


def _top_k(scaled: torch.Tensor, k: torch.Tensor, vocabulary: Vocabulary) -> torch.Tensor:
    """Only the k most probable tokens of each row."""
    most = _most(scaled, int(k.max()), vocabulary)
    place = (k[:, None] - 1).clamp_max(most.shape[-1] - 1)
    return _not_below(scaled, scaled, most.gather(-1, sent(place, scaled.device)))


def _most(values: torch.Tensor, count: int, vocabulary: Vocabulary) -> torch.Tensor:
    """The `count` greatest values of each row in falling order, or all where there are fewer: [n, count]."""
    own = vocabulary.gather(values.topk(min(count, values.shape[-1])).values)
    return own.topk(min(count, own.shape[-1])).values


def _top_p(scaled: torch.Tensor, p: torch.Tensor, vocabulary: Vocabulary) -> torch.Tensor:
    """Only the fewest most probable tokens of each row that have probability p together."""
    p = sent(p[:, None], scaled.device)
    probability = scaled.exp()
    probability /= vocabulary.sum(probability.sum(-1, keepdim=True))
    most = _most(probability, _NUCLEUS, vocabulary)
    before = most.cumsum(-1) - most
    size = (before < p).sum(-1, keepdim=True).clamp_min(1)
    floor = most.gather(-1, size - 1)
    wide = (most.sum(-1) < p[:, 0]).nonzero()[:, 0]
    if len(wide):
        floor[wide] = _wide_floor(probability[wide], p[wide], vocabulary)
    return _not_below(scaled, probability, floor)


def _wide_floor(probability: torch.Tensor, p: torch.Tensor, vocabulary: Vocabulary) -> torch.Tensor:
    """The smallest probability [n, 1] in a nucleus of many tokens, by bisection among the patterns of floats' bits.

    Those of positive floats are in the order of the floats.
    """
    low, high = (torch.full(p.shape, bits, dtype=torch.int32, device=p.device) for bits in (0, 0x3F800001))
    while bool((high - low > 1).any()):  # the nucleus from `low` on reaches p, that from `high` on does not
        middle = (low + high) // 2
        share = probability.where(probability >= middle.view(torch.float32), 0).sum(-1, keepdim=True)
        enough = vocabulary.sum(share) >= p
        low, high = low.where(~enough, middle), high.where(enough, middle)
    return low.view(torch.float32)


def _min_p(scaled: torch.Tensor, least: torch.Tensor, _: Vocabulary) -> torch.Tensor:
    """Only the tokens at least `least` times as probable as the first, whose scaled logit is 0."""
    return _not_below(scaled, scaled, sent(least.log()[:, None], scaled.device))


def _not_below(scaled: torch.Tensor, measure: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
    return scaled.masked_fill(measure < floor, float("-inf"))


def _log_exponential(seeds: torch.Tensor, counters: torch.Tensor, like: torch.Tensor, first: int) -> torch.Tensor:
    """log of independent Exponential(1) draws for tokens from `first` on, shaped as `like` [n, V]: minus a Gumbel draw.

    The token with the least E / probability wins, so small draws matter: E = -log(1 - u) with u > 0 keeps float32's
    relative precision there.
    """
    bits = _hash(sent(_key(seeds, counters), like.device), like.shape[-1], first)
    u = ((bits & 0x7FFFFFFF).float() + 0.5) * 2.0**-31
    return u.clamp_max_(1 - 2.0**-24).neg_().log1p_().neg_().log_()


def _hash(key: torch.Tensor, tokens: int, first: int = 0) -> torch.Tensor:
    """lowbias32 of tokens from `first` on under a key of 2 words: int32 [n, 2] -> [n, tokens]; arithmetic wraps."""
    x = torch.arange(first, first + tokens, dtype=torch.int32, device=key.device) + key[:, :1]
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
