"""FlashAttention-3 (https://github.com/Dao-AILab/flash-attention), used where it is installed.

Legend: T tokens of this step, N query heads, K key-value heads, D head_dim.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from llmkit.kernels.attention_metadata import AttentionMetadata
from llmkit.kernels.kv_cache import KVCache

MODULE = "flash_attn_interface"
MAX_HEAD_DIM = 256
library: Any = import_module(MODULE) if torch.cuda.is_available() and find_spec(MODULE) else None


def supports(q: torch.Tensor, cache: KVCache) -> bool:
    """Whether `attention` takes these queries [T, N, D] and this cache: 16-bit, on Hopper GPUs."""
    fits = (
        library is not None
        and q.is_cuda
        and q.element_size() == 2
        and not cache.quantized
        and q.shape[2] <= MAX_HEAD_DIM
    )
    return bool(fits and torch.cuda.get_device_capability(q.device)[0] == 9)


def attention(
    q: torch.Tensor,
    cache: KVCache,
    metadata: AttentionMetadata,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """See `attention.paged_attention`. q: [T, N, D].

    The cache is not copied: the library takes [blocks, block_size, K, D] with any strides.
    """
    tensors = metadata.device_tensors(1)
    k, v = cache.kv.permute(1, 2, 0, 3).chunk(2, dim=2)
    out: torch.Tensor = library.flash_attn_with_kvcache(
        q,
        k,
        v,
        cache_seqlens=tensors.seq_lens,
        page_table=tensors.block_table,
        cu_seqlens_q=tensors.query_start_loc,
        max_seqlen_q=int(metadata.batch.query_lens.max()),
        softmax_scale=scale,
        causal=True,
        window_size=(-1 if metadata.window is None else metadata.window - 1, 0),
        softcap=softcap or 0.0,
    )
    return out
