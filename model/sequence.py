"""Whole sequences through a model at once, for calibration, scoring and tests: no scheduler, no sampling."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from llmkit.kernels.attention import AttentionBatch
from llmkit.model.decoder import Decoder


def packed(model: Decoder, lengths: list[int]) -> tuple[torch.Tensor, AttentionBatch]:
    """Positions [T] and the batch for complete sequences of these lengths, one after the other."""
    offset = model.spec.rope_offset(max(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths]) + offset
    return positions.to(model.device), AttentionBatch.for_sequences(lengths, device=model.device)


@torch.inference_mode()
def hidden_states(model: Decoder, sequences: list[torch.Tensor]) -> torch.Tensor:
    """Hidden states [T, H] after the last norm, for complete sequences of token ids [n] each.

    All layers share one scratch cache: a layer reads only what it has just written.
    """
    positions, batch = packed(model, [len(s) for s in sequences])
    scratch = model.new_cache(batch.blocks, batch.block_size)
    return model(torch.cat(sequences).to(model.device), positions, batch, [scratch] * len(model.layers))


@torch.inference_mode()
def logits_of(model: Decoder, windows: torch.Tensor) -> Iterator[torch.Tensor]:
    """Logits float32 [L, vocab] of each window of token ids [n, L], one at a time."""
    for window in windows:
        yield model.logits(hidden_states(model, [window]))
