"""Samples next tokens, and computes log probabilities.

A sampled token depends only on the row's logits, parameters, seed and counter. The sampling
parameters are on the CPU, so that the host decides which filters a step needs without waiting for
the device. Sorting and hashing a vocabulary costs as much as a layer of a small model, so each
filter runs only on the rows that need it.
Legend: n rows, V vocabulary columns of this rank.
"""

from __future__ import annotations

import torch

from llmkit.kernels.cpu import cpu_kernels
from llmkit.kernels.device_copy import to_device

# splitmix64 (Steele et al., 2014), in signed integers: the increment 2^64 / phi, and two factors.
_GOLDEN = -0x61C8864680B583EB
_MIX1 = -0x40A7B892E31B1A47
_MIX2 = -0x6B2FB644ECCEEE15
# lowbias32 (Wellons, "Prospecting for Hash Functions", 2018)
_BIAS1 = 0x7FEB352D
_BIAS2 = 0x846CA68B - 2**32
# Top-p first sorts this many tokens. Only a larger nucleus needs the bisection.
_NUCLEUS = 1024


class VocabParallel:
    """The reductions over ranks that each hold some columns of the vocabulary.

    This class is for a single rank with the whole vocabulary; `ParallelGroup` is for several ranks.
    """

    vocab_start = 0  # the token of this rank's first column
    is_split = False  # other ranks hold the other columns

    def argmax(self, x: torch.Tensor) -> torch.Tensor:
        """The token with the largest value in each row [n, V]; the first one on a tie. int64 [n]"""
        if cpu_kernels.supports(x) and cpu_kernels.has_compact_rows(x):
            return cpu_kernels.argmax(x)[0]
        return x.argmax(-1)

    def all_reduce_max(self, x: torch.Tensor) -> torch.Tensor:
        """The element-wise maximum over the ranks; `x` may be overwritten."""
        return x

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The element-wise sum over the ranks; `x` may be overwritten."""
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """The columns [n, k] of all ranks, concatenated."""
        return x

    def rows_finite(self, x: torch.Tensor) -> torch.Tensor:
        """Whether all values of a row [n, V] are finite: bool [n]."""
        if cpu_kernels.supports(x) and cpu_kernels.has_compact_rows(x):
            is_finite = cpu_kernels.argmax(x)[1]
        else:
            is_finite = torch.isfinite(x.sum(-1))
        return self.all_reduce_max((~is_finite).float()) == 0

    def greedy(self, x: torch.Tensor) -> torch.Tensor:
        """`argmax`; -1 for the rows whose values are not all finite. int64 [n]"""
        if not self.is_split and cpu_kernels.supports(x) and cpu_kernels.has_compact_rows(x):
            ids, is_finite = cpu_kernels.argmax(x)
            return ids.masked_fill_(~is_finite, -1)
        return torch.where(self.rows_finite(x), self.argmax(x), -1)


FULL_VOCAB = VocabParallel()


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    counters: torch.Tensor,
    vocab_parallel: VocabParallel = FULL_VOCAB,
) -> torch.Tensor:
    """Sample one token for each row of logits, float32 [n, V]. Returns int64 [n], on their device.

    On the CPU: temperature, top_p, min_p: float32 [n]; top_k, seeds, counters: int64 [n].
    Temperature 0 takes the most probable token. Otherwise the temperature is applied, then the
    filters, in the order of transformers: the `top_k` most probable tokens (0: all); of those, the
    fewest whose probabilities sum to `top_p`; of those, the tokens at least `min_p` times as
    probable as the most probable one. Tokens that tie with the last kept one are kept, too. The
    draw uses the Gumbel trick, with noise hashed from (seed, counter, token). Ranks that share a
    vocabulary all get the same token.
    """
    ids = vocab_parallel.argmax(logits)
    sampled = temperature.nonzero()[:, 0]
    if not len(sampled):
        return ids
    top_k = top_k[sampled]
    top_p = top_p[sampled]
    min_p = min_p[sampled]
    rows = to_device(sampled, logits.device)
    row_logits = logits[rows]
    # The most probable token gets the value 0, so that a tiny temperature causes no infinity.
    largest = vocab_parallel.all_reduce_max(row_logits.amax(-1, keepdim=True))
    scaled = (row_logits - largest) / to_device(temperature[sampled, None], logits.device)
    for filter_rows, values, is_set in (
        (_top_k, top_k, top_k > 0),
        (_top_p, top_p, top_p < 1),
        (_min_p, min_p, min_p > 0),
    ):
        if is_set.any():
            where = to_device(is_set.nonzero()[:, 0], logits.device)
            scaled[where] = filter_rows(scaled[where], values[is_set], vocab_parallel)
    noise = _log_exponential(seeds[sampled], counters[sampled], scaled, vocab_parallel.vocab_start)
    ids[rows] = vocab_parallel.argmax(scaled - noise)
    return ids


def gather_logprobs(
    logits: torch.Tensor, ids: torch.Tensor, count: int, vocab_parallel: VocabParallel
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log probabilities from float32 logits [n, V].

    Returns the log probabilities of `ids`, int64 [n], as float32 [n]; the `count` largest of each
    row in falling order, float32 [n, count]; and the tokens of these, int64 [n, count].
    """
    largest = vocab_parallel.all_reduce_max(logits.amax(-1, keepdim=True))
    exp_sum = vocab_parallel.all_reduce((logits - largest).exp().sum(-1, keepdim=True))
    log_sum = exp_sum.log() + largest
    # A rank that does not have the token contributes -inf to the maximum.
    columns = ids[:, None] - vocab_parallel.vocab_start
    is_here = (columns >= 0) & (columns < logits.shape[-1])
    id_logits = logits.gather(-1, columns.where(is_here, 0)).where(is_here, float("-inf"))
    values, tokens = logits.topk(min(count, logits.shape[-1]))
    values = vocab_parallel.all_gather(values)
    tokens = vocab_parallel.all_gather(tokens + vocab_parallel.vocab_start)
    values, order = values.topk(min(count, values.shape[-1]))
    id_logprobs = (vocab_parallel.all_reduce_max(id_logits) - log_sum)[:, 0]
    return id_logprobs, values - log_sum, tokens.gather(-1, order)


