"""Positions to the cosines and sines of every rotary embedding a model has, once per step."""

from __future__ import annotations

import torch

from llmkit.checkpoint.config import RopeSpec
from llmkit.model.spec import ModelSpec

Rotation = tuple[torch.Tensor, torch.Tensor]  # cos, sin: float32 [T, 1, 2R], as `rotate_` wants them


class Rope:
    """One rotary embedding on a device."""

    def __init__(self, spec: RopeSpec, max_positions: int, device: torch.device) -> None:
        self.scale, self.max_positions = spec.scale, max_positions
        self.short = torch.tensor(spec.frequencies, dtype=torch.float32, device=device)
        self.long = torch.tensor(spec.long_frequencies, dtype=torch.float32, device=device)

    def __call__(self, positions: torch.Tensor) -> Rotation:
        """positions: int64 [T]; from `max_positions` on they mean the long factors (ModelSpec.rope_offset)."""
        if len(self.long):
            long = (positions >= self.max_positions)[:, None]
            turn = (positions % self.max_positions)[:, None].float()
            angles = turn * torch.where(long, self.long, self.short)
        else:
            angles = positions[:, None].float() * self.short
        cos, sin = (angles.cos() * self.scale)[:, None], (angles.sin() * self.scale)[:, None]
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def make_ropes(spec: ModelSpec, device: torch.device) -> dict[str, Rope]:
    """The model's rotary embeddings by name."""
    return {name: Rope(rope, spec.max_positions, device) for name, rope in spec.ropes.items()}
