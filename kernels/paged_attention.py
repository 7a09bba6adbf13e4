"""Attention over a paged KV cache in Triton. Blocks are not copied.

Legend: T tokens of this step, N query heads, K key-value heads, D head_dim. A program computes a
tile: consecutive queries of a sequence, times the N / K heads that share a key-value head.
"""

from __future__ import annotations

import torch

from llmkit.kernels.activation_quant import FP8
from llmkit.kernels.attention_metadata import AttentionMetadata
from llmkit.kernels.kv_cache import KVCache
from llmkit.kernels.triton_support import jit, runs_triton, tl
from llmkit.kernels.tuned_configs import Tunable

MAX_HEAD_DIM = 512
MAX_SPLITS = 64
LOG2_E = 1.4426950408889634
# The choices for: tokens of a tile of keys, warps, stages, and programs per multiprocessor.
TILE = Tunable("attention", ((16, 32, 64, 128), (2, 4, 8), (1, 2, 3, 4, 5), (1, 2, 4, 8)))


def supports(q: torch.Tensor, cache: KVCache) -> bool:
    """Whether `attention` takes these queries [T, N, D] and this cache.

    GPUs before sm_89 have no FP8.
    """
    fits = runs_triton(q) and q.stride()[1:] == (q.shape[2], 1) and q.shape[2] <= MAX_HEAD_DIM
    return fits and (cache.kv.dtype != FP8 or torch.cuda.get_device_capability(q.device) >= (8, 9))


