"""FlashAttention-3's documented function in plain torch, with the reads of its paged loader."""

from __future__ import annotations

from itertools import pairwise

import torch

BLOCK_N = 128  # tokens of the library's tiles: 128 or more for heads of up to 128 with a window


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    cache_seqlens: torch.Tensor,
    page_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
) -> torch.Tensor:
    """The function as its documentation says, and the reads of its paged loader.

    q: [total, N, D]; caches: [pages, page size, K, D], of which only the last dimension must be
    contiguous. Queries are at the end of their contexts; softcap 0 is none; window (-1, ...) is
    unlimited. Tiles of tokens are read whole from the one with the window's left edge on: only
    tokens behind the end of the context are left out. Values that no query sees count 0 times.
    """
    assert causal and window_size[1] == 0
    assert all(one.dtype == torch.int32 for one in (cache_seqlens, page_table, cu_seqlens_q))
    assert k_cache.stride(-1) == v_cache.stride(-1) == 1 and k_cache.dtype == q.dtype
    lengths = cu_seqlens_q.diff()
    assert max_seqlen_q >= lengths.max() and len(lengths) == len(cache_seqlens) == len(page_table)
    out = torch.empty_like(q)
    share = q.shape[1] // k_cache.shape[2]
    page_size = k_cache.shape[1]
    for i, (start, stop) in enumerate(pairwise(cu_seqlens_q.tolist())):
        if stop == start:  # an unused sequence of a graph
            continue
        context = int(cache_seqlens[i])
        query = torch.arange(context - (stop - start), context)[:, None]
        first = 0
        if window_size[0] >= 0:
            edge = context - (stop - start) - window_size[0]
            first = max(0, edge) // BLOCK_N * BLOCK_N
        token = torch.arange(first, context)
        seen = token <= query
        if window_size[0] >= 0:
            seen &= token >= query - window_size[0]
        pages = page_table[i, token // page_size].long()
        assert pages.min() >= 0 and pages.max() < len(k_cache), "an illegal memory access"
        place = pages, token % page_size
        k, v = (one[place].repeat_interleave(share, 1).double() for one in (k_cache, v_cache))
        scores = torch.einsum("qnd,knd->nqk", q[start:stop].double(), k) * softmax_scale
        if softcap:
            scores = softcap * (scores / softcap).tanh()
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        out[start:stop] = torch.einsum("nqk,knd->qnd", weights, v).to(q.dtype)
    return out
