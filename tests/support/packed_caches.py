"""KV caches in the order of elements of the compiled CPU kernels, where there are any."""

from __future__ import annotations

from dataclasses import replace

from llmkit.kernels.cpu.packed_cache import can_pack, pack_blocks
from llmkit.kernels.kv_cache import KVCache


def packed(cache: KVCache) -> KVCache:
    """The same keys and values, packed if the compiled kernels can use them."""
    _, _, block_size, head_dim = cache.kv.shape
    if not can_pack(block_size, head_dim, cache.kv.dtype, cache.kv.device):
        return cache
    return replace(cache, kv=pack_blocks(cache.kv), is_packed=True)
