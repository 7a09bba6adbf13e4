"""Attention over a paged KV cache in Triton. Blocks are not copied.

Legend: T tokens of this step, N query heads, K key-value heads, D head_dim. A program computes a
tile: consecutive queries of a sequence, times the N / K heads that share a key-value head.
"""

from __future__ import annotations

import torch

from llmkit.kernels.activation_quant import FP8
from llmkit.kernels.attention_metadata import AttentionBatch, AttentionMetadata, QueryTiles
from llmkit.kernels.kv_cache import KVCache
from llmkit.kernels.triton_support import (
    device_capability,
    is_amd,
    jit,
    jit_without_specializing,
    multiplies_from_shared_memory,
    runs_triton,
    tl,
)
from llmkit.kernels.tuned_configs import Config, Tunable

MAX_HEAD_DIM = 512
MAX_AMD_STAGES = 2  # the shared memory of a compute unit of gfx90a and gfx942 is 64 KiB
MIN_UNIT_TILES = 2  # tiles of tokens: a shorter part of a context is not worth a program
MANY_QUERIES = 1 << 16  # of a sequence: more than any tile has
SCHEDULE_STEP = 256  # tiles of queries that the kernel of the schedule takes in a turn
LOG2_E = 1.4426950408889634
# The choices for: tokens of a tile of keys, warps, stages, and programs per multiprocessor.
TILE = Tunable("attention", ((16, 32, 64, 128), (2, 4, 8), (1, 2, 3, 4, 5), (1, 2, 4, 8)))


def supports(q: torch.Tensor, cache: KVCache) -> bool:
    """Whether `attention` takes these queries [T, N, D] and this cache."""
    fits = runs_triton(q) and q.stride()[1:] == (q.shape[2], 1) and q.shape[2] <= MAX_HEAD_DIM
    return fits and supports_cache(cache)


def supports_cache(cache: KVCache) -> bool:
    """Whether `attention` takes this cache on its GPU. GPUs before sm_89 have no FP8."""
    return cache.kv.dtype != FP8 or device_capability(cache.kv.device) >= (8, 9)


