"""Sequences in one paged cache, to compare a model's logits with transformers'."""

from __future__ import annotations

import torch

from llmkit.kernels.attention_metadata import AttentionBatch
from llmkit.kernels.recurrent_state import NO_ROW, RecurrentBatch
from llmkit.model.language_model import LanguageModel, new_layer_caches
from support.tiny_families import COMMON

BLOCK = 16


def tokens_of(length: int, seed: int) -> torch.Tensor:
    """Random token ids [length]."""
    return torch.randint(
        3, COMMON["vocab_size"], (length,), generator=torch.Generator().manual_seed(seed)
    )


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Assert that logits are equal but for rounding."""
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


class Sequences:
    """Several sequences in one paged cache, advanced by any number of tokens at a time."""

    def __init__(self, model: LanguageModel, sequences: list[torch.Tensor]) -> None:
        self.model = model
        self.sequences = sequences
        self.done = [0] * len(sequences)
        per = 128 // BLOCK
        order = torch.randperm(
            per * len(sequences), generator=torch.Generator().manual_seed(1)
        ).tolist()
        self.tables = [order[i * per : (i + 1) * per] for i in range(len(sequences))]
        # A sequence has two rows of recurrent states: it reads one and writes the other.
        self.rows = [NO_ROW] * len(sequences)
        self.caches = new_layer_caches(
            model, lambda _: per * len(sequences), BLOCK, num_state_rows=2 * len(sequences)
        )

    @torch.inference_mode()
    def step(self, counts: list[int]) -> dict[int, torch.Tensor]:
        """Advance sequence i by counts[i] tokens; the logits of those that advanced."""
        spans = {i: (self.done[i], self.done[i] + n) for i, n in enumerate(counts) if n}
        lengths = [stop - start for start, stop in spans.values()]
        new_rows = {i: 2 * i + (self.rows[i] == 2 * i) for i in spans}
        recurrent = RecurrentBatch.build(
            lengths,
            [self.rows[i] for i in spans],
            [[(length, new_rows[i])] for i, length in zip(spans, lengths, strict=True)],
        )
        batch = AttentionBatch.build(
            lengths,
            [stop for _, stop in spans.values()],
            {None: [self.tables[i] for i in spans]},
            BLOCK,
            recurrent=recurrent,
        )
        tokens = torch.cat([self.sequences[i][slice(*span)] for i, span in spans.items()])
        positions = torch.cat(
            [
                torch.arange(*span) + self.model.spec.rope_offset(len(self.sequences[i]))
                for i, span in spans.items()
            ]
        )
        logits = self.model.logits(self.model(tokens, positions, batch, self.caches))
        for i, (_, stop) in spans.items():
            self.done[i] = stop
            self.rows[i] = new_rows[i]
        parts = logits.split(lengths)
        return dict(zip(spans, parts, strict=True))
