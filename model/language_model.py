"""What the engine, scoring and memory planning need of a model in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch

from llmkit.kernels.attention_metadata import AttentionBatch
from llmkit.kernels.cpu.packed_cache import can_pack
from llmkit.kernels.kv_cache import KV_CACHE_DTYPES, QUANTIZED_KV_CACHE_DTYPES, KVCache
from llmkit.kernels.latent_cache import LatentCache
from llmkit.kernels.latent_cache import can_pack as can_pack_latents
from llmkit.kernels.recurrent_state import RecurrentState
from llmkit.model.device import lazy_zeros
from llmkit.model.linear import Linear
from llmkit.model.parallel_group import ParallelGroup
from llmkit.model.spec import LayerSpec, ModelSpec

# What a layer keeps of the past. A layer without a mixer has an empty state.
LayerCache = KVCache | LatentCache | RecurrentState


class LanguageModel(Protocol):
    """A `Decoder` (every native family), or a `TransformersModel` (the fallback)."""

    spec: ModelSpec
    dtype: torch.dtype
    device: torch.device
    parallel_group: ParallelGroup

    def __call__(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        batch: AttentionBatch,
        caches: Sequence[LayerCache],
    ) -> torch.Tensor:
        """Run a step. tokens, positions: int64 [T]; caches: one for each layer.

        Returns hidden states [T, H] after the last norm.
        """
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, H] -> float32 [n, vocab]; a rank computes only its part of the vocabulary."""
        ...

    def new_kv_cache(
        self,
        num_blocks: int,
        block_size: int = 16,
        kv_cache_dtype: str | None = None,
        layer_spec: ModelSpec | None = None,
    ) -> KVCache:
        """A layer's empty cache on the model's device.

        kv_cache_dtype: a name in KV_CACHE_DTYPES, or None for the model's dtype.
        layer_spec: the spec with the layer's sizes; None: those of the model.
        """
        ...

    def weights(self) -> tuple[list[Linear], list[torch.Tensor]]:
        """Its linear layers, and its other tensors. A tensor may occur several times."""
        ...


def empty_kv_cache(
    model: LanguageModel,
    spec: ModelSpec,
    num_blocks: int,
    block_size: int,
    kv_cache_dtype: str | None,
    *,
    has_static_scales: bool,
) -> KVCache:
    """A cache in the sizes of `spec`; see `LanguageModel.new_kv_cache`.

    has_static_scales: an 8-bit cache needs no scale for each token and head.
    """
    shape = (2 * spec.num_kv_heads, num_blocks, block_size)
    dtype = KV_CACHE_DTYPES[kv_cache_dtype] if kv_cache_dtype else model.dtype
    # The compiled kernels attend in float32 only. Packed keys and values would slow torch down.
    is_packed = model.dtype == torch.float32 and can_pack(
        block_size, spec.head_dim, dtype, model.device
    )
    cache = KVCache(lazy_zeros((*shape, spec.head_dim), dtype, model.device), is_packed=is_packed)
    if not cache.quantized or has_static_scales:
        return cache
    return replace(cache, scales=lazy_zeros((*shape, 1), torch.float32, model.device))


def empty_latent_cache(
    model: LanguageModel, num_blocks: int, block_size: int, kv_cache_dtype: str | None = None
) -> LatentCache:
    """A layer's empty cache of latents on the model's device.

    kv_cache_dtype: as in `LanguageModel.new_kv_cache`, but not one of 8 bits.
    """
    mla = model.spec.mla
    assert mla is not None and kv_cache_dtype not in QUANTIZED_KV_CACHE_DTYPES
    dtype = KV_CACHE_DTYPES[kv_cache_dtype] if kv_cache_dtype else model.dtype
    shape = (1, num_blocks, block_size, mla.latent_dim)
    is_packed = model.dtype == torch.float32 and can_pack_latents(
        block_size, mla.latent_dim, dtype, model.device
    )
    return LatentCache(lazy_zeros(shape, dtype, model.device), is_packed)


def empty_recurrent_state(
    model: LanguageModel, spec: ModelSpec, index: int, num_rows: int
) -> RecurrentState:
    """The states of a layer that is not attention, all zero; see `RecurrentState`."""
    width = channels = heads = keys = values = 0
    if spec.recurrent is not None and spec.layers[index].mixer != "none":
        width = spec.recurrent.conv_kernel_size - 1
        channels = spec.recurrent.conv_channels
        heads, keys, values = spec.recurrent.state_shape
    return RecurrentState(
        lazy_zeros((num_rows, width, channels), model.dtype, model.device),
        lazy_zeros((num_rows, heads, keys, values), torch.float32, model.device),
    )


def new_layer_caches(
    model: LanguageModel,
    num_blocks: Callable[[LayerSpec], int],
    block_size: int,
    kv_cache_dtype: str | None = None,
    num_state_rows: int = 0,
) -> list[LayerCache]:
    """A cache for each layer. A layer that reads the keys and values of another has its cache.

    num_blocks: the blocks of a layer. num_state_rows: the rows of its recurrent states.
    """
    caches: list[LayerCache] = []
    for index, layer in enumerate(model.spec.layers):
        if layer.mixer == "mla":
            blocks = num_blocks(layer)
            caches.append(empty_latent_cache(model, blocks, block_size, kv_cache_dtype))
        elif layer.mixer != "attention":
            caches.append(empty_recurrent_state(model, model.spec, index, num_state_rows))
        elif layer.kv_shared_layer_offset:
            caches.append(caches[index - layer.kv_shared_layer_offset])
        else:
            blocks = num_blocks(layer)
            own = model.spec.for_layer(index)
            caches.append(model.new_kv_cache(blocks, block_size, kv_cache_dtype, own))
    return caches


def scratch_layer_caches(
    model: LanguageModel,
    spec: ModelSpec,
    num_blocks: int,
    block_size: int,
    kv_cache_dtype: str | None = None,
) -> list[LayerCache]:
    """A cache for each layer of `spec`, for a step whose keys and values are not read again.

    Layers of equal sizes share one: a layer reads only what it has just written. A layer whose keys
    and values others read has its own. Recurrent states are not kept.
    """
    is_read = spec.kv_source_layers
    caches: list[LayerCache] = []
    shared: dict[tuple[int, int], KVCache] = {}
    latents: LatentCache | None = None
    for index, layer in enumerate(spec.layers):
        if layer.mixer == "mla":
            latents = latents or empty_latent_cache(model, num_blocks, block_size, kv_cache_dtype)
            caches.append(latents)
            continue
        if layer.mixer != "attention":
            caches.append(empty_recurrent_state(model, spec, index, 0))
            continue
        if layer.kv_shared_layer_offset:
            caches.append(caches[index - layer.kv_shared_layer_offset])
            continue
        own = spec.for_layer(index)
        sizes = (own.num_kv_heads, own.head_dim)
        if index in is_read:
            caches.append(model.new_kv_cache(num_blocks, block_size, kv_cache_dtype, own))
            continue
        if sizes not in shared:
            shared[sizes] = model.new_kv_cache(num_blocks, block_size, kv_cache_dtype, own)
        caches.append(shared[sizes])
    return caches
