"""Multi-head latent attention in a decoder layer (DeepSeek V2 and V3; kernels/latent_attention.py).

A model that is loaded for serving computes long parts of prompts in the expanded form, and other
tokens in the absorbed one (see `kernels.latent_attention.mla_attention`). Where linear layers are
dense, for calibration and learned rounding, the expanded form runs: there `kv_b` is a linear layer
like others, whose inputs can be observed. Inputs of `kv_b` are never rounded.

Legend: T tokens, H hidden, N heads; the others are those of kernels/latent_attention.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from llmkit.kernels.attention_metadata import AttentionBatch
from llmkit.kernels.cpu import cpu_kernels
from llmkit.kernels.elementwise import apply_rotary_emb_, rms_norm, scale_tokens_
from llmkit.kernels.input_quant import LinearInput
from llmkit.kernels.latent_attention import (
    LatentProjection,
    expanded_attention,
    latent_projection,
    mla_attention,
)
from llmkit.kernels.latent_cache import LatentCache
from llmkit.model.linear import Linear
from llmkit.model.mixer_layer import MixerLayer
from llmkit.model.rope import CosSin
from llmkit.model.spec import MlaSpec, ModelSpec


class LatentLinear(Linear):
    """`kv_b` for serving, in both forms.

    `weight` is on the meta device: it has a shape but no values.
    """

    def __init__(self, weight: torch.Tensor, spec: ModelSpec, dtype: torch.dtype) -> None:
        """weight: [N * (P + V), L]. dtype: of the model."""
        assert spec.mla is not None
        super().__init__(torch.empty(weight.shape, device="meta"))
        self.projection: LatentProjection = latent_projection(
            weight, spec.num_heads, spec.mla.v_head_dim, dtype
        )


def mla_mixer(
    layer: MixerLayer,
    x: LinearInput,
    cos_sin: Mapping[str, CosSin],
    batch: AttentionBatch,
    cache: LatentCache,
) -> torch.Tensor:
    """x: [T, H], normalized. Returns the update of the residual, [T, H].

    A rank has some of the heads: its update is a part of the sum over the ranks.
    """
    spec = layer.spec
    mla = spec.mla
    assert mla is not None
    rope = cos_sin["global"]
    metadata = batch.metadata(None)
    qkv = layer.linears["attn.qkv_a"](x)
    q, kv = qkv.tensor_split((qkv.shape[1] - mla.latent_dim,), dim=1)
    q = _queries(layer, mla, q).view(len(q), spec.num_heads, mla.qk_head_dim)
    rotated = q[:, :, mla.qk_nope_head_dim :]
    apply_rotary_emb_(rotated, rope.cos, rope.sin, spec.rope_interleaved)
    if rope.query_scale is not None:
        scale_tokens_(q, rope.query_scale)
    latents = _latents(layer, mla, kv, rope)
    cache.store(latents.detach(), metadata.slot_mapping)
    kv_b = layer.linears["attn.kv_b"]
    rank = mla.kv_lora_rank
    if isinstance(kv_b, LatentLinear):
        out = mla_attention(q, kv_b.projection, cache, batch, spec.attention_scale, rank)
    else:
        out = expanded_attention(
            q, kv_b, latents, cache, metadata, spec.attention_scale, rank, mla.v_head_dim
        )
    return layer.linears["attn.o"](out.flatten(1))


def _queries(layer: MixerLayer, mla: MlaSpec, q: torch.Tensor) -> torch.Tensor:
    """The queries [T, N * (P + R)], contiguous, from the first rows of the first linear layer."""
    if mla.q_lora_rank is not None:
        return layer.linears["attn.q_b"](_norm(layer, "attn.q_a_norm", mla, q))
    if not cpu_kernels.supports(q):
        return q.contiguous()
    out = torch.empty(q.shape)
    cpu_kernels.copy_columns(q, out, 0)
    return out


def _latents(layer: MixerLayer, mla: MlaSpec, kv: torch.Tensor, rope: CosSin) -> torch.Tensor:
    """The latents [T, L + R] of new tokens, normalized and rotated. `kv` may be overwritten."""
    rank = mla.kv_lora_rank
    interleaved = layer.spec.rope_interleaved
    if cpu_kernels.supports(kv):  # in place
        _norm(layer, "attn.kv_a_norm", mla, kv[:, :rank])
        apply_rotary_emb_(kv[:, None, rank:], rope.cos, rope.sin, interleaved)
        return kv
    normed = _norm(layer, "attn.kv_a_norm", mla, kv[:, :rank])
    rotated = kv[:, None, rank:].clone()
    apply_rotary_emb_(rotated, rope.cos, rope.sin, interleaved)
    return torch.cat((normed, rotated[:, 0]), dim=1)


def _norm(layer: MixerLayer, name: str, mla: MlaSpec, x: torch.Tensor) -> torch.Tensor:
    """The RMS norm `name` of x, columns of a tensor. The values of x may be overwritten."""
    weight = layer.norms[name]
    if cpu_kernels.supports(x):
        cpu_kernels.norm_heads_(x[:, None], weight.float(), mla.norm_eps, False)
        return x
    return rms_norm(x.contiguous(), weight, mla.norm_eps)
