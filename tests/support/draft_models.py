"""Draft models that often agree with a model."""

from __future__ import annotations

from pathlib import Path

import torch

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.model.decoder import Decoder
from llmkit.model.weight_loader import load_model


def similar_decoder(model: Path) -> Decoder:
    """The model of a checkpoint, disturbed."""
    other = load_model(open_checkpoint(model), torch.float32)
    generator = torch.Generator().manual_seed(1)
    other.final_norm.add_(torch.randn(other.final_norm.shape, generator=generator) * 0.2)
    return other