def attention(
    q: torch.Tensor,
    cache: KVCache,
    metadata: AttentionMetadata,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `attention.paged_attention`. q: [T, N, D], whose last two dimensions are contiguous.

    In a step with one query per sequence, or with a `max_query_len` of the batch, the launches
    depend only on shapes. A CUDA graph of them may be replayed after q, the cache and the tensors
    of `metadata.device_tensors` were overwritten (see `metadata.update_block_tables`). Rows of
    tokens that belong to no sequence are not written.
    """
    num_heads = q.shape[1]
    num_kv_heads = cache.kv.shape[0] // 2
    group = num_heads // num_kv_heads
    short_rows, long_rows = _tile_rows(q, cache, metadata.batch)
    out = q.new_empty(q.shape)
    with torch.cuda.device_of(q):
        for tiles in metadata.query_tiles(short_rows // group, long_rows // group):
            rows = short_rows if tiles.tile_queries == short_rows // group else long_rows
            _attend(q, cache, metadata, tiles, rows, scale, softcap, sinks, out)
    return out


def queries_used(tile_queries: int, max_query_len: int) -> int:
    """How many queries of a tile the kernels reckon with: one in a decode, else all.

    The kernels are compiled for each number. With the true one, there would be a kernel for each
    length of a short prompt.
    """
    return 1 if max_query_len == 1 else tile_queries


def _tile_rows(q: torch.Tensor, cache: KVCache, batch: AttentionBatch) -> tuple[int, int]:
    """The rows of tiles for decodes and for prompts. A row is a query of one head.

    Only a CUDA graph, whose sequences have up to so many tokens in every step, gets tiles for its
    number of tokens. Others have those of prompts, so that few kernels are compiled.
    """
    max_query_len = batch.max_query_len
    if not batch.is_fixed and max_query_len > 1:
        max_query_len = MANY_QUERIES
    return tile_rows(
        q.shape[1] * 2 // cache.kv.shape[0],
        q.shape[2],
        q.dtype,
        cache.scales is not None,
        max_query_len,
        device_capability(q.device),
    )


def tile_rows(
    group: int,
    head_dim: int,
    dtype: torch.dtype,
    dynamic_scales: bool,
    max_query_len: int,
    capability: tuple[int, int],
) -> tuple[int, int]:
    """The rows of tiles for up to `short` queries of a sequence, and for more.

    group: query heads of a KV head. dtype: of the queries.
    """
    padded_dim = _padded_dim(head_dim)
    rows = max(16, 1 << (group - 1).bit_length())
    if dtype.itemsize == 4:  # tensor cores do not compute in float32
        return rows, rows
    # The sums of 64 rows of 512 dimensions do not fit into a program's registers.
    most = 64 if padded_dim <= 256 else 32
    wanted = 1 << (max_query_len * group - 1).bit_length()
    if wanted <= most:  # a step that verifies drafts: a tile has all queries of a sequence
        return max(rows, wanted), max(rows, wanted)
    # With a scale for each token, 128 rows do not fit into the registers either.
    from_shared = multiplies_from_shared_memory(capability[0])
    is_large = padded_dim <= 128 and not dynamic_scales and from_shared
    return rows, max(rows, 128 if is_large else most)


def split_bytes(
    num_tiles: int, rows_used: int, num_kv_heads: int, head_dim: int, device: torch.device
) -> int:
    """Bytes of the results of all units of a launch before they are combined, at most.

    num_tiles: tiles of queries. rows_used: rows of a tile that have a query.
    """
    per_core = 2 if rows_used <= 32 else 1
    num_units = num_tiles + num_programs(device, num_kv_heads, per_core)
    return num_units * num_kv_heads * rows_used * (head_dim + 1) * 4


def default_config(
    rows: int,
    head_dim: int,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    dynamic_scales: bool,
    capability: tuple[int, int],
) -> Config:
    """Where nothing was measured: tokens of a tile, warps, stages, programs per multiprocessor."""
    padded_dim = _padded_dim(head_dim)
    from_shared = multiplies_from_shared_memory(capability[0])
    is_float32 = dtype == torch.float32
    tokens = max(16, min(128, 16384 // padded_dim) // dtype.itemsize)
    if not from_shared and rows >= 64 and (padded_dim > 128 or dynamic_scales):
        tokens = max(16, tokens // 2)  # registers, and the 99 KiB of shared memory of sm_86 and 89
    # The matrix products of Hopper take 64 rows with 4 warps; elsewhere they would need too many
    # registers.
    is_small = rows * padded_dim < 1 << 14 and (rows < 64 or (from_shared and dynamic_scales))
    return (
        tokens,
        4 if is_small else 8,
        # Keys and values in two buffers each, or three of half the size: two programs or more fit
        # into a multiprocessor of Hopper.
        MAX_AMD_STAGES if is_amd() else 4 if kv_dtype.itemsize == 1 and not is_float32 else 3,
        2 if rows <= 32 else 1,
    )


def _padded_dim(head_dim: int) -> int:
    return max(16, 1 << (head_dim - 1).bit_length())


def _attend(
    q: torch.Tensor,
    cache: KVCache,
    metadata: AttentionMetadata,
    tiles: QueryTiles,
    rows: int,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Compute the queries of these tiles into `out`."""
    _, num_heads, head_dim = q.shape
    both, _, block_size, _ = cache.kv.shape
    num_kv_heads = both // 2
    group = num_heads // num_kv_heads
    padded_dim = _padded_dim(head_dim)
    capability = device_capability(q.device)
    default = default_config(
        rows, head_dim, q.dtype, cache.kv.dtype, cache.scales is not None, capability
    )
    tile_tokens, warps, stages, per_core = TILE.config(
        (head_dim, group, rows, q.dtype, cache.kv.dtype), default, q.device
    )
    programs = num_programs(q.device, num_kv_heads, per_core)
    if tiles.max_tokens <= MIN_UNIT_TILES * tile_tokens or (
        tiles.total_tokens is not None and tiles.max_tokens * programs <= tiles.total_tokens
    ):
        programs = 0  # no tile is longer than a program's share: nothing is split
    window = metadata.window or 1 << 30
    key = (id(tiles.tiles), tiles.tile_queries, tile_tokens, programs)  # `metadata` keeps tiles
    units, parts = metadata.schedule(
        key, lambda: schedule(metadata, tiles, window, tile_tokens, programs)
    )
    tensors = metadata.device_tensors()
    scales = cache.static_scales if cache.scales is None else cache.scales
    rows_used = queries_used(tiles.tile_queries, metadata.batch.max_query_len) * group
    unit_out = out
    unit_lse = None
    if programs:
        shape = (len(units), num_kv_heads, rows_used, head_dim)
        unit_out = q.new_empty(shape, dtype=torch.float32)
        unit_lse = unit_out.new_empty(shape[:3])
    compiled = _paged_attention_kernel[len(units), num_kv_heads](
        q,
        cache.kv,
        tensors.block_table,
        tensors.seq_lens,
        tensors.query_start_loc,
        units,
        out,
        unit_out,
        unit_lse,
        q.stride(0),
        cache.kv.stride(0),
        tensors.block_table.stride(0),
        scale * (2 / softcap if softcap else 1) * LOG2_E,
        scales,
        sinks,
        group,
        block_size,
        head_dim,
        padded_dim,
        rows,
        rows_used,
        tile_tokens,
        window,
        (softcap or 0.0) * LOG2_E,
        int(cache.scales is not None),
        LOG2_E,
        num_warps=warps,
        num_stages=stages,
    )
    TILE.notify_observer(compiled)
    if unit_lse is not None:
        combine_units_kernel[tiles.num_tiles, num_kv_heads * rows_used](
            unit_out,
            unit_lse,
            parts,
            tiles.tiles,
            tensors.query_start_loc,
            out,
            group,
            head_dim,
            padded_dim,
            rows_used,
            max(1, 2048 // padded_dim),
            num_warps=4,
        )


def num_programs(device: torch.device, num_kv_heads: int, per_core: int) -> int:
    """Into how many shares the work of a KV head is cut: `per_core` programs per multiprocessor."""
    num_cores = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, per_core * num_cores // num_kv_heads)


def schedule(
    metadata: AttentionMetadata, tiles: QueryTiles, window: int, tile_tokens: int, programs: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which program works on which tile of queries and on which of its tokens, for one KV head.

    The tokens that a tile of queries attends to are cut into units, each for one program. No unit
    has more than its share of all tokens, a `programs`-th, or MIN_UNIT_TILES tiles of tokens if
    these are more. So a long context beside many short ones becomes many units. It is computed
    on the device, because a CUDA graph is launched again with other lengths.

    programs: 0: nothing is split.
    Returns units, int32 [num_tiles + programs, 4]: sequence, first query, first token, last token +
    1 (not above the first one for an unused unit), and parts, int32 [num_tiles, 2]: the first unit
    of each tile and the number of its units.
    """
    tensors = metadata.device_tensors()
    units = tensors.seq_lens.new_empty(tiles.num_tiles + programs, 4)
    parts = tensors.seq_lens.new_empty(tiles.num_tiles, 2)
    _schedule_kernel[tiles.num_tiles,](
        tensors.seq_lens,
        tensors.query_start_loc,
        tiles.tiles,
        units,
        parts,
        programs,
        tiles.tile_queries,
        tile_tokens,
        window,
        MIN_UNIT_TILES,
        SCHEDULE_STEP,
        num_warps=4,
    )
    return units, parts


@jit
def _tokens_of_tiles(
    seq_lens: tl.tensor,
    query_start_loc: tl.tensor,
    tiles: tl.tensor,
    tile: tl.tensor,
    num_tiles: tl.tensor,
    TILE_QUERIES: tl.constexpr,
    TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The sequence and first query of tiles, and the tokens [start, stop) that they attend to.

    start is rounded down to TOKENS. Without queries (an unused row of a CUDA graph), both are 0.
    """
    inside = tile < num_tiles
    sequence = tile
    first_query = tile * 0
    if tiles is not None:
        sequence = tl.load(tiles + 2 * tile, mask=inside, other=0)
        first_query = tl.load(tiles + 2 * tile + 1, mask=inside, other=0)
    first_token = tl.load(query_start_loc + sequence, mask=inside, other=0)
    query_len = tl.load(query_start_loc + sequence + 1, mask=inside, other=0) - first_token
    num_cached = tl.load(seq_lens + sequence, mask=inside, other=0) - query_len
    stop = num_cached + tl.minimum(first_query + TILE_QUERIES, query_len)
    stop = tl.where(first_query < query_len, stop, 0)
    start = tl.maximum(0, num_cached + first_query - WINDOW + 1) // TOKENS * TOKENS
    return sequence, first_query, tl.minimum(start, stop), stop


@jit_without_specializing("programs")
def _schedule_kernel(
    seq_lens: tl.tensor,
    query_start_loc: tl.tensor,
    tiles: tl.tensor,
    units: tl.tensor,
    parts: tl.tensor,
    programs: tl.tensor,
    TILE_QUERIES: tl.constexpr,
    TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
    MIN_UNIT_TILES: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    """A program writes the units of one tile of queries: see `schedule`."""
    tile = tl.program_id(0)
    num_tiles = tl.num_programs(0)
    most = num_tiles * 0 + (1 << 30)  # tiles of tokens in a unit
    if programs > 0:
        total = num_tiles * 0
        for first in tl.range(0, num_tiles, STEP):
            _, _, start, stop = _tokens_of_tiles(
                seq_lens,
                query_start_loc,
                tiles,
                first + tl.arange(0, STEP),
                num_tiles,
                TILE_QUERIES,
                TOKENS,
                WINDOW,
            )
            total += tl.sum(tl.cdiv(stop - start, TOKENS), 0)
        most = tl.maximum(MIN_UNIT_TILES, tl.cdiv(total, programs))
    first_unit = num_tiles * 0
    num_units = num_tiles * 0
    for first in tl.range(0, num_tiles, STEP):
        other = first + tl.arange(0, STEP)
        _, _, start, stop = _tokens_of_tiles(
            seq_lens, query_start_loc, tiles, other, num_tiles, TILE_QUERIES, TOKENS, WINDOW
        )
        length = tl.cdiv(stop - start, TOKENS)
        # The units of a tile are equally long, but for the last one.
        size = tl.maximum(1, tl.cdiv(length, tl.maximum(1, tl.cdiv(length, most))))
        count = tl.cdiv(length, size)
        first_unit += tl.sum(tl.where(other < tile, count, 0), 0)
        num_units += tl.sum(count, 0)
    sequence, first_query, start, stop = _tokens_of_tiles(
        seq_lens, query_start_loc, tiles, tile, num_tiles, TILE_QUERIES, TOKENS, WINDOW
    )
    length = tl.cdiv(stop - start, TOKENS)
    size = tl.maximum(1, tl.cdiv(length, tl.maximum(1, tl.cdiv(length, most))))
    count = tl.cdiv(length, size)
    tl.store(parts + 2 * tile, first_unit)
    tl.store(parts + 2 * tile + 1, count)
    size *= TOKENS
    for first in tl.range(0, count, STEP):
        unit = first + tl.arange(0, STEP)
        at = units + 4 * (first_unit + unit)
        mask = unit < count
        zero = unit * 0
        tl.store(at, zero + sequence, mask=mask)
        tl.store(at + 1, zero + first_query, mask=mask)
        tl.store(at + 2, start + unit * size, mask=mask)
        tl.store(at + 3, tl.minimum(stop, start + (unit + 1) * size), mask=mask)
    if tile == 0:
        for first in tl.range(num_units, num_tiles + programs, STEP):
            unit = first + tl.arange(0, STEP)
            at = units + 4 * unit
            mask = unit < num_tiles + programs
            for value in tl.static_range(4):
                tl.store(at + value, unit * 0, mask=mask)


@jit
def _paged_attention_kernel(
    q: tl.tensor,
    kv: tl.tensor,
    block_table: tl.tensor,
    seq_lens: tl.tensor,
    query_start_loc: tl.tensor,
    units: tl.tensor,
    out: tl.tensor,
    unit_out: tl.tensor,
    unit_lse: tl.tensor,
    q_stride: tl.tensor,
    head_stride: tl.tensor,
    table_stride: tl.tensor,
    scale: tl.tensor,
    scales: tl.tensor,
    sinks: tl.tensor,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_USED: tl.constexpr,
    TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DYNAMIC_SCALES: tl.constexpr,
    LOG2E: tl.constexpr,
) -> None:
    """A program computes one unit: a tile of queries and a range of tokens. See `schedule`.

    Online softmax in base 2. out: [T, N, D], written by units that are alone in their tile. Others
    write unit_out, float32 [units, K, ROWS_USED, D], and unit_lse, float32 [units, K, ROWS_USED],
    the base-2 logarithm of the unit's sum of exponentials: -inf where a row attends to none of its
    tokens. The sink of a row counts in the first unit.
    Tokens that no row of the tile attends to are not read: their blocks may be freed or hold NaN.
    """
    unit = tl.program_id(0)
    head = tl.program_id(1)
    start = tl.load(units + 4 * unit + 2)
    stop = tl.load(units + 4 * unit + 3)
    if stop <= start:
        return
    sequence = tl.load(units + 4 * unit)
    first_query = tl.load(units + 4 * unit + 1)
    first_token = tl.load(query_start_loc + sequence)
    query_len = tl.load(query_start_loc + sequence + 1) - first_token
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, PADDED_DIM)
    query = first_query + row // GROUP
    valid_dim = (dim < HEAD_DIM)[None, :]
    valid_row = (row < ROWS_USED) & (query < query_len)
    num_cached = tl.load(seq_lens + sequence) - query_len
    position = num_cached + query
    # At least one row attends to the tokens [low, high). This unit computes [start, stop).
    high = num_cached + tl.minimum(first_query + ROWS // GROUP, query_len)
    low = tl.maximum(0, num_cached + first_query - WINDOW + 1)
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
    score_scale = tl.full((ROWS,), 1.0, tl.float32) * scale
    acc_scale = 1.0
    if scales is not None:
        if queries.dtype == tl.bfloat16:
            # 8-bit values become float16, which is one instruction for two of them; bfloat16 would
            # take several. The queries are brought into its range by powers of two.
            size = tl.max(tl.abs(queries.to(tl.float32)), 1)
            power = tl.floor(tl.log2(tl.maximum(size, 1e-20)))
            queries = (queries.to(tl.float32) * tl.exp2(-power)[:, None]).to(tl.float16)
            score_scale *= tl.exp2(power)
        if not DYNAMIC_SCALES:
            score_scale *= tl.load(scales + head)
            acc_scale = tl.load(scales + value_head)
    keys = kv + head.to(tl.int64) * head_stride
    values = kv + value_head.to(tl.int64) * head_stride
    max_score = tl.full((ROWS,), float("-inf"), tl.float32)
    exp_sum = tl.zeros((ROWS,), tl.float32)
    if sinks is not None and start <= low:
        max_score = tl.load(sinks + query_head) * LOG2E
        exp_sum += 1
    acc = tl.zeros((ROWS, PADDED_DIM), tl.float32)
    is_key = (tl.arange(0, 2) == 0)[:, None]
    if DYNAMIC_SCALES:
        scale_at = scales + tl.where(is_key, head, value_head) * (head_stride // HEAD_DIM)
    offset = tl.arange(0, TOKENS)
    table = block_table + sequence * table_stride
    # The blocks of a tile are looked up one tile ahead. Within an iteration, keys and values would
    # wait for them, and the pipeline would have half as many buffers.
    # `token` is a multiple of TOKENS: where whole blocks fit, only it is divided in the loop.
    whole_blocks: tl.constexpr = TOKENS % BLOCK_SIZE == 0
    block = tl.load(table + (start + offset) // BLOCK_SIZE, mask=start + offset < stop, other=0)
    for masked in tl.static_range(1 - skips_mask, 2):
        for token in tl.range(middle if masked else start, stop if masked else middle, TOKENS):
            tokens = token + offset
            in_unit = (tokens >= low) & (tokens < stop)
            if whole_blocks:
                slot = block.to(tl.int64) * BLOCK_SIZE + offset % BLOCK_SIZE
                next_block = table + (token + TOKENS) // BLOCK_SIZE + offset // BLOCK_SIZE
            else:
                slot = block.to(tl.int64) * BLOCK_SIZE + tokens % BLOCK_SIZE
                next_block = table + (tokens + TOKENS) // BLOCK_SIZE
            block = tl.load(next_block, mask=tokens + TOKENS < stop, other=0)
            kv_at = slot[:, None] * HEAD_DIM + dim[None, :]
            kv_mask = in_unit[:, None] & valid_dim
            k = _convert(tl.load(keys + kv_at, mask=kv_mask, other=0.0), queries.dtype)
            score = tl.dot(queries, tl.trans(k), input_precision="ieee") * score_scale[:, None]
            if DYNAMIC_SCALES:
                # One load for both. The sums take it out of the layout of the scores, in which each
                # thread would load its own copies.
                both = tl.load(scale_at + slot[None, :], mask=in_unit[None, :], other=0.0)
                score *= tl.sum(tl.where(is_key, both, 0.0), 0)[None, :]
            if SOFTCAP > 0:
                score = SOFTCAP - 2 * SOFTCAP / (tl.exp2(score) + 1)  # SOFTCAP * tanh
            if masked:
                seen = (tokens[None, :] <= position[:, None]) & (
                    tokens[None, :] > position[:, None] - WINDOW
                )
                score = tl.where(seen & in_unit[None, :], score, float("-inf"))
            previous_max = max_score
            max_score = tl.maximum(max_score, tl.max(score, 1))
            # The maximum of a row without any token so far is -inf, and -inf - -inf would be NaN.
            base = tl.where(max_score == float("-inf"), 0.0, max_score)
            rescale = tl.exp2(previous_max - base)
            weight = tl.exp2(score - base[:, None])
            exp_sum = exp_sum * rescale + tl.sum(weight, 1)
            if DYNAMIC_SCALES:
                # Multiply by 2^8: products with small scales may be below float16's range.
                weight *= tl.sum(tl.where(is_key, 0.0, both * 256), 0)[None, :]
            v = _convert(tl.load(values + kv_at, mask=kv_mask, other=0.0), queries.dtype)
            acc = tl.dot(weight.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
    if DYNAMIC_SCALES:
        acc_scale = 1.0 / 256
    acc *= (acc_scale / tl.where(exp_sum > 0, exp_sum, 1.0))[:, None]
    is_split = (start > low) | (stop < high)
    if unit_lse is not None and is_split:
        out_row = (unit * tl.num_programs(1) + head).to(tl.int64) * ROWS_USED + row
        tl.store(unit_lse + out_row, max_score + tl.log2(exp_sum), mask=valid_row)
        valid_row &= exp_sum > 0
        tl.store(
            unit_out + out_row[:, None] * HEAD_DIM + dim[None, :],
            acc,
            mask=valid_row[:, None] & valid_dim,
        )
    else:
        out_row = token_row * (tl.num_programs(1) * GROUP) + query_head
        tl.store(
            out + out_row[:, None] * HEAD_DIM + dim[None, :],
            acc.to(out.dtype.element_ty),
            mask=valid,
        )


@jit
def _convert(values: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Cached values in the dtype of the queries."""
    if values.dtype == tl.int8 and dtype == tl.float16:
        # The float16 with the bits 0x6480 + x is 1152 + x, for x in [-128, 127]. A conversion
        # instruction takes 4 times as long as these integer operations.
        bits = values.to(tl.uint8, bitcast=True).to(tl.uint16) ^ 0x6480
        return bits.to(tl.float16, bitcast=True) - 1152.0
    return values.to(dtype)


@jit
def combine_units_kernel(
    unit_out: tl.tensor,
    unit_lse: tl.tensor,
    parts: tl.tensor,
    tiles: tl.tensor,
    query_start_loc: tl.tensor,
    out: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROWS_USED: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    """A program combines the units of one row of a tile by their shares of the softmax sum.

    STEP units are read at a time. A tile with one unit is in `out` already.
    """
    tile = tl.program_id(0)
    num_units = tl.load(parts + 2 * tile + 1)
    if num_units <= 1:
        return
    head = tl.program_id(1) // ROWS_USED
    num_kv_heads = tl.num_programs(1) // ROWS_USED
    row = tl.program_id(1) % ROWS_USED
    sequence = tile
    query = row // GROUP
    if tiles is not None:
        sequence = tl.load(tiles + 2 * tile)
        query += tl.load(tiles + 2 * tile + 1)
    first_token = tl.load(query_start_loc + sequence)
    if query >= tl.load(query_start_loc + sequence + 1) - first_token:
        return
    first_unit = tl.load(parts + 2 * tile)
    dim = tl.arange(0, PADDED_DIM)
    max_lse = first_unit * 0 + float("-inf")
    total = first_unit * 0.0
    combined = tl.zeros((PADDED_DIM,), tl.float32)
    for first in tl.range(0, num_units, STEP):
        unit = first + tl.arange(0, STEP)
        at = ((first_unit + unit) * num_kv_heads + head).to(tl.int64) * ROWS_USED + row
        lse = tl.load(unit_lse + at, mask=unit < num_units, other=float("-inf"))
        previous_max = max_lse
        max_lse = tl.maximum(max_lse, tl.max(lse, 0))
        base = tl.where(max_lse == float("-inf"), 0.0, max_lse)
        share = tl.exp2(lse - base)
        rescale = tl.exp2(previous_max - base)
        mask = (lse > float("-inf"))[:, None] & (dim < HEAD_DIM)[None, :]
        part = tl.load(unit_out + at[:, None] * HEAD_DIM + dim[None, :], mask=mask, other=0.0)
        total = total * rescale + tl.sum(share, 0)
        combined = combined * rescale + tl.sum(part * share[:, None], 0)
    combined /= tl.where(total > 0, total, 1.0)
    query_head = head * GROUP + row % GROUP
    out_row = (first_token + query).to(tl.int64) * (num_kv_heads * GROUP) + query_head
    tl.store(
        out + out_row * HEAD_DIM + dim,
        combined.to(out.dtype.element_ty),
        mask=dim < HEAD_DIM,
    )