def attention(
    q: torch.Tensor,
    cache: KVCache,
    metadata: AttentionMetadata,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `attention.paged_attention`. q: [T, N, D], whose last two dimensions are contiguous.

    In a step with one query per sequence, the launch depends only on shapes. A CUDA graph of it may
    be replayed after q, the cache and the tensors of `metadata.device_tensors` were overwritten
    (see `metadata.update_block_tables`).
    """
    num_tokens, num_heads, head_dim = q.shape
    both, _, block_size, _ = cache.kv.shape
    num_kv_heads = both // 2
    is_float32 = q.element_size() == 4
    group = num_heads // num_kv_heads
    padded_dim = max(16, 1 << (head_dim - 1).bit_length())
    max_query_len = int(metadata.batch.query_lens.max())

    rows = max(16, 1 << (group - 1).bit_length())
    if max_query_len * group > rows and not is_float32:  # tensor cores do not compute in float32
        is_large = (
            max_query_len * group > 64
            and padded_dim <= 128
            and torch.cuda.get_device_capability(q.device) >= (9, 0)
        )
        # The sums of 64 rows of 512 dimensions do not fit into a program's registers.
        rows = max(rows, 128 if is_large else 64 if padded_dim <= 256 else 32)
    default = (
        max(16, min(128, 16384 // padded_dim) // q.element_size()),
        8 if rows >= 64 or rows * padded_dim >= 1 << 14 else 4,
        3 if is_float32 or (padded_dim > 128 and rows > 16) else 5,
        4,
    )
    tile_tokens, warps, stages, programs = TILE.config(
        (head_dim, group, rows, q.dtype, cache.kv.dtype), default, q.device
    )
    tensors = metadata.device_tensors(rows // group)
    num_tiles = len(tensors.seq_lens if tensors.tiles is None else tensors.tiles)
    window = metadata.window or 1 << 30
    max_tokens_seen = min(tensors.block_table.shape[1] * block_size, window + rows)
    splits = _num_splits(
        q.device, num_tiles * num_kv_heads, max_tokens_seen // (2 * tile_tokens), programs
    )
    scales = cache.static_scales if cache.scales is None else cache.scales
    out = q.new_empty(q.shape)
    split_out = out
    split_lse = None
    if splits > 1:
        split_out = q.new_empty(num_tokens, num_heads, splits, head_dim, dtype=torch.float32)
        split_lse = split_out.new_empty(split_out.shape[:3])
    with torch.cuda.device_of(q):
        compiled = _paged_attention_kernel[num_tiles, num_kv_heads, splits](
            q,
            cache.kv,
            tensors.block_table,
            tensors.seq_lens,
            split_out,
            q.stride(0),
            cache.kv.stride(0),
            tensors.block_table.stride(0),
            scale * (2 / softcap if softcap else 1) * LOG2_E,
            tensors.query_start_loc,
            tensors.tiles,
            scales,
            split_lse,
            sinks,
            group,
            block_size,
            head_dim,
            padded_dim,
            rows,
            tile_tokens,
            window,
            (softcap or 0.0) * LOG2_E,
            int(cache.scales is not None),
            LOG2_E,
            num_warps=warps,
            num_stages=stages,
        )
        TILE.notify_observer(compiled)
        if split_lse is not None:
            _combine_splits_kernel[num_tokens * num_heads,](
                split_out,
                split_lse,
                out,
                head_dim,
                padded_dim,
                splits,
                num_warps=8 if splits * padded_dim > 1 << 14 else 4,
            )
    return out


def _num_splits(device: torch.device, programs: int, max_splits: int, per_core: int = 4) -> int:
    """The number of parts into which contexts are split, a power of two.

    Too few programs would leave multiprocessors idle. Splits raise the number of programs to about
    `per_core` per multiprocessor.
    """
    num_cores = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = per_core * num_cores // programs
    return 1 << max(1, min(wanted, max_splits, MAX_SPLITS)).bit_length() - 1


@jit
def _paged_attention_kernel(
    q: tl.tensor,
    kv: tl.tensor,
    block_table: tl.tensor,
    seq_lens: tl.tensor,
    out: tl.tensor,
    q_stride: tl.tensor,
    head_stride: tl.tensor,
    table_stride: tl.tensor,
    scale: tl.tensor,
    query_start_loc: tl.tensor,
    tiles: tl.tensor,
    scales: tl.tensor,
    split_lse: tl.tensor,
    sinks: tl.tensor,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DYNAMIC_SCALES: tl.constexpr,
    LOG2E: tl.constexpr,
) -> None:
    """A program computes one tile over one split of its context: online softmax in base 2.

    out: [T, N, D]. With `split_lse`, out is float32 [T, N, splits, D], and split_lse, float32
    [T, N, splits], gets the base-2 logarithm of each split's sum of exponentials: -inf where a row
    attends to no token of the split. The sink of a row counts in the first split.
    Tokens that no row of the tile attends to are not read: their blocks may be freed or hold NaN.
    """
    head = tl.program_id(1)
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    sequence = tl.program_id(0)
    first_token = tl.program_id(0)
    first_query = 0
    query_len = 1
    if tiles is not None:
        sequence = tl.load(tiles + 2 * first_token)
        first_query = tl.load(tiles + 2 * first_token + 1)
        first_token = tl.load(query_start_loc + sequence)
        query_len = tl.load(query_start_loc + sequence + 1) - first_token
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, PADDED_DIM)
    query = first_query + row // GROUP
    valid_dim = (dim < HEAD_DIM)[None, :]
    valid_row = (row < ROWS // GROUP * GROUP) & (query < query_len)
    num_cached = tl.load(seq_lens + sequence) - query_len
    position = num_cached + query
    # At least one row attends to the tokens [low, high). This split computes [start, stop) of them.
    high = num_cached + tl.minimum(first_query + ROWS // GROUP, query_len)
    low = tl.maximum(0, num_cached + first_query - WINDOW + 1)
    start = low // TOKENS * TOKENS
    chunk = tl.cdiv(high - start, splits * TOKENS) * TOKENS
    start += split * chunk
    stop = tl.minimum(high, start + chunk)
    # All rows attend to the tokens before `middle`. Large tiles skip the mask for them.
    skips_mask: tl.constexpr = WINDOW >= 1 << 30 and ROWS >= 128 and scales is None
    middle = (
        tl.maximum(start, tl.minimum(stop, num_cached + first_query + 1) // TOKENS * TOKENS)
        if skips_mask
        else start
    )
    token_row = (first_token + query).to(tl.int64)
    query_head = head * GROUP + row % GROUP
    value_head = head + tl.num_programs(1)
    valid = valid_row[:, None] & valid_dim
    q_at = q + (token_row * q_stride + query_head * HEAD_DIM)[:, None] + dim[None, :]
    queries = tl.load(q_at, mask=valid, other=0.0)
    keys = kv + head.to(tl.int64) * head_stride
    values = kv + value_head.to(tl.int64) * head_stride
    scales_per_head = head_stride // HEAD_DIM if DYNAMIC_SCALES else 1
    max_score = tl.full((ROWS,), float("-inf"), tl.float32)
    exp_sum = tl.zeros((ROWS,), tl.float32)
    if sinks is not None and split == 0:
        max_score = tl.load(sinks + query_head) * LOG2E
        exp_sum += 1
    acc = tl.zeros((ROWS, PADDED_DIM), tl.float32)
    for masked in tl.static_range(1 - skips_mask, 2):
        for token in tl.range(middle if masked else start, stop if masked else middle, TOKENS):
            tokens = token + tl.arange(0, TOKENS)
            in_split = (tokens >= low) & (tokens < stop)
            block_at = block_table + sequence * table_stride + tokens // BLOCK_SIZE
            block = tl.load(block_at, mask=in_split, other=0)
            slot = block.to(tl.int64) * BLOCK_SIZE + tokens % BLOCK_SIZE
            kv_at = slot[:, None] * HEAD_DIM + dim[None, :]
            kv_mask = in_split[:, None] & valid_dim
            k = tl.load(keys + kv_at, mask=kv_mask, other=0.0).to(queries.dtype)
            score = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale
            if scales is not None:
                k_scale_at = scales + head * scales_per_head + slot * DYNAMIC_SCALES
                score *= tl.load(k_scale_at, mask=in_split, other=0.0)[None, :]
            if SOFTCAP > 0:
                score = SOFTCAP - 2 * SOFTCAP / (tl.exp2(score) + 1)  # SOFTCAP * tanh
            if masked:
                seen = (tokens[None, :] <= position[:, None]) & (
                    tokens[None, :] > position[:, None] - WINDOW
                )
                score = tl.where(seen & in_split[None, :], score, float("-inf"))
            previous_max = max_score
            max_score = tl.maximum(max_score, tl.max(score, 1))
            # The maximum of a row without any token so far is -inf, and -inf - -inf would be NaN.
            base = tl.where(max_score == float("-inf"), 0.0, max_score)
            rescale = tl.exp2(previous_max - base)
            weight = tl.exp2(score - base[:, None])
            exp_sum = exp_sum * rescale + tl.sum(weight, 1)
            if scales is not None:
                # Multiply by 2^8: products with small scales may be below float16's range.
                v_scale_at = scales + value_head * scales_per_head + slot * DYNAMIC_SCALES
                weight *= (tl.load(v_scale_at, mask=in_split, other=0.0) * 256)[None, :]
            v = tl.load(values + kv_at, mask=kv_mask, other=0.0).to(queries.dtype)
            acc = tl.dot(weight.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
    acc /= tl.where(exp_sum > 0, exp_sum, 1.0)[:, None] * (1 if scales is None else 256)
    out_row = token_row * (tl.num_programs(1) * GROUP) + query_head
    if split_lse is not None:
        out_row = out_row * splits + split
        tl.store(split_lse + out_row, max_score + tl.log2(exp_sum), mask=valid_row)
        valid_row &= exp_sum > 0
    tl.store(
        out + out_row[:, None] * HEAD_DIM + dim[None, :],
        acc.to(out.dtype.element_ty),
        mask=valid_row[:, None] & valid_dim,
    )


@jit
def _combine_splits_kernel(
    split_out: tl.tensor,
    split_lse: tl.tensor,
    out: tl.tensor,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    """A program combines the splits of one query and head by their shares of the softmax sum."""
    split = tl.program_id(0).to(tl.int64) * SPLITS + tl.arange(0, SPLITS)
    dim = tl.arange(0, PADDED_DIM)
    lse = tl.load(split_lse + split)
    max_lse = tl.max(lse, 0)
    share = tl.exp2(lse - tl.where(max_lse == float("-inf"), 0.0, max_lse))
    mask = (share > 0)[:, None] & (dim < HEAD_DIM)[None, :]
    part = tl.load(split_out + split[:, None] * HEAD_DIM + dim[None, :], mask=mask, other=0.0)
    total = tl.sum(share, 0)
    combined = tl.sum(part * share[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(
        out + tl.program_id(0).to(tl.int64) * HEAD_DIM + dim,
        combined.to(out.dtype.element_ty),
        mask=dim < HEAD_DIM,
    )
