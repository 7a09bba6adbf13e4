"""`sampling.sample` on a GPU, as five Triton kernels.

The host reads none of the parameters, so that a CUDA graph can contain the kernels. A row of logits
is split over several programs, so that one row fills a GPU, too. No filter sorts the vocabulary.

1. Each split finds its largest and smallest logit. Greedy rows need nothing else.
2. For top-k, each split counts the tokens up to each of `WAYS` distances from the largest logit;
   for top-p alone, it sums their probabilities. A bound, the largest distance of a token that a
   filter keeps, then lies between two neighbouring distances.
3. Where too many tokens lie below a bound and between its two distances, the same is done with
   distances between those two.
4. Where at most `CANDIDATES` tokens lie below the larger distance, each split lists its own. Else
   it draws among the tokens below the bounds, and lists those that may be at them.
5. One program a row finds the exact bounds among the listed tokens, and combines all draws. Only a
   row with too many tokens at almost the same distance is searched as a whole, by bisection.

A grammar's bitmask is read beside the logits, and only in the rows that have one. So are the tables
of bias, minimum lengths and penalties.
Results do not change from run to run: sums are taken in a fixed order or are exact.
Legend: n rows, V vocabulary, S splits. A distance is the largest logit minus the token's logit,
divided by the temperature. A token wins that has the smallest arrival time: a random draw of
Exponential(1), divided by the token's probability.
"""

from __future__ import annotations

import torch

from llmkit.kernels.logits_tables import LogitsTables
from llmkit.kernels.triton_support import jit, jit_without_specializing, tl

