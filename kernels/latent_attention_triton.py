"""Multi-head latent attention in Triton, in the absorbed form: all heads attend to latents.

Legend: T tokens of this step, N heads, L the rank of the latents, R the rotated part of queries and
keys. A program computes a tile: consecutive queries of a sequence, times some of the heads. All
programs of a sequence read the same latents, so a program takes many heads.
"""

from __future__ import annotations

import torch

from llmkit.kernels import paged_attention
from llmkit.kernels.attention_metadata import AttentionMetadata, QueryTiles
from llmkit.kernels.latent_cache import LatentCache
from llmkit.kernels.paged_attention import (
    LOG2_E,
    combine_units_kernel,
    schedule,
)
from llmkit.kernels.triton_support import jit, runs_triton, tl

MAX_LATENT_DIM = 576
NO_WINDOW = 1 << 30


def supports(q: torch.Tensor, cache: LatentCache, rank: int) -> bool:
    """Whether `attention` takes these queries [T, N, L + R] and this cache."""
    return runs_triton(q) and q.is_contiguous() and rank <= 512 and supports_cache(cache)


def supports_cache(cache: LatentCache) -> bool:
    """Whether `attention` takes this cache on its GPU."""
    return cache.kv.is_cuda and tl is not None and cache.kv.shape[3] <= MAX_LATENT_DIM


