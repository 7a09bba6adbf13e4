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
from llmkit.kernels.attention_metadata import AttentionMetadata
from llmkit.kernels.cpu import cpu_kernels, cpu_latent
from llmkit.kernels.cpu.cpu_latent import CpuLatentProjection
from llmkit.kernels.latent_cache import LatentCache


class LatentProjection(Protocol):
    """The weight of kv_b, [N * (P + V), L], for the absorbed form."""

    nbytes: int

    def absorb(self, q: torch.Tensor) -> torch.Tensor:
        """Queries [T, N, P + R] as queries of the latents, [T, N, L + R]. q: contiguous."""
        ...

    def project(self, latents: torch.Tensor) -> torch.Tensor:
        """Weighted sums of latents [T, N, L] as those of values, [T, N, V]."""
        ...


class DenseLatentProjection:
    """See `LatentProjection`; by torch."""

    def __init__(self, weight: torch.Tensor, num_heads: int, value_dim: int) -> None:
        """weight: [N * (P + V), L]."""
        self.weight = weight
        self.nbytes = weight.nbytes
        by_head = weight.unflatten(0, (num_heads, -1))
        self._no_position = by_head.shape[1] - value_dim
        self._keys, self._values = by_head.split((self._no_position, value_dim), dim=1)

    def absorb(self, q: torch.Tensor) -> torch.Tensor:
        """See `LatentProjection`."""
        no_position, rotated = q.tensor_split((self._no_position,), dim=2)
        absorbed = torch.bmm(no_position.transpose(0, 1), self._keys)  # [N, T, L]
        return torch.cat((absorbed.transpose(0, 1), rotated), dim=2)

    def project(self, latents: torch.Tensor) -> torch.Tensor:
        """See `LatentProjection`."""
        return torch.bmm(latents.transpose(0, 1), self._values.mT).transpose(0, 1).contiguous()

    def expand(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [n, L] as keys and values [n, N * (P + V)]."""
        return linear(latents, self.weight)


def latent_projection(weight: torch.Tensor, num_heads: int, value_dim: int) -> LatentProjection:
    """The form of a weight [N * (P + V), L] for its device.

    On a CPU with compiled kernels, the weight keeps its dtype.
    """
    if cpu_kernels.library is not None and weight.device.type == "cpu":
        return CpuLatentProjection(weight, num_heads, value_dim)
    return DenseLatentProjection(weight, num_heads, value_dim)


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