TILE = 1024  # tokens that a program handles at once
NUM_WARPS = 4
UNROLL = 8  # tokens of a thread in a turn of a counting loop
CHOICE_TILE = 2048  # tokens that the last kernel handles at once
CHOICE_WARPS = 8
CHANGED_CHOICE_WARPS = 16  # with tables: a thread needs more registers for a token
WAYS = 16  # distances up to which one pass counts
CANDIDATES = 4096  # the most tokens that are listed for a row
MAX_SPLITS = 64
TARGET_PROGRAMS = 512  # of a launch: about four for each multiprocessor of a large GPU


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    counters: torch.Tensor,
    bitmask: torch.Tensor | None = None,
    bitmask_rows: torch.Tensor | None = None,
    tables: LogitsTables | None = None,
    slots: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sample one token for each row of logits [n, V] of the whole vocabulary.

    logits: float32, bfloat16 or float16; their rows are contiguous. All tensors are on one GPU:
    temperature, top_p, min_p: float32 [n]; top_k, seeds, counters: int64 [n], all contiguous.
    bitmask: int32 [m, ceil(V / 32)], contiguous: the allowed tokens of rows with a grammar, see
    `token_bitmask`. bitmask_rows: int32 [n], the row of `bitmask` of each row; -1: it has none.
    tables: what changes the logits before, see `logits_tables.change_logits`. slots: int64 [n], the
    slot of each row in `tables`; -1: its logits do not change.
    Parameters and random draws are those of `sampling.sample`. Sums are taken in another order, and
    tokens tie for top-p when their logits do, so that the result may differ in borderline cases.
    Returns int64 [n]: -1 for a row with a logit that is not finite, or without an allowed token.
    """
    rows, vocab_size = logits.shape
    is_rare = bitmask is not None or tables is not None or logits.dtype == torch.float32
    splits = num_splits(rows, vocab_size, is_rare=is_rare)
    slice_size = -(-vocab_size // (splits * TILE)) * TILE
    ids = torch.empty_like(seeds)
    device = logits.device
    extremes = torch.empty((3, rows, splits), device=device)
    tokens = torch.empty((2, rows, splits), dtype=torch.int32, device=device)
    masses = torch.empty((2, rows, splits, WAYS), device=device)
    counts = torch.empty((2, rows, splits, WAYS), dtype=torch.int32, device=device)
    # How many tokens are listed, the tokens, and their distances.
    candidates = torch.empty((rows, 1 + 2 * CANDIDATES), dtype=torch.int32, device=device)
    none = dict.fromkeys(LogitsTables._fields)
    changes = {"bitmask": bitmask, "bitmask_rows": bitmask_rows, "slots": slots}
    changes |= none if tables is None else tables._asdict()
    sizes = {"rows": rows, "row_stride": logits.stride(0), "vocab_size": vocab_size}
    constants = {"SPLITS": splits, "WAYS": WAYS, "CANDIDATES": CANDIDATES}
    filters = (temperature, top_k, top_p)
    grid = (rows, splits)
    with torch.cuda.device_of(logits):
        _find_extremes_kernel[grid](
            logits,
            counters,
            extremes,
            tokens,
            candidates,
            **changes,
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
                counters,
                extremes,
                masses,
                counts,
                **changes,
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
            **changes,
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
            **changes,
            **sizes,
            **constants,
            TILE=CHOICE_TILE,
            num_warps=CHOICE_WARPS if tables is None else CHANGED_CHOICE_WARPS,
        )
    return ids


def num_splits(rows: int, vocab_size: int, *, is_rare: bool = False) -> int:
    """Over how many programs a row is split: a power of two.

    is_rare: a power of four. The kernels are compiled for each number, and few steps have a
    grammar, requests that change logits, or logits in float32.
    """
    wanted = min(MAX_SPLITS, -(-vocab_size // TILE), max(1, TARGET_PROGRAMS // rows))
    bits = wanted.bit_length() - 1
    return 1 << (bits + bits % 2 if is_rare else bits)


def rows_of_variants(max_rows: int) -> list[int]:
    """The fewest rows that get each number of splits, for up to `max_rows` rows of any vocabulary.

    A step with other numbers of rows launches the same kernels.
    """
    rows = [1]
    splits = MAX_SPLITS
    while splits > 1:
        rows.append(TARGET_PROGRAMS // splits + 1)
        splits //= 2
    return [number for number in rows if number <= max_rows]


@jit
def _row_changes(
    bitmask: tl.tensor,
    bitmask_rows: tl.tensor,
    slots: tl.tensor,
    token_counts: tl.tensor,
    bias: tl.tensor,
    factors: tl.tensor,
    min_tokens: tl.tensor,
    counters: tl.tensor,
    row: tl.tensor,
    vocab_size: tl.tensor,
) -> tuple[tl.tensor, ...]:
    """What `_changed` needs to know of a row.

    Whether it has a grammar, and the words of its bitmask; the biases, and of how many tokens they
    are read, all or none; the same for token counts; where its slot's row begins in both; whether
    its minimum length is not reached; and its slot's factors, see `LogitsTables`.
    """
    if bitmask is None:
        words = row
        is_masked = row < 0
    else:
        mask_row = tl.load(bitmask_rows + row)
        words = bitmask + mask_row.to(tl.int64) * ((vocab_size + 31) // 32)
        is_masked = mask_row >= 0
    if slots is None:
        biases = row
        num_biases = row
        occurrences = row
        num_counts = row
        first = row
        is_early = row < 0
        row_factors = row
    else:
        biases = bias
        occurrences = token_counts
        slot = tl.load(slots + row)
        has_slot = slot >= 0
        slot = tl.maximum(slot, 0)
        first = slot * vocab_size
        row_factors = factors + 5 * slot
        is_penalized = tl.load(row_factors + 1) != 1
        is_penalized |= (tl.load(row_factors + 2) != 0) | (tl.load(row_factors + 3) != 0)
        has_bias = has_slot & (tl.load(row_factors + 4) > 0)
        num_biases = tl.where(has_bias, vocab_size, 0)
        is_early = tl.load(counters + row) < tl.load(min_tokens + slot)
        num_counts = tl.where(has_slot & (is_penalized | is_early), vocab_size, 0)
    return (
        is_masked,
        words,
        biases,
        num_biases,
        occurrences,
        num_counts,
        first,
        is_early,
        row_factors,
    )


@jit
def _changed(
    x: tl.tensor,
    token: tl.tensor,
    inside: tl.tensor,
    bitmask: tl.tensor,
    slots: tl.tensor,
    changes: tl.tuple,
) -> tl.tensor:
    """The logits of a row's tokens after `logits_tables.change_logits` and its grammar.

    Tokens that the grammar forbids get -inf. changes: see `_row_changes`.
    """
    is_masked, words, biases, num_biases, counts, num_counts, first, is_early, factors = changes
    if slots is not None:
        x += tl.load(biases + first + token, mask=token < num_biases, other=0.0)
        counted = tl.load(counts + first + token, mask=token < num_counts, other=0)
        x = tl.where(is_early & ((counted & 0x20000000) != 0), -1e30, x)
        scale = tl.where(x > 0, tl.load(factors), tl.load(factors + 1))
        x = tl.where((counted & 0x5FFFFFFF) != 0, _product(x, scale), x)
        times = counted & 0x1FFFFFFF
        frequency = _product(tl.load(factors + 3), times.to(tl.float32))
        x -= tl.where(times > 0, tl.load(factors + 2) + frequency, 0.0)
    if is_masked:
        x = _allowed(x, bitmask, words, token, inside)
    return x


@jit
def _allowed(
    x: tl.tensor, bitmask: tl.tensor, words: tl.tensor, token: tl.tensor, inside: tl.tensor
) -> tl.tensor:
    """The logits of the tokens that a bitmask allows, -inf for the others."""
    if bitmask is not None:
        word = tl.load(words + (token >> 5), mask=inside, other=0)
        x = tl.where(((word >> (token & 31)) & 1) != 0, x, float("-inf"))
    return x


@jit
def _product(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """a * b, rounded: the compiler cannot make one operation of it and the sum that follows.

    All kernels and torch so get the same logits.
    """
    return tl.maximum(a * b, -3.4e38)


@jit_without_specializing("rows")
def _find_extremes_kernel(
    logits: tl.tensor,
    counters: tl.tensor,
    extremes: tl.tensor,
    tokens: tl.tensor,
    candidates: tl.tensor,
    bitmask: tl.tensor,
    bitmask_rows: tl.tensor,
    slots: tl.tensor,
    token_counts: tl.tensor,
    bias: tl.tensor,
    factors: tl.tensor,
    min_tokens: tl.tensor,
    rows: tl.tensor,
    row_stride: tl.tensor,
    vocab_size: tl.tensor,
    slice_size: tl.tensor,
    SPLITS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """The largest and the smallest allowed logit of a split, and the first token with the largest.

    The largest is inf when a logit is not finite, and -inf when no token is allowed.
    """
    row = tl.program_id(0)
    split = tl.program_id(1)
    d = tl.arange(0, TILE)
    row_logits = logits + row.to(tl.int64) * row_stride
    changes = _row_changes(
        bitmask,
        bitmask_rows,
        slots,
        token_counts,
        bias,
        factors,
        min_tokens,
        counters,
        row,
        vocab_size,
    )
    first = split * slice_size
    best = tl.full((TILE,), float("-inf"), tl.float32)
    least = tl.full((TILE,), float("inf"), tl.float32)
    where = tl.zeros((TILE,), tl.int32)
    zeros = tl.zeros((TILE,), tl.float32)
    for start in tl.range(first, tl.minimum(first + slice_size, vocab_size), TILE, num_stages=3):
        token = start + d
        inside = token < vocab_size
        x = tl.load(row_logits + token, mask=inside, other=0.0).to(tl.float32)
        zeros += x * 0.0  # NaN once a logit is not finite
        x = tl.where(inside, x, float("-inf"))
        x = _changed(x, token, inside, bitmask, slots, changes)
        where = tl.where(x > best, start, where)
        best = tl.maximum(best, x)
        least = tl.minimum(least, tl.where(x > float("-inf"), x, float("inf")))
    largest = tl.max(best, 0)
    token = tl.min(tl.where(best == largest, where + d, vocab_size), 0)
    not_finite = tl.max((zeros != zeros).to(tl.int32), 0)
    at = row * SPLITS + split
    tl.store(extremes + at, tl.where(not_finite > 0, float("inf"), largest))
    tl.store(extremes + rows * SPLITS + at, tl.min(least, 0))
    tl.store(tokens + at, token)
    if split == 0:
        tl.store(candidates + row.to(tl.int64) * (1 + 2 * CANDIDATES), 0)


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
    cuts = tl.where(way < WAYS - 2, reach * (way * (1 / (WAYS - 2))), reach)
    return tl.where(way < WAYS - 1, cuts, float("inf"))


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
    row: tl.tensor,
    rows: tl.tensor,
    LEVEL: tl.constexpr,
    SPLITS: tl.constexpr,
    WAYS: tl.constexpr,
) -> tl.tensor:
    """The masses or counts of a row up to each cut."""
    base = (LEVEL * rows + row) * (SPLITS * WAYS)
    at = base + tl.arange(0, SPLITS)[:, None] * WAYS + tl.arange(0, WAYS)[None, :]
    sums = tl.load(masses + at)
    if masses.dtype.element_ty == tl.float32:
        # In float64, the order of the additions changes nothing. It differs between the kernels,
        # and one that found another bracket would read what those before it did not write.
        sums = tl.sum(sums.to(tl.float64), 0).to(tl.float32)
    else:
        sums = tl.sum(sums, 0)
    return sums


@jit
def _count_bounds(
    masses: tl.tensor,
    cuts: tl.tensor,
    low_count: tl.tensor,
    low_mass: tl.tensor,
    WAYS: tl.constexpr,
) -> tl.tensor:
    """How many tokens there are at most up to each cut, from the masses up to the cuts.

    A token's mass is at least that of a token at its cut. low_count, low_mass: up to the cut
    before the first.
    """
    way = tl.arange(0, WAYS)
    # The mass of each interval: what lies up to a cut, less what lies up to the one before.
    is_before = way[None, :] < way[:, None]
    before = tl.max(tl.where(is_before, masses[None, :], low_mass), 1)
    tokens = (masses - before) * tl.exp(tl.minimum(cuts, 60.0)) * 1.001 + 1
    sums = tl.sum(tl.where(is_before | (way[None, :] == way[:, None]), tokens[None, :], 0.0), 1)
    return low_count + tl.minimum(sums, 1e9).to(tl.int32)


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
    tl.tensor,
]:
    """Between which distances the bounds of top-k and top-p lie, after one or two levels.

    Returns, for top-k and then for top-p: whether the filter has a bound within reach, the bracket
    (low, high], and the mass up to `low`; the count up to `low` of top-k; the total mass; how many
    tokens are listed at most, more than CANDIDATES if they are too many; and the distance up to
    which all tokens are listed, -1 if only those in the brackets are.
    """
    k = tl.load(top_k + row)
    p = tl.load(top_p + row)
    by_count, sums_mass = _what_to_sum(k, p, vocab_size, CANDIDATES)
    is_short = by_count & (k <= CANDIDATES)
    by_mass = p < 1
    has_counts = by_count
    k_low, k_high = -1.0, float("inf")
    k_low_count, k_high_count = 0, 0x7FFFFFFF
    k_low_mass, k_high_mass = 0.0, float("inf")
    p_low, p_high = -1.0, float("inf")
    p_low_count, p_high_count = 0, 0x7FFFFFFF
    p_low_mass, p_high_mass = 0.0, float("inf")
    total = 0.0
    inside = CANDIDATES + 1  # not known yet
    listed_to = -1.0
    for level in tl.static_range(LEVELS):
        if inside > CANDIDATES:
            if level == 0:
                cuts = _level_0_cuts(reach, WAYS)
            else:
                cuts = _level_1_cuts(
                    by_count, by_mass & sums_mass, k_low, k_high, p_low, p_high, WAYS
                )
            count = tl.zeros((WAYS,), tl.int32)
            mass = tl.zeros((WAYS,), tl.float32)
            if has_counts:
                count = _sums(counts, row, rows, level, SPLITS, WAYS)
            if sums_mass:
                mass = _sums(masses, row, rows, level, SPLITS, WAYS)
                if has_counts == 0:
                    count = _count_bounds(mass, cuts, p_low_count, p_low_mass, WAYS)
            if level == 0:
                total = tl.max(mass, 0)
            k_low, k_high, k_low_count, k_high_count, k_low_mass, k_high_mass = _narrow(
                cuts,
                count,
                mass,
                count < tl.where(by_count, k, -1),
                count >= tl.where(by_count, k, 0x7FFFFFFF),
                k_low,
                k_high,
                k_low_count,
                k_high_count,
                k_low_mass,
                k_high_mass,
            )
            if is_short & (k_high == float("inf")):
                # Fewer than k tokens are within reach: top-k keeps them all.
                k_low = -1.0
                k_high = reach
                k_high_count = k_low_count
                k_low_count = 0
            by_count = by_count & (k_high < float("inf"))
            # The mass that top-p takes a share of is known only as closely as the bound of top-k.
            least = p * tl.where(by_count, k_low_mass, total)
            most = p * tl.where(by_count, k_high_mass, total)
            p_low, p_high, p_low_count, p_high_count, p_low_mass, p_high_mass = _narrow(
                cuts,
                count,
                mass,
                mass < tl.where(sums_mass, least, -1.0),
                mass >= tl.where(sums_mass, most, float("inf")),
                p_low,
                p_high,
                p_low_count,
                p_high_count,
                p_low_mass,
                p_high_mass,
            )
            # Of a short row, top-p keeps tokens that tie with the largest.
            by_mass = by_mass & tl.where(is_short, k_high > 0, p_high < float("inf"))
            all_count = tl.where(by_mass, p_high_count, 0x7FFFFFFF)
            all_count = tl.where(by_count, k_high_count, all_count)
            if (all_count <= CANDIDATES) & (is_short | (has_counts == 0)):
                inside = all_count
                listed_to = tl.where(is_short, k_high, p_high)
            elif is_short & by_mass:
                inside = CANDIDATES + 1  # top-p needs all tokens that top-k keeps
            else:
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
        listed_to,
    )


@jit
def _what_to_sum(
    k: tl.tensor, p: tl.tensor, vocab_size: tl.tensor, CANDIDATES: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Whether a row's tokens are counted, and whether their masses are summed.

    Where all tokens that top-k keeps are listed, top-p needs no mass but theirs.
    """
    by_count = (k > 0) & (k < vocab_size)
    return by_count, (p < 1) & ((by_count == 0) | (k > CANDIDATES))