def attention(
    q: torch.Tensor, cache: LatentCache, metadata: AttentionMetadata, scale: float, rank: int
) -> torch.Tensor:
    """See `latent_attention.latent_attention`. q: contiguous [T, N, L + R]. Returns [T, N, L].

    As with `paged_attention.attention`, a CUDA graph of a step may be replayed after the tensors of
    the metadata were overwritten.
    """
    num_tokens, num_heads, _ = q.shape
    most = max_rows(rank, q.dtype)
    group = max(size for size in range(1, most + 1) if num_heads % size == 0)
    max_query_len = metadata.batch.max_query_len
    if not metadata.batch.is_fixed and max_query_len > 1:
        max_query_len = paged_attention.MANY_QUERIES  # few kernels, as there
    wanted = 1 << (max_query_len * group - 1).bit_length()
    rows = max(16, min(most, wanted))
    out = q.new_empty(num_tokens, num_heads, rank)
    with torch.cuda.device_of(q):
        for tiles in metadata.query_tiles(rows // group, rows // group):
            _attend(q, cache, metadata, tiles, rows, group, scale, out)
    return out


def max_rows(rank: int, dtype: torch.dtype) -> int:
    """The most rows of a tile whose sums fit into a program's registers. A row is a head's query.

    Tensor cores do not compute in float32.
    """
    if dtype == torch.float32:
        return 16
    return 64 if rank <= 256 else 32


def launch_sizes(rows: int, rank: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Tokens of a tile, warps and stages."""
    if dtype == torch.float32:
        # Triton 3.6 spills registers where a second stage is loaded ahead.
        return 16, 4, 1 if rank > 256 else 2
    is_large = rank > 256 or rows >= 64
    return 32, 8 if is_large else 4, 2


def _attend(
    q: torch.Tensor,
    cache: LatentCache,
    metadata: AttentionMetadata,
    tiles: QueryTiles,
    rows: int,
    group: int,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Compute the queries of these tiles into `out`."""
    _, num_heads, latent_dim = q.shape
    rank = out.shape[2]
    num_groups = num_heads // group
    tile_tokens, warps, stages = launch_sizes(rows, rank, q.dtype)
    programs = paged_attention.num_programs(q.device, num_groups, 1)
    if tiles.max_tokens <= paged_attention.MIN_UNIT_TILES * tile_tokens or (
        tiles.total_tokens is not None and tiles.max_tokens * programs <= tiles.total_tokens
    ):
        programs = 0  # no tile is longer than a program's share: nothing is split
    key = ("latent", id(tiles.tiles), tiles.tile_queries, tile_tokens, programs)
    units, parts = metadata.schedule(
        key, lambda: schedule(metadata, tiles, NO_WINDOW, tile_tokens, programs)
    )
    tensors = metadata.device_tensors()
    max_query_len = metadata.batch.max_query_len
    rows_used = paged_attention.queries_used(tiles.tile_queries, max_query_len) * group
    unit_out = out
    unit_lse = None
    if programs:
        shape = (len(units), num_groups, rows_used, rank)
        unit_out = q.new_empty(shape, dtype=torch.float32)
        unit_lse = unit_out.new_empty(shape[:3])
    padded_rank = _padded(rank)
    _latent_attention_kernel[len(units), num_groups](
        q,
        cache.kv,
        tensors.block_table,
        tensors.seq_lens,
        tensors.query_start_loc,
        units,
        out,
        unit_out,
        unit_lse,
        tensors.block_table.stride(0),
        scale * LOG2_E,
        group,
        cache.kv.shape[2],
        latent_dim,
        rank,
        padded_rank,
        _padded(latent_dim - rank),
        rows,
        rows_used,
        tile_tokens,
        num_warps=warps,
        num_stages=stages,
    )
    if unit_lse is not None:
        combine_units_kernel[tiles.num_tiles, num_groups * rows_used](
            unit_out,
            unit_lse,
            parts,
            tiles.tiles,
            tensors.query_start_loc,
            out,
            group,
            rank,
            padded_rank,
            rows_used,
            max(1, 2048 // padded_rank),
            num_warps=4,
        )


def _padded(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


@jit
def _latent_attention_kernel(
    q: tl.tensor,
    latents: tl.tensor,
    block_table: tl.tensor,
    seq_lens: tl.tensor,
    query_start_loc: tl.tensor,
    units: tl.tensor,
    out: tl.tensor,
    unit_out: tl.tensor,
    unit_lse: tl.tensor,
    table_stride: tl.tensor,
    scale: tl.tensor,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LATENT_DIM: tl.constexpr,
    RANK: tl.constexpr,
    PADDED_RANK: tl.constexpr,
    PADDED_ROPE: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_USED: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """A program computes one unit: a tile of queries and a range of tokens.

    See `_paged_attention_kernel` for units and outputs; groups of heads have the place of key-value
    heads. A tile of latents is read once, as keys and as values.
    """
    unit = tl.program_id(0)
    head_group = tl.program_id(1)
    start = tl.load(units + 4 * unit + 2)
    stop = tl.load(units + 4 * unit + 3)
    if stop <= start:
        return
    sequence = tl.load(units + 4 * unit)
    first_query = tl.load(units + 4 * unit + 1)
    first_token = tl.load(query_start_loc + sequence)
    query_len = tl.load(query_start_loc + sequence + 1) - first_token
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, PADDED_RANK)
    rope_dim = tl.arange(0, PADDED_ROPE)
    query = first_query + row // GROUP
    valid_row = (row < ROWS_USED) & (query < query_len)
    valid_dim = (dim < RANK)[None, :]
    valid_rope = (rope_dim < LATENT_DIM - RANK)[None, :]
    num_cached = tl.load(seq_lens + sequence) - query_len
    position = num_cached + query
    high = num_cached + tl.minimum(first_query + ROWS_USED // GROUP, query_len)
    num_heads = tl.num_programs(1) * GROUP
    query_head = head_group * GROUP + row % GROUP
    token_row = (first_token + query).to(tl.int64) * num_heads + query_head
    q_at = q + token_row[:, None] * LATENT_DIM
    queries = tl.load(q_at + dim[None, :], mask=valid_row[:, None] & valid_dim, other=0.0)
    rotated = tl.load(
        q_at + RANK + rope_dim[None, :], mask=valid_row[:, None] & valid_rope, other=0.0
    )
    max_score = tl.full((ROWS,), float("-inf"), tl.float32)
    exp_sum = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, PADDED_RANK), tl.float32)
    offset = tl.arange(0, TOKENS)
    table = block_table + sequence * table_stride
    block = tl.load(table + (start + offset) // BLOCK_SIZE, mask=start + offset < stop, other=0)
    for token in tl.range(start, stop, TOKENS):
        tokens = token + offset
        in_unit = tokens < stop
        slot = block.to(tl.int64) * BLOCK_SIZE + tokens % BLOCK_SIZE
        # The blocks of a tile are looked up one tile ahead.
        block = tl.load(
            table + (tokens + TOKENS) // BLOCK_SIZE, mask=tokens + TOKENS < stop, other=0
        )
        at = latents + slot[:, None] * LATENT_DIM
        tile = tl.load(at + dim[None, :], mask=in_unit[:, None] & valid_dim, other=0.0)
        keys = tl.load(at + RANK + rope_dim[None, :], mask=in_unit[:, None] & valid_rope, other=0.0)
        score = tl.dot(queries, tl.trans(tile), input_precision="ieee")
        score = tl.dot(rotated, tl.trans(keys), score, input_precision="ieee") * scale
        seen = (tokens[None, :] <= position[:, None]) & in_unit[None, :]
        score = tl.where(seen, score, float("-inf"))
        previous_max = max_score
        max_score = tl.maximum(max_score, tl.max(score, 1))
        # The maximum of a row without any token so far is -inf, and -inf - -inf would be NaN.
        base = tl.where(max_score == float("-inf"), 0.0, max_score)
        rescale = tl.exp2(previous_max - base)
        weight = tl.exp2(score - base[:, None])
        exp_sum = exp_sum * rescale + tl.sum(weight, 1)
        acc = tl.dot(weight.to(tile.dtype), tile, acc * rescale[:, None], input_precision="ieee")
    acc *= (1.0 / tl.where(exp_sum > 0, exp_sum, 1.0))[:, None]
    is_split = (start > 0) | (stop < high)
    if unit_lse is not None and is_split:
        out_row = (unit * tl.num_programs(1) + head_group).to(tl.int64) * ROWS_USED + row
        tl.store(unit_lse + out_row, max_score + tl.log2(exp_sum), mask=valid_row)
        valid_row &= exp_sum > 0
        tl.store(
            unit_out + out_row[:, None] * RANK + dim[None, :],
            acc,
            mask=valid_row[:, None] & valid_dim,
        )
    else:
        tl.store(
            out + token_row[:, None] * RANK + dim[None, :],
            acc.to(out.dtype.element_ty),
            mask=valid_row[:, None] & valid_dim,
        )
