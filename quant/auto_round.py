"""AutoRound, learned rounding (Cheng et al., 2023, arXiv 2309.05516).

Signed gradient descent on the rounding and the scales of a decoder layer brings the layer's output
close to that of the unquantized model. It starts from the quantized values of another method and
keeps them when it finds nothing better. The layer's inputs come from the quantized layers before it
and its target is the unquantized model's output, so it also corrects earlier errors where it can.

Legend: `out` rows, `in` columns, `G` groups along `in`, L tokens of a window, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from llmkit.checkpoint.quantized_weight import FP4_VALUES, QuantizedWeight
from llmkit.kernels.activation_quant import FP4_MAX, round_to_fp4
from llmkit.kernels.cpu.packed_cache import unpack_blocks
from llmkit.kernels.kv_cache import KVCache
from llmkit.model.decoder import DecoderLayer
from llmkit.model.linear import ActivationQuant
from llmkit.quant.algorithm import AutoRound
from llmkit.quant.float_scales import fp4_codes, round_to_e4m3
from llmkit.quant.layer_stream import LayerInputs, LayerStream, MicroBatch

HELD_OUT_STEPS = 2  # the result is judged on the windows of this many steps
# A weight starts at most this far from the middle of its rounding interval, as a fraction of a
# quantization step, so that gradients can move it out.
MAX_START_DISTANCE = 0.45


class LearnedRounding:
    """One weight [out, in] while its rounding is learned.

    q = round(weight / scale + rounding_offset * step) + zero
    scale = start scale * (1 + scale_delta)

    Integers are one step apart. For FP4, a step is half the distance between the values on both
    sides of the start value. Scales that are powers of two stay what they are.
    """

    def __init__(self, weight: torch.Tensor, start: QuantizedWeight) -> None:
        self.start = start
        self.scheme = start.scheme
        rows, groups = start.scales.shape
        self.weight = weight.detach().clone().view(rows, groups, -1)
        self.scales = start.scales.float().unsqueeze(2)
        self.zeros = start.zeros.float().unsqueeze(2)
        start_values = start.values().view_as(self.weight) - self.zeros
        self.steps, below, above = self._distances(start_values)
        # No larger than needed for the weight to round to its start value.
        nearest = self.weight / self.scales
        nearest = torch.maximum(nearest, start_values - MAX_START_DISTANCE * below)
        nearest = torch.minimum(nearest, start_values + MAX_START_DISTANCE * above)
        offset = (nearest - self.weight / self.scales) / self.steps
        self.rounding_offset = offset.requires_grad_()
        self.scale_delta = torch.zeros_like(self.scales).requires_grad_()

    def _distances(
        self, values: torch.Tensor
    ) -> tuple[torch.Tensor | float, torch.Tensor | float, torch.Tensor | float]:
        """Half the distance between the neighbours of `values`, and that to each neighbour."""
        if not self.scheme.is_fp4:
            return 1.0, 1.0, 1.0
        magnitudes = torch.tensor([*FP4_VALUES, 2 * FP4_VALUES[-1] - FP4_VALUES[-2]])
        magnitudes = magnitudes.to(values.device)
        index = torch.searchsorted(magnitudes, values.abs())
        outward = magnitudes[index + 1] - magnitudes[index]
        inward = magnitudes[index] - magnitudes[(index - 1).clamp(min=0)]
        inward = torch.where(index == 0, outward, inward)
        is_negative = values < 0
        below = torch.where(is_negative, outward, inward)
        above = torch.where(is_negative, inward, outward)
        return (below + above) / 2, below, above

    def _stored_scales(self) -> torch.Tensor:
        """The current scales as the format stores them; gradients pass through the rounding."""
        if self.scheme.scale_format == "e8m0":
            return self.scales
        scales = self.scales * (1 + self.scale_delta)
        if self.scheme.scale_format == "float":
            return _straight_through(scales, scales.to(self.start.scales.dtype).float())
        global_scale = self.start.global_scale
        assert global_scale is not None
        return _straight_through(scales, round_to_e4m3(scales.detach(), global_scale))

    def _rounded(self, scales: torch.Tensor) -> torch.Tensor:
        """The rounded weights in units of `scales`, without zero points."""
        values = self.weight / scales + self.rounding_offset * self.steps
        if self.scheme.is_fp4:
            values = values.clamp(-FP4_MAX, FP4_MAX)
            return _straight_through(values, round_to_fp4(values.detach()))
        max_q = (1 << self.scheme.bits) - 1
        q = (_straight_through(values, values.round()) + self.zeros).clamp(0, max_q)
        return q - self.zeros

    def dense(self) -> torch.Tensor:
        """The dequantized weight [out, in], differentiable with a straight-through estimator."""
        scales = self._stored_scales()
        return (self._rounded(scales) * scales).view(self.start.q.shape)

    @torch.no_grad()
    def descend(self, settings: AutoRound, rate_factor: float) -> None:
        """One step of signed gradient descent at `rate_factor` of the full rates."""
        for values, rate in (
            (self.rounding_offset, settings.rounding_rate),
            (self.scale_delta, settings.scale_rate),
        ):
            if values.grad is None:  # scales that stay
                continue
            values.sub_(values.grad.sign_(), alpha=rate * rate_factor / settings.steps)
            values.grad = None

    @torch.no_grad()
    def result(self) -> QuantizedWeight:
        """The weight quantized with the current rounding and scales."""
        scales = self._stored_scales()
        values = self._rounded(scales).view(self.start.q.shape)
        scales = scales.squeeze(2).to(self.start.scales.dtype)
        if self.scheme.is_fp4:
            return replace(self.start, q=fp4_codes(values), scales=scales)
        zeros = self.zeros.expand_as(self.weight).reshape(values.shape)
        return replace(self.start, q=(values + zeros).to(torch.uint8), scales=scales)


def _straight_through(values: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """`rounded`, with the gradient of `values`."""
    return rounded.detach() + (values - values.detach())


@dataclass(frozen=True)
class StraightThroughQuant(ActivationQuant):
    """Quantizes a linear's inputs and passes gradients to the layers before it."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., C] in and out."""
        return _straight_through(x, super().__call__(x.detach()))


