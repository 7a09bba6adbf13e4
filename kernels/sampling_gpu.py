"""`sampling.sample` as one Triton kernel: the host sees none of its parameters, so that a CUDA graph may hold it."""

from __future__ import annotations

import torch

from llmkit.kernels.jit import jit, tl


def sample(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor,
    seeds: torch.Tensor, counters: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """One token id int64 [n] for each row of logits, float32 [n, V], of a whole vocabulary; -1 where one is not finite.

    All on one GPU: temperature, top_p, min_p: float32 [n]; top_k, seeds, counters: int64 [n]. What they mean, and the
    draws, are those of `sampling.sample`; what is computed in another way is rounded in another way.
    """
    (rows, size), ids = logits.shape, torch.empty_like(seeds)
    with torch.cuda.device_of(logits):
        _sample[(rows,)](
            logits, temperature, top_k, top_p, min_p, seeds, counters, ids, logits.stride(0), size, TILE=2048, WAYS=4,
            num_warps=16,
        )  # fmt: skip
    return ids


@jit
def _sample(
    logits: tl.tensor, temperature: tl.tensor, top_k: tl.tensor, top_p: tl.tensor, min_p: tl.tensor, seeds: tl.tensor,
    counters: tl.tensor, ids: tl.tensor, stride: tl.tensor, size: tl.tensor, TILE: tl.constexpr, WAYS: tl.constexpr,
) -> None:  # fmt: skip
    """One row. A token's distance is how far it is below the most probable one; every filter is a bound on it."""
    row, d, odd = tl.program_id(0), tl.arange(0, TILE), tl.zeros((TILE,), tl.int32)
    at, best, token = logits + row.to(tl.int64) * stride, tl.full((TILE,), float("-inf"), tl.float32), odd
    for start in tl.range(0, size, TILE, num_stages=3):
        x = tl.load(at + start + d, mask=start + d < size, other=-1e38)
        odd |= ((x.to(tl.int32, bitcast=True) & 0x7F800000) == 0x7F800000).to(tl.int32)
        best = tl.maximum(best, x)
    most, warmth, bound = tl.max(best, 0), tl.load(temperature + row), tl.full((), float("inf"), tl.float32)
    unit = tl.where(warmth > 0, warmth, 1.0)
    if warmth > 0:
        k, p, least = tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
        if (k > 0) & (k < size):
            bound = _bound(at, size, most, unit, k.to(tl.float32), bound, False, TILE, WAYS)
        if p < 1:
            bound = _bound(at, size, most, unit, p, bound, True, TILE, WAYS)
        if least > 0:
            bound = tl.minimum(bound, -tl.log(least) * unit)
    key = tl.load(seeds + row).to(tl.uint64)
    for turn in tl.static_range(2):  # splitmix64
        key += 0x9E3779B97F4A7C15 if turn == 0 else 0x9E3779B97F4A7C15 + tl.load(counters + row).to(tl.uint64)
        key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9
        key = (key ^ (key >> 27)) * 0x94D049BB133111EB
        key ^= key >> 31
    best = tl.full((TILE,), float("-inf"), tl.float32)
    for start in tl.range(0, size, TILE, num_stages=3):
        x = tl.load(at + start + d, mask=start + d < size, other=-1e38)
        bits = (start + d).to(tl.uint32) + key.to(tl.uint32)  # as `sampling._log_exponential` draws
        bits = (bits ^ (bits >> 16)) * 0x7FEB352D
        bits = (bits ^ (bits >> 15)) * 0x846CA68B
        bits ^= (bits >> 16) ^ (key >> 32).to(tl.uint32)
        u = tl.minimum(((bits & 0x7FFFFFFF).to(tl.int32).to(tl.float32) + 0.5) * 2.0**-31, 1 - 2.0**-24)
        w = 1 - u  # rounded: log(1 - u) is log(w) u / (1 - w) for small u
        draw = tl.log(tl.where(w < 1, tl.log(w) * u / (w - 1), u))
        score = -tl.div_rn(most - x, unit) - tl.where(warmth > 0, draw, 0.0)
        better = (score > best) & (most - x <= bound) & (start + d < size)
        best, token = tl.where(better, score, best), tl.where(better, start + d, token)
    chosen = tl.min(tl.where(best == tl.max(best, 0), token, size), 0)
    tl.store(ids + row, tl.where(tl.max(odd, 0) > 0, -1, chosen).to(tl.int64))


@jit
def _bound(
    at: tl.tensor, size: tl.tensor, most: tl.tensor, unit: tl.tensor, wanted: tl.tensor, within: tl.tensor,
    MASS: tl.constexpr, TILE: tl.constexpr, WAYS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The least distance up to which there are `wanted` tokens, or with MASS that share of the probability `within`.

    It is looked for among the bit patterns of floats, which are in the floats' order: at each turn with the tokens, or
    the mass, up to WAYS - 1 patterns between those that are known to be too low and high enough, and up to `within`.
    """
    low, high, way, d = -1, within.to(tl.int32, bitcast=True), tl.arange(0, WAYS), tl.arange(0, TILE)
    while high - low > 1:
        step = (high - low + WAYS - 1) // WAYS
        cuts = tl.minimum(low + step * (way + 1), high).to(tl.float32, bitcast=True)
        cuts, sums = tl.where(way < WAYS - 1, cuts, within), tl.zeros((TILE, WAYS), tl.float32)
        for start in tl.range(0, size, TILE, num_stages=3):
            distance = most - tl.load(at + start + d, mask=start + d < size, other=0.0)
            share = tl.where(start + d < size, tl.exp(-distance / unit) if MASS else 1.0, 0.0)
            sums += tl.where(distance[:, None] <= cuts[None, :], share[:, None], 0.0)
        reached = tl.sum(sums, 0)
        short = reached < (wanted * tl.max(reached, 0) if MASS else wanted)
        low += step * tl.sum((short & (way < WAYS - 1)).to(tl.int32), 0)
        high = tl.minimum(low + step, high)
    return high.to(tl.float32, bitcast=True)
