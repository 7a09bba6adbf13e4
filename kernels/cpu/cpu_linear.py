"""Linear layers with packed weights on a CPU: y = x W' + b, W [out, in] in 32, 16, 8 or 4 bits.

Each class takes a weight when it is constructed, and is called with x [..., in]. It returns
[..., out] in x's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from llmkit.common.options import CpuActivations
from llmkit.kernels.cpu import cpu_kernels
from llmkit.kernels.cpu.cpu_kernels import (
    DEPTH_MULTIPLE,
    GROUP_MULTIPLE,
    PANEL_WIDTH,
    InputType,
    PackedWeight,
)
from llmkit.kernels.input_quant import InputQuant, LinearInput, QuantizedInput


class CpuLinear:
    """A linear layer with the compiled kernels: weights as stored, inputs and sums in float32.

    weights: parts of the weight, [rows, in] each, in the order of their rows. bias: [out].
    inputs: what inputs are rounded to before the product with a weight that supports it; auto: the
    type that suits the weight (`cpu_kernels.AUTO_INPUTS`). input_scale: float32 [1], where `inputs`
    has a stored scale.
    """

    def __init__(
        self,
        weights: Sequence[PackedWeight],
        bias: torch.Tensor | None = None,
        *,
        inputs: CpuActivations | InputType = "float32",
        input_scale: torch.Tensor | None = None,
    ) -> None:
        # For each part: its weight, its padded bias, its first output, and its inputs.
        self._segments: list[tuple[PackedWeight, torch.Tensor | None, int, InputType]] = []
        self.in_features = weights[0].shape[1]
        self.out_features = 0
        self._input_scale = None if input_scale is None else input_scale.float().contiguous()
        for weight in weights:
            first = self.out_features
            rows = weight.shape[0]
            padded_bias = None
            if bias is not None:
                padded_bias = pad(bias[first : first + rows].float(), (0, -rows % PANEL_WIDTH))
            rounded_to = _rounded_to(weight, inputs)
            held = _compressed(weight, rounded_to)
            self._segments.append((held, padded_bias, first, rounded_to))
            self.out_features += rows
        self.nbytes = sum(weight.nbytes for weight, *_ in self._segments)
        # How the norm before may round the inputs; None: it must not.
        self.input_quant: InputQuant | None = None
        if all(_takes_rounded(weight, rounded_to) for weight, _, _, rounded_to in self._segments):
            self.input_quant = InputQuant(torch.bfloat16)

    @property
    def only_segment(self) -> tuple[PackedWeight, torch.Tensor | None, InputType] | None:
        """The weight, the padded bias and the inputs; None where the weight has several parts."""
        if len(self._segments) != 1:
            return None
        weight, bias, _, inputs = self._segments[0]
        return weight, bias, inputs

    @property
    def fields(self) -> list[int]:
        """The fields of the only segment, as the C code takes them (`ExpertLinear`)."""
        assert self.only_segment is not None
        weight, bias, inputs = self.only_segment
        weight_type, scale_type, *addresses, cols, depth, group_size = weight.kernel_arguments
        input_type = cpu_kernels.INPUT_TYPES[inputs]
        return [
            weight_type,
            input_type,
            scale_type,
            *addresses,
            cpu_kernels.address(bias),
            cpu_kernels.address(self._input_scale),
            cols,
            depth,
            group_size,
        ]

    def __call__(self, x: LinearInput) -> torch.Tensor:
        """See `LinearKernel`. x: also as `input_quant` says."""
        if isinstance(x, QuantizedInput):
            y = torch.empty(len(x), self.out_features)
            for weight, bias, first, inputs in self._segments:
                cpu_kernels.linear(x.values, weight, bias, y, first, inputs)
            return y
        is_plain = x.dtype is torch.float32 and x.dim() == 2 and x.stride(1) == 1
        rows = x if is_plain else x.reshape(-1, x.shape[-1]).float().contiguous()
        y = torch.empty(rows.shape[0], self.out_features)
        for weight, bias, first, inputs in self._segments:
            cpu_kernels.linear(rows, weight, bias, y, first, inputs, self._input_scale)
        return y if is_plain else y.view(*x.shape[:-1], self.out_features).to(x.dtype)


def _rounded_to(weight: PackedWeight, inputs: CpuActivations | InputType) -> InputType:
    """What the inputs of a weight are rounded to."""
    if inputs == "auto" or inputs in ("float32", "bfloat16", "int8"):
        return cpu_kernels.inputs_for(weight, inputs)
    assert cpu_kernels.supports_inputs(weight, inputs)
    return inputs


def _compressed(weight: PackedWeight, rounded_to: InputType) -> PackedWeight:
    """The weight, compressed without loss if it is bfloat16 and the level reads that."""
    has_scales = weight.scales is not None or weight.offsets is not None
    if has_scales or weight.is_compressed or not cpu_kernels.compresses(weight.dtype, rounded_to):
        return weight
    return weight.compressed()


def _takes_rounded(weight: PackedWeight, rounded_to: InputType) -> bool:
    """Whether a weight is multiplied by inputs that the norm before has rounded to bfloat16."""
    depth = weight.shape[1]
    num_groups = 1 if weight.scales is None else len(weight.scales)
    whole_rows = depth % DEPTH_MULTIPLE == 0
    whole_groups = num_groups == 1 or depth // num_groups % GROUP_MULTIPLE == 0
    return rounded_to == "bfloat16" and whole_rows and whole_groups and weight.offsets is None