class TuningWindows:
    """The inputs and target outputs of a layer; `count` windows [L, H] make up a step."""

    def __init__(
        self,
        inputs: Sequence[MicroBatch],
        targets: Sequence[MicroBatch],
        length: int,
        settings: AutoRound,
        stream: LayerStream,
    ) -> None:
        self.inputs = inputs
        self.targets = targets
        self.length = length
        # Each window's micro-batch and its first token there.
        self.positions = [
            (batch, start)
            for batch, micro_batch in enumerate(inputs)
            for start in range(0, micro_batch.num_tokens, length)
        ]
        self.count = min(len(self.positions), max(1, settings.tokens // length))
        self.context = stream.batch_context(self.count, length)

    def get(self, chosen: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The inputs and targets [count * L, H] of the chosen windows."""
        return self._gather(self.inputs, chosen), self._gather(self.targets, chosen)

    def _gather(self, batches: Sequence[MicroBatch], chosen: Sequence[int]) -> torch.Tensor:
        windows = []
        for index in chosen:
            batch, start = self.positions[index]
            windows.append(batches[batch].hidden[start : start + self.length])
        return torch.cat(windows).to(self.context.device)

    def layer_inputs(self, index: int, chosen: Sequence[int]) -> LayerInputs:
        """What a layer reads of the chosen windows besides the hidden states.

        A KV cache is a new one in each call, because gradients pass through it. It is not packed,
        because torch computes with it.
        """
        context = self.context
        cache = context.caches[index]
        per_layer_input = self._per_layer_input(index, chosen)
        if not isinstance(cache, KVCache):
            return LayerInputs(context.cos_sin, context.batch, cache, per_layer_input)
        kv = torch.zeros_like(cache.kv)
        blocks_per_window = kv.shape[1] // self.count
        for position, window in enumerate(chosen):
            batch, start = self.positions[window]
            kept = self.inputs[batch].kept_kv(index)
            if kept is not None:
                kept = unpack_blocks(kept) if cache.is_packed else kept
                first = position * blocks_per_window
                kept_first = start // self.length * blocks_per_window
                kv[:, first : first + blocks_per_window] = kept[
                    :, kept_first : kept_first + blocks_per_window
                ]
        return LayerInputs(context.cos_sin, context.batch, KVCache(kv), per_layer_input)

    def _per_layer_input(self, index: int, chosen: Sequence[int]) -> torch.Tensor | None:
        """What a layer reads of each token of the chosen windows, [count * L, P]."""
        parts = []
        for window in chosen:
            batch, start = self.positions[window]
            per_layer_input = self.inputs[batch].per_layer_input(index)
            if per_layer_input is not None:
                parts.append(per_layer_input[start : start + self.length])
        return torch.cat(parts).to(self.context.device) if parts else None


def tune_rounding(
    layer: DecoderLayer,
    weights: Mapping[str, torch.Tensor],
    start: Mapping[str, QuantizedWeight],
    windows: TuningWindows,
    settings: AutoRound,
    seed: int,
    note: Callable[[str], None],
) -> dict[str, QuantizedWeight]:
    """Improve the quantized linears `start` of a layer, whose unquantized weights are `weights`.

    Afterwards the layer has the weights of the result. They are those of `start` when learning did
    not help. `note` receives a line of progress every ten steps.
    """
    learned = {name: LearnedRounding(weights[name], weight) for name, weight in start.items()}
    input_quants = {name: layer.linears[name].activation_quant for name in start}
    for name, quant in input_quants.items():
        if quant is not None:
            layer.linears[name].activation_quant = StraightThroughQuant(**vars(quant))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(windows.positions), generator=generator).tolist()
    num_judged = HELD_OUT_STEPS * windows.count
    held_out = order[:num_judged] if len(order) > 2 * num_judged else []
    training = torch.tensor(order[len(held_out) :])
    # With few windows there are none to hold out: the result is judged on training windows.
    judged = held_out or order[:num_judged]
    _set_weights(layer, start)
    start_loss = _total_loss(layer, windows, judged)
    for index in range(settings.steps):
        step_windows = torch.randperm(len(training), generator=generator)[: windows.count]
        chosen = training[step_windows].tolist()
        with torch.enable_grad():
            for name, rounding in learned.items():
                layer.linears[name].weight = rounding.dense()
            loss = _relative_loss(layer, windows, chosen)
            loss.backward()
        for rounding in learned.values():
            rounding.descend(settings, 1 - index / settings.steps)
        if index % 10 == 0:
            note(f"learning, step {index} of {settings.steps}, error {loss.item():.2e}")
    for name, quant in input_quants.items():
        layer.linears[name].activation_quant = quant
    results = {name: rounding.result() for name, rounding in learned.items()}
    _set_weights(layer, results)
    if _total_loss(layer, windows, judged) < start_loss:
        return results
    _set_weights(layer, start)
    return dict(start)


def _set_weights(layer: DecoderLayer, weights: Mapping[str, QuantizedWeight]) -> None:
    for name, weight in weights.items():
        layer.linears[name].weight = weight.dequantize().to(layer.linears[name].weight.device)


def _relative_loss(
    layer: DecoderLayer, windows: TuningWindows, chosen: Sequence[int]
) -> torch.Tensor:
    """The mean squared error of the layer's output, relative to the target's mean square."""
    inputs, targets = windows.get(chosen)
    outputs = layer(inputs, *windows.layer_inputs(layer.index, chosen))
    return (outputs - targets).square().mean() / targets.square().mean()


@torch.no_grad()
def _total_loss(layer: DecoderLayer, windows: TuningWindows, chosen: Sequence[int]) -> float:
    """The sum of the relative losses of the chosen windows, a step's windows at a time."""
    total = 0.0
    for start in range(0, len(chosen), windows.count):
        part = chosen[start : start + windows.count]
        if len(part) == windows.count:
            total += _relative_loss(layer, windows, part).item()
    return total
