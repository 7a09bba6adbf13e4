"""What `llmkit inspect` shows about a checkpoint: its architecture, sizes, formats and memory."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict
from typing import Any

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.quantized_weight import QuantizationConfig, Scheme
from llmkit.checkpoint.safetensors_header import byte_count
from llmkit.model.checkpoint_tensors import carried_summary, checkpoint_tensors
from llmkit.model.families import checkpoint_spec, support, unstack_experts
from llmkit.model.parameter_table import parameters
from llmkit.model.spec import ATTENTION_MIXERS, ModelSpec

# INT4 is estimated with the largest of these group sizes that divides every layer, else per row.
GROUP_SIZES = (128, 64, 32)
INT8 = QuantizationConfig("compressed-tensors", Scheme(8))


def inspect_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """A JSON document about a checkpoint. The keys are an interface: programs read them.

    Bytes are of weights: `disk_bytes` as stored, `weight_bytes` as llmkit would store them at each
    precision. Raises InputError for an architecture that llmkit does not know.
    """
    spec = checkpoint_spec(checkpoint)
    manifest = checkpoint.manifest
    windows = [layer.sliding_window for layer in spec.layers if layer.sliding_window]
    return {
        "reference": checkpoint.reference,
        "kind": checkpoint.file_format,
        "architecture": spec.architecture,
        "support": support(spec)[0],
        "support_reason": support(spec)[1],
        "model_type": checkpoint.config.get("model_type"),
        "parameters": parameter_count(spec),
        "active_parameters": active_parameter_count(spec),
        "layers": len(spec.layers),
        "hidden": spec.hidden_size,
        "heads": spec.num_heads,
        "kv_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "intermediate": spec.intermediate_size,
        "attention": _attention_entries(spec),
        "recurrent": _recurrent_entry(spec),
        "shared_kv_layers": sum(layer.kv_shared_layer_offset > 0 for layer in spec.layers),
        "per_layer_input_size": spec.per_layer_input_size,
        "experts": spec.moe.num_experts if spec.moe else None,
        "moe": _moe_entry(spec),
        "vocab": spec.vocab_size,
        "tied_embeddings": spec.tie_word_embeddings,
        "max_positions": spec.max_position_embeddings,
        "sliding_window": windows[0] if windows else None,
        "disk_bytes": checkpoint.weight_bytes,
        "carried": carried_summary(checkpoint, spec),
        "stored_dtypes": dict(Counter(info.dtype for info in checkpoint.tensors.values())),
        "quantization": _quantization_entry(checkpoint.quantization),
        "written_by": None if manifest is None else manifest.get("tool"),
        "layout": checkpoint.layout,
        "weight_bytes": weight_bytes(spec),
        "kv_bytes_per_token": {
            "fp32": spec.kv_elements_per_token * 4,
            "bf16": spec.kv_elements_per_token * 2,
        },
    }


def _attention_entries(spec: ModelSpec) -> list[dict[str, Any]]:
    """The kinds of attention layers, in the order of their first layers.

    The keys and values of a layer with a sliding window are kept for the tokens in the window.
    """
    layers: Counter[tuple[int, int, int, int | None]] = Counter()
    kv_elements: Counter[tuple[int, int, int, int | None]] = Counter()
    for index, layer in enumerate(spec.layers):
        if layer.mixer not in ATTENTION_MIXERS:
            continue
        sizes = spec.for_layer(index)
        kind = (sizes.num_heads, sizes.num_kv_heads, sizes.head_dim, layer.sliding_window)
        layers[kind] += 1
        kv_elements[kind] += spec.kv_elements_of_layer(index)
    return [
        {
            "layers": count,
            "heads": kind[0],
            "kv_heads": kind[1],
            "head_dim": kind[2],
            "latent_dim": spec.mla.latent_dim if spec.mla else None,
            "sliding_window": kind[3],
            "kv_elements_per_token": kv_elements[kind],
        }
        for kind, count in layers.items()
    ]


def _recurrent_entry(spec: ModelSpec) -> dict[str, Any] | None:
    """The layers that keep a recurrent state; None when there are none.

    The state of a sequence has `heads` matrices of `key_dim` x `value_dim`, and the last inputs of
    the convolution.
    """
    others = (*ATTENTION_MIXERS, "none")
    layers = [layer.mixer for layer in spec.layers if layer.mixer not in others]
    if spec.recurrent is None or not layers:
        return None
    heads, key_dim, value_dim = spec.recurrent.state_shape
    return {
        "layers": len(layers),
        "mixer": layers[0],
        "heads": heads,
        "key_dim": key_dim,
        "value_dim": value_dim,
        "conv_channels": spec.recurrent.conv_channels,
        "conv_kernel_size": spec.recurrent.conv_kernel_size,
        "bytes_per_sequence": {
            "fp32": spec.recurrent_bytes_per_sequence(4),
            "bf16": spec.recurrent_bytes_per_sequence(2),
        },
    }


def _moe_entry(spec: ModelSpec) -> dict[str, Any] | None:
    moe = spec.moe
    if moe is None:
        return None
    return {
        "layers": sum(layer.is_moe for layer in spec.layers),
        "experts": moe.num_experts,
        "experts_per_token": moe.num_experts_per_tok,
        "intermediate": moe.intermediate_size,
        "shared_intermediate": moe.shared_intermediate_size or None,
        "router": moe.scoring,
        "correction_bias": moe.correction_bias is not None,
        "groups": moe.num_groups,
        "groups_per_token": moe.topk_groups,
        "stacked": moe.expert_stack is not None,
    }


def _quantization_entry(quantization: QuantizationConfig | None) -> dict[str, Any] | None:
    if quantization is None:
        return None
    return {
        "format": quantization.format,
        "method": quantization.method or None,
        "kv": quantization.kv or None,
        "schemes": [asdict(scheme) | {"label": scheme.label} for scheme in quantization.schemes],
    }


def parameter_count(spec: ModelSpec) -> int:
    """The number of weights. Tied embeddings count once."""
    return sum(math.prod(parameter.shape) for parameter in parameters(spec))


def active_parameter_count(spec: ModelSpec) -> int:
    """The number of weights without those of experts that a token does not use."""
    if spec.moe is None:
        return parameter_count(spec)
    of_experts = sum(math.prod(row.shape) for row in parameters(spec) if row.expert is not None)
    share = spec.moe.num_experts_per_tok / spec.moe.num_experts
    return parameter_count(spec) - round(of_experts * (1 - share))


def weight_bytes(spec: ModelSpec) -> dict[str, int]:
    """The bytes of all weights at each precision that `quantize` can write.

    Quantized precisions keep embeddings, norms and biases in 16 bits.
    """
    count = parameter_count(spec)
    in_features = {parameter.shape[1] for parameter in parameters(spec) if parameter.is_linear}
    group_size = -1
    for size in GROUP_SIZES:
        if all(columns % size == 0 for columns in in_features):
            group_size = size
            break
    int4 = QuantizationConfig("gptq", Scheme(4, group_size))
    quantized = unstack_experts(spec)
    return {
        "fp32": count * 4,
        "bf16": count * 2,
        "int8": _stored_bytes(quantized, INT8),
        "int4": _stored_bytes(quantized, int4),
    }


def _stored_bytes(spec: ModelSpec, quantization: QuantizationConfig) -> int:
    tensors = checkpoint_tensors(spec, quantization).values()
    return sum(byte_count(packed.dtype or "BF16", packed.shape) for _, packed in tensors)
