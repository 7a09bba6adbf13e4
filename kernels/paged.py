"""Attention over a paged KV cache in Triton: pages are read where they lie.

Legend: T tokens of this step, N query heads, K key-value heads, D head_dim. A program's tile: consecutive queries of a
sequence, times the N / K heads that share a key-value head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from llmkit.kernels.jit import jit, runs_triton, tl
from llmkit.kernels.rounding import FP8
from llmkit.kernels.tuning import Tunable

if TYPE_CHECKING:
    from llmkit.kernels.attention import KvCache
    from llmkit.kernels.paging import Group

MOST_DIM, MOST_SPLITS, LOG2_E = 256, 64, 1.4426950408889634
# Tokens of a tile of keys, warps, stages, programs wanted for each multiprocessor.
TILE = Tunable("attention", ((16, 32, 64, 128), (2, 4, 8), (1, 2, 3, 4, 5), (1, 2, 4, 8)))


def attends(q: torch.Tensor, cache: KvCache) -> bool:
    """Whether `attention` takes these queries and this cache. Processors before sm_89 know no FP8."""
    fits = runs_triton(q) and q.stride()[1:] == (q.shape[2], 1) and q.shape[2] <= MOST_DIM
    return fits and (cache.kv.dtype != FP8 or torch.cuda.get_device_capability(q.device) >= (8, 9))


def attention(q: torch.Tensor, cache: KvCache, group: Group, scale: float, softcap: float | None) -> torch.Tensor:
    """See `paged_attention`. q: [T, N, D], whose last two dimensions are contiguous.

    Of a step with one query a sequence, the launch depends on shapes alone: a CUDA graph of it may be replayed after q,
    the cache, and table and contexts of `group.on_device` were overwritten (`group.refresh`).
    """
    (length, heads, dim), (both, _, block, _), exact = q.shape, cache.kv.shape, q.element_size() == 4
    share, padded = 2 * heads // both, max(16, 1 << (dim - 1).bit_length())
    longest, rows = int(group.batch.query_lens.max()), max(16, 1 << (share - 1).bit_length())
    tokens = min(128, 16384 // padded) // q.element_size()
    if longest * share > rows and not exact:  # float32 has no tensor cores to fill
        wide = longest * share > 64 and padded <= 128 and torch.cuda.get_device_capability(q.device) >= (9, 0)
        rows = max(rows, 128 if wide else 64)
    safe = (tokens, 8 if rows >= 64 else 4, 3 if exact or (padded > 128 and rows > 16) else 5, 4)
    tokens, warps, stages, programs = TILE.config((dim, share, rows, q.dtype, cache.kv.dtype), safe, q.device)
    table, contexts, starts, tiles = group.on_device(rows // share)
    count, window = len(contexts if tiles is None else tiles), group.window or 1 << 30
    splits = _splits(q.device, count * both // 2, min(table.shape[1] * block, window + rows) // (2 * tokens), programs)
    scales = cache.stored if cache.scales is None else cache.scales
    out = q.new_empty(q.shape)
    parts = q.new_empty(length, heads, splits, dim, dtype=torch.float32) if splits > 1 else out
    sums = parts.new_empty(parts.shape[:3]) if splits > 1 else None
    with torch.cuda.device_of(q):
        _attend[count, both // 2, splits](
            q, cache.kv, table, contexts, parts, q.stride(0), cache.kv.stride(0), table.stride(0),
            scale * (2 / softcap if softcap else 1) * LOG2_E, starts, tiles, scales, sums, share, block, dim, padded,
            rows, tokens, window, (softcap or 0.0) * LOG2_E, int(cache.scales is not None),
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
        if sums is not None:
            _combine[length * heads,](parts, sums, out, dim, padded, splits)
    return out


def _splits(device: torch.device, programs: int, most: int, per: int = 4) -> int:
    """Among how many programs a context is divided, a power of two: up to `per` of them for each multiprocessor."""
    wanted = per * torch.cuda.get_device_properties(device).multi_processor_count // programs
    return 1 << max(1, min(wanted, most, MOST_SPLITS)).bit_length() - 1


@jit
def _attend(
    q: tl.tensor, kv: tl.tensor, table: tl.tensor, contexts: tl.tensor, out: tl.tensor, q_token: tl.tensor,
    head_size: tl.tensor, width: tl.tensor, scale: tl.tensor, starts: tl.tensor, tiles: tl.tensor, scales: tl.tensor,
    sums: tl.tensor, SHARE: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, OWN_SCALES: tl.constexpr,
) -> None:  # fmt: skip
    """A tile, and of its context one of as many splits as the grid has: online softmax in powers of two.

    out: [T, N, D], or with `sums` float32 [T, N, splits, D], and sums the logarithms of splits' sums of exponentials,
    -inf where nothing was seen. What no row of the tile sees is not read: neither freed blocks nor others' NaN.
    """
    head, split, splits = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    sequence, begin, first, new = tl.program_id(0), tl.program_id(0), 0, 1
    if tiles is not None:
        sequence, first = tl.load(tiles + 2 * begin), tl.load(tiles + 2 * begin + 1)
        begin = tl.load(starts + sequence)
        new = tl.load(starts + sequence + 1) - begin
    row, dim = tl.arange(0, ROWS), tl.arange(0, PADDED)
    query, wide = first + row // SHARE, (dim < DIM)[None, :]
    inside = (row < ROWS // SHARE * SHARE) & (query < new)
    before = tl.load(contexts + sequence) - new
    place, high = before + query, before + tl.minimum(first + ROWS // SHARE, new)
    low = tl.maximum(0, before + first - WINDOW + 1)
    start = low // TOKENS * TOKENS
    chunk = tl.cdiv(high - start, splits * TOKENS) * TOKENS
    start += split * chunk
    stop = tl.minimum(high, start + chunk)
    plain: tl.constexpr = WINDOW >= 1 << 30 and ROWS >= 128 and scales is None  # what all rows see needs no mask
    middle = tl.maximum(start, tl.minimum(stop, before + first + 1) // TOKENS * TOKENS) if plain else start
    at = (begin + query).to(tl.int64)
    member, values_head = head * SHARE + row % SHARE, head + tl.num_programs(1)
    own = inside[:, None] & wide
    rows = tl.load(q + (at * q_token + member * DIM)[:, None] + dim[None, :], mask=own, other=0.0)
    keys, values = kv + head.to(tl.int64) * head_size, kv + values_head.to(tl.int64) * head_size
    size = head_size // DIM if OWN_SCALES else 1  # scales of a head
    most, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    answer = tl.zeros((ROWS, PADDED), tl.float32)
    for masked in tl.static_range(1 - plain, 2):
        for token in tl.range(middle if masked else start, stop if masked else middle, TOKENS):
            tokens = token + tl.arange(0, TOKENS)
            known = (tokens >= low) & (tokens < stop)
            page = tl.load(table + sequence * width + tokens // BLOCK, mask=known, other=0)
            slot = page.to(tl.int64) * BLOCK + tokens % BLOCK
            where, there = slot[:, None] * DIM + dim[None, :], known[:, None] & wide
            k = tl.load(keys + where, mask=there, other=0.0).to(rows.dtype)
            score = tl.dot(rows, tl.trans(k), input_precision="ieee") * scale
            if scales is not None:
                score *= tl.load(scales + head * size + slot * OWN_SCALES, mask=known, other=0.0)[None, :]
            if CAP > 0:
                score = CAP - 2 * CAP / (tl.exp2(score) + 1)  # CAP tanh
            if masked:
                seen = (tokens[None, :] <= place[:, None]) & (tokens[None, :] > place[:, None] - WINDOW)
                score = tl.where(seen & known[None, :], score, float("-inf"))
            before_most, most = most, tl.maximum(most, tl.max(score, 1))
            base = tl.where(most == float("-inf"), 0.0, most)  # for rows that have seen nothing yet
            keep = tl.exp2(before_most - base)
            weight = tl.exp2(score - base[:, None])
            total = total * keep + tl.sum(weight, 1)
            if scales is not None:  # times 2^8, or a product with a small scale may be less than float16 holds
                factor = tl.load(scales + values_head * size + slot * OWN_SCALES, mask=known, other=0.0) * 256
                weight *= factor[None, :]
            v = tl.load(values + where, mask=there, other=0.0).to(rows.dtype)
            answer = tl.dot(weight.to(v.dtype), v, answer * keep[:, None], input_precision="ieee")
    answer /= tl.where(total > 0, total, 1.0)[:, None] * (1 if scales is None else 256)
    at = at * (tl.num_programs(1) * SHARE) + member
    if sums is not None:
        at = at * splits + split
        tl.store(sums + at, most + tl.log2(total), mask=inside)
        inside &= total > 0
    tl.store(out + at[:, None] * DIM + dim[None, :], answer.to(out.dtype.element_ty), mask=inside[:, None] & wide)


@jit
def _combine(
    parts: tl.tensor, sums: tl.tensor, out: tl.tensor, DIM: tl.constexpr, PADDED: tl.constexpr, SPLITS: tl.constexpr
) -> None:
    """The answer for one query and head: those of the splits that saw something, by their shares of the softmax."""
    split, dim = tl.program_id(0).to(tl.int64) * SPLITS + tl.arange(0, SPLITS), tl.arange(0, PADDED)
    size = tl.load(sums + split)
    most = tl.max(size, 0)
    share = tl.exp2(size - tl.where(most == float("-inf"), 0.0, most))
    there = (share > 0)[:, None] & (dim < DIM)[None, :]
    part = tl.load(parts + split[:, None] * DIM + dim[None, :], mask=there, other=0.0)
    total = tl.sum(share, 0)
    answer = tl.sum(part * share[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + tl.program_id(0).to(tl.int64) * DIM + dim, answer.to(out.dtype.element_ty), mask=dim < DIM)
