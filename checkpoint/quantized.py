"""A quantized weight in memory, whatever the format it came from or goes to.

Legend: `out` rows, `in` columns, `G` groups along `in`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch

Format = Literal["gptq", "awq", "compressed-tensors"]


@dataclass(frozen=True)
class Scheme:
    """How the weight of one linear layer is stored, and what its inputs are rounded to while it runs."""

    bits: int
    group_size: int = -1  # along `in`; -1: one scale per output row
    symmetric: bool = True
    kind: Literal["int", "float"] = "int"  # float: FP8 e4m3
    inputs: Literal["none", "token", "tensor"] = "none"  # not at all, with a scale per token, with a stored scale

    def groups(self, in_features: int) -> int:
        """How many groups a row of `in_features` weights has."""
        return 1 if self.group_size == -1 else -(-in_features // self.group_size)

    @property
    def label(self) -> str:
        """For people: "INT4 in groups of 64", "INT8, inputs too"."""
        name = "FP8" if self.kind == "float" else f"INT{self.bits}"
        grid = "" if self.group_size == -1 else f" in groups of {self.group_size}"
        zeros = "" if self.symmetric else " with zero points"
        inputs = {"none": "", "token": ", inputs too", "tensor": ", inputs too by a fixed scale"}[self.inputs]
        return name + grid + zeros + inputs

    @property
    def half(self) -> int:
        """The code that stands for zero on a symmetric grid; FP8 has no offset."""
        return 1 << (self.bits - 1) if self.kind == "int" else 0


@dataclass(frozen=True)
class QuantizationConfig:
    """How a checkpoint's linear weights are stored; the parsed `quantization_config` of its config.json.

    Modules have checkpoint names ("model.layers.0.mlp.up_proj"). `ignore` and `overrides` hold names, or regular
    expressions after "re:"; an override comes before `scheme`, and `ignore` before both.
    """

    format: Format
    scheme: Scheme | None  # of linear layers that no override names; None: they are not quantized
    ignore: tuple[str, ...] = ("lm_head",)
    overrides: tuple[tuple[str, Scheme], ...] = ()
    kv: Literal["", "fp8", "int8"] = ""  # what keys and values are rounded to, with a stored scale per layer
    method: str = ""  # what chose the codes, when the checkpoint says so (gptq, rtn, int8)
    damp: float = 0.01  # GPTQ: the share of the mean diagonal that was added to the Hessian; only told, never used

    def scheme_of(self, module: str) -> Scheme | None:
        """The scheme of a linear layer; None when it is not quantized."""
        if any(_names(entry, module) for entry in self.ignore):
            return None
        return next((scheme for entry, scheme in self.overrides if _names(entry, module)), self.scheme)

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """The distinct schemes, the general one first."""
        found = [self.scheme] if self.scheme else []
        return tuple(dict.fromkeys([*found, *(scheme for _, scheme in self.overrides)]))


def _names(entry: str, module: str) -> bool:
    return re.match(entry[3:], module) is not None if entry.startswith("re:") else entry == module


@dataclass
class QuantizedWeight:
    """W[o, i] = scales[o, g(i)] * (codes[o, i] - zeros[o, g(i)]), with g(i) = i // group_size.

    codes: uint8 [out, in], 0 .. 2^bits - 1; float8_e4m3fn for FP8.
    scales: float16, bfloat16 or float32 [out, G].
    zeros: uint8 [out, G]; `scheme.half` everywhere when symmetric.
    input_scale: float32 [1] when the scheme says that one is stored for the inputs.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    scheme: Scheme
    input_scale: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]"""
        rows, columns = self.codes.shape
        return rows, columns

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The dense weight [out, in], computed in float32 and cast to `dtype`."""
        rows, columns = self.shape
        size = columns if self.scheme.group_size == -1 else self.scheme.group_size
        dense = self.codes.float()
        if columns % size:  # the last group is short
            index = torch.arange(columns, device=dense.device) // size
            return dense.sub_(self.zeros.float()[:, index]).mul_(self.scales.float()[:, index]).to(dtype)
        groups = dense.view(rows, -1, size)
        groups.sub_(self.zeros.float().unsqueeze(2)).mul_(self.scales.float().unsqueeze(2))
        return dense.to(dtype)

    def rows(self, rows: slice) -> QuantizedWeight:
        """Some of the rows."""
        return QuantizedWeight(self.codes[rows], self.scales[rows], self.zeros[rows], self.scheme, self.input_scale)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same weight on another device."""
        scale = None if self.input_scale is None else self.input_scale.to(device)
        return QuantizedWeight(self.codes.to(device), self.scales.to(device), self.zeros.to(device), self.scheme, scale)


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
