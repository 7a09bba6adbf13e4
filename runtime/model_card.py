"""The facts about a model that a person wants to see."""

from __future__ import annotations

import math
from typing import Any

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.model.families import checkpoint_spec
from llmkit.model.parameter_table import parameters


def model_card(checkpoint: Checkpoint) -> dict[str, Any]:
    """Architecture, size and quantization, JSON-ready.

    Raises InputError for an unknown architecture.
    """
    spec = checkpoint_spec(checkpoint)
    quantization = checkpoint.quantization
    quantization_text = "GGUF, dequantized" if checkpoint.file_format == "gguf" else None
    if quantization:
        labels = [scheme.label for scheme in quantization.schemes]
        quantization_text = f"{'; '.join(labels)} ({quantization.format})"
    return {
        "architecture": spec.architecture,
        # Tied embeddings count once.
        "parameters": sum(math.prod(row.shape) for row in parameters(spec)),
        "layers": len(spec.layers),
        "hidden": spec.hidden_size,
        "heads": spec.num_heads,
        "kv_heads": spec.num_kv_heads,
        "experts": spec.moe.num_experts if spec.moe else None,
        "vocab": spec.vocab_size,
        "model_limit": spec.max_position_embeddings,
        "quantization": quantization_text,
        "layout": {kind: (checkpoint.layout or {}).get(kind, 1) for kind in ("tp", "pp", "ep")},
    }
