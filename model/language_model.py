"""What the engine, scoring and memory planning need of a model in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from llmkit.kernels.attention_metadata import AttentionBatch
from llmkit.kernels.kv_cache import KVCache
from llmkit.model.linear import Linear
from llmkit.model.parallel_group import ParallelGroup
from llmkit.model.spec import ModelSpec


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
        caches: Sequence[KVCache],
    ) -> torch.Tensor:
        """Run a step. tokens, positions: int64 [T]; caches: one for each layer.

        Returns hidden states [T, H] after the last norm.
        """
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, H] -> float32 [n, vocab]; a rank computes only its part of the vocabulary."""
        ...

    def new_kv_cache(
        self, num_blocks: int, block_size: int = 16, kv_cache_dtype: str | None = None
    ) -> KVCache:
        """One layer's empty cache on the model's device.

        kv_cache_dtype: "int8", "fp8", or None for the model's dtype.
        """
        ...

    def weights(self) -> tuple[list[Linear], list[torch.Tensor]]:
        """Its linear layers, and its other tensors. A tensor may occur several times."""
        ...
