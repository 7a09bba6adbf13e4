"""A rank's part of a model, and the communication between the ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch

from llmkit.kernels.logits_tables import MASKED_LOGIT
from llmkit.kernels.sampling import VocabParallel
from llmkit.model.spec import LayerSpec, ModelSpec, RankSpec
from llmkit.model.split import Split


def rank_spec(
    full_model: ModelSpec, rank: int, tp: int, ep: int = 1, layers: tuple[int, int] | None = None
) -> ModelSpec:
    """The spec of one of `tp` ranks, which must divide the model.

    ep: the number of groups of ranks over which the experts are divided.
    layers: [first, end) of the rank's pipeline stage; None: all layers.
    """
    first, end = layers or (0, len(full_model.layers))
    moe = full_model.moe
    if moe is not None:
        moe = replace(
            moe,
            intermediate_size=moe.intermediate_size // (tp // ep),
            shared_intermediate_size=moe.shared_intermediate_size // tp,
        )
    head_ranks = tp if full_model.splits_attention else 1
    return replace(
        full_model,
        num_heads=full_model.num_heads // head_ranks,
        num_kv_heads=max(1, full_model.num_kv_heads // head_ranks),
        intermediate_size=full_model.intermediate_size // tp,
        vocab_size=Split("vocab", 0, full_model.vocab_size).padded_rows(tp),
        layers=tuple(_layer_of_rank(layer, tp) for layer in full_model.layers[first:end]),
        moe=moe,
        recurrent=None if full_model.recurrent is None else full_model.recurrent.of_rank(tp),
        rank=RankSpec(full_model, rank, tp, ep, first, end),
    )


def _layer_of_rank(layer: LayerSpec, tp: int) -> LayerSpec:
    """A layer whose own sizes are those of one of `tp` ranks."""
    num_heads = layer.num_heads
    num_kv_heads = layer.num_kv_heads
    intermediate_size = layer.intermediate_size
    return replace(
        layer,
        num_heads=None if num_heads is None else num_heads // tp,
        num_kv_heads=None if num_kv_heads is None else max(1, num_kv_heads // tp),
        intermediate_size=None if intermediate_size is None else intermediate_size // tp,
    )


def mask_padding(logits: torch.Tensor, spec: ModelSpec, group: ParallelGroup) -> torch.Tensor:
    """Mask the padding among the logits [n, vocab] of a rank's part of the vocabulary, in place."""
    padding = group.vocab_start + spec.vocab_size - spec.full_model.vocab_size
    if padding > 0:
        logits[:, max(0, spec.vocab_size - padding) :] = MASKED_LOGIT
    return logits


def gather_logits(logits: torch.Tensor, spec: ModelSpec, group: ParallelGroup) -> torch.Tensor:
    """The logits [n, V] of the whole vocabulary, from a rank's part of them."""
    return group.all_gather(logits)[:, : spec.full_model.vocab_size]


class Waitable(Protocol):
    """An operation in progress, for example a CUDA event."""

    def synchronize(self) -> None:
        """Wait until it is done."""


class ParallelGroup(VocabParallel):
    """The communication of a rank with the other ranks of its model.

    This class is the group of a single rank; `DistributedGroup` is for several ranks. All ranks
    make the same calls in the same order. Reductions are over the tensor-parallel ranks of a
    pipeline stage. Hidden states are sent from stage to stage; the last stage broadcasts results.
    """

    tp_size = 1  # ranks of a stage
    pp_size = 1  # stages

    @property
    def reduces_in_kernels(self) -> bool:
        """Whether `all_reduce` of float32 is one of the compiled kernels, or does nothing.

        Then the decode steps of a CPU can be recorded.
        """
        return True

    def receive(
        self, tokens: int, hidden: int, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """Receive the hidden states [tokens, hidden] of the previous stage."""
        raise AssertionError("the first stage receives nothing")

    def send(self, hidden: torch.Tensor) -> None:
        """Send hidden states to the next stage."""
        raise AssertionError("the last stage sends nothing")

    def broadcast_results(self, results: list[torch.Tensor]) -> None:
        """Send a step's results (host tensors, token ids first) from the last stage to others."""

    def receive_results(self, results: list[torch.Tensor]) -> Waitable:
        """Begin to receive what the last stage broadcasts, into tensors on the host."""
        raise AssertionError("the last stage has the results")
