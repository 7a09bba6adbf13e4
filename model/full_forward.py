"""Runs whole sequences in one forward pass, without a scheduler, for calibration and evaluation."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from llmkit.kernels.attention_metadata import AttentionBatch
from llmkit.model.language_model import LanguageModel, scratch_layer_caches


def make_batch(model: LanguageModel, lengths: list[int]) -> tuple[torch.Tensor, AttentionBatch]:
    """Positions [T] and the batch for complete sequences of these lengths, one after the other."""
    offset = model.spec.rope_offset(max(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths]) + offset
    return positions.to(model.device), AttentionBatch.for_sequences(lengths, device=model.device)


@torch.inference_mode()
def hidden_states(model: LanguageModel, sequences: list[torch.Tensor]) -> torch.Tensor:
    """Hidden states [T, H] after the last norm. sequences: int64 token ids, one [n] each."""
    positions, batch = make_batch(model, [len(sequence) for sequence in sequences])
    caches = scratch_layer_caches(model, model.spec, batch.num_blocks, batch.block_size)
    tokens = torch.cat(sequences).to(model.device)
    return model(tokens, positions, batch, caches)


@torch.inference_mode()
def window_logits(model: LanguageModel, windows: torch.Tensor) -> Iterator[torch.Tensor]:
    """Logits float32 [L, vocab] of each window of token ids [n, L], one window at a time."""
    for window in windows:
        yield model.logits(hidden_states(model, [window]))
