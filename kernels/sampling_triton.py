"""`sampling.sample` on a GPU, as five Triton kernels.

The host reads none of the parameters, so that a CUDA graph can contain the kernels. A row of logits
is split over several programs, so that one row fills a GPU, too. No filter sorts the vocabulary.

1. Each split finds its largest and smallest logit. Greedy rows need nothing else.
2. For top-k and top-p, each split counts the tokens, and sums their probabilities, up to each of
   `WAYS` distances from the largest logit. A bound, the largest distance of a token that a filter
   keeps, then lies between two neighbouring distances.
3. Where more than `CANDIDATES` tokens lie between them, the same is done with distances between
   those two.
4. Each split draws among the tokens below the bounds, and lists the tokens that may be at them.
5. One program a row finds the exact bounds among the listed tokens, and combines all draws. Only a
   row with too many tokens at almost the same distance is searched as a whole, by bisection.

Results do not change from run to run: sums are taken in a fixed order or are exact.
Legend: n rows, V vocabulary, S splits. A distance is the largest logit minus the token's logit,
divided by the temperature. A token wins that has the smallest arrival time: a random draw of
Exponential(1), divided by the token's probability.
"""

from __future__ import annotations

import torch

from llmkit.kernels.triton_support import jit, jit_without_specializing, tl

