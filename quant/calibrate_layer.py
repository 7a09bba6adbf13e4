"""Runs a decoder layer on the calibration text and collects the inputs of its linears.

A decoder layer has two sublayers, attention and MLP. A layer that computes both from the same input
is one sublayer. The linears of a sublayer form two groups, or three with latent attention: the
inputs of a group depend on the outputs of the group before.

What the last linear of a sublayer reads is recorded where it fits in memory. The sublayer's output
is then computed from it, instead of from the beginning.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import nn

from llmkit.checkpoint.quantized_weight import QuantizedWeight
from llmkit.kernels.kv_cache import KVCache
from llmkit.model.decoder import MIXER_INPUTS, MIXER_OUTPUTS, UNROUNDED_INPUTS, DecoderLayer
from llmkit.model.linear import ActivationQuant
from llmkit.quant.input_stats import InputStats, StatKind
from llmkit.quant.layer_stream import LayerInputs, MicroBatch

# The recorded inputs of a sublayer's last linear have at most this many bytes.
RECORDED_BYTES = 256 * 2**20


@dataclass(frozen=True)
class SubLayer:
    """Half of a decoder layer, attention or MLP, or a layer that computes both at once."""

    # Runs hidden states [T, H] through the sublayer.
    run: Callable[[torch.Tensor, LayerInputs], torch.Tensor]
    layer_index: int
    # Its linears by name within the layer, in the order in which they run.
    linear_groups: tuple[tuple[str, ...], ...]
    is_moe: bool  # a micro-batch may send no token to some linear
    # The same as `run`, computed from the sublayer's input [T, H] and what its last linear reads,
    # [T, in]. None where more than one linear reads it or something else is computed, too.
    finish: Callable[[torch.Tensor, torch.Tensor, LayerInputs], torch.Tensor] | None = None

    @property
    def last_linear(self) -> str | None:
        """The linear that `finish` begins with; None where there is no `finish`."""
        last_group = self.linear_groups[-1]
        return last_group[0] if self.finish is not None and len(last_group) == 1 else None

    def advance(self, batches: Sequence[MicroBatch], recorded: RecordedInputs) -> None:
        """Run micro-batches through the sublayer, from its last linear on where that is possible.

        recorded: what this linear reads, with the weights that the sublayer has now.
        """
        for micro_batch in batches:
            run = self.run
            x = recorded.pop()
            if x is not None and self.finish is not None:
                run = _from_last_linear(self.finish, x)
            micro_batch.advance(self.layer_index, run)


def _from_last_linear(
    finish: Callable[[torch.Tensor, torch.Tensor, LayerInputs], torch.Tensor], x: torch.Tensor
) -> Callable[[torch.Tensor, LayerInputs], torch.Tensor]:
    return lambda hidden, inputs: finish(hidden, x, inputs)


class RecordedInputs:
    """What a linear reads, by micro-batch: the first ones that fit in RECORDED_BYTES."""

    def __init__(self) -> None:
        self._inputs: deque[torch.Tensor] = deque()
        self._bytes = 0

    def add(self, x: torch.Tensor) -> None:
        """Keep what the linear reads of the next micro-batch, [T, in], if there is room."""
        self._bytes += x.nbytes
        if self._bytes <= RECORDED_BYTES:
            self._inputs.append(x)

    def pop(self) -> torch.Tensor | None:
        """What was kept of the next micro-batch. It is not kept any longer."""
        return self._inputs.popleft() if self._inputs else None


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

    def finish_attention(
        hidden: torch.Tensor, x: torch.Tensor, _inputs: LayerInputs
    ) -> torch.Tensor:
        return layer.finish_attention(hidden, x)

    def finish_mlp(hidden: torch.Tensor, x: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        return layer.finish_mlp(hidden, x, inputs.per_layer_input)

    # Keys and values that later layers read are those of a whole run.
    keeps_kv = layer.index in layer.spec.kv_source_layers
    return (
        SubLayer(
            attention,
            layer.index,
            mixer_groups,
            is_moe=False,
            finish=None if keeps_kv else finish_attention,
        ),
        SubLayer(mlp, layer.index, mlp_groups, is_moe, None if is_moe else finish_mlp),
    )


def input_quant(name: str, weight: QuantizedWeight) -> ActivationQuant | None:
    """How a quantized linear of a decoder layer rounds its inputs, as when it is loaded."""
    if name == UNROUNDED_INPUTS:
        return None
    return ActivationQuant.of(weight.scheme, weight.input_scale)


class _AllCollected(Exception):  # noqa: N818
    """Skips the rest of a sublayer once every linear has its inputs of a micro-batch."""


@dataclass(frozen=True)
class DenseSubLayer:
    """The sublayer of the unquantized model, on the hidden states that it has there."""

    layer: DecoderLayer
    sublayer: SubLayer
    batches: Sequence[MicroBatch]
    # The scales [in] that smoothing divided the inputs of the quantized layer's linears by.
    input_scales: Mapping[str, torch.Tensor]
    recorded: RecordedInputs

    def inputs(self, batch: int, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """What the named linears read of micro-batch `batch`, [T, in] each."""
        found: dict[str, torch.Tensor] = {}

        def receive(name: str, x: torch.Tensor) -> None:
            if name == self.sublayer.last_linear:
                self.recorded.add(x)
            scales = self.input_scales.get(name)
            found[name] = x if scales is None else x / scales

        _run_to_linears(self.layer, self.sublayer, names, self.batches[batch], receive)
        return found

    def advance(self) -> None:
        """Run the micro-batches through the sublayer."""
        self.sublayer.advance(self.batches, self.recorded)


def collect_input_stats(
    layer: DecoderLayer,
    sublayer: SubLayer,
    names: Sequence[str],
    batches: Sequence[MicroBatch],
    required_stats: Set[StatKind],
    recorded: RecordedInputs | None = None,
    dense: DenseSubLayer | None = None,
) -> dict[str, InputStats]:
    """The input statistics of the named linears over all micro-batches, which are not changed.

    The sublayer runs no further than these linears, and not at all when no statistics are required.
    recorded: receives what the sublayer's last linear reads, if its statistics are collected.
    dense: needed for residuals, without which they are not collected.
    """
    if dense is None:
        required_stats = required_stats - {"residual"}
    stats: dict[str, InputStats] = {}
    for name in names:
        weight = layer.linears[name].weight
        stats[name] = InputStats(weight.shape[1], required_stats, weight.device)
    if not required_stats or not names:
        return stats
    for index, micro_batch in enumerate(batches):
        dense_inputs = {} if dense is None else dense.inputs(index, names)

        def receive(
            name: str,
            x: torch.Tensor,
            micro_batch: MicroBatch = micro_batch,
            dense_inputs: dict[str, torch.Tensor] = dense_inputs,
        ) -> None:
            # An expert reads some of the tokens, in another order: they all count alike.
            reads_all_tokens = len(x) == micro_batch.num_tokens
            first_tokens = micro_batch.first_tokens if reads_all_tokens else ()
            stats[name].add(x, dense_inputs.pop(name, None), first_tokens)
            if recorded is not None and name == sublayer.last_linear:
                recorded.add(x)

        _run_to_linears(layer, sublayer, names, micro_batch, receive)
    return stats


def _run_to_linears(
    layer: DecoderLayer,
    sublayer: SubLayer,
    names: Sequence[str],
    micro_batch: MicroBatch,
    receive: Callable[[str, torch.Tensor], None],
) -> None:
    """Run a micro-batch through a sublayer, no further than the named linears need.

    `receive` is called with each of their names and its inputs.
    """
    # The linears that have not yet received their inputs.
    waiting = set(names)

    def hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def collect(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            receive(name, inputs[0])
            waiting.discard(name)
            if not waiting and not sublayer.is_moe:
                raise _AllCollected

        return collect

    handles = [layer.linears[name].register_forward_pre_hook(hook(name)) for name in names]
    try:
        hidden = micro_batch.hidden.to(micro_batch.context.device)
        with suppress(_AllCollected):
            sublayer.run(hidden, micro_batch.layer_inputs(layer.index))
    finally:
        for handle in handles:
            handle.remove()


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
