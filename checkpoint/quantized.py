"""A quantized weight in memory, whatever the format it came from or goes to.

Legend: `out` rows, `in` columns, `G` groups along `in`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Format = Literal["gptq", "compressed-tensors"]


@dataclass(frozen=True)
class QuantizationConfig:
    """How a checkpoint's linear weights are stored; the parsed `quantization_config` of its config.json."""

    format: Format
    bits: int
    group_size: int  # along `in`; -1: one scale per output row
    symmetric: bool
    ignore: tuple[str, ...] = ("lm_head",)  # module names left unquantized
    method: str = ""  # what chose the codes, when the checkpoint says so (gptq, rtn, int8)
    damp: float = 0.01  # GPTQ: the share of the mean diagonal that was added to the Hessian; only told, never used

    def groups(self, in_features: int) -> int:
        """How many groups a row of `in_features` weights has."""
        return 1 if self.group_size == -1 else -(-in_features // self.group_size)


@dataclass
class QuantizedWeight:
    """W[o, i] = scales[o, g(i)] * (codes[o, i] - zeros[o, g(i)]), with g(i) = i // group_size.

    codes: uint8 [out, in], 0 .. 2^bits - 1.
    scales: float16, bfloat16 or float32 [out, G].
    zeros: uint8 [out, G]; 2^(bits-1) everywhere when symmetric.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    bits: int
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]"""
        rows, columns = self.codes.shape
        return rows, columns

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The dense weight [out, in], computed in float32 and cast to `dtype`."""
        _, columns = self.codes.shape
        size = columns if self.group_size == -1 else self.group_size
        index = torch.arange(columns, device=self.codes.device) // size
        scales = self.scales.float()[:, index]
        zeros = self.zeros.float()[:, index]
        return ((self.codes.float() - zeros) * scales).to(dtype)


@dataclass(frozen=True)
class PackedTensor:
    """One tensor of a quantized linear on disk, and how it moves when the dense weight is split.

    `out` and `in_` are (dimension of this tensor, dense elements per element of it) for the dense
    weight's rows and columns, or None when the tensor does not extend along them. A dense interval
    [a, b) is the interval [a / per, b / per) here, so both ends must be multiples of `per`.
    """

    suffix: str  # "qweight", "weight_scale", ...
    dtype: str  # as in a safetensors header: "I32", "F16", ...
    shape: tuple[int, ...]
    out: tuple[int, int] | None
    in_: tuple[int, int] | None
    derived: Literal["", "group_index", "shape"] = ""
    # group_index: values count groups from the slice's own first group (GPTQ g_idx)
    # shape: the values are the dense shape itself (compressed-tensors weight_shape)
