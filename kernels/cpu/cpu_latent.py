"""Multi-head latent attention by the compiled CPU kernels: `kv_b`, and the absorbed form.

Legend: T tokens of this step, N heads, P and R the parts of a head's query that have no position
and a rotated one, L the rank of the latents, V the size of a head's values.
"""

from __future__ import annotations

import torch

from llmkit.kernels.attention_metadata import AttentionMetadata
from llmkit.kernels.cpu import cpu_kernels
from llmkit.kernels.cpu.cpu_kernels import KV_TYPES, WEIGHT_TYPES, PackedWeight
from llmkit.kernels.latent_cache import LatentCache

HEADS_AT_ONCE = 24  # the most heads that read the cache together


class CpuHeadLinear:
    """A linear layer of its own for each head. weights: [N, out, in], in even."""

    def __init__(self, weights: torch.Tensor) -> None:
        _, self.out_features, self.in_features = weights.shape
        assert self.in_features % 2 == 0
        weights = weights if weights.dtype in WEIGHT_TYPES else weights.float()
        self._weight_type = WEIGHT_TYPES[weights.dtype]
        self._packed = torch.stack([PackedWeight.pack(weight).q for weight in weights])
        self.nbytes = self._packed.nbytes

    def __call__(self, x: torch.Tensor, y: torch.Tensor, first_head: int = 0) -> None:
        """y[:, :, :out] = x[:, :, :in] W' for each head from `first_head`.

        x: float32 [T, heads, in or more]; y: float32 [T, heads, out or more]. Their last dimensions
        are contiguous.
        """
        assert cpu_kernels.library is not None
        cpu_kernels.library.head_linear(
            self._weight_type,
            x.data_ptr(),
            x.stride(0),
            x.stride(1),
            self._packed[first_head].data_ptr(),
            y.data_ptr(),
            y.stride(0),
            y.stride(1),
            len(x),
            self.out_features,
            self.in_features,
            y.shape[1],
        )


class CpuLatentProjection:
    """The weight of kv_b; see `latent_attention.LatentProjection`."""

    def __init__(self, weight: torch.Tensor, num_heads: int, value_dim: int) -> None:
        """weight: [N * (P + V), L], in the dtype in which it is stored."""
        by_head = weight.unflatten(0, (num_heads, -1))
        keys, values = by_head.split((by_head.shape[1] - value_dim, value_dim), dim=1)
        self.value_dim = value_dim
        self._absorb = CpuHeadLinear(keys.transpose(1, 2))
        self._keys = CpuHeadLinear(keys)
        self._values = CpuHeadLinear(values)
        self.nbytes = self._absorb.nbytes + self._keys.nbytes + self._values.nbytes

    def absorb(self, q: torch.Tensor) -> torch.Tensor:
        """[T, N, P + R] -> [T, N, L + R]; see `LatentProjection`. q: contiguous."""
        num_tokens, num_heads, head_dim = q.shape
        no_position = self._absorb.in_features
        rank = self._absorb.out_features
        out = torch.empty(num_tokens, num_heads, rank + head_dim - no_position)
        self._absorb(q, out)
        rotated = q.view(-1, head_dim)[:, no_position:]
        cpu_kernels.copy_columns(rotated, out.view(-1, out.shape[2]), rank)
        return out

    def project(self, latents: torch.Tensor) -> torch.Tensor:
        """[T, N, L] -> [T, N, V]; see `LatentProjection`."""
        out = torch.empty(*latents.shape[:2], self.value_dim)
        self._values(latents, out)
        return out

    def expand(self, latents: torch.Tensor, heads: range, head_dim: int) -> torch.Tensor:
        """See `LatentProjection`. latents: contiguous [n, L + R]."""
        both = torch.zeros(len(latents), 2 * len(heads), head_dim)
        keys, values = both.chunk(2, dim=1)
        of_all_heads = latents[:, None].expand(-1, len(heads), -1)
        self._keys(of_all_heads, keys, heads.start)
        keys[:, :, self._keys.out_features :] = of_all_heads[:, :, self._keys.in_features :]
        self._values(of_all_heads, values, heads.start)
        return both


def supports(q: torch.Tensor, cache: LatentCache, rank: int) -> bool:
    """Whether `attention` takes these queries [T, N, L + R] and this cache."""
    return (
        cpu_kernels.supports(q)
        and cache.is_packed
        and q.stride()[1:] == (q.shape[2], 1)
        and rank % 8 == 0
    )


def attention(
    q: torch.Tensor, cache: LatentCache, metadata: AttentionMetadata, scale: float, rank: int
) -> torch.Tensor:
    """See `latent_attention.latent_attention`. q: [T, N, L + R]. Returns [T, N, L]."""
    assert cpu_kernels.library is not None
    num_tokens, num_heads, latent_dim = q.shape
    out = torch.empty(num_tokens, num_heads, rank)
    num_sequences, query_lens, seq_lens, block_tables, table_starts = metadata.host_addresses
    cpu_kernels.library.latent_attention(
        q.data_ptr(),
        out.data_ptr(),
        q.stride(0),
        KV_TYPES[cache.kv.dtype],
        cache.kv.data_ptr(),
        cache.kv.shape[2],
        latent_dim,
        rank,
        num_heads,
        _head_groups(num_heads),
        num_sequences,
        query_lens,
        seq_lens,
        block_tables,
        table_starts,
        scale,
    )
    return out


def _head_groups(num_heads: int) -> int:
    """The number of equal groups of heads that read the cache together."""
    sizes = range(1, HEADS_AT_ONCE + 1)
    return num_heads // max(size for size in sizes if num_heads % size == 0)