TILE = 1024  # tokens that a program handles at once
NUM_WARPS = 4
UNROLL = 8  # tokens of a thread in a turn of a counting loop
WAYS = 16  # distances up to which one pass counts
CANDIDATES = 4096  # the most tokens that are listed for a row
MAX_SPLITS = 64
TARGET_PROGRAMS = 1024  # of a launch: about eight for each multiprocessor of a large GPU


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    counters: torch.Tensor,
) -> torch.Tensor:
    """Sample one token for each row of logits [n, V] of the whole vocabulary.

    logits: float32, bfloat16 or float16; their rows are contiguous. All tensors are on one GPU:
    temperature, top_p, min_p: float32 [n]; top_k, seeds, counters: int64 [n], all contiguous.
    Parameters and random draws are those of `sampling.sample`. Sums are taken in another order, and
    tokens tie for top-p when their logits do, so that the result may differ in borderline cases.
    Returns int64 [n]: -1 for a row with a logit that is not finite.
    """
    rows, vocab_size = logits.shape
    splits = num_splits(rows, vocab_size)
    slice_size = -(-vocab_size // (splits * TILE)) * TILE
    ids = torch.empty_like(seeds)
    device = logits.device
    extremes = torch.empty((3, rows, splits), device=device)
    tokens = torch.empty((2, rows, splits), dtype=torch.int32, device=device)
    masses = torch.empty((2, rows, splits, WAYS), device=device)
    counts = torch.empty((2, rows, splits, WAYS), dtype=torch.int32, device=device)
    candidates = torch.empty((rows, 1 + CANDIDATES), dtype=torch.int32, device=device)
    sizes = {"rows": rows, "row_stride": logits.stride(0), "vocab_size": vocab_size}
    constants = {"SPLITS": splits, "WAYS": WAYS, "CANDIDATES": CANDIDATES}
    filters = (temperature, top_k, top_p)
    grid = (rows, splits)
    with torch.cuda.device_of(logits):
        _find_extremes_kernel[grid](
            logits,
            extremes,
            tokens,
            candidates,
            **sizes,
            slice_size=slice_size,
            SPLITS=splits,
            CANDIDATES=CANDIDATES,
            TILE=TILE,
            num_warps=NUM_WARPS,
        )
        for level in range(2):
            _count_kernel[grid](
                logits,
                *filters,
                extremes,
                masses,
                counts,
                **sizes,
                slice_size=slice_size,
                **constants,
                LEVEL=level,
                THREADS=32 * NUM_WARPS,
                UNROLL=UNROLL,
                num_warps=NUM_WARPS,
            )
        _draw_kernel[grid](
            logits,
            *filters,
            min_p,
            seeds,
            counters,
            extremes,
            tokens,
            masses,
            counts,
            candidates,
            **sizes,
            slice_size=slice_size,
            **constants,
            TILE=TILE,
            num_warps=NUM_WARPS,
        )
        _choose_kernel[(rows,)](
            logits,
            *filters,
            min_p,
            seeds,
            counters,
            extremes,
            tokens,
            masses,
            counts,
            candidates,
            ids,
            **sizes,
            **constants,
            TILE=CANDIDATES,
            num_warps=16,
        )
    return ids


def num_splits(rows: int, vocab_size: int) -> int:
    """Over how many programs a row is split: a power of two."""
    wanted = min(MAX_SPLITS, -(-vocab_size // TILE), max(1, TARGET_PROGRAMS // rows))
    return 1 << (wanted.bit_length() - 1)


@jit_without_specializing("rows")
def _find_extremes_kernel(
    logits: tl.tensor,
    extremes: tl.tensor,
    tokens: tl.tensor,
    candidates: tl.tensor,
    rows: tl.tensor,
    row_stride: tl.tensor,
    vocab_size: tl.tensor,
    slice_size: tl.tensor,
    SPLITS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """The largest and the smallest logit of a split, and the first token with the largest.

    The largest is infinite when a logit is not finite.
    """
    row = tl.program_id(0)
    split = tl.program_id(1)
    d = tl.arange(0, TILE)
    row_logits = logits + row.to(tl.int64) * row_stride
    first = split * slice_size
    best = tl.full((TILE,), -3e38, tl.float32)
    least = tl.full((TILE,), 3e38, tl.float32)
    where = tl.zeros((TILE,), tl.int32)
    zeros = tl.zeros((TILE,), tl.float32)
    for start in tl.range(first, tl.minimum(first + slice_size, vocab_size), TILE, num_stages=3):
        inside = start + d < vocab_size
        x = tl.load(row_logits + start + d, mask=inside, other=0.0).to(tl.float32)
        zeros += x * 0.0  # NaN once a logit is not finite
        best_here = tl.where(inside, x, -3e38)
        where = tl.where(best_here > best, start, where)
        best = tl.maximum(best, best_here)
        least = tl.minimum(least, tl.where(inside, x, 3e38))
    largest = tl.max(best, 0)
    token = tl.min(tl.where(best == largest, where + d, vocab_size), 0)
    not_finite = tl.max((zeros != zeros).to(tl.int32), 0)
    at = row * SPLITS + split
    tl.store(extremes + at, tl.where(not_finite > 0, float("inf"), largest))
    tl.store(extremes + rows * SPLITS + at, tl.min(least, 0))
    tl.store(tokens + at, token)
    if split == 0:
        tl.store(candidates + row.to(tl.int64) * (1 + CANDIDATES), 0)


@jit
def _row_extremes(
    extremes: tl.tensor,
    temperature: tl.tensor,
    row: tl.tensor,
    rows: tl.tensor,
    SPLITS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The row's largest logit, what its distances are multiplied by, and the last cut.

    No token beyond a distance of 25.1 can win: the largest draw is below 16.7, the smallest above
    2^-32.
    """
    split = row * SPLITS + tl.arange(0, SPLITS)
    largest = tl.max(tl.load(extremes + split), 0)
    smallest = tl.min(tl.load(extremes + rows * SPLITS + split), 0)
    inverse = tl.minimum(1 / tl.load(temperature + row), 3e38)
    return largest, inverse, tl.minimum((largest - smallest) * inverse, 25.125)


@jit
def _level_0_cuts(reach: tl.tensor, WAYS: tl.constexpr) -> tl.tensor:
    """The distances up to which level 0 counts: 0 for ties with the largest, then even steps."""
    way = tl.arange(0, WAYS)
    return tl.where(way < WAYS - 1, reach * (way * (1 / (WAYS - 2))), float("inf"))


@jit
def _level_1_cuts(
    by_count: tl.tensor,
    by_mass: tl.tensor,
    count_low: tl.tensor,
    count_high: tl.tensor,
    mass_low: tl.tensor,
    mass_high: tl.tensor,
    WAYS: tl.constexpr,
) -> tl.tensor:
    """The distances up to which level 1 counts: within the brackets of both bounds."""
    way = tl.arange(0, WAYS)
    both = by_count & by_mass
    is_count = by_count & ((way < WAYS // 2) | (both == 0))
    place = tl.where(both & (way >= WAYS // 2), way - WAYS // 2, way) + 1
    step = place.to(tl.float32) * tl.where(both, 1 / (WAYS // 2 + 1), 1 / (WAYS + 1))
    # An unused bracket may be infinite.
    count_width = tl.where(by_count, count_high - count_low, 0.0)
    mass_width = tl.where(by_mass, mass_high - mass_low, 0.0)
    return tl.where(is_count, count_low + count_width * step, mass_low + mass_width * step)


@jit
def _sums(
    masses: tl.tensor,
    counts: tl.tensor,
    row: tl.tensor,
    rows: tl.tensor,
    LEVEL: tl.constexpr,
    SPLITS: tl.constexpr,
    WAYS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The counts and masses of a row up to each cut."""
    base = (LEVEL * rows + row) * (SPLITS * WAYS)
    at = base + tl.arange(0, SPLITS)[:, None] * WAYS + tl.arange(0, WAYS)[None, :]
    # In float64, the order of the additions changes nothing. It differs between the kernels, and
    # one that found another bracket would read what the kernels before it did not write.
    mass = tl.sum(tl.load(masses + at).to(tl.float64), 0).to(tl.float32)
    return tl.sum(tl.load(counts + at), 0), mass


@jit
def _narrow(
    cuts: tl.tensor,
    counts: tl.tensor,
    masses: tl.tensor,
    too_low: tl.tensor,
    enough: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    low_count: tl.tensor,
    high_count: tl.tensor,
    low_mass: tl.tensor,
    high_mass: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """A narrower bracket of a bound: the last cut that is too low, and the first high enough.

    With them, the count and mass up to each.
    """
    return (
        tl.maximum(low, tl.max(tl.where(too_low, cuts, -1.0), 0)),
        tl.minimum(high, tl.min(tl.where(enough, cuts, float("inf")), 0)),
        tl.maximum(low_count, tl.max(tl.where(too_low, counts, 0), 0)),
        tl.minimum(high_count, tl.min(tl.where(enough, counts, 0x7FFFFFFF), 0)),
        tl.maximum(low_mass, tl.max(tl.where(too_low, masses, 0.0), 0)),
        tl.minimum(high_mass, tl.min(tl.where(enough, masses, float("inf")), 0)),
    )


@jit
def _brackets(
    top_k: tl.tensor,
    top_p: tl.tensor,
    masses: tl.tensor,
    counts: tl.tensor,
    row: tl.tensor,
    rows: tl.tensor,
    vocab_size: tl.tensor,
    reach: tl.tensor,
    LEVELS: tl.constexpr,
    SPLITS: tl.constexpr,
    WAYS: tl.constexpr,
    CANDIDATES: tl.constexpr,
) -> tuple[
    tl.tensor,
    tl.tensor,
    tl.tensor,
    tl.tensor,
    tl.tensor,
    tl.tensor,
    tl.tensor,
    tl.tensor,
    tl.tensor,
    tl.tensor,
    tl.tensor,
]:
    """Between which distances the bounds of top-k and top-p lie, after one or two levels.

    Returns, for top-k and then for top-p: whether the filter has a bound within reach, the bracket
    (low, high], and the mass up to `low`; the count up to `low` of top-k; the total mass; and how
    many tokens are in the brackets.
    """
    k = tl.load(top_k + row)
    p = tl.load(top_p + row)
    by_count = (k > 0) & (k < vocab_size)
    by_mass = p < 1
    k_low, k_high = -1.0, float("inf")
    k_low_count, k_high_count = 0, 0x7FFFFFFF
    k_low_mass, k_high_mass = 0.0, float("inf")
    p_low, p_high = -1.0, float("inf")
    p_low_count, p_high_count = 0, 0x7FFFFFFF
    p_low_mass, p_high_mass = 0.0, float("inf")
    total = 0.0
    inside = CANDIDATES + 1  # not known yet
    for level in tl.static_range(LEVELS):
        if inside > CANDIDATES:
            if level == 0:
                cuts = _level_0_cuts(reach, WAYS)
            else:
                cuts = _level_1_cuts(by_count, by_mass, k_low, k_high, p_low, p_high, WAYS)
            count, mass = _sums(masses, counts, row, rows, level, SPLITS, WAYS)
            if level == 0:
                total = tl.max(mass, 0)
            k_low, k_high, k_low_count, k_high_count, k_low_mass, k_high_mass = _narrow(
                cuts,
                count,
                mass,
                count < k,
                count >= k,
                k_low,
                k_high,
                k_low_count,
                k_high_count,
                k_low_mass,
                k_high_mass,
            )
            by_count = by_count & (k_high < float("inf"))
            # The mass that top-p takes a share of is known only as closely as the bound of top-k.
            least = p * tl.where(by_count, k_low_mass, total)
            most = p * tl.where(by_count, k_high_mass, total)
            p_low, p_high, p_low_count, p_high_count, p_low_mass, p_high_mass = _narrow(
                cuts,
                count,
                mass,
                mass < least,
                mass >= most,
                p_low,
                p_high,
                p_low_count,
                p_high_count,
                p_low_mass,
                p_high_mass,
            )
            by_mass = by_mass & (p_high < float("inf"))
            inside = tl.where(by_count & (k_high > 0), k_high_count - k_low_count, 0)
            inside += tl.where(by_mass & (p_high > 0), p_high_count - p_low_count, 0)
    # All tokens up to a distance of 0 tie: such a bound is exact.
    k_low_mass = tl.where(k_high > 0, k_low_mass, k_high_mass)
    k_low = tl.where(k_high > 0, k_low, 0.0)
    p_low = tl.where(p_high > 0, p_low, 0.0)
    return (
        by_count,
        k_low,
        k_high,
        k_low_mass,
        by_mass,
        p_low,
        p_high,
        p_low_mass,
        k_low_count,
        total,
        inside,
    )


@jit_without_specializing("rows")
def _count_kernel(
    logits: tl.tensor,
    temperature: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    extremes: tl.tensor,
    masses: tl.tensor,
    counts: tl.tensor,
    rows: tl.tensor,
    row_stride: tl.tensor,
    vocab_size: tl.tensor,
    slice_size: tl.tensor,
    SPLITS: tl.constexpr,
    WAYS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    LEVEL: tl.constexpr,
    THREADS: tl.constexpr,
    UNROLL: tl.constexpr,
) -> None:
    """The number and the mass of a split's tokens up to each cut."""
    row = tl.program_id(0)
    split = tl.program_id(1)
    k = tl.load(top_k + row)
    is_filtered = ((k > 0) & (k < vocab_size)) | (tl.load(top_p + row) < 1)
    if is_filtered & (tl.load(temperature + row) > 0):
        largest, inverse, reach = _row_extremes(extremes, temperature, row, rows, SPLITS)
        needed = largest < float("inf")
        cuts = _level_0_cuts(reach, WAYS)
        if LEVEL > 0:
            by_count, k_low, k_high, _, by_mass, p_low, p_high, _, _, _, inside = _brackets(
                top_k,
                top_p,
                masses,
                counts,
                row,
                rows,
                vocab_size,
                reach,
                1,
                SPLITS,
                WAYS,
                CANDIDATES,
            )
            needed = needed & (inside > CANDIDATES)
            cuts = _level_1_cuts(by_count, by_mass, k_low, k_high, p_low, p_high, WAYS)
        if needed:
            row_logits = logits + row.to(tl.int64) * row_stride
            d = tl.arange(0, THREADS)
            first = split * slice_size
            stop = tl.minimum(first + slice_size, vocab_size)
            # A thread has one token and all cuts in its registers.
            mass = tl.zeros((WAYS, THREADS), tl.float32)
            count = tl.zeros((WAYS, THREADS), tl.float32)
            for start in tl.range(first, stop, THREADS * UNROLL):
                for turn in tl.static_range(UNROLL):
                    token = start + turn * THREADS + d
                    inside_row = token < vocab_size
                    # After the end, the share is 0: 0 times an infinite share would be NaN.
                    x = tl.load(row_logits + token, mask=inside_row, other=-3e38).to(tl.float32)
                    distance = (largest - x) * inverse
                    share = tl.exp(-distance)
                    # A token after the end is beyond the last cut, too.
                    distance = tl.where(inside_row, distance, float("nan"))
                    kept = distance[None, :] <= cuts[:, None]
                    one = kept.to(tl.float32)
                    mass += one * share[None, :]
                    count += one
            at = ((LEVEL * rows + row) * SPLITS + split) * WAYS + tl.arange(0, WAYS)
            tl.store(masses + at, tl.sum(mass, 1))
            tl.store(counts + at, tl.sum(count, 1).to(tl.int32))


@jit
def _key(seeds: tl.tensor, counters: tl.tensor, row: tl.tensor) -> tl.tensor:
    """The key of (seed, counter), as in `sampling._key`: splitmix64 twice."""
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
    return key


@jit
def _arrival(token: tl.tensor, distance: tl.tensor, key: tl.tensor) -> tl.tensor:
    """When tokens arrive: the draws of `sampling._log_exponential`, over their probability."""
    bits = token.to(tl.uint32) + key.to(tl.uint32)
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    bits ^= (bits >> 16) ^ (key >> 32).to(tl.uint32)
    u = ((bits & 0x7FFFFFFF).to(tl.int32).to(tl.float32) + 0.5) * 2.0**-31
    return _exponential(tl.minimum(u, 1 - 2.0**-24)) * tl.exp(distance)


@jit
def _exponential(u: tl.tensor) -> tl.tensor:
    """-log(1 - u), for u above 0 and below 1.

    1 - u is 2^e (1 + f), with f between -1/3 and 1/3. Where e is 0, f is -u without rounding, so
    that small u keep their precision. The polynomial is a minimax approximation of log(1 + f) / f.
    """
    w = 1 - u
    bits = w.to(tl.int32, bitcast=True)
    e = (bits - 0x3F2AAAAB) >> 23
    f = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1
    f = tl.where(e == 0, -u, f)
    r = f * 0.14056111872196198 - 0.15403199195861816
    r = r * f + 0.13987651467323303
    r = r * f - 0.164127916097641
    r = r * f + 0.20011945068836212
    r = r * f - 0.25008028745651245
    r = r * f + 0.3333316743373871
    r = r * f - 0.4999993145465851
    r = r * f + 1
    return e.to(tl.float32) * -0.6931471805599453 - f * r


@jit_without_specializing("rows")
def _draw_kernel(
    logits: tl.tensor,
    temperature: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    min_p: tl.tensor,
    seeds: tl.tensor,
    counters: tl.tensor,
    extremes: tl.tensor,
    tokens: tl.tensor,
    masses: tl.tensor,
    counts: tl.tensor,
    candidates: tl.tensor,
    rows: tl.tensor,
    row_stride: tl.tensor,
    vocab_size: tl.tensor,
    slice_size: tl.tensor,
    SPLITS: tl.constexpr,
    WAYS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Draw among a split's tokens that are kept for certain, and list those that may be kept."""
    row = tl.program_id(0)
    split = tl.program_id(1)
    if tl.load(temperature + row) > 0:
        largest, inverse, reach = _row_extremes(extremes, temperature, row, rows, SPLITS)
        k = tl.load(top_k + row)
        needed = largest < float("inf")
        by_count = (k > 0) & (k < vocab_size)
        by_mass = tl.load(top_p + row) < 1
        k_low = reach * 0
        k_high = k_low
        p_low = k_low
        p_high = k_low
        if (by_count | by_mass) & needed:
            by_count, k_low, k_high, _, by_mass, p_low, p_high, _, _, _, inside = _brackets(
                top_k,
                top_p,
                masses,
                counts,
                row,
                rows,
                vocab_size,
                reach,
                2,
                SPLITS,
                WAYS,
                CANDIDATES,
            )
            needed = inside <= CANDIDATES
        is_filtered = by_count | by_mass
        certain = _min_p_bound(min_p, row)
        certain = tl.minimum(certain, tl.where(by_count, k_low, float("inf")))
        certain = tl.minimum(certain, tl.where(by_mass, p_low, float("inf")))
        k_high = tl.where(by_count, k_high, -1.0)
        p_high = tl.where(by_mass, p_high, -1.0)
        if needed:
            key = _key(seeds, counters, row)
            d = tl.arange(0, TILE)
            row_logits = logits + row.to(tl.int64) * row_stride
            row_candidates = candidates + row.to(tl.int64) * (1 + CANDIDATES)
            first = split * slice_size
            stop = tl.minimum(first + slice_size, vocab_size)
            best = tl.full((TILE,), float("inf"), tl.float32)
            where = tl.zeros((TILE,), tl.int32)
            for start in tl.range(first, stop, TILE, num_stages=3):
                token = start + d
                inside = token < vocab_size
                x = tl.load(row_logits + token, mask=inside, other=-3e38).to(tl.float32)
                distance = (largest - x) * inverse
                arrival = _arrival(token, distance, key)
                better = (arrival < best) & (distance <= certain)
                best = tl.where(better, arrival, best)
                where = tl.where(better, start, where)
                if is_filtered:
                    listed = (distance > k_low) & (distance <= k_high)
                    listed = listed | ((distance > p_low) & (distance <= p_high))
                    listed = listed & inside
                    place = tl.atomic_add(row_candidates + d * 0, 1, mask=listed, sem="relaxed")
                    tl.store(row_candidates + 1 + place, token, mask=listed)
            earliest = tl.min(best, 0)
            token = tl.min(tl.where(best == earliest, where + d, vocab_size), 0)
            at = row * SPLITS + split
            tl.store(extremes + 2 * rows * SPLITS + at, earliest)
            tl.store(tokens + rows * SPLITS + at, token)


@jit
def _min_p_bound(min_p: tl.tensor, row: tl.tensor) -> tl.tensor:
    """The largest distance that min-p keeps."""
    share = tl.load(min_p + row)
    return tl.where(share > 0, -tl.log(tl.where(share > 0, share, 1.0)), float("inf"))


@jit_without_specializing("rows")
def _choose_kernel(
    logits: tl.tensor,
    temperature: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    min_p: tl.tensor,
    seeds: tl.tensor,
    counters: tl.tensor,
    extremes: tl.tensor,
    tokens: tl.tensor,
    masses: tl.tensor,
    counts: tl.tensor,
    candidates: tl.tensor,
    ids: tl.tensor,
    rows: tl.tensor,
    row_stride: tl.tensor,
    vocab_size: tl.tensor,
    SPLITS: tl.constexpr,
    WAYS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """The sampled token of a row."""
    row = tl.program_id(0)
    at = row * SPLITS + tl.arange(0, SPLITS)
    maxima = tl.load(extremes + at)
    largest = tl.max(maxima, 0)
    token = tl.min(tl.where(maxima == largest, tl.load(tokens + at), vocab_size), 0)
    if (tl.load(temperature + row) > 0) & (largest < float("inf")):
        largest, inverse, reach = _row_extremes(extremes, temperature, row, rows, SPLITS)
        k = tl.load(top_k + row)
        p = tl.load(top_p + row)
        bound = _min_p_bound(min_p, row)
        d = tl.arange(0, TILE)
        row_logits = logits + row.to(tl.int64) * row_stride
        row_candidates = candidates + row.to(tl.int64) * (1 + CANDIDATES)
        num_listed = vocab_size * 0
        num_tokens = vocab_size * 0
        if ((k > 0) & (k < vocab_size)) | (p < 1):
            (
                by_count,
                k_low,
                k_high,
                k_mass,
                by_mass,
                p_low,
                p_high,
                p_mass,
                k_count,
                total,
                inside,
            ) = _brackets(
                top_k,
                top_p,
                masses,
                counts,
                row,
                rows,
                vocab_size,
                reach,
                2,
                SPLITS,
                WAYS,
                CANDIDATES,
            )
            is_listed = inside <= CANDIDATES
            num_listed = tl.where(is_listed, tl.load(row_candidates), 0)
            num_tokens = tl.where(is_listed, num_listed, vocab_size)
            if by_count:
                wanted = (k - k_count).to(tl.float64)
                k_high, mass = _find_bound(
                    row_logits,
                    row_candidates,
                    num_listed,
                    num_tokens,
                    largest,
                    inverse,
                    wanted,
                    k_low,
                    k_high,
                    False,
                    TILE,
                )
                total = k_mass + mass.to(tl.float32)
                bound = tl.minimum(bound, k_high)
            if by_mass:
                wanted = p.to(tl.float64) * total - p_mass
                p_high, mass = _find_bound(
                    row_logits,
                    row_candidates,
                    num_listed,
                    num_tokens,
                    largest,
                    inverse,
                    wanted,
                    p_low,
                    p_high,
                    True,
                    TILE,
                )
                bound = tl.minimum(bound, p_high)
        key = _key(seeds, counters, row)
        best = tl.full((TILE,), float("inf"), tl.float32)
        where = tl.zeros((TILE,), tl.int32) + vocab_size
        for start in range(0, num_tokens, TILE):
            inside_row = start + d < num_tokens
            place = _token(row_candidates, num_listed, start + d)
            x = tl.load(row_logits + place, mask=inside_row, other=-3e38).to(tl.float32)
            distance = (largest - x) * inverse
            arrival = _arrival(place, distance, key)
            arrival = tl.where(inside_row & (distance <= bound), arrival, float("inf"))
            better = (arrival < best) | ((arrival == best) & (place < where))
            best = tl.where(better, arrival, best)
            where = tl.where(better, place, where)
        earliest = tl.min(best, 0)
        token = tl.min(tl.where(best == earliest, where, vocab_size), 0)
        if num_listed == num_tokens:
            draws = tl.load(extremes + 2 * rows * SPLITS + at)
            first = tl.min(draws, 0)
            drawn = tl.load(tokens + rows * SPLITS + at)
            drawn = tl.min(tl.where(draws == first, drawn, vocab_size), 0)
            token = tl.where(
                (first < earliest) | ((first == earliest) & (drawn < token)), drawn, token
            )
    tl.store(ids + row, tl.where(largest < float("inf"), token, -1).to(tl.int64))


@jit
def _token(row_candidates: tl.tensor, num_listed: tl.tensor, place: tl.tensor) -> tl.tensor:
    """A listed token, or simply the token at this place of the vocabulary."""
    is_listed = place < num_listed
    return tl.where(is_listed, tl.load(row_candidates + 1 + place, mask=is_listed, other=0), place)


@jit
def _find_bound(
    row_logits: tl.tensor,
    row_candidates: tl.tensor,
    num_listed: tl.tensor,
    num_tokens: tl.tensor,
    largest: tl.tensor,
    inverse: tl.tensor,
    wanted: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    MASS: tl.constexpr,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The smallest distance up to which `wanted` tokens, or so much mass, are in (low, high].

    Returns it and the mass up to it. The search is over the bit patterns of floats that are not
    negative, which sort like the floats. It ends at `high` if too few tokens are found before.
    The masses of at most CANDIDATES tokens at about the same distance are added exactly.
    """
    d = tl.arange(0, TILE)
    below = tl.where(low < 0, -1, low.to(tl.int32, bitcast=True))  # -1: distance 0 may do
    above = high.to(tl.int32, bitcast=True)
    inside = d < num_tokens
    first = tl.load(row_logits + _token(row_candidates, num_listed, d), mask=inside, other=0.0)
    first_distance = (largest - first.to(tl.float32)) * inverse
    # What is not in (low, high] is never counted.
    inside = inside & (first_distance > low) & (first_distance <= high)
    first_mass = tl.where(inside, tl.exp(-first_distance), 0.0).to(tl.float64)
    first_share = first_mass if MASS else inside.to(tl.float64)
    while above - below > 1:
        middle = below + (above - below) // 2
        cut = middle.to(tl.float32, bitcast=True)
        found = tl.sum(tl.where(first_distance <= cut, first_share, 0.0), 0)
        for start in range(TILE, num_tokens, TILE):
            # Only a row that is not listed has more tokens than a tile.
            x = tl.load(row_logits + start + d, mask=start + d < num_tokens, other=0.0)
            distance = (largest - x.to(tl.float32)) * inverse
            kept = (start + d < num_tokens) & (distance > low) & (distance <= cut)
            share = tl.exp(-distance) if MASS else distance * 0 + 1
            found += tl.sum(tl.where(kept, share, 0.0).to(tl.float64), 0)
        enough = found >= wanted
        above = tl.where(enough, middle, above)
        below = tl.where(enough, below, middle)
    bound = above.to(tl.float32, bitcast=True)
    mass = tl.sum(tl.where(first_distance <= bound, first_mass, 0.0), 0)
    for start in range(TILE, num_tokens, TILE):
        x = tl.load(row_logits + start + d, mask=start + d < num_tokens, other=0.0)
        distance = (largest - x.to(tl.float32)) * inverse
        kept = (start + d < num_tokens) & (distance > low) & (distance <= bound)
        mass += tl.sum(tl.where(kept, tl.exp(-distance), 0.0).to(tl.float64), 0)
    return bound, mass
