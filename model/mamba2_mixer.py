"""The mixer of Mamba 2 layers (arXiv 2405.21060)."""

from __future__ import annotations

import torch
from torch.nn.functional import silu

from llmkit.kernels.causal_conv import causal_conv
from llmkit.kernels.input_quant import LinearInput
from llmkit.kernels.mamba2 import gated_group_rms_norm, mamba2_scan
from llmkit.kernels.recurrent_state import RecurrentBatch, RecurrentState
from llmkit.model.mixer_layer import MixerLayer
from llmkit.model.spec import Mamba2Spec


def mamba2(
    layer: MixerLayer, x: LinearInput, batch: RecurrentBatch, state: RecurrentState
) -> torch.Tensor:
    """A projection, a convolution of x, B and C, the state space, and a gated norm.

    See `RecurrentMixer`.
    """
    mamba = layer.spec.recurrent
    assert isinstance(mamba, Mamba2Spec)
    projected = layer.linears["mamba.in_proj"](x)
    sizes = (mamba.intermediate_size, mamba.conv_channels, mamba.num_heads)
    z, xbc, dt = projected.split(sizes, dim=1)
    conv = layer.vectors["mamba.conv.weight"]
    conv_bias = layer.vectors.get("mamba.conv.bias")
    xbc = causal_conv(xbc, conv, conv_bias, state, batch, silu=True)
    mixed = mamba2_scan(
        xbc,
        dt,
        layer.vectors["mamba.A_log"],
        layer.vectors["mamba.D"],
        layer.vectors["mamba.dt_bias"],
        mamba.n_groups,
        mamba.time_step_limit,
        state,
        batch,
    )  # [T, heads, head_dim]
    return layer.linears["mamba.out"](_gated_norm(layer, mamba, mixed.flatten(1), z))


def _gated_norm(
    layer: MixerLayer, mamba: Mamba2Spec, x: torch.Tensor, z: torch.Tensor
) -> torch.Tensor:
    """The norm of x * silu(z), over each of the model's groups. x, z: [T, intermediate_size]."""
    weight = layer.norms["mamba.norm"] if mamba.gated_norm else None
    eps = layer.spec.rms_norm_eps
    rank = layer.spec.rank
    full_mamba = layer.spec.full_model.recurrent
    assert isinstance(full_mamba, Mamba2Spec)
    if weight is None or rank is None or full_mamba.norm_groups % rank.tp_size == 0:
        return gated_group_rms_norm(x, z, weight, eps, mamba.norm_groups)
    # Several ranks have parts of a group.
    ranks_per_group = rank.tp_size // full_mamba.norm_groups
    group = rank.tp_rank // ranks_per_group
    gated = x.float() * silu(z.float())
    square_sums = gated.new_zeros(len(gated), full_mamba.norm_groups)
    square_sums[:, group] = gated.square().sum(1)
    square_sums = layer.parallel_group.all_reduce(square_sums)
    mean = square_sums[:, group, None] / (gated.shape[1] * ranks_per_group)
    return (gated * torch.rsqrt(mean + eps) * weight.float()).to(x.dtype)
