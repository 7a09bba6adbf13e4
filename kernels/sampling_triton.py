"""`sampling.sample` as one Triton kernel.

The host reads none of the parameters, so that a CUDA graph can contain the kernel. Legend: n rows,
V vocabulary.
"""

from __future__ import annotations

import torch

from llmkit.kernels.triton_support import jit, tl


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    counters: torch.Tensor,
) -> torch.Tensor:
    """Sample one token for each row of logits, float32 [n, V], of the whole vocabulary.

    All tensors are on one GPU: temperature, top_p, min_p: float32 [n]; top_k, seeds, counters:
    int64 [n]. Parameters and random draws are those of `sampling.sample`. Sums are taken in another
    order, so that the result may differ in borderline cases.
    Returns int64 [n]: -1 for a row with a logit that is not finite.
    """
    rows, vocab_size = logits.shape
    ids = torch.empty_like(seeds)
    with torch.cuda.device_of(logits):
        _sample_kernel[(rows,)](
            logits,
            temperature,
            top_k,
            top_p,
            min_p,
            seeds,
            counters,
            ids,
            logits.stride(0),
            vocab_size,
            TILE=2048,
            WAYS=4,
            num_warps=16,
        )
    return ids


@jit
def _sample_kernel(
    logits: tl.tensor,
    temperature: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    min_p: tl.tensor,
    seeds: tl.tensor,
    counters: tl.tensor,
    ids: tl.tensor,
    row_stride: tl.tensor,
    vocab_size: tl.tensor,
    TILE: tl.constexpr,
    WAYS: tl.constexpr,
) -> None:
    """A program samples one row.

    The distance of a token is the largest logit minus the token's logit. Each filter is an upper
    bound on the distance. Every pass reads the row again; it stays in the L2 cache, not in
    registers.
    """
    row = tl.program_id(0)
    d = tl.arange(0, TILE)
    not_finite = tl.zeros((TILE,), tl.int32)
    row_logits = logits + row.to(tl.int64) * row_stride
    best = tl.full((TILE,), float("-inf"), tl.float32)
    token = not_finite  # zeros
    for start in tl.range(0, vocab_size, TILE, num_stages=3):
        x = tl.load(row_logits + start + d, mask=start + d < vocab_size, other=-1e38)
        not_finite |= ((x.to(tl.int32, bitcast=True) & 0x7F800000) == 0x7F800000).to(tl.int32)
        best = tl.maximum(best, x)
    largest = tl.max(best, 0)
    row_temperature = tl.load(temperature + row)
    bound = tl.full((), float("inf"), tl.float32)
    divisor = tl.where(row_temperature > 0, row_temperature, 1.0)
    if row_temperature > 0:
        k = tl.load(top_k + row)
        p = tl.load(top_p + row)
        row_min_p = tl.load(min_p + row)
        if (k > 0) & (k < vocab_size):
            bound = _find_bound(
                row_logits, vocab_size, largest, divisor, k.to(tl.float32), bound, False, TILE, WAYS
            )
        if p < 1:
            bound = _find_bound(
                row_logits, vocab_size, largest, divisor, p, bound, True, TILE, WAYS
            )
        if row_min_p > 0:
            bound = tl.minimum(bound, -tl.log(row_min_p) * divisor)
    # The key of (seed, counter), as in `sampling._key`: splitmix64 twice.
    key = tl.load(seeds + row).to(tl.uint64)
    for turn in tl.static_range(2):
        key += (
            0x9E3779B97F4A7C15
            if turn == 0
            else 0x9E3779B97F4A7C15 + tl.load(counters + row).to(tl.uint64)
        )
        key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9
        key = (key ^ (key >> 27)) * 0x94D049BB133111EB
        key ^= key >> 31
    best = tl.full((TILE,), float("-inf"), tl.float32)
    for start in tl.range(0, vocab_size, TILE, num_stages=3):
        x = tl.load(row_logits + start + d, mask=start + d < vocab_size, other=-1e38)
        # The random draw of each token, as in `sampling._log_exponential`: lowbias32.
        bits = (start + d).to(tl.uint32) + key.to(tl.uint32)
        bits = (bits ^ (bits >> 16)) * 0x7FEB352D
        bits = (bits ^ (bits >> 15)) * 0x846CA68B
        bits ^= (bits >> 16) ^ (key >> 32).to(tl.uint32)
        u = tl.minimum(
            ((bits & 0x7FFFFFFF).to(tl.int32).to(tl.float32) + 0.5) * 2.0**-31, 1 - 2.0**-24
        )
        w = 1 - u  # rounded: for small u, log(1 - u) is log(w) u / (1 - w)
        draw = tl.log(tl.where(w < 1, tl.log(w) * u / (w - 1), u))
        score = -tl.div_rn(largest - x, divisor) - tl.where(row_temperature > 0, draw, 0.0)
        better = (score > best) & (largest - x <= bound) & (start + d < vocab_size)
        best = tl.where(better, score, best)
        token = tl.where(better, start + d, token)
    chosen = tl.min(tl.where(best == tl.max(best, 0), token, vocab_size), 0)
    tl.store(ids + row, tl.where(tl.max(not_finite, 0) > 0, -1, chosen).to(tl.int64))


@jit
def _find_bound(
    row_logits: tl.tensor,
    vocab_size: tl.tensor,
    largest: tl.tensor,
    divisor: tl.tensor,
    wanted: tl.tensor,
    within: tl.tensor,
    MASS: tl.constexpr,
    TILE: tl.constexpr,
    WAYS: tl.constexpr,
) -> tl.tensor:
    """The smallest distance d such that `wanted` tokens have a distance of at most d.

    With MASS, `wanted` is a share of probability instead of a number of tokens. The share is of the
    probability of the tokens with a distance of at most `within`.

    The search is over the bit patterns of positive floats, which sort like the floats. Each pass
    over the row tries WAYS - 1 patterns between `low`, which is too low, and `high`, which is high
    enough. It also sums up to `within`, for the total.
    """
    low = -1
    high = within.to(tl.int32, bitcast=True)
    way = tl.arange(0, WAYS)
    d = tl.arange(0, TILE)
    while high - low > 1:
        step = (high - low + WAYS - 1) // WAYS
        cuts = tl.minimum(low + step * (way + 1), high).to(tl.float32, bitcast=True)
        cuts = tl.where(way < WAYS - 1, cuts, within)
        sums = tl.zeros((TILE, WAYS), tl.float32)
        for start in tl.range(0, vocab_size, TILE, num_stages=3):
            inside = start + d < vocab_size
            distance = largest - tl.load(row_logits + start + d, mask=inside, other=0.0)
            share = tl.where(inside, tl.exp(-distance / divisor) if MASS else 1.0, 0.0)
            sums += tl.where(distance[:, None] <= cuts[None, :], share[:, None], 0.0)
        reached = tl.sum(sums, 0)
        too_low = reached < (wanted * tl.max(reached, 0) if MASS else wanted)
        low += step * tl.sum((too_low & (way < WAYS - 1)).to(tl.int32), 0)
        high = tl.minimum(low + step, high)
    return high.to(tl.float32, bitcast=True)
