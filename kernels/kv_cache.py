"""One layer's paged KV cache, in the model's dtype, in 16 bits, or quantized to 8 bits.

Legend: T tokens of this step, K key-value heads, D head_dim. Each token has a slot. Block b holds
the slots [b * block_size, (b + 1) * block_size).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmkit.kernels.activation_quant import FP8, quantize_per_token, quantize_static
from llmkit.kernels.cpu import cpu_kernels, packed_cache

# The 8-bit dtypes by the names of --kv-cache-dtype, which have scales, and all dtypes.
QUANTIZED_KV_CACHE_DTYPES = {"int8": torch.int8, "fp8": FP8}
KV_CACHE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    **QUANTIZED_KV_CACHE_DTYPES,
}


@dataclass(frozen=True)
class KVCache:
    """The keys and values of a layer.

    kv: [2K, blocks, block_size, D], first the K key heads, then the K value heads. The tokens of a
    head are contiguous, which suits matrix products.
    scales: float32 [2K, blocks, block_size, 1], one per token and head, computed when it is stored.
    static_scales: float32 [2K, 1, 1], from the checkpoint.
    A quantized cache has one of the two, other caches have neither.
    is_packed: the elements of a head are in the order of `packed_cache`.
    """

    kv: torch.Tensor
    scales: torch.Tensor | None = None
    static_scales: torch.Tensor | None = None
    is_packed: bool = False

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All tensors with a part for each token, [2K, blocks, block_size, D or 1]."""
        return (self.kv,) if self.scales is None else (self.kv, self.scales)

    @property
    def quantized(self) -> bool:
        """Whether keys and values are 8-bit."""
        return self.kv.dtype in QUANTIZED_KV_CACHE_DTYPES.values()

    def store(self, kv: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Write new keys and values [T, 2K, D] to their slots, int64 [T]."""
        compact = kv.stride()[1:] == (kv.shape[2], 1)
        if self.is_packed and compact and cpu_kernels.supports(kv):
            static = self.scales is None
            scales = self.static_scales if static else self.scales
            cpu_kernels.store_kv(kv, slot_mapping, self.kv, scales, static_scales=static)
            return
        kv = kv.transpose(0, 1)
        if self.quantized:
            value_type = "int8" if self.kv.dtype == torch.int8 else "fp8"
            if self.scales is None:
                assert self.static_scales is not None
                q = quantize_static(kv.float(), self.static_scales, value_type)
            else:
                q, scale = quantize_per_token(kv, value_type)
                self.scales.flatten(1, 2).index_copy_(1, slot_mapping, scale)
            kv = q
        kv = _view_fp8_as_bytes(kv.to(self.kv.dtype))
        to = _view_fp8_as_bytes(self.kv)
        if not self.is_packed:
            to.flatten(1, 2).index_copy_(1, slot_mapping, kv)
            return
        block_size = self.kv.shape[2]
        blocks, places = (slot_mapping // block_size).unique(return_inverse=True)
        selected = packed_cache.unpack_blocks(to[:, blocks])
        selected.flatten(1, 2).index_copy_(1, places * block_size + slot_mapping % block_size, kv)
        to[:, blocks] = packed_cache.pack_blocks(selected)

    def gather(self, blocks: torch.Tensor | slice, dtype: torch.dtype) -> torch.Tensor:
        """The keys and values of n blocks: [2K, n * block_size, D], possibly a view."""
        kv = _select_blocks(_view_fp8_as_bytes(self.kv), blocks)
        if self.is_packed:
            kv = packed_cache.unpack_blocks(kv)
        kv = kv.flatten(1, 2)
        if not self.quantized:
            return kv.to(dtype)
        scale = self.static_scales
        if self.scales is not None:
            scale = _select_blocks(self.scales, blocks).flatten(1, 2)
        assert scale is not None
        return kv.view(self.kv.dtype).float().mul_(scale).to(dtype)

    def clear(self, blocks: list[int]) -> None:
        """Set blocks to zero that may hold NaN or infinity.

        Attention multiplies masked values by 0, and 0 * NaN is NaN.
        """
        for part in (self.kv, self.scales):
            if part is not None:
                _view_fp8_as_bytes(part)[:, blocks] = 0


def _select_blocks(pages: torch.Tensor, blocks: torch.Tensor | slice) -> torch.Tensor:
    """[2K, blocks, block_size, x] -> [2K, n, block_size, x]; a slice is not copied."""
    return pages[:, blocks] if isinstance(blocks, slice) else pages.index_select(1, blocks)


def _view_fp8_as_bytes(values: torch.Tensor) -> torch.Tensor:
    """View FP8 as bytes, because not every device can index FP8. Other dtypes are unchanged."""
    return values.view(torch.uint8) if values.dtype == FP8 else values
