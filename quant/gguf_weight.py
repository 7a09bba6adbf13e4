"""A weight on its way to a GGUF file."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from llmkit.checkpoint.gguf_blocks import GgufBlocks
from llmkit.checkpoint.quantized_weight import Scheme


@dataclass
class GgufWeight:
    """A weight [out, in] whose checkpoint tensors may have different types.

    parts: the blocks, or dense values, of each checkpoint tensor. rows: its rows in the weight.
    """

    shape: tuple[int, int]
    parts: dict[str, GgufBlocks | torch.Tensor]
    rows: dict[str, list[slice]]
    scheme: Scheme
    input_scale: torch.Tensor | None = None

    def dequantize(self) -> torch.Tensor:
        """The weight, float32 [out, in]."""
        parts = {
            name: part.dequantize() if isinstance(part, GgufBlocks) else part.float()
            for name, part in self.parts.items()
        }
        dense = next(iter(parts.values())).new_empty(self.shape)
        for name, part in parts.items():
            first = 0
            for rows in self.rows[name]:
                count = rows.stop - rows.start
                dense[rows] = part[first : first + count]
                first += count
        return dense

    def to(self, device: torch.device | str) -> GgufWeight:
        """The same weight on another device."""
        return replace(self, parts={name: part.to(device) for name, part in self.parts.items()})
