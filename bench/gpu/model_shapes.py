"""Models of random weights in the shapes of real ones: nothing is read or downloaded."""

from __future__ import annotations

from typing import Any

import torch

from llmkit.checkpoint.quantized_weight import QuantizedWeight, Scheme
from llmkit.kernels.activation_quant import FP8
from llmkit.kernels.fused_experts import copy_to_expert_stack
from llmkit.model.decoder import Decoder
from llmkit.model.linear import ActivationQuant, Linear, serving_linear
from llmkit.model.parameter_table import parameters
from llmkit.model.spec import ModelSpec

BLOCK_SIZE = 16  # tokens of a block of the KV cache

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _config(
    architecture: str,
    kind: str,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    **more: Any,
) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 8192,
        **more,
    }


MODEL_CONFIGS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": _config(
        "LlamaForCausalLM", "llama", 576, 1536, 30, 9, 3, vocab_size=49152, tie_word_embeddings=True
    ),
    "Qwen3-0.6B": _config(
        "Qwen3ForCausalLM",
        "qwen3",
        1024,
        3072,
        28,
        16,
        8,
        vocab_size=151936,
        head_dim=128,
        tie_word_embeddings=True,
    ),
    "Qwen3-8B": _config(
        "Qwen3ForCausalLM", "qwen3", 4096, 12288, 36, 32, 8, vocab_size=151936, head_dim=128
    ),
    "Llama-3.1-8B": _config(
        "LlamaForCausalLM",
        "llama",
        4096,
        14336,
        32,
        32,
        8,
        vocab_size=128256,
        rope_theta=500000.0,
        rope_scaling=LLAMA3_ROPE,
    ),
    "Qwen3-30B-A3B": _config(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        2048,
        6144,
        48,
        32,
        4,
        vocab_size=151936,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
    ),
}


def tiny_config(config: dict[str, Any]) -> dict[str, Any]:
    """The same family with two small layers, to try the benchmarks on a CPU."""
    small = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 512,
    }
    if "num_experts" in config:
        small |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    return config | small


WEIGHT_SCHEMES: dict[str, Scheme | None] = {
    "bf16": None,
    "fp8": Scheme(8, kind="float", inputs="token"),
    "int8": Scheme(8, inputs="token"),
    "int4": Scheme(4, 128),
    "fp8-blocks": Scheme(8, 128, kind="float", inputs="group", block_rows=128),
    "mxfp8": Scheme(8, 32, kind="float", inputs="group", scale_format="e8m0"),
    "mxfp4": Scheme(4, 32, kind="float", scale_format="e8m0"),
    "nvfp4": Scheme(4, 16, kind="float", scale_format="e4m3"),
}


def product_type(weights: str) -> str:
    """The type whose products a GPU computes with these weights: "bf16", "fp8" or "int8".

    weights: a key of WEIGHT_SCHEMES.
    """
    scheme = WEIGHT_SCHEMES[weights]
    return "bf16" if scheme is None or scheme.input_type is None else scheme.input_type


def scale_bytes(scheme: Scheme) -> int:
    """Bytes of a scale as GPU kernels hold it."""
    return 1 if scheme.is_fp4 else 4


def random_model(
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    scheme: Scheme | None = None,
    seed: int = 0,
) -> Decoder:
    """A decoder with small random weights, made on the device.

    scheme: quantizes the linear layers, experts excepted; None: no quantization.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def weights(shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype, device=device)
        return torch.randn(shape, dtype=dtype, device=device, generator=generator).mul_(0.02)

    rows = parameters(spec)
    expert_stacks: dict[str, list[torch.Tensor]] = {}
    linears: dict[str, Linear] = {}
    for row in rows:
        if scheme and row.is_linear and row.expert is None:
            activation_quant = ActivationQuant.of(scheme)
            linears[row.module] = serving_linear(
                [random_weight(row.shape, scheme, device)], None, activation_quant, dtype, device
            )
    tensors = {
        row.name: weights(row.shape)
        for row in rows
        if row.expert is None and row.module not in linears
    }
    for row in rows:
        if row.expert is not None and spec.moe is not None:
            tensors[row.name] = copy_to_expert_stack(
                expert_stacks, row.name, weights(row.shape), spec.moe.num_experts
            )
    return Decoder(spec, tensors, None, linears)


def random_weight(shape: tuple[int, ...], scheme: Scheme, device: torch.device) -> QuantizedWeight:
    """A random quantized weight [out, in] with small scales."""
    out_features, in_features = shape
    q = torch.randint(0, 1 << scheme.bits, (out_features, in_features), device=device)
    # FP8 bit patterns below 120 are finite.
    q = (q % 120).to(torch.uint8).view(FP8) if scheme.is_fp8 else q.to(torch.uint8)
    scale = 2.0**-10 if scheme.scale_format == "e8m0" else 1e-3
    scales = torch.full((out_features, scheme.groups(in_features)), scale, device=device)
    zeros = torch.full(scales.shape, scheme.half, dtype=torch.uint8, device=device)
    has_global_scale = scheme.scale_format == "e4m3"
    global_scale = torch.full((1,), scale, device=device) if has_global_scale else None
    return QuantizedWeight(q, scales, zeros, scheme, None, global_scale)
