"""Attention over a paged KV cache, for batches that mix prefill chunks and decode tokens.

Legend: T tokens of this step, N query heads, K key-value heads, D head_dim, L tokens of a sequence.
`attention_metadata` says which blocks each query sees; `kv_cache` holds the keys and values.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmkit.kernels import flash_attention
from llmkit.kernels import paged_attention as triton_attention
from llmkit.kernels.attention_metadata import AttentionMetadata
from llmkit.kernels.attention_reference import paged_attention_reference
from llmkit.kernels.cpu import cpu_attention, cpu_kernels
from llmkit.kernels.elementwise import apply_rotary_emb_, norm_heads, scale_tokens_
from llmkit.kernels.kv_cache import KVCache
from llmkit.kernels.rope_and_cache_triton import rope_and_cache_triton

Quantize = Callable[[torch.Tensor], torch.Tensor]


def rope_and_cache(
    qkv: torch.Tensor,
    num_heads: int,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    cos_sin: tuple[torch.Tensor, torch.Tensor] | None,
    cache: KVCache | None,
    slot_mapping: torch.Tensor,
    kv_quant: tuple[Quantize, Quantize] | None = None,
    *,
    interleaved: bool = False,
    norm_after_rope: bool = False,
    norm_subtracts_mean: bool = False,
    query_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """QK norm, RoPE, and the write to the KV cache: the steps between the QKV linear and attention.

    qkv: [T, N + 2K, D]; its values may be overwritten. norms: the weights of the norms of query
    heads and of key heads, [D] each, or [N, D] and [K, D]; None: no norm. cos_sin, interleaved: see
    `apply_rotary_emb_`; None: no RoPE. cache: None: qkv has only queries, [T, N, D], for the keys
    and values of another layer. slot_mapping: int64 [T]. kv_quant: fake quantization of keys
    and of values before they are stored.
    norm_after_rope: the norms follow RoPE. norm_subtracts_mean: they are layer norms, not RMS
    norms. query_scale: float32 [T], a last factor of each token's queries, which is rounded to the
    dtype first.
    Returns the queries [T, N, D].
    """
    if cache is not None and kv_quant is None and triton_attention.supports(qkv, cache):
        return rope_and_cache_triton(
            qkv,
            num_heads,
            norms,
            eps,
            cos_sin,
            cache,
            slot_mapping,
            interleaved=interleaved,
            norm_after_rope=norm_after_rope,
            norm_subtracts_mean=norm_subtracts_mean,
            query_scale=query_scale,
        )
    first_value_head = (num_heads + qkv.shape[1]) // 2
    if norms is not None and not norm_after_rope:
        qkv = _norm_queries_and_keys(qkv, num_heads, norms, eps, norm_subtracts_mean)
    if cos_sin is not None:
        apply_rotary_emb_(qkv[:, :first_value_head], *cos_sin, interleaved)
    if norms is not None and norm_after_rope:
        qkv = _norm_queries_and_keys(qkv, num_heads, norms, eps, norm_subtracts_mean)
    if query_scale is not None:
        scale_tokens_(qkv[:, :num_heads], query_scale)
    if cache is None:
        return qkv
    kv = qkv[:, num_heads:]
    if kv_quant is not None:
        k, v = kv.chunk(2, dim=1)
        quantize_k, quantize_v = kv_quant
        kv = torch.cat((quantize_k(k), quantize_v(v)), dim=1)
    cache.store(kv, slot_mapping)
    return qkv[:, :num_heads]


def _norm_queries_and_keys(
    qkv: torch.Tensor,
    num_heads: int,
    norms: tuple[torch.Tensor, torch.Tensor],
    eps: float,
    subtract_mean: bool,
) -> torch.Tensor:
    """qkv [T, N + 2K, D] with normalized queries and keys. Its values may be overwritten."""
    q, k, v = qkv.tensor_split((num_heads, (num_heads + qkv.shape[1]) // 2), dim=1)
    q_norm, k_norm = norms
    compact = qkv.stride()[1:] == (qkv.shape[2], 1)
    if compact and cpu_kernels.supports(qkv) and q_norm.dtype == k_norm.dtype == qkv.dtype:
        cpu_kernels.norm_heads_(q, q_norm, eps, subtract_mean)
        if k.shape[1]:
            cpu_kernels.norm_heads_(k, k_norm, eps, subtract_mean)
        return qkv
    q = norm_heads(q, q_norm, eps, subtract_mean)
    if k.shape[1]:
        k = norm_heads(k, k_norm, eps, subtract_mean)
    return torch.cat((q, k, v), dim=1)


def paged_attention(
    q: torch.Tensor,
    cache: KVCache,
    metadata: AttentionMetadata,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(softcap(scale q k')) v for every token, causal, within the sliding window.

    q: [T, N, D]. The cache already holds the keys and values of this step. Returns [T, N, D].
    sinks: float32 [N], attention sinks (arXiv 2309.17453): a logit per query head that joins the
    softmax's sum and contributes no value. The soft cap does not apply to it.
    """
    if cpu_attention.supports(q, cache):
        return cpu_attention.attention(q, cache, metadata, scale, softcap, sinks)
    # The library knows no sinks.
    if sinks is None and flash_attention.supports(q, cache, metadata.window, softcap):
        return flash_attention.attention(q, cache, metadata, scale, softcap)
    if triton_attention.supports(q, cache):
        return triton_attention.attention(q, cache, metadata, scale, softcap, sinks)
    return paged_attention_reference(q, cache, metadata, scale, softcap, sinks)
