"""FlashAttention-3 (https://github.com/Dao-AILab/flash-attention), where it is installed, in the place of `paged`."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from llmkit.kernels.attention import KvCache
    from llmkit.kernels.paging import Group

NAME = "flash_attn_interface"
library: Any = import_module(NAME) if torch.cuda.is_available() and find_spec(NAME) else None


def attends(q: torch.Tensor, cache: KvCache) -> bool:
    """Whether `attention` takes these queries and this cache: 16 bits, on Hopper."""
    fits = library is not None and q.is_cuda and q.element_size() == 2 and not cache.coded and q.shape[2] <= 256
    return bool(fits and torch.cuda.get_device_capability(q.device)[0] == 9)


def attention(q: torch.Tensor, cache: KvCache, group: Group, scale: float, softcap: float | None) -> torch.Tensor:
    """See `paged_attention`. Pages are read where they lie: [blocks, block_size, K, D] with strides of our own."""
    table, contexts, starts, _ = group.on_device(1)
    k, v = cache.kv.permute(1, 2, 0, 3).chunk(2, dim=2)
    out: torch.Tensor = library.flash_attn_with_kvcache(
        q, k, v, cache_seqlens=contexts, page_table=table, cu_seqlens_q=starts,
        max_seqlen_q=int(group.batch.query_lens.max()), softmax_scale=scale, causal=True,
        window_size=(-1 if group.window is None else group.window - 1, 0), softcap=softcap or 0.0,
    )  # fmt: skip
    return out
