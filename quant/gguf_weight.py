"""A weight on its way to a GGUF file."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from llmkit.checkpoint.gguf_blocks import GgufBlocks
from llmkit.checkpoint.quantized_weight import Scheme
from llmkit.model.gguf_export import GgufPlace

Stored = GgufBlocks | torch.Tensor


@dataclass
class MovedTensor:
    """A checkpoint tensor as the file stores it, with values that are not in its own rows.

    stored: each tensor of the file, blocks or dense values. Tensors of three dimensions are
    flattened to rows of the last one.
    """

    place: GgufPlace
    stored: tuple[Stored, ...]

    def dequantize(self) -> torch.Tensor:
        """The checkpoint tensor, float32."""
        parts = (
            values_of(part).view(shape)
            for part, shape in zip(self.stored, self.place.shapes, strict=True)
        )
        return self.place.restore(*parts)

    def to(self, device: torch.device | str) -> MovedTensor:
        """The same tensor on another device."""
        return replace(self, stored=tuple(part.to(device) for part in self.stored))


def values_of(part: Stored | MovedTensor) -> torch.Tensor:
    """The values of blocks, or dense ones, float32."""
    return part.float() if isinstance(part, torch.Tensor) else part.dequantize()


@dataclass
class GgufWeight:
    """A weight [out, in] whose checkpoint tensors may have different types.

    parts: the blocks, or dense values, of each checkpoint tensor, in its rows unless the file has
    them in another order. rows: its rows in the weight.
    """

    shape: tuple[int, int]
    parts: dict[str, Stored | MovedTensor]
    rows: dict[str, list[slice]]
    scheme: Scheme
    input_scale: torch.Tensor | None = None

    def dequantize(self) -> torch.Tensor:
        """The weight, float32 [out, in]."""
        parts = {name: values_of(part) for name, part in self.parts.items()}
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
