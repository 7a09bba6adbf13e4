"""Running a decoder layer on the calibration text: its two blocks, and what their linears were given.

A layer has two blocks, and each block its linears in two stages; a stage's inputs depend on the stage before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import nn

from llmkit.model.decoder import DecoderLayer
from llmkit.quant.statistics import Need, Statistics
from llmkit.quant.stream import MicroBatch, Step


@dataclass(frozen=True)
class Block:
    """Half of a decoder layer: how to run it, and its linears by stage."""

    run: Callable[[torch.Tensor, Step], torch.Tensor]
    stages: tuple[tuple[str, ...], ...]
    routed: bool  # by experts: a micro-batch may miss a linear

    def take(self, batches: Sequence[MicroBatch]) -> None:
        """Run micro-batches through the block."""
        for one in batches:
            one.hidden = self.run(one.hidden.to(one.step.device), one.step).cpu()


def blocks(layer: DecoderLayer) -> tuple[Block, Block]:
    """The two blocks of a layer: attention and MLP."""

    def attention(hidden: torch.Tensor, step: Step) -> torch.Tensor:
        return layer.attention_block(hidden, step.rotations, step.batch, step.cache)

    def mlp(hidden: torch.Tensor, step: Step) -> torch.Tensor:
        return layer.mlp_block(hidden)

    def ending(kind: str) -> tuple[str, ...]:
        return tuple(name for name in layer.linears if name.startswith("mlp.") and name.endswith(kind))

    return (
        Block(attention, (("attn.qkv",), ("attn.o",)), routed=False),
        Block(mlp, (ending(".gate_up"), ending(".down")), routed=layer.layer.moe),
    )


class _Seen(Exception):  # noqa: N818 - a signal, not an error
    """All linears asked for have had their inputs of a micro-batch; what follows in the block is not needed."""


def observe(
    layer: DecoderLayer, block: Block, names: Sequence[str], batches: Sequence[MicroBatch], needs: Set[Need]
) -> dict[str, Statistics]:
    """The statistics of the named linears' inputs over all micro-batches, which stay where they are.

    The block is run no further than these linears; not at all when nothing is needed.
    """
    found = {
        name: Statistics(layer.linears[name].weight.shape[1], needs, layer.linears[name].weight.device)
        for name in names
    }
    if not needs or not names:
        return found
    waiting: set[str] = set()

    def hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def take(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            found[name].add(inputs[0])
            waiting.discard(name)
            if not waiting and not block.routed:
                raise _Seen

        return take

    handles = [layer.linears[name].register_forward_pre_hook(hook(name)) for name in names]
    try:
        for one in batches:
            waiting.update(names)
            with suppress(_Seen):
                block.run(one.hidden.to(one.step.device), one.step)
    finally:
        for handle in handles:
            handle.remove()
    return found


def largest_kv(block: Block, batches: Sequence[MicroBatch]) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest magnitudes [1] of the keys and of the values that an attention block puts into its cache."""
    sizes = [torch.zeros(1), torch.zeros(1)]
    for one in batches:
        block.run(one.hidden.to(one.step.device), one.step)
        for size, cache in zip(sizes, one.step.cache.kv.chunk(2), strict=True):
            size.clamp_(min=cache.abs().max().item())
    return sizes[0], sizes[1]
