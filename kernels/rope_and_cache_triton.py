"""QK norm, RoPE and the write to the KV cache as one Triton kernel.

Legend: T tokens of this step, N query heads, K key-value heads, D head_dim, R rotary dimensions.
"""

from __future__ import annotations

import torch

from llmkit.kernels.activation_quant import FP8, FP8_MAX, INT8_MAX
from llmkit.kernels.input_quant import quantize, row_scale
from llmkit.kernels.kv_cache import KVCache
from llmkit.kernels.triton_support import jit, tl


def rope_and_cache_triton(
    qkv: torch.Tensor,
    num_heads: int,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    cos_sin: tuple[torch.Tensor, torch.Tensor] | None,
    cache: KVCache,
    slot_mapping: torch.Tensor,
    *,
    interleaved: bool = False,
    norm_after_rope: bool = False,
    norm_subtracts_mean: bool = False,
    query_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """`attention.rope_and_cache` as one kernel.

    qkv: [T, N + 2K, D], whose last two dimensions are contiguous; D is 512 at most.
    """
    num_tokens, all_heads, head_dim = qkv.shape
    q = qkv.new_empty(num_tokens, num_heads, head_dim)
    padded_dim = max(16, 1 << (head_dim - 1).bit_length())
    q_norm, k_norm = norms or (None, None)
    cos, sin = cos_sin or (None, None)
    max_value = {torch.int8: INT8_MAX, FP8: FP8_MAX}.get(cache.kv.dtype, 0.0)
    scales = cache.static_scales if cache.scales is None else cache.scales
    tile_heads = 1024 // padded_dim
    with torch.cuda.device_of(qkv):
        _rope_and_cache_kernel[num_tokens, -(-all_heads // tile_heads)](
            qkv,
            q,
            cache.kv,
            slot_mapping,
            q_norm,
            k_norm,
            cos,
            sin,
            query_scale,
            scales,
            qkv.stride(0),
            cache.kv.stride(0),
            eps,
            num_heads,
            all_heads,
            head_dim,
            padded_dim,
            tile_heads,
            0 if cos is None else cos.shape[-1],
            interleaved,
            norm_after_rope,
            norm_subtracts_mean,
            q_norm is not None and q_norm.dim() == 2,
            max_value,
            int(cache.scales is not None),
        )
    return q


@jit
def _rope_and_cache_kernel(
    qkv: tl.tensor,
    q: tl.tensor,
    kv: tl.tensor,
    slot_mapping: tl.tensor,
    q_norm: tl.tensor,
    k_norm: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    query_scale: tl.tensor,
    scales: tl.tensor,
    qkv_stride: tl.tensor,
    head_stride: tl.tensor,
    eps: tl.tensor,
    HEADS: tl.constexpr,
    ALL_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORM_AFTER_ROPE: tl.constexpr,
    SUBTRACT_MEAN: tl.constexpr,
    PER_HEAD_NORM: tl.constexpr,
    MAX_VALUE: tl.constexpr,
    DYNAMIC_SCALES: tl.constexpr,
) -> None:
    """A program computes TILE of a token's heads: HEADS query heads, then key and value heads.

    The result of each operation is rounded to the dtype, as in torch. PER_HEAD_NORM: each head has
    a norm weight of its own. MAX_VALUE: the largest value of a quantized cache; 0 for other caches.
    DYNAMIC_SCALES: a scale per token and head is computed and stored.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * TILE + tl.arange(0, TILE)
    d = tl.arange(0, PADDED_DIM)
    dtype: tl.constexpr = qkv.dtype.element_ty
    inside = (head < ALL_HEADS)[:, None] & (d < HEAD_DIM)[None, :]
    row = qkv + token * qkv_stride + head[:, None] * HEAD_DIM
    x = tl.load(row + d[None, :], mask=inside, other=0.0).to(tl.float32)
    is_query_or_key = head[:, None] < (HEADS + ALL_HEADS) // 2
    norm_first: tl.constexpr = q_norm is not None and not NORM_AFTER_ROPE
    norm_last: tl.constexpr = q_norm is not None and NORM_AFTER_ROPE
    if norm_first:
        weight = _norm_weight(
            q_norm, k_norm, head, d, inside, HEADS, ALL_HEADS, HEAD_DIM, PER_HEAD_NORM
        )
        x = _norm(x, weight, is_query_or_key, inside, eps, dtype, HEAD_DIM, SUBTRACT_MEAN)
    if cos is not None:
        rotates = d < ROTARY_DIM
        half: tl.constexpr = ROTARY_DIM // 2
        if INTERLEAVED:
            partner = tl.where(rotates, d ^ 1, d)
            angle = d % 2 * half + d // 2
        else:
            partner = tl.where(rotates, tl.where(d < half, d + half, d - half), d)
            angle = d
        other = tl.load(row + partner[None, :], mask=inside, other=0.0).to(tl.float32)
        if norm_first:
            weight = _norm_weight(
                q_norm, k_norm, head, partner, inside, HEADS, ALL_HEADS, HEAD_DIM, PER_HEAD_NORM
            )
            other = _norm(
                other, weight, is_query_or_key, inside, eps, dtype, HEAD_DIM, SUBTRACT_MEAN
            )
        c = tl.load(cos + token * ROTARY_DIM + angle, mask=rotates, other=1.0)[None, :]
        s = tl.load(sin + token * ROTARY_DIM + angle, mask=rotates, other=0.0)[None, :]
        rotated = (x * c + other * s).to(dtype).to(tl.float32)
        x = tl.where(is_query_or_key, rotated, x)
    if norm_last:
        weight = _norm_weight(
            q_norm, k_norm, head, d, inside, HEADS, ALL_HEADS, HEAD_DIM, PER_HEAD_NORM
        )
        x = _norm(x, weight, is_query_or_key, inside, eps, dtype, HEAD_DIM, SUBTRACT_MEAN)
    queries = x
    if query_scale is not None:
        queries = x * tl.load(query_scale + token).to(dtype).to(tl.float32)
    q_at = q + (token * HEADS + head)[:, None] * HEAD_DIM + d[None, :]
    tl.store(q_at, queries.to(dtype), mask=inside & (head < HEADS)[:, None])
    is_kv = (head >= HEADS) & (head < ALL_HEADS)
    slot = tl.load(slot_mapping + token)
    kv_head = (head - HEADS).to(tl.int64)
    if DYNAMIC_SCALES:
        scale = row_scale(x, MAX_VALUE)
        tl.store(scales + kv_head * (head_stride // HEAD_DIM) + slot, scale, mask=is_kv)
    elif MAX_VALUE > 0:
        scale = tl.load(scales + kv_head, mask=is_kv, other=1.0)
    if MAX_VALUE > 0:
        x = quantize(x, scale[:, None], MAX_VALUE)
    kv_at = kv + kv_head[:, None] * head_stride + slot * HEAD_DIM + d[None, :]
    tl.store(kv_at, x.to(kv.dtype.element_ty), mask=inside & is_kv[:, None])


@jit
def _norm_weight(
    q_norm: tl.tensor,
    k_norm: tl.tensor,
    head: tl.tensor,
    at: tl.tensor,
    inside: tl.tensor,
    HEADS: tl.constexpr,
    ALL_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PER_HEAD_NORM: tl.constexpr,
) -> tl.tensor:
    """The norm weights of query and key heads in float32. at: the dimensions, in any order."""
    is_query = head[:, None] < HEADS
    if PER_HEAD_NORM:
        is_key = (head[:, None] >= HEADS) & (head[:, None] < (HEADS + ALL_HEADS) // 2)
        weight_at = head[:, None] * HEAD_DIM + at[None, :]
        q = tl.load(q_norm + weight_at, mask=inside & is_query, other=0.0)
        k = tl.load(k_norm + weight_at - HEADS * HEAD_DIM, mask=inside & is_key, other=0.0)
    else:
        q = tl.load(q_norm + at, mask=at < HEAD_DIM, other=0.0)[None, :]
        k = tl.load(k_norm + at, mask=at < HEAD_DIM, other=0.0)[None, :]
    return tl.where(is_query, q.to(tl.float32), k.to(tl.float32))


@jit
def _norm(
    x: tl.tensor,
    weight: tl.tensor,
    is_query_or_key: tl.tensor,
    inside: tl.tensor,
    eps: tl.tensor,
    dtype: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SUBTRACT_MEAN: tl.constexpr,
) -> tl.tensor:
    """Normalize the queries and keys among heads x in float32; values stay the same."""
    centered = x
    if SUBTRACT_MEAN:
        centered = tl.where(inside, x - tl.sum(x, 1)[:, None] / HEAD_DIM, 0.0)
    inverse_rms = tl.rsqrt(tl.sum(centered * centered, 1) / HEAD_DIM + eps)[:, None]
    normed = (centered * inverse_rms * weight).to(dtype).to(tl.float32)
    return tl.where(is_query_or_key, normed, x)
