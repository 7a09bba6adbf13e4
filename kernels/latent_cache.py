"""One layer's paged cache of multi-head latent attention: a vector for each token.

Legend: T tokens of this step, D elements of a token's latent: the compressed keys and values, then
the key's rotated part. Slots and blocks are those of `KVCache`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmkit.kernels.cpu import cpu_kernels
from llmkit.kernels.cpu.cpu_kernels import KV_TYPES, PANEL_WIDTH
from llmkit.kernels.cpu.packed_cache import KV_CHUNK

MAX_LATENT_DIM = 576  # MAX_HEAD_DIM of cpu_kernels.h


def can_pack(
    block_size: int, latent_dim: int, dtype: torch.dtype, device: torch.device | str
) -> bool:
    """Whether the compiled kernels can use a cache of this form."""
    return (
        cpu_kernels.library is not None
        and torch.device(device).type == "cpu"
        and dtype in KV_TYPES
        and latent_dim % 8 == 0
        and latent_dim <= MAX_LATENT_DIM
        and block_size % PANEL_WIDTH == 0
        and KV_CHUNK % block_size == 0
    )


@dataclass(frozen=True)
class LatentCache:
    """The latents of a layer.

    kv: [1, blocks, block_size, D], in the dtype of the model or in 16 bits.
    is_packed: elements of 16 bits lie as the compiled CPU kernels read them: the pairs of two
    tokens' elements, [block_size / 2, D, 2].
    """

    kv: torch.Tensor
    is_packed: bool = False

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All tensors of the cache, [1, blocks, block_size, D]."""
        return (self.kv,)

    def store(self, latents: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Write new latents [T, D] to their slots, int64 [T]."""
        if self.is_packed and latents.stride(1) == 1 and cpu_kernels.supports(latents):
            cpu_kernels.store_kv(latents[:, None], slot_mapping, self.kv, None, static_scales=False)
            return
        rows = self._rows()
        width = rows.shape[1]
        latents = latents.to(rows.dtype)
        if width == 1:
            rows[:, 0].index_copy_(0, slot_mapping, latents)
        else:
            rows[slot_mapping // width, slot_mapping % width] = latents

    def gather(self, blocks: torch.Tensor | slice, dtype: torch.dtype) -> torch.Tensor:
        """The latents of n blocks, [n * block_size, D]."""
        _, num_blocks, block_size, _ = self.kv.shape
        if isinstance(blocks, slice):
            blocks = torch.arange(num_blocks, device=self.kv.device)[blocks]
        slots = blocks[:, None] * block_size + torch.arange(block_size, device=self.kv.device)
        rows = self._rows()
        slots = slots.flatten()
        return rows[slots // rows.shape[1], slots % rows.shape[1]].to(dtype)

    def clear(self, blocks: list[int]) -> None:
        """Set blocks to zero that may hold NaN or infinity; see `KVCache.clear`."""
        self.kv[:, blocks] = 0

    def _rows(self) -> torch.Tensor:
        """A view of the latents, [slots / w, w, D]; w: the tokens whose elements alternate."""
        latents = self.kv[0]
        width = max(1, 4 // latents.element_size()) if self.is_packed else 1
        return latents.view(-1, latents.shape[-1], width).transpose(1, 2)
