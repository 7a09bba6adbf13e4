"""What a checkpoint is, in figures: for `llmkit inspect` and for whoever plans memory."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict
from typing import Any

from llmkit.checkpoint.quantized import QuantizationConfig, Scheme
from llmkit.checkpoint.safetensors_header import byte_count
from llmkit.checkpoint.source import Checkpoint
from llmkit.model.families import model_spec
from llmkit.model.layout import parameters
from llmkit.model.loader import stored_tensors
from llmkit.model.spec import ModelSpec

GROUP_SIZES = (128, 64, 32)  # what INT4 is estimated with: the largest that divides every layer, else per row
INT8 = QuantizationConfig("compressed-tensors", Scheme(8))


def inspect_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Family, sizes, formats and memory of a checkpoint, as one JSON-ready document.

    Bytes are of weights: `disk_bytes` as stored, `weight_bytes` as llmkit would store them at each precision.
    Raises InputError for an architecture llmkit does not know.
    """
    spec = model_spec(checkpoint.config)
    quantization = checkpoint.quantization
    manifest = checkpoint.manifest
    return {
        "reference": checkpoint.reference,
        "kind": checkpoint.kind,
        "architecture": spec.architecture,
        "model_type": checkpoint.config.get("model_type"),
        "parameters": parameter_count(spec),
        "layers": len(spec.layers),
        "hidden": spec.hidden,
        "heads": spec.heads,
        "kv_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "intermediate": spec.intermediate,
        "experts": spec.experts.count if spec.experts else None,
        "vocab": spec.vocab,
        "tied_embeddings": spec.tied,
        "max_positions": spec.max_positions,
        "sliding_window": next((layer.window for layer in spec.layers if layer.window), None),
        "disk_bytes": checkpoint.weight_bytes,
        "stored_dtypes": dict(Counter(info.dtype for info in checkpoint.tensors.values())),
        "quantization": None if quantization is None else {
            "format": quantization.format, "method": quantization.method or None, "kv": quantization.kv or None,
            "schemes": [asdict(scheme) | {"label": scheme.label} for scheme in quantization.schemes],
        },
        "written_by": None if manifest is None else manifest.get("tool"),
        "layout": checkpoint.layout,
        "weight_bytes": weight_bytes(spec),
        "kv_bytes_per_token": {"fp32": spec.kv_elements_per_token * 4, "bf16": spec.kv_elements_per_token * 2},
    }  # fmt: skip


def parameter_count(spec: ModelSpec) -> int:
    """The number of weights, tied embeddings counted once."""
    return sum(math.prod(parameter.shape) for parameter in parameters(spec))


def weight_bytes(spec: ModelSpec) -> dict[str, int]:
    """Bytes of all weights at each precision; quantized ones keep embeddings, norms and biases in 16 bits."""
    count = parameter_count(spec)
    inputs = {parameter.shape[1] for parameter in parameters(spec) if parameter.linear}
    group = next((size for size in GROUP_SIZES if all(columns % size == 0 for columns in inputs)), -1)
    int4 = QuantizationConfig("gptq", Scheme(4, group))
    return {"fp32": count * 4, "bf16": count * 2, "int8": _stored_bytes(spec, INT8), "int4": _stored_bytes(spec, int4)}


def _stored_bytes(spec: ModelSpec, quantization: QuantizationConfig) -> int:
    stored = stored_tensors(spec, quantization).values()
    return sum(byte_count(tensor.dtype or "BF16", tensor.shape) for tensor in stored)
