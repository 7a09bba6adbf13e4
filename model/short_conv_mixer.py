"""The mixer of gated short convolutions (LFM2)."""

from __future__ import annotations

import torch

from llmkit.kernels.causal_conv import gated_short_conv
from llmkit.kernels.input_quant import LinearInput
from llmkit.kernels.recurrent_state import RecurrentBatch, RecurrentState
from llmkit.model.mixer_layer import MixerLayer


def short_conv(
    layer: MixerLayer, x: LinearInput, batch: RecurrentBatch, state: RecurrentState
) -> torch.Tensor:
    """A projection to B, C and x, the convolution of B * x times C, and a projection back.

    See `RecurrentMixer`.
    """
    mixed = gated_short_conv(
        layer.linears["conv.in_proj"](x),
        layer.vectors["conv.conv.weight"],
        layer.vectors.get("conv.conv.bias"),
        state,
        batch,
    )
    return layer.linears["conv.out"](mixed)
