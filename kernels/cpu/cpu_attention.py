"""Attention over a paged KV cache by the compiled CPU kernel.

Legend: T tokens of this step, N query heads, K key-value heads, D head_dim.
"""

from __future__ import annotations

import torch

from llmkit.kernels.attention_metadata import AttentionMetadata
from llmkit.kernels.cpu import cpu_kernels
from llmkit.kernels.kv_cache import KVCache

MAX_HEADS_PER_KV_HEAD = 48  # rows of the C kernel's scratch memory (attention.h)


def supports(q: torch.Tensor, cache: KVCache) -> bool:
    """Whether `attention` takes these queries [T, N, D] and this cache."""
    if not cpu_kernels.supports(q) or q.stride()[1:] != (q.shape[2], 1):
        return False
    return cache.is_packed and q.shape[1] <= MAX_HEADS_PER_KV_HEAD * cache.kv.shape[0] // 2


def attention(
    q: torch.Tensor,
    cache: KVCache,
    metadata: AttentionMetadata,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `attention.paged_attention`.

    q: [T, N, D], whose last two dimensions are contiguous; sinks: contiguous.
    """
    assert cpu_kernels.library is not None
    out = torch.empty(q.shape)
    both, _, block_size, head_dim = cache.kv.shape
    has_static_scales = cache.scales is None
    scales = cache.static_scales if has_static_scales else cache.scales
    num_sequences, query_lens, seq_lens, block_tables, table_starts = metadata.host_addresses
    cpu_kernels.library.paged_attention(
        q.data_ptr(),
        out.data_ptr(),
        q.stride(0),
        cpu_kernels.KV_TYPES[cache.kv.dtype],
        cache.kv.data_ptr(),
        cpu_kernels.address(scales),
        has_static_scales,
        cache.kv.stride(0),
        block_size,
        head_dim,
        q.shape[1],
        both // 2,
        num_sequences,
        query_lens,
        seq_lens,
        block_tables,
        table_starts,
        metadata.window or 0,
        cpu_kernels.address(sinks),
        scale,
        softcap or 0.0,
    )
    return out
