"""A rank's part of a model, and what the ranks do together."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch

from llmkit.kernels.sampling import Vocabulary
from llmkit.model.layout import Split
from llmkit.model.spec import ModelSpec, RankSpec


def rank_spec(whole: ModelSpec, rank: int, tp: int, ep: int = 1, layers: tuple[int, int] | None = None) -> ModelSpec:
    """The part of one of `tp` ranks that share the layers [first, stop) of a model; they must divide it."""
    first, stop = layers or (0, len(whole.layers))
    experts = whole.experts and replace(whole.experts, intermediate=whole.experts.intermediate // (tp // ep))
    return replace(
        whole,
        heads=whole.heads // tp,
        kv_heads=max(1, whole.kv_heads // tp),
        intermediate=whole.intermediate // tp,
        vocab=Split("vocab", 0, whole.vocab).padded_rows(tp),
        layers=whole.layers[first:stop],
        experts=experts,
        rank=RankSpec(whole, rank, tp, ep, first, stop),
    )


class Waitable(Protocol):
    """Something under way."""

    def synchronize(self) -> None:
        """Wait for its end."""


class Ranks(Vocabulary):
    """What a rank asks of the others, answered for one that is alone. All ranks of a group ask in the same order.

    Sums and the vocabulary's operations are over the ranks that share a stage's tensors; hidden states go from stage
    to stage, and what the last stage has chosen and found to all others.
    """

    size = 1  # ranks that share a stage's tensors
    stages = 1

    def receive(self, tokens: int, hidden: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Hidden states [tokens, hidden] from the stage before."""
        raise AssertionError("the first stage receives nothing")

    def send(self, hidden: torch.Tensor) -> None:
        """Hidden states to the stage after this one."""
        raise AssertionError("the last stage sends nothing")

    def publish(self, results: list[torch.Tensor]) -> None:
        """What has come of a step, ids first, on the host of the last stage, to the other stages."""

    def expect(self, results: list[torch.Tensor]) -> Waitable:
        """Let `results`, on the host, be filled with what the last stage publishes."""
        raise AssertionError("the last stage has the results")
