"""Runs a decoder layer on the calibration text and collects the inputs of its linears.

A decoder layer has two sublayers, attention and MLP. A layer that computes both from the same input
is one sublayer. The linears of a sublayer form two groups, or three with latent attention: the
inputs of a group depend on the outputs of the group before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import nn

from llmkit.kernels.kv_cache import KVCache
from llmkit.model.decoder import MIXER_INPUTS, MIXER_OUTPUTS, DecoderLayer
from llmkit.quant.input_stats import InputStats, StatKind
from llmkit.quant.layer_stream import LayerInputs, MicroBatch


@dataclass(frozen=True)
class SubLayer:
    """Half of a decoder layer, attention or MLP, or a layer that computes both at once."""

    # Runs hidden states [T, H] through the sublayer.
    run: Callable[[torch.Tensor, LayerInputs], torch.Tensor]
    layer_index: int
    # Its linears by name within the layer, in the order in which they run.
    linear_groups: tuple[tuple[str, ...], ...]
    is_moe: bool  # a micro-batch may send no token to some linear

    def advance(self, batches: Sequence[MicroBatch]) -> None:
        """Run micro-batches through the sublayer."""
        for micro_batch in batches:
            micro_batch.advance(self.layer_index, self.run)


def sublayers(layer: DecoderLayer) -> tuple[SubLayer, ...]:
    """The attention and the MLP of a decoder layer. The first has the attention."""

    def both(hidden: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        return layer(hidden, *inputs)

    def attention(hidden: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        block = layer.attention_block(hidden, None, inputs.cos_sin, inputs.batch, inputs.cache)
        return layer.add_update(*block)

    def mlp(hidden: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        return layer.add_update(*layer.mlp_block(hidden, None, inputs.per_layer_input))

    def linears(*endings: str) -> tuple[str, ...]:
        return tuple(name for name in layer.linears if name.endswith(endings))

    mixer_groups: tuple[tuple[str, ...], ...]
    mixer_groups = (linears(*MIXER_INPUTS), linears(*MIXER_OUTPUTS))
    from_latents = linears("attn.q_b", "attn.kv_b")
    if from_latents:
        mixer_groups = (mixer_groups[0], from_latents, mixer_groups[1])
    mlp_groups = (linears(".gate_up", ".up"), linears(".down"))
    is_moe = layer.layer.is_moe
    if layer.spec.parallel_block:
        groups = tuple(a + b for a, b in zip(mixer_groups, mlp_groups, strict=True))
        return (SubLayer(both, layer.index, groups, is_moe),)
    return (
        SubLayer(attention, layer.index, mixer_groups, is_moe=False),
        SubLayer(mlp, layer.index, mlp_groups, is_moe),
    )


class _AllCollected(Exception):  # noqa: N818
    """Skips the rest of a sublayer once every linear has its inputs of a micro-batch."""


def collect_input_stats(
    layer: DecoderLayer,
    sublayer: SubLayer,
    names: Sequence[str],
    batches: Sequence[MicroBatch],
    required_stats: Set[StatKind],
) -> dict[str, InputStats]:
    """The input statistics of the named linears over all micro-batches, which are not changed.

    The sublayer runs no further than these linears, and not at all when no statistics are required.
    """
    stats: dict[str, InputStats] = {}
    for name in names:
        weight = layer.linears[name].weight
        stats[name] = InputStats(weight.shape[1], required_stats, weight.device)
    if not required_stats or not names:
        return stats
    # The linears that have not yet received their inputs of the current micro-batch.
    waiting: set[str] = set()

    def hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def collect(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            stats[name].add(inputs[0])
            waiting.discard(name)
            if not waiting and not sublayer.is_moe:
                raise _AllCollected

        return collect

    handles = [layer.linears[name].register_forward_pre_hook(hook(name)) for name in names]
    try:
        for micro_batch in batches:
            waiting.update(names)
            hidden = micro_batch.hidden.to(micro_batch.context.device)
            with suppress(_AllCollected):
                sublayer.run(hidden, micro_batch.layer_inputs(layer.index))
    finally:
        for handle in handles:
            handle.remove()
    return stats


def max_abs_kv(
    layer: DecoderLayer, attention: SubLayer, batches: Sequence[MicroBatch]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest magnitudes [1] of the keys and of the values that go into the KV cache."""
    max_key = torch.zeros(1)
    max_value = torch.zeros(1)
    for micro_batch in batches:
        inputs = micro_batch.layer_inputs(layer.index)
        attention.run(micro_batch.hidden.to(micro_batch.context.device), inputs)
        assert isinstance(inputs.cache, KVCache), "only attention has keys and values"
        keys, values = inputs.cache.kv.chunk(2)
        max_key.clamp_(min=keys.abs().max().item())
        max_value.clamp_(min=values.abs().max().item())
    return max_key, max_value
