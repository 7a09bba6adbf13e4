"""A gated MLP on a CPU as one compiled kernel: y = down(act(gate(x)) * up(x)).

Legend: T tokens, H hidden, I intermediate size.
"""

from __future__ import annotations

import torch

from llmkit.kernels.cpu import cpu_kernels
from llmkit.kernels.cpu.cpu_kernels import ACTIVATIONS, PANEL_WIDTH, SWIGLU_CLAMPED
from llmkit.kernels.cpu.cpu_linear import CpuLinear
from llmkit.kernels.input_quant import LinearInput, QuantizedInput


class CpuMlp:
    """The outputs of gate and up stay in the processor's cache, and have the same bits."""

    def __init__(
        self,
        gate_up: CpuLinear,
        down: CpuLinear,
        activation: str,
        swiglu: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        """activation: of `cpu_kernels.ACTIVATIONS`, or "swiglu_clamped". swiglu: limit, alpha."""
        self._linears = torch.tensor([gate_up.fields, down.fields])
        self._kept = (gate_up, down)  # what the addresses point to
        self._hidden_size = down.out_features
        is_clamped = activation == "swiglu_clamped"
        self._activation = SWIGLU_CLAMPED if is_clamped else ACTIVATIONS[activation]
        self._swiglu = swiglu

    @staticmethod
    def supports(gate_up: CpuLinear, down: CpuLinear) -> bool:
        """Whether each has one weight, and gate and up consist of whole panels."""
        has_panels = gate_up.out_features % (2 * PANEL_WIDTH) == 0
        return has_panels and gate_up.only_segment is not None and down.only_segment is not None

    @staticmethod
    def takes(x: LinearInput) -> bool:
        """Whether `__call__` takes these inputs."""
        if isinstance(x, QuantizedInput):
            return True
        return cpu_kernels.supports(x) and cpu_kernels.has_compact_rows(x)

    def __call__(self, x: LinearInput) -> torch.Tensor:
        """x: float32 [T, H], or as gate_up's `input_quant` says. Returns [T, H]."""
        assert cpu_kernels.library is not None
        y = torch.empty(len(x), self._hidden_size)
        is_rounded = isinstance(x, QuantizedInput)
        values = x.values if isinstance(x, QuantizedInput) else x
        cpu_kernels.library.gated_mlp(
            values.data_ptr(),
            values.stride(0),
            y.data_ptr(),
            len(x),
            self._linears.data_ptr(),
            self._activation,
            is_rounded,
            *self._swiglu,
        )
        return y
