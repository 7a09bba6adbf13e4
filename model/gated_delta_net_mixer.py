"""The mixer of gated delta net layers (Qwen3-Next, Qwen3.5; arXiv 2412.06464)."""

from __future__ import annotations

import torch

from llmkit.kernels.causal_conv import causal_conv
from llmkit.kernels.gated_delta_net import gated_delta_rule, gated_rms_norm
from llmkit.kernels.input_quant import LinearInput
from llmkit.kernels.recurrent_state import RecurrentBatch, RecurrentState
from llmkit.model.mixer_layer import MixerLayer
from llmkit.model.spec import GatedDeltaNetSpec


def gated_delta_net(
    layer: MixerLayer, x: LinearInput, batch: RecurrentBatch, state: RecurrentState
) -> torch.Tensor:
    """Projections, a convolution of queries, keys and values, the delta rule, a gated norm.

    See `RecurrentMixer`.
    """
    gdn = layer.spec.recurrent
    assert isinstance(gdn, GatedDeltaNetSpec)
    qkvz = layer.linears["gdn.qkvz"](x)
    ba = layer.linears["gdn.ba"](x)
    conv = layer.vectors["gdn.conv.weight"]
    qkv = causal_conv(qkvz[:, : gdn.conv_channels], conv, None, state, batch, silu=True)
    mixed = gated_delta_rule(
        qkv,
        ba,
        layer.vectors["gdn.A_log"],
        layer.vectors["gdn.dt_bias"],
        gdn.num_k_heads,
        state,
        batch,
    )  # [T, heads, V]
    z = qkvz[:, gdn.conv_channels :].unflatten(1, (gdn.num_v_heads, gdn.head_v_dim))
    gated = gated_rms_norm(mixed, z, layer.norms["gdn.norm"], layer.spec.rms_norm_eps)
    return layer.linears["gdn.out"](gated.flatten(1))
