"""Runs one step: chunks of token ids in, one token id per chunk out."""

from __future__ import annotations

from itertools import accumulate

import torch

from llmkit.kernels.attention import AttentionBatch
from llmkit.kernels.sampling import sample
from llmkit.model.decoder import Decoder
from llmkit.runtime.engine.scheduler import Chunk
from llmkit.runtime.engine.types import EngineConfig


class Runner:
    """A model and its KV cache on a device."""

    def __init__(self, model: Decoder, config: EngineConfig) -> None:
        self.model, self.config = model, config
        self.caches = [model.new_cache(config.num_blocks, config.block_size) for _ in model.layers]

    @torch.inference_mode()
    def run(self, chunks: list[Chunk]) -> list[int]:
        """Compute the chunks. Returns for each the token after its last; -1 where the logits there are not finite.

        Only a chunk that samples has use for the token, but every one is looked at: a value that is not finite
        spreads to all later tokens of its sequence, and its blocks must be cleaned before another one gets them.
        """
        tokens: list[int] = []
        positions: list[int] = []
        for chunk in chunks:
            stop = chunk.start + chunk.count
            offset = self.model.spec.rope_offset(chunk.sequence.longest)
            tokens += chunk.sequence.tokens[chunk.start : stop]
            positions += range(chunk.start + offset, stop + offset)
        batch = AttentionBatch.build(
            [chunk.count for chunk in chunks],
            [chunk.start + chunk.count for chunk in chunks],
            [chunk.sequence.blocks for chunk in chunks],
            self.config.block_size,
            self.config.device,
        )
        hidden = self.model(self._device(tokens), self._device(positions), batch, self.caches)
        last = [end - 1 for end in accumulate(chunk.count for chunk in chunks)]
        return self._sample(self.model.logits(hidden[self._device(last)]), chunks)

    def _sample(self, logits: torch.Tensor, chunks: list[Chunk]) -> list[int]:
        """logits: float32, a row for each chunk."""
        params = [chunk.sequence.request.sampling for chunk in chunks]
        ids = sample(
            logits,
            torch.tensor([p.temperature for p in params], dtype=torch.float32),
            torch.tensor([p.top_k for p in params]),
            torch.tensor([p.top_p for p in params], dtype=torch.float32),
            torch.tensor([p.min_p for p in params], dtype=torch.float32),
            torch.tensor([chunk.sequence.seed for chunk in chunks]),
            torch.tensor([chunk.sequence.generated for chunk in chunks]),
        )
        finite = torch.isfinite(logits.sum(-1))
        chosen: list[int] = torch.where(finite, ids, -1).tolist()
        for chunk, token in zip(chunks, chosen, strict=True):
            if token < 0:
                self._clear(chunk.sequence.blocks)
        return chosen

    def _clear(self, blocks: list[int]) -> None:
        """Zero blocks whose values may be NaN: masked attention multiplies by 0 what it does not see."""
        for k, v in self.caches:
            k[blocks] = 0
            v[blocks] = 0

    def _device(self, values: list[int]) -> torch.Tensor:
        """int64, on the device."""
        host = torch.tensor(values)
        if self.config.device.type == "cpu":
            return host
        return host.pin_memory().to(self.config.device, non_blocking=True)