def _top_k(scaled: torch.Tensor, k: torch.Tensor, vocab_parallel: VocabParallel) -> torch.Tensor:
    """Keep the k most probable tokens of each row."""
    largest = _largest(scaled, int(k.max()), vocab_parallel)
    last_kept = (k[:, None] - 1).clamp_max(largest.shape[-1] - 1)
    return _mask_below(scaled, scaled, largest.gather(-1, to_device(last_kept, scaled.device)))


def _largest(values: torch.Tensor, count: int, vocab_parallel: VocabParallel) -> torch.Tensor:
    """The `count` largest values of each row in falling order; all values if there are fewer."""
    gathered = vocab_parallel.all_gather(values.topk(min(count, values.shape[-1])).values)
    return gathered.topk(min(count, gathered.shape[-1])).values


def _top_p(scaled: torch.Tensor, p: torch.Tensor, vocab_parallel: VocabParallel) -> torch.Tensor:
    """Keep the most probable tokens of each row: as few as needed for a total probability of p."""
    p = to_device(p[:, None], scaled.device)
    probability = scaled.exp()
    probability /= vocab_parallel.all_reduce(probability.sum(-1, keepdim=True))
    largest = _largest(probability, _NUCLEUS, vocab_parallel)
    before = largest.cumsum(-1) - largest
    nucleus_size = (before < p).sum(-1, keepdim=True).clamp_min(1)
    floor = largest.gather(-1, nucleus_size - 1)
    wide = (largest.sum(-1) < p[:, 0]).nonzero()[:, 0]
    if len(wide):
        floor[wide] = _wide_floor(probability[wide], p[wide], vocab_parallel)
    return _mask_below(scaled, probability, floor)


def _wide_floor(
    probability: torch.Tensor, p: torch.Tensor, vocab_parallel: VocabParallel
) -> torch.Tensor:
    """The smallest probability [n, 1] in a nucleus of many tokens, by bisection.

    The bisection is over the bit patterns of positive floats, which sort like the floats.
    """
    low = torch.full(p.shape, 0, dtype=torch.int32, device=p.device)
    high = torch.full(p.shape, 0x3F800001, dtype=torch.int32, device=p.device)  # just above 1
    # The tokens with probability >= `low` sum to p or more; those with >= `high` to less than p.
    while bool((high - low > 1).any()):
        middle = (low + high) // 2
        kept = probability.where(probability >= middle.view(torch.float32), 0)
        enough = vocab_parallel.all_reduce(kept.sum(-1, keepdim=True)) >= p
        low = low.where(~enough, middle)
        high = high.where(enough, middle)
    return low.view(torch.float32)


def _min_p(scaled: torch.Tensor, min_p: torch.Tensor, _: VocabParallel) -> torch.Tensor:
    """Keep the tokens at least min_p times as probable as the first, whose scaled logit is 0."""
    return _mask_below(scaled, scaled, to_device(min_p.log()[:, None], scaled.device))


def _mask_below(scaled: torch.Tensor, measure: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
    return scaled.masked_fill(measure < floor, float("-inf"))


def _log_exponential(
    seeds: torch.Tensor, counters: torch.Tensor, like: torch.Tensor, first: int
) -> torch.Tensor:
    """The logarithm of Exponential(1) draws for the tokens from `first` on: float32 [n, V].

    It is the negative of a Gumbel draw. The token with the smallest E / probability is sampled, so
    small draws must be precise: E = -log(1 - u) with u > 0 keeps float32's relative precision.
    """
    bits = _hash(to_device(_key(seeds, counters), like.device), like.shape[-1], first)
    u = ((bits & 0x7FFFFFFF).float() + 0.5) * 2.0**-31
    return u.clamp_max_(1 - 2.0**-24).neg_().log1p_().neg_().log_()


def _hash(key: torch.Tensor, tokens: int, first: int = 0) -> torch.Tensor:
    """The hash lowbias32 of the tokens from `first` on, with a key of two words for each row.

    key: int32 [n, 2]. Returns int32 [n, tokens]. The arithmetic wraps around.
    """
    x = torch.arange(first, first + tokens, dtype=torch.int32, device=key.device) + key[:, :1]
    x ^= _shift_right(x, 16)
    x *= _BIAS1
    x ^= _shift_right(x, 15)
    x *= _BIAS2
    x ^= _shift_right(x, 16)
    return x.bitwise_xor_(key[:, 1:])


def _key(seeds: torch.Tensor, counters: torch.Tensor) -> torch.Tensor:
    """64 bits for each (seed, counter), as int32 [n, 2]."""
    return _splitmix(_splitmix(seeds) + counters)[:, None].view(torch.int32)


def _splitmix(x: torch.Tensor) -> torch.Tensor:
    """The hash splitmix64 of int64 values. The arithmetic wraps around."""
    x = x + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MIX1
    x = (x ^ _shift_right(x, 27)) * _MIX2
    return x ^ _shift_right(x, 31)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """A logical shift to the right. torch's `>>` is arithmetic: it keeps the sign."""
    return (x >> bits).bitwise_and_((1 << (x.element_size() * 8 - bits)) - 1)
