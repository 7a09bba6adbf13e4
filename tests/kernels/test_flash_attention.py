"""The arguments for FlashAttention-3, checked by its documented function in plain torch."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.paged_cases import DECODE, MIXED, PREFILL, SCALE, Case

from llmkit.kernels import flash_attention as flash


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
    """The function as its documentation says.

    q: [total, N, D]; caches: [pages, page size, K, D], of which only the last dimension must be
    contiguous. Queries are at the end of their contexts; softcap 0 is none; window (-1, ...) is
    unlimited.
    """
    assert causal and window_size[1] == 0
    assert all(one.dtype == torch.int32 for one in (cache_seqlens, page_table, cu_seqlens_q))
    assert k_cache.stride(-1) == v_cache.stride(-1) == 1 and k_cache.dtype == q.dtype
    lengths = cu_seqlens_q.diff()
    assert max_seqlen_q == lengths.max() and len(lengths) == len(cache_seqlens) == len(page_table)
    out = torch.empty_like(q)
    share = q.shape[1] // k_cache.shape[2]
    for i, (start, stop) in enumerate(pairwise(cu_seqlens_q.tolist())):
        context = int(cache_seqlens[i])
        token = torch.arange(context)
        query = torch.arange(context - (stop - start), context)[:, None]
        seen = token <= query
        if window_size[0] >= 0:
            seen &= token >= query - window_size[0]
        first = int(token[seen.any(0)][0])  # pages before are not read: -1 stands there
        place = (
            page_table[i, token[first:] // k_cache.shape[1]].long(),
            token[first:] % k_cache.shape[1],
        )
        k, v = (one[place].repeat_interleave(share, 1).double() for one in (k_cache, v_cache))
        scores = torch.einsum("qnd,knd->nqk", q[start:stop].double(), k) * softmax_scale
        if softcap:
            scores = softcap * (scores / softcap).tanh()
        weights = scores.masked_fill(~seen[:, first:], float("-inf")).softmax(-1)
        out[start:stop] = torch.einsum("nqk,knd->qnd", weights, v).to(q.dtype)
    return out


CASES = [
    Case("decode", *DECODE),
    Case("prompts", *PREFILL),
    Case("mixed", *MIXED),
    Case("softcap", *MIXED, softcap=5.0),
    Case("window", *MIXED, window=24),
    Case("window, decode", *DECODE, window=40),
    Case("one head each", *MIXED, heads=(4, 4)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_flash_attention_gets_documented_arguments(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        flash, "library", SimpleNamespace(flash_attn_with_kvcache=flash_attn_with_kvcache)
    )
    inputs = case.inputs
    got = flash.attention(
        inputs.q, inputs.clean, inputs.batch().metadata(case.window), SCALE, case.softcap
    )
    assert torch.allclose(got.float(), inputs.expected(), atol=2e-3)


def test_flash_attention_supports(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = CASES[0].inputs
    assert not flash.supports(inputs.q, inputs.clean), "it is not installed, and this is no GPU"
    on_gpu: Any = SimpleNamespace(
        is_cuda=True, element_size=lambda: 2, shape=inputs.q.shape, device="cuda"
    )
    monkeypatch.setattr(flash, "library", object())
    for capability, wanted in (((9, 0), True), ((8, 0), False), ((12, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert flash.supports(on_gpu, inputs.clean) is wanted
    quantized_cache: Any = SimpleNamespace(quantized=True)
    assert not flash.supports(on_gpu, quantized_cache)
