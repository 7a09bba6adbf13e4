"""What a model is, in a few figures for people."""

from __future__ import annotations

import math
from typing import Any

from llmkit.checkpoint.source import Checkpoint
from llmkit.model.families import model_spec
from llmkit.model.layout import parameters


def model_card(checkpoint: Checkpoint) -> dict[str, Any]:
    """Architecture, size and quantization, JSON-ready. Raises InputError for an architecture llmkit does not know."""
    spec = model_spec(checkpoint.config)
    quantization = checkpoint.quantization
    quantized = "GGUF, dequantized" if checkpoint.kind == "gguf" else None
    if quantization:
        labels = [scheme.label for scheme in quantization.schemes]
        quantized = f"{'; '.join(labels)} ({quantization.format})"
    return {
        "architecture": spec.architecture,
        "parameters": sum(math.prod(parameter.shape) for parameter in parameters(spec)),  # tied embeddings once
        "layers": len(spec.layers),
        "hidden": spec.hidden,
        "heads": spec.heads,
        "kv_heads": spec.kv_heads,
        "experts": spec.experts.count if spec.experts else None,
        "vocab": spec.vocab,
        "model_limit": spec.max_positions,
        "quantization": quantized,
        "layout": {kind: (checkpoint.layout or {}).get(kind, 1) for kind in ("tp", "pp", "ep")},
    }
