"""Rotary embeddings: from positions to cosines and sines, computed once per step for all layers."""

from __future__ import annotations

from typing import NamedTuple

import torch

from llmkit.checkpoint.hf_config import RopeSpec
from llmkit.model.spec import ModelSpec


class CosSin(NamedTuple):
    """What a rotary embedding needs for the tokens of a step.

    cos, sin: float32 [T, 1, 2R] for R rotated pairs, in the form that the rope kernels read: both
    halves of the cosines are equal, the first half of the sines is negated.
    query_scale: float32 [T], multiplies the queries; None: they stay as they are.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    query_scale: torch.Tensor | None = None


class RotaryEmbedding:
    """One rotary embedding on a device."""

    def __init__(self, spec: RopeSpec, max_position_embeddings: int, device: torch.device) -> None:
        self.attention_scaling = spec.attention_scaling
        self.query_scale_beta = spec.query_scale_beta
        self.original_max_position_embeddings = spec.original_max_position_embeddings
        self.max_position_embeddings = max_position_embeddings
        self.inv_freq = torch.tensor(spec.inv_freq, dtype=torch.float32, device=device)
        self.long_inv_freq = torch.tensor(spec.long_inv_freq, dtype=torch.float32, device=device)

    def __call__(self, positions: torch.Tensor) -> CosSin:
        """positions: int64 [T].

        With LongRoPE, a position p >= `max_position_embeddings` stands for the position
        p - max_position_embeddings with the long factors (see `ModelSpec.rope_offset`).
        """
        if len(self.long_inv_freq):
            is_long = (positions >= self.max_position_embeddings)[:, None]
            real_positions = (positions % self.max_position_embeddings)[:, None].float()
            angles = real_positions * torch.where(is_long, self.long_inv_freq, self.inv_freq)
        else:
            angles = positions[:, None].float() * self.inv_freq
        cos = (angles.cos() * self.attention_scaling)[:, None]
        sin = (angles.sin() * self.attention_scaling)[:, None]
        scale = None
        if self.query_scale_beta:
            periods = (positions // self.original_max_position_embeddings).float()
            scale = 1 + self.query_scale_beta * periods.log1p()
        return CosSin(torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1), scale)


class CosSinTable:
    """The cosines and sines of a rotary embedding's first positions, computed once."""

    MAX_BYTES = 8 << 20

    def __init__(self, rope: RotaryEmbedding, num_positions: int) -> None:
        """num_positions: those that steps may have. The table has as many as are in MAX_BYTES."""
        self._rope = rope
        bytes_per_position = sum(part.nbytes for part in rope(torch.zeros(1)) if part is not None)
        self.num_positions = min(num_positions, self.MAX_BYTES // bytes_per_position)
        self._rows = rope(torch.arange(self.num_positions))

    def write(self, positions: torch.Tensor, largest: int, out: CosSin) -> None:
        """Write what the embedding computes for positions, int64 [T], to the tensors of `out`.

        largest: the largest of the positions.
        """
        if largest < self.num_positions:
            for rows, written in zip(self._rows, out, strict=True):
                if rows is not None and written is not None:
                    torch.index_select(rows, 0, positions, out=written)
            return
        for computed, written in zip(self._rope(positions), out, strict=True):
            if computed is not None and written is not None:
                written.copy_(computed)


def make_rotary_embeddings(spec: ModelSpec, device: torch.device) -> dict[str, RotaryEmbedding]:
    """The model's rotary embeddings by name (see `LayerSpec.rope`)."""
    return {
        name: RotaryEmbedding(rope, spec.max_position_embeddings, device)
        for name, rope in spec.ropes.items()
    }
