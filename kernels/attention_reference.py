"""Attention over a paged KV cache in plain torch, one sequence after the other.

Legend: T tokens of this step, N query heads, K key-value heads, D head_dim, L tokens of a sequence.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from llmkit.kernels.attention_metadata import AttentionMetadata
from llmkit.kernels.kv_cache import KVCache


def paged_attention_reference(
    q: torch.Tensor,
    cache: KVCache,
    metadata: AttentionMetadata,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """`paged_attention` in plain torch, one sequence after the other."""
    out = torch.zeros_like(q)  # a CUDA graph may have rows of tokens that belong to no sequence
    first_query = 0
    for sequence in metadata.reference_sequences:
        kv = cache.gather(sequence.blocks, q.dtype)[:, sequence.tokens]
        k, v = kv.view(2, -1, 1, *kv.shape[1:]).unbind(0)  # [K, 1, L, D]
        end_query = first_query + sequence.num_queries
        rows = q[first_query:end_query].unflatten(1, (len(k), -1))
        rows = rows.permute(1, 2, 0, 3)  # [K, N / K, queries, D]
        output = _masked_attention(rows, k, v, sequence.mask, scale, softcap, sinks)
        out[first_query:end_query] = output.permute(2, 0, 1, 3).flatten(1, 2)
        first_query = end_query
    return out


def _masked_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """q: [K, N / K, queries, D]; k, v: [K, 1, L, D]; mask: bool [queries, L]; None: no mask."""
    if softcap is None and sinks is None:
        k = k.expand(*q.shape[:2], -1, -1)
        v = v.expand(*q.shape[:2], -1, -1)
        return scaled_dot_product_attention(q, k, v, mask, scale=scale)
    scores = q @ k.mT
    if softcap is None:
        scores = (scores * scale).float()
    else:
        scores = (scores * (scale / softcap)).tanh().mul(softcap).float()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is None:
        return scores.softmax(-1).to(q.dtype) @ v
    sink_scores = sinks.view(*q.shape[:2], 1, 1).expand(*scores.shape[:-1], 1)
    probabilities = torch.cat((scores, sink_scores), dim=-1).softmax(-1)
    return probabilities[..., :-1].to(q.dtype) @ v