@jit_without_specializing("rows")
def _count_kernel(
    logits: tl.tensor,
    temperature: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    counters: tl.tensor,
    extremes: tl.tensor,
    masses: tl.tensor,
    counts: tl.tensor,
    bitmask: tl.tensor,
    bitmask_rows: tl.tensor,
    slots: tl.tensor,
    token_counts: tl.tensor,
    bias: tl.tensor,
    factors: tl.tensor,
    min_tokens: tl.tensor,
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
    """The number or the mass of a split's tokens up to each cut, or both."""
    row = tl.program_id(0)
    split = tl.program_id(1)
    has_counts, sums_mass = _what_to_sum(
        tl.load(top_k + row), tl.load(top_p + row), vocab_size, CANDIDATES
    )
    if (has_counts | sums_mass) & (tl.load(temperature + row) > 0):
        largest, inverse, reach = _row_extremes(extremes, temperature, row, rows, SPLITS)
        needed = tl.abs(largest) < float("inf")
        cuts = _level_0_cuts(reach, WAYS)
        if LEVEL > 0:
            by_count, k_low, k_high, _, by_mass, p_low, p_high, _, _, _, inside, _ = _brackets(
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
            cuts = _level_1_cuts(by_count, by_mass & sums_mass, k_low, k_high, p_low, p_high, WAYS)
        if needed:
            row_logits = logits + row.to(tl.int64) * row_stride
            changes = _row_changes(
                bitmask,
                bitmask_rows,
                slots,
                token_counts,
                bias,
                factors,
                min_tokens,
                counters,
                row,
                vocab_size,
            )
            d = tl.arange(0, THREADS)
            first = split * slice_size
            stop = tl.minimum(first + slice_size, vocab_size)
            at = ((LEVEL * rows + row) * SPLITS + split) * WAYS + tl.arange(0, WAYS)
            # A thread has one token and all cuts in its registers; of a float32, the sum with
            # what a comparison gives is one instruction.
            if has_counts:
                count = tl.zeros((WAYS, THREADS), tl.float32)
                for start in tl.range(first, stop, THREADS * UNROLL):
                    for turn in tl.static_range(UNROLL):
                        token = start + turn * THREADS + d
                        inside_row = token < vocab_size
                        x = tl.load(row_logits + token, mask=inside_row, other=float("-inf"))
                        x = x.to(tl.float32)
                        x = _changed(x, token, inside_row, bitmask, slots, changes)
                        distance = (largest - x) * inverse
                        count += (distance[None, :] <= cuts[:, None]).to(tl.float32)
                tl.store(counts + at, tl.sum(count, 1).to(tl.int32))
            if sums_mass:
                mass = tl.zeros((WAYS, THREADS), tl.float32)
                for start in tl.range(first, stop, THREADS * UNROLL):
                    for turn in tl.static_range(UNROLL):
                        token = start + turn * THREADS + d
                        inside_row = token < vocab_size
                        x = tl.load(row_logits + token, mask=inside_row, other=float("-inf"))
                        x = x.to(tl.float32)
                        x = _changed(x, token, inside_row, bitmask, slots, changes)
                        distance = (largest - x) * inverse
                        share = tl.exp(-distance)
                        kept = distance[None, :] <= cuts[:, None]
                        mass += kept.to(tl.float32) * share[None, :]
                tl.store(masses + at, tl.sum(mass, 1))


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
def _random_bits(token: tl.tensor, key: tl.tensor) -> tl.tensor:
    """31 random bits for each token, as in `sampling._log_exponential`."""
    bits = token.to(tl.uint32) + key.to(tl.uint32)
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    bits ^= (bits >> 16) ^ (key >> 32).to(tl.uint32)
    return (bits & 0x7FFFFFFF).to(tl.int32)


@jit
def _arrival(bits: tl.tensor, distance: tl.tensor) -> tl.tensor:
    """When tokens arrive: a draw of Exponential(1) over the token's probability."""
    u = (bits.to(tl.float32) + 0.5) * 2.0**-31
    return _exponential(tl.minimum(u, 1 - 2.0**-24)) * tl.exp(distance)


@jit
def _log2_before(bits: tl.tensor, distance: tl.tensor) -> tl.tensor:
    """A bound of arrivals that needs no logarithm: 158 + log2(arrival) is not smaller.

    (But for rounding.) A draw is at least bits / 2^31. The bits of a float, as an integer, are 2^23
    times its exponent plus its mantissa, and log2(1 + mantissa) is at least the mantissa. 158 is
    31 and the exponent's bias, 127: so the bound is not negative.
    """
    float_bits = bits.to(tl.float32).to(tl.int32, bitcast=True)
    return float_bits.to(tl.float32) * 2.0**-23 + distance * 1.4426950408889634


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
    bitmask: tl.tensor,
    bitmask_rows: tl.tensor,
    slots: tl.tensor,
    token_counts: tl.tensor,
    bias: tl.tensor,
    factors: tl.tensor,
    min_tokens: tl.tensor,
    rows: tl.tensor,
    row_stride: tl.tensor,
    vocab_size: tl.tensor,
    slice_size: tl.tensor,
    SPLITS: tl.constexpr,
    WAYS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """List a split's tokens that may be kept; of too many, draw among those kept for certain."""
    row = tl.program_id(0)
    split = tl.program_id(1)
    if tl.load(temperature + row) > 0:
        largest, inverse, reach = _row_extremes(extremes, temperature, row, rows, SPLITS)
        k = tl.load(top_k + row)
        needed = tl.abs(largest) < float("inf")
        by_count = (k > 0) & (k < vocab_size)
        by_mass = tl.load(top_p + row) < 1
        k_low = reach * 0
        k_high = k_low
        p_low = k_low
        p_high = k_low
        listed_to = k_low - 1
        if (by_count | by_mass) & needed:
            by_count, k_low, k_high, _, by_mass, p_low, p_high, _, _, _, inside, listed_to = (
                _brackets(
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
            )
            needed = inside <= CANDIDATES
        is_filtered = by_count | by_mass
        certain = _min_p_bound(min_p, row)
        row_logits = logits + row.to(tl.int64) * row_stride
        changes = _row_changes(
            bitmask,
            bitmask_rows,
            slots,
            token_counts,
            bias,
            factors,
            min_tokens,
            counters,
            row,
            vocab_size,
        )
        row_candidates = candidates + row.to(tl.int64) * (1 + 2 * CANDIDATES)
        d = tl.arange(0, TILE)
        first = split * slice_size
        stop = tl.minimum(first + slice_size, vocab_size)
        if needed & (listed_to >= 0):
            for start in tl.range(first, stop, TILE, num_stages=3):
                token = start + d
                inside = token < vocab_size
                x = tl.load(row_logits + token, mask=inside, other=float("-inf")).to(tl.float32)
                x = _changed(x, token, inside, bitmask, slots, changes)
                distance = (largest - x) * inverse
                _list(row_candidates, token, distance, distance <= listed_to, CANDIDATES)
        elif needed:
            certain = tl.minimum(certain, tl.where(by_count, k_low, float("inf")))
            certain = tl.minimum(certain, tl.where(by_mass, p_low, float("inf")))
            k_high = tl.where(by_count, k_high, -1.0)
            p_high = tl.where(by_mass, p_high, -1.0)
            key = _key(seeds, counters, row)
            earliest = reach * 0 + float("inf")
            latest = earliest  # above 158 + log2(earliest), by more than rounding
            winner = split * 0 + vocab_size
            for start in tl.range(first, stop, TILE, num_stages=3):
                token = start + d
                inside = token < vocab_size
                x = tl.load(row_logits + token, mask=inside, other=float("-inf")).to(tl.float32)
                x = _changed(x, token, inside, bitmask, slots, changes)
                distance = (largest - x) * inverse
                bits = _random_bits(token, key)
                before = tl.where(distance <= certain, _log2_before(bits, distance), float("inf"))
                # Floats that are not negative have the order of their bits.
                soonest = tl.min(before.to(tl.int32, bitcast=True), 0).to(tl.float32, bitcast=True)
                # Few tiles have a token that may arrive before all others.
                if soonest < latest:
                    arrival = _arrival(bits, distance)
                    arrival = tl.where(distance <= certain, arrival, float("inf"))
                    tile_earliest = tl.min(arrival, 0)
                    tile_winner = tl.min(tl.where(arrival == tile_earliest, token, vocab_size), 0)
                    winner = tl.where(tile_earliest < earliest, tile_winner, winner)
                    earliest = tl.minimum(earliest, tile_earliest)
                    latest = tl.log2(earliest) + (158 + 1e-3)
                if is_filtered:
                    listed = (distance > k_low) & (distance <= k_high)
                    listed = listed | ((distance > p_low) & (distance <= p_high))
                    _list(row_candidates, token, distance, listed, CANDIDATES)
            at = row * SPLITS + split
            tl.store(extremes + 2 * rows * SPLITS + at, earliest)
            tl.store(tokens + rows * SPLITS + at, winner)


@jit
def _list(
    row_candidates: tl.tensor,
    token: tl.tensor,
    distance: tl.tensor,
    listed: tl.tensor,
    CANDIDATES: tl.constexpr,
) -> None:
    """Add tokens to the list of a row. Those that do not fit are only counted."""
    place = tl.atomic_add(row_candidates + token * 0, 1, mask=listed, sem="relaxed")
    listed = listed & (place < CANDIDATES)
    at = row_candidates + 1 + place
    tl.store(at, token, mask=listed)
    tl.store(at + CANDIDATES, distance.to(tl.int32, bitcast=True), mask=listed)


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
    bitmask: tl.tensor,
    bitmask_rows: tl.tensor,
    slots: tl.tensor,
    token_counts: tl.tensor,
    bias: tl.tensor,
    factors: tl.tensor,
    min_tokens: tl.tensor,
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
    has_token = tl.abs(largest) < float("inf")
    if (tl.load(temperature + row) > 0) & has_token:
        largest, inverse, reach = _row_extremes(extremes, temperature, row, rows, SPLITS)
        k = tl.load(top_k + row)
        p = tl.load(top_p + row)
        bound = _min_p_bound(min_p, row)
        d = tl.arange(0, TILE)
        row_logits = logits + row.to(tl.int64) * row_stride
        changes = _row_changes(
            bitmask,
            bitmask_rows,
            slots,
            token_counts,
            bias,
            factors,
            min_tokens,
            counters,
            row,
            vocab_size,
        )
        row_candidates = candidates + row.to(tl.int64) * (1 + 2 * CANDIDATES)
        is_listed = reach >= 0
        is_drawn = reach >= 0
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
                listed_to,
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
            is_listed = is_listed & (num_listed <= CANDIDATES)
            is_drawn = is_listed & (listed_to < 0)
            num_tokens = tl.where(is_listed, num_listed, vocab_size)
            if is_drawn == 0:  # all tokens are found among these
                k_low = -1.0
                k_count = 0
                k_mass = 0.0
                p_low = -1.0
                p_mass = 0.0
            if by_count:
                wanted = (k - k_count).to(tl.int64)
                k_high, mass = _find_bound(
                    row_logits,
                    bitmask,
                    slots,
                    changes,
                    row_candidates,
                    is_listed,
                    num_tokens,
                    vocab_size,
                    largest,
                    inverse,
                    wanted,
                    k_low,
                    k_high,
                    False,
                    CANDIDATES,
                    TILE,
                )
                total = k_mass + mass
                bound = tl.minimum(bound, k_high)
                p_high = tl.minimum(p_high, k_high)
            if by_mass:
                # As float32, p may be the smallest number above 0: at least one token stays.
                wanted = p.to(tl.float64) * total - p_mass
                p_high, mass = _find_bound(
                    row_logits,
                    bitmask,
                    slots,
                    changes,
                    row_candidates,
                    is_listed,
                    num_tokens,
                    vocab_size,
                    largest,
                    inverse,
                    _fixed(wanted),
                    p_low,
                    p_high,
                    True,
                    CANDIDATES,
                    TILE,
                )
                bound = tl.minimum(bound, p_high)
        key = _key(seeds, counters, row)
        best = tl.full((TILE,), float("inf"), tl.float32)
        where = tl.zeros((TILE,), tl.int32) + vocab_size
        for start in range(0, num_tokens, TILE):
            place = start + d
            inside_row = place < num_tokens
            distance = _distances(
                row_logits,
                bitmask,
                slots,
                changes,
                row_candidates,
                is_listed,
                place,
                num_tokens,
                largest,
                inverse,
                CANDIDATES,
            )
            if is_listed:
                place = tl.load(row_candidates + 1 + place, mask=inside_row, other=0)
            arrival = _arrival(_random_bits(place, key), distance)
            arrival = tl.where(inside_row & (distance <= bound), arrival, float("inf"))
            better = (arrival < best) | ((arrival == best) & (place < where))
            best = tl.where(better, arrival, best)
            where = tl.where(better, place, where)
        earliest = tl.min(best, 0)
        token = tl.min(tl.where(best == earliest, where, vocab_size), 0)
        if is_drawn:
            draws = tl.load(extremes + 2 * rows * SPLITS + at)
            first = tl.min(draws, 0)
            drawn = tl.load(tokens + rows * SPLITS + at)
            drawn = tl.min(tl.where(draws == first, drawn, vocab_size), 0)
            token = tl.where(
                (first < earliest) | ((first == earliest) & (drawn < token)), drawn, token
            )
    tl.store(ids + row, tl.where(has_token, token, -1).to(tl.int64))


@jit
def _distances(
    row_logits: tl.tensor,
    bitmask: tl.tensor,
    slots: tl.tensor,
    changes: tl.tuple,
    row_candidates: tl.tensor,
    is_listed: tl.tensor,
    place: tl.tensor,
    num_tokens: tl.tensor,
    largest: tl.tensor,
    inverse: tl.tensor,
    CANDIDATES: tl.constexpr,
) -> tl.tensor:
    """The distances of tokens: of the list, or else at these places of the vocabulary.

    They are infinite after the end.
    """
    inside = place < num_tokens
    if is_listed:
        bits = tl.load(row_candidates + 1 + CANDIDATES + place, mask=inside, other=0x7F800000)
        distance = bits.to(tl.float32, bitcast=True)
    else:
        x = tl.load(row_logits + place, mask=inside, other=float("-inf")).to(tl.float32)
        x = _changed(x, place, inside, bitmask, slots, changes)
        distance = (largest - x) * inverse
    return distance


@jit
def _fixed(mass: tl.tensor) -> tl.tensor:
    """A mass as an integer, so that sums do not depend on their order. A token has up to 1."""
    return (mass * 1099511627776.0).to(tl.int64)


@jit
def _find_bound(
    row_logits: tl.tensor,
    bitmask: tl.tensor,
    slots: tl.tensor,
    changes: tl.tuple,
    row_candidates: tl.tensor,
    is_listed: tl.tensor,
    num_tokens: tl.tensor,
    vocab_size: tl.tensor,
    largest: tl.tensor,
    inverse: tl.tensor,
    wanted: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    MASS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The smallest distance up to which `wanted` tokens, or so much mass, are in (low, high].

    Returns it and the mass up to it. The search is over the bit patterns of floats that are not
    negative, which sort like the floats: a turn asks for three of them and keeps a quarter. It
    ends at `high` if too few tokens are found before.
    """
    d = tl.arange(0, TILE)
    below = tl.where(low < 0, -1, low.to(tl.int32, bitcast=True))  # -1: distance 0 may do
    above = high.to(tl.int32, bitcast=True)
    # What is not in (low, high] is never counted.
    first = _distances(
        row_logits,
        bitmask,
        slots,
        changes,
        row_candidates,
        is_listed,
        d,
        num_tokens,
        largest,
        inverse,
        CANDIDATES,
    )
    first = tl.where((first > low) & (first <= high), first, float("inf"))
    first_share = _fixed(tl.exp(-first)) if MASS else (first < float("inf")).to(tl.int32)
    while above - below > 1:
        width = above - below
        step = tl.maximum(width // 4, 1)
        middle_1 = below + step
        middle_2 = below + width // 2
        middle_3 = above - step
        cut_1 = middle_1.to(tl.float32, bitcast=True)
        cut_2 = middle_2.to(tl.float32, bitcast=True)
        cut_3 = middle_3.to(tl.float32, bitcast=True)
        found_1 = tl.sum(tl.where(first <= cut_1, first_share, 0), 0).to(tl.int64)
        found_2 = tl.sum(tl.where(first <= cut_2, first_share, 0), 0).to(tl.int64)
        found_3 = tl.sum(tl.where(first <= cut_3, first_share, 0), 0).to(tl.int64)
        for start in range(TILE, num_tokens, TILE):
            distance = _distances(
                row_logits,
                bitmask,
                slots,
                changes,
                row_candidates,
                is_listed,
                start + d,
                num_tokens,
                largest,
                inverse,
                CANDIDATES,
            )
            share = _fixed(tl.exp(-distance)) if MASS else (distance < float("inf")).to(tl.int32)
            share = tl.where(distance > low, share, 0)
            found_1 += tl.sum(tl.where(distance <= cut_1, share, 0), 0)
            found_2 += tl.sum(tl.where(distance <= cut_2, share, 0), 0)
            found_3 += tl.sum(tl.where(distance <= cut_3, share, 0), 0)
        top = tl.where(found_3 >= wanted, middle_3, above)
        top = tl.where(found_2 >= wanted, middle_2, top)
        above = tl.where(found_1 >= wanted, middle_1, top)
        bottom = tl.where(found_1 < wanted, middle_1, below)
        bottom = tl.where(found_2 < wanted, middle_2, bottom)
        below = tl.where(found_3 < wanted, middle_3, bottom)
    bound = above.to(tl.float32, bitcast=True)
    mass = tl.sum(tl.where(first <= bound, _fixed(tl.exp(-first)), 0), 0)
    for start in range(TILE, num_tokens, TILE):
        distance = _distances(
            row_logits,
            bitmask,
            slots,
            changes,
            row_candidates,
            is_listed,
            start + d,
            num_tokens,
            largest,
            inverse,
            CANDIDATES,
        )
        kept = (distance > low) & (distance <= bound)
        mass += tl.sum(tl.where(kept, _fixed(tl.exp(-distance)), 0), 0)
    return bound, (mass.to(tl.float64) * 9.094947017729282e-13).to(tl.float32)
