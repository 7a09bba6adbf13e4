"""Multi-head latent attention (MLA, arXiv 2405.04434, section 2.1) over a paged cache of latents.

A token's keys and values are the outputs of one linear layer, `kv_b`, whose input is the token's
latent, and a part of the key that all heads share, which is rotated. Only these are cached. There
are two forms of the same attention:

- expanded: the latents become keys and values of each head, as in other models;
- absorbed: the part of `kv_b` that makes keys multiplies the queries, and the part that makes
  values multiplies the output. Then all heads attend to the latents themselves, as keys and as
  values. That is less work where few queries read many tokens.

Legend: T tokens of this step, N heads, P and R the parts of a head's query and key without a
position and with a rotated one, L the rank of the latents, V the size of a head's values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from llmkit.kernels import latent_attention_triton as triton_attention
from llmkit.kernels.attention import paged_attention
from llmkit.kernels.attention_metadata import AttentionBatch, AttentionMetadata, Prompt
from llmkit.kernels.cpu import cpu_kernels, cpu_latent
from llmkit.kernels.cpu.cpu_latent import CpuLatentProjection
from llmkit.kernels.cpu.packed_cache import can_pack
from llmkit.kernels.kv_cache import KVCache
from llmkit.kernels.latent_cache import LatentCache

# New tokens of a sequence from which it is computed in the expanded form, and the most memory that
# the keys and values of some heads may take.
MIN_EXPANDED_QUERIES = 256
EXPANDED_BYTES = 1 << 26


class LatentProjection(Protocol):
    """The weight of kv_b, [N * (P + V), L], in both forms."""

    nbytes: int
    value_dim: int  # V

    def absorb(self, q: torch.Tensor) -> torch.Tensor:
        """Queries [T, N, P + R] as queries of the latents, [T, N, L + R]. q: contiguous."""
        ...

    def project(self, latents: torch.Tensor) -> torch.Tensor:
        """Weighted sums of latents [T, N, L] as those of values, [T, N, V]."""
        ...

    def expand(self, latents: torch.Tensor, heads: range, head_dim: int) -> torch.Tensor:
        """The keys and values of some heads, for latents [n, L + R]: [n, 2 * heads, head_dim].

        The keys come first. A value ends with zeros: head_dim is P + R, which V does not exceed.
        """
        ...


class DenseLatentProjection:
    """See `LatentProjection`; by torch."""

    def __init__(self, weight: torch.Tensor, num_heads: int, value_dim: int) -> None:
        """weight: [N * (P + V), L]."""
        self.nbytes = weight.nbytes
        self.value_dim = value_dim
        self._by_head = weight.unflatten(0, (num_heads, -1))
        self._no_position = self._by_head.shape[1] - value_dim
        self._keys, self._values = self._by_head.split((self._no_position, value_dim), dim=1)

    def absorb(self, q: torch.Tensor) -> torch.Tensor:
        """See `LatentProjection`."""
        no_position, rotated = q.tensor_split((self._no_position,), dim=2)
        absorbed = torch.bmm(no_position.transpose(0, 1), self._keys)  # [N, T, L]
        return torch.cat((absorbed.transpose(0, 1), rotated), dim=2)

    def project(self, latents: torch.Tensor) -> torch.Tensor:
        """See `LatentProjection`."""
        return torch.bmm(latents.transpose(0, 1), self._values.mT).transpose(0, 1).contiguous()

    def expand(self, latents: torch.Tensor, heads: range, head_dim: int) -> torch.Tensor:
        """See `LatentProjection`."""
        weight = self._by_head[heads.start : heads.stop]
        rank = weight.shape[2]
        kv = linear(latents[:, :rank], weight.flatten(0, 1)).unflatten(1, (len(heads), -1))
        keys, values = kv.split((self._no_position, self.value_dim), dim=2)
        both = latents.new_zeros(len(latents), 2 * len(heads), head_dim)
        both[:, : len(heads), : self._no_position] = keys
        both[:, : len(heads), self._no_position :] = latents[:, None, rank:]
        both[:, len(heads) :, : self.value_dim] = values
        return both


def latent_projection(
    weight: torch.Tensor, num_heads: int, value_dim: int, dtype: torch.dtype
) -> LatentProjection:
    """The form of a weight [N * (P + V), L] for its device and for queries of `dtype`.

    For compiled CPU kernels, the weight keeps its dtype.
    """
    on_cpu = weight.device.type == "cpu" and dtype == torch.float32
    if on_cpu and cpu_kernels.library is not None:
        return CpuLatentProjection(weight, num_heads, value_dim)
    return DenseLatentProjection(weight.to(dtype), num_heads, value_dim)


def latent_attention(
    q: torch.Tensor, cache: LatentCache, metadata: AttentionMetadata, scale: float, rank: int
) -> torch.Tensor:
    """softmax(scale q c') c[:, :L] for every token and head, causal: the absorbed form.

    q: [T, N, L + R], from `LatentProjection.absorb`. rank: L. The cache already holds the latents c
    of this step. Returns [T, N, L].
    """
    if cpu_latent.supports(q, cache, rank):
        return cpu_latent.attention(q, cache, metadata, scale, rank)
    if triton_attention.supports(q, cache, rank):
        return triton_attention.attention(q, cache, metadata, scale, rank)
    return latent_attention_reference(q, cache, metadata, scale, rank)


def mla_attention(
    q: torch.Tensor,
    projection: LatentProjection,
    cache: LatentCache,
    batch: AttentionBatch,
    scale: float,
    rank: int,
) -> torch.Tensor:
    """Attention of queries [T, N, P + R] to a cache that holds this step's latents: [T, N, V].

    A sequence with many new tokens is computed in the expanded form; others in the absorbed one.
    What else is in the batch changes no form.
    """
    split = None
    value_dim = projection.value_dim
    if value_dim <= q.shape[2]:
        split = batch.split_prompts(MIN_EXPANDED_QUERIES)

    def absorbed(rows: torch.Tensor, own: AttentionBatch) -> torch.Tensor:
        metadata = own.metadata(None)
        sums = latent_attention(projection.absorb(rows), cache, metadata, scale, rank)
        return projection.project(sums)

    if split is None:
        return absorbed(q, batch)
    out = q.new_empty(*q.shape[:2], value_dim)
    if split.others is not None and split.other_rows is not None:
        out[split.other_rows] = absorbed(q[split.other_rows], split.others)
    for prompt in split.prompts:
        out[prompt.rows] = _expanded_prompt(q[prompt.rows], projection, cache, prompt, scale)
    return out


def _expanded_prompt(
    q: torch.Tensor,
    projection: LatentProjection,
    cache: LatentCache,
    prompt: Prompt,
    scale: float,
) -> torch.Tensor:
    """The expanded form for one sequence. q: [queries, N, P + R]. Returns [queries, N, V].

    Keys and values of some heads at a time are in memory, as a paged cache of their own.
    """
    num_heads, head_dim = q.shape[1:]
    latents = cache.gather(prompt.blocks, q.dtype)  # [n, L + R], to the end of the last block
    num_tokens = len(latents)
    block_size = cache.kv.shape[2]
    bytes_of_head = 2 * num_tokens * head_dim * q.element_size()
    group = max(1, min(num_heads, EXPANDED_BYTES // bytes_of_head))
    is_packed = can_pack(block_size, head_dim, q.dtype, q.device)
    slots = torch.arange(num_tokens, device=q.device)
    outputs = []
    for first in range(0, num_heads, group):
        heads = range(first, min(first + group, num_heads))
        shape = 2 * len(heads), num_tokens // block_size, block_size, head_dim
        expanded = KVCache(q.new_empty(shape), is_packed=is_packed)
        expanded.store(projection.expand(latents, heads, head_dim), slots)
        own = q[:, heads.start : heads.stop]
        sums = paged_attention(own.contiguous(), expanded, prompt.batch.metadata(None), scale)
        outputs.append(sums[:, :, : projection.value_dim])
    return torch.cat(outputs, dim=1)


def latent_attention_reference(
    q: torch.Tensor, cache: LatentCache, metadata: AttentionMetadata, scale: float, rank: int
) -> torch.Tensor:
    """`latent_attention` in plain torch, one sequence after the other."""
    # A CUDA graph may have rows of tokens that belong to no sequence.
    out = q.new_zeros(*q.shape[:2], rank)
    first_query = 0
    for sequence in metadata.reference_sequences:
        end_query = first_query + sequence.num_queries
        latents = cache.gather(sequence.blocks, q.dtype)[sequence.tokens]
        out[first_query:end_query] = _attend(
            q[first_query:end_query],
            latents[:, None].expand(-1, q.shape[1], -1),
            latents[:, None, :rank].expand(-1, q.shape[1], -1),
            sequence.mask,
            scale,
        )
        first_query = end_query
    return out


def expanded_attention(
    q: torch.Tensor,
    expand: Callable[[torch.Tensor], torch.Tensor],
    latents: torch.Tensor,
    cache: LatentCache,
    metadata: AttentionMetadata,
    scale: float,
    rank: int,
    value_dim: int,
) -> torch.Tensor:
    """The expanded form in plain torch, one sequence after the other.

    q: [T, N, P + R]. expand: `kv_b`: from [n, L] to [n, N * (P + V)]. latents: those of this step,
    [T, L + R], which the cache holds, too. Returns [T, N, V].

    Where all sequences begin in this step, `expand` is called once, and gradients pass through
    it and the latents. The cache is not read then.
    """
    num_heads = q.shape[1]
    batch = metadata.batch
    are_fresh = bool((batch.query_lens == batch.seq_lens).all())
    expanded = expand(latents[:, :rank]).unflatten(-1, (num_heads, -1)) if are_fresh else None
    parts = []
    first_query = 0
    for sequence in metadata.reference_sequences:
        end_query = first_query + sequence.num_queries
        if expanded is not None:
            own = latents[first_query:end_query]
            kv = expanded[first_query:end_query]
        else:
            own = cache.gather(sequence.blocks, q.dtype)[sequence.tokens]
            kv = expand(own[:, :rank]).unflatten(-1, (num_heads, -1))
        no_position, values = kv.split((kv.shape[2] - value_dim, value_dim), dim=2)
        rotated = own[:, None, rank:].expand(-1, num_heads, -1)
        keys = torch.cat((no_position, rotated), dim=2)
        parts.append(_attend(q[first_query:end_query], keys, values, sequence.mask, scale))
        first_query = end_query
    return torch.cat(parts)


def _attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """q: [queries, N, x]; keys, values: [tokens, N, x and y]; mask: [queries, tokens] or None."""
    q, keys, values = (part.transpose(0, 1)[None] for part in (q, keys, values))
    return scaled_dot_product_attention(q, keys, values, mask, scale=scale)[0].transpose(0, 1)
