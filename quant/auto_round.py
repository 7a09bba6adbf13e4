"""Learned rounding: AutoRound (Cheng et al., 2023, arXiv 2309.05516) with steps by curvature.

Gradient descent on the rounding and the scales of a decoder layer brings the layer's output close
to that of the unquantized model. It starts from the quantized values of another method and keeps
them when it finds nothing better. The layer's inputs come from the quantized layers before it. Its
target is between the unquantized model's output and what its unquantized weights make of these
inputs, so that it also corrects a share of the earlier errors.

AutoRound starts from rounding to nearest and moves all values by the sign of their gradient. From
a start that GPTQ has optimized, most such moves are for the worse. So a value moves here by its
gradient over its curvature (a Newton step of one value), times a rate.

Legend: `out` rows, `in` columns, `G` groups along `in`, L tokens of a window, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn.functional import linear

from llmkit.checkpoint.quantized_weight import FP4_VALUES, QuantizedWeight
from llmkit.kernels.activation_quant import FP4_MAX, round_to_fp4
from llmkit.kernels.cpu import cpu_kernels
from llmkit.kernels.cpu.packed_cache import unpack_blocks
from llmkit.kernels.kv_cache import KVCache
from llmkit.model.decoder import DecoderLayer
from llmkit.model.linear import ActivationQuant, Linear
from llmkit.quant.algorithm import AutoRound
from llmkit.quant.float_scales import fp4_codes, round_to_e4m3
from llmkit.quant.layer_stream import LayerInputs, LayerStream, MicroBatch, StoredTensor

HELD_OUT_STEPS = 2  # the result is judged on the windows of this many steps
# A weight starts at most this far from the middle of its rounding interval, as a fraction of a
# quantization step, so that gradients can move it out.
MAX_START_DISTANCE = 0.45
# It starts at this fraction of its distance from its quantized value. Values that GPTQ moved beyond
# their rounding interval would otherwise all start at its end, and leave it in the same step.
START_FRACTION = 0.5
MAX_STEP = 1.0  # of a value, in quantization steps, before the rate
MAX_SCALE_STEP = 0.05  # of a scale, as a fraction, before the rate
MIN_CURVATURE = 1e-20
# Errors of weights count as if inputs had this much noise, as a fraction of their mean square. As
# in GPTQ, this keeps weights from fitting the calibration tokens alone.
DAMPENING = 0.01
PROBED_RATE = 0.01  # at which the loss is computed to find a layer's best rate
MAX_RATE = 0.25
TOKENS_AT_ONCE = 1024  # that the layer runs on, with gradients


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
        # Part of the way from the start value to the weight, and inside its rounding interval.
        nearest = start_values + START_FRACTION * (self.weight / self.scales - start_values)
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
    def descend(self, curvature: torch.Tensor, rate: float) -> None:
        """One step of gradient descent.

        curvature: about the loss's second derivative by each weight, float32 [out, in].
        rate: the fraction of a Newton step of each value alone.
        """
        curvature = curvature.view_as(self.weight)
        of_rounding = curvature * (self.scales * self.steps).square()
        # An upper bound, because values change with a scale, too. So scales take smaller steps.
        of_scale = curvature * (self.start.values().view_as(self.weight) - self.zeros).square()
        of_scale = of_scale.sum(2, keepdim=True) * self.scales.square()
        for values, second_derivative, largest in (
            (self.rounding_offset, of_rounding, MAX_STEP),
            (self.scale_delta, of_scale, MAX_SCALE_STEP),
        ):
            if values.grad is None:  # scales that stay
                continue
            step = values.grad.div_(second_derivative.clamp_(min=MIN_CURVATURE))
            values.sub_(step.clamp_(-largest, largest), alpha=rate)
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


class LearningLinear(Linear):
    """A linear whose weight is learned: gradients pass through the quantization of its inputs.

    uses_bfloat16: whether inputs and weight are rounded to bfloat16, which is faster on many
    machines and precise enough for gradients.
    """

    def __init__(self, quantized: Linear, *, uses_bfloat16: bool) -> None:
        quant = quantized.activation_quant
        quant = None if quant is None else StraightThroughQuant(**vars(quant))
        super().__init__(quantized.weight, quantized.bias, quant)
        self.pre_quant_scale = quantized.pre_quant_scale
        self.uses_bfloat16 = uses_bfloat16

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in]. Returns [..., out]."""
        x = self._prepare_inputs(x)
        if not self.uses_bfloat16:
            return linear(x, self.weight, self.bias)
        y = linear(x.bfloat16(), self.weight.bfloat16()).to(x.dtype)
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True)
class StraightThroughQuant(ActivationQuant):
    """Quantizes a linear's inputs and passes gradients to the layers before it."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., C] in and out."""
        return _straight_through(x, super().__call__(x.detach()))


@torch.no_grad()
def layer_targets(
    layer: DecoderLayer,
    inputs: Sequence[MicroBatch],
    outputs: Sequence[MicroBatch],
    correction: float,
    folder: Path | None = None,
) -> list[StoredTensor]:
    """What a layer shall compute of its inputs, [T, H] for each micro-batch.

    layer: with unquantized weights. inputs: from the quantized layers before it.
    outputs: those of the unquantized model's layer.
    correction: 1 for the unquantized model's outputs, 0 for what the unquantized weights make of
        these inputs.
    folder: for the targets; None keeps them in memory.
    """
    targets = []
    for index, (layer_input, output) in enumerate(zip(inputs, outputs, strict=True)):
        hidden = layer_input.hidden.to(layer_input.context.device)
        uncorrected = layer(hidden, *layer_input.layer_inputs(layer.index)).cpu()
        file = folder / f"learned-{index}.bin" if folder is not None else None
        targets.append(StoredTensor(uncorrected.lerp(output.hidden, correction), file))
    return targets


class TuningWindows:
    """The inputs and target outputs of a layer; `count` windows [L, H] make up a step."""

    def __init__(
        self,
        inputs: Sequence[MicroBatch],
        targets: Sequence[StoredTensor],
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
        per_step = min(len(self.positions), max(1, settings.tokens // length))
        # The layer runs on this many windows at once. The gradients of a step add up.
        self.at_once = min(per_step, max(1, TOKENS_AT_ONCE // length))
        self.count = per_step // self.at_once * self.at_once
        self.context = stream.batch_context(self.at_once, length)

    def parts(self, chosen: Sequence[int]) -> list[Sequence[int]]:
        """The chosen windows, `at_once` in each part. Windows that do not fill one are left out."""
        firsts = range(0, len(chosen) - self.at_once + 1, self.at_once)
        return [chosen[first : first + self.at_once] for first in firsts]

    def get(self, chosen: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The inputs and targets [at_once * L, H] of the chosen windows."""
        inputs = []
        targets = []
        for index in chosen:
            batch, start = self.positions[index]
            rows = slice(start, start + self.length)
            inputs.append(self.inputs[batch].hidden[rows])
            targets.append(self.targets[batch].read()[rows])
        device = self.context.device
        return torch.cat(inputs).to(device), torch.cat(targets).to(device)

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
        blocks_per_window = kv.shape[1] // self.at_once
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
        """What a layer reads of each token of the chosen windows, [at_once * L, P]."""
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
    learned = {
        name: LearnedRounding(weights[name], weight.to(weights[name].device))
        for name, weight in start.items()
    }
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(windows.positions), generator=generator).tolist()
    num_judged = HELD_OUT_STEPS * windows.count
    held_out = order[:num_judged] if len(order) > 2 * num_judged else []
    training = torch.tensor(order[len(held_out) :])
    # With few windows there are none to hold out: the result is judged on training windows.
    judged = windows.parts(held_out or order[:num_judged])
    _set_weights(layer, start)
    start_loss = _total_loss(layer, windows, judged)
    linears = {name: layer.linears[name] for name in start}
    uses_bfloat16 = multiplies_bfloat16(windows.context.device)
    for name, quantized in linears.items():
        layer.linears[name] = LearningLinear(quantized, uses_bfloat16=uses_bfloat16)

    def choose() -> list[Sequence[int]]:
        """The windows of a step."""
        step_windows = torch.randperm(len(training), generator=generator)[: windows.count]
        return windows.parts(training[step_windows].tolist())

    rate = 0.0
    by_weight = curvatures(layer, start, windows, choose(), generator) if settings.steps else {}
    for index in range(settings.steps):
        parts = choose()
        loss = _backward(layer, learned, by_weight, windows, parts)
        if index == 0:
            best = _best_rate(layer, learned, by_weight, windows, parts, loss)
            rate = min(settings.rate * best, MAX_RATE)
        for name, rounding in learned.items():
            rounding.descend(by_weight[name], rate * (1 - index / settings.steps))
        if index % 10 == 0:
            note(f"learning, step {index} of {settings.steps}, error {loss:.2e}")
    layer.linears.update(linears)
    results = {name: rounding.result() for name, rounding in learned.items()}
    _set_weights(layer, results)
    if _total_loss(layer, windows, judged) < start_loss:
        return results
    _set_weights(layer, start)
    return dict(start)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 several times faster than float32."""
    if device.type == "cpu":
        return cpu_kernels.has_bfloat16()
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


@torch.enable_grad()
def _backward(
    layer: DecoderLayer,
    learned: Mapping[str, LearnedRounding],
    by_weight: Mapping[str, torch.Tensor],
    windows: TuningWindows,
    parts: Sequence[Sequence[int]],
) -> float:
    """Compute the gradients of a step's mean loss, of the layer's weights, too. Returns it.

    The gradients are those of the loss and of a penalty, which is not in what is returned: half of
    the squared distance to the unquantized weights, times DAMPENING and a row's mean curvature.
    """
    dense = {name: rounding.dense() for name, rounding in learned.items()}
    # Every part adds to the gradients of these copies.
    for name, weight in dense.items():
        layer.linears[name].weight = weight.detach().requires_grad_()
    total = 0.0
    for part in parts:
        loss = _relative_loss(layer, windows, part) / len(parts)
        loss.backward()
        total += loss.item()
    for name, weight in dense.items():
        gradient = layer.linears[name].weight.grad
        assert gradient is not None
        pull = DAMPENING * by_weight[name].mean(1, keepdim=True)
        gradient.addcmul_(pull, weight.detach() - learned[name].weight.view_as(weight))
        weight.backward(gradient)
    return total


@torch.no_grad()
def _best_rate(
    layer: DecoderLayer,
    learned: Mapping[str, LearnedRounding],
    by_weight: Mapping[str, torch.Tensor],
    windows: TuningWindows,
    parts: Sequence[Sequence[int]],
    loss: float,
) -> float:
    """The rate that lowers a step's loss most if weights are not rounded and scales stay.

    Newton steps of single weights together go too far, the more the more inputs are alike. Along
    their direction, the loss is about a parabola: its slope is known, and a second point of it is
    computed.
    """
    slope = 0.0
    for name, rounding in learned.items():
        weight = layer.linears[name].weight
        assert weight.grad is not None
        step = weight.grad / by_weight[name].clamp(min=MIN_CURVATURE)
        largest = (rounding.scales * rounding.steps).expand_as(rounding.weight).reshape_as(step)
        step = torch.maximum(torch.minimum(step, largest), -largest)
        slope += (weight.grad * step).sum().item()
        layer.linears[name].weight = weight - PROBED_RATE * step
    probed = _total_loss(layer, windows, parts) / len(parts)
    curvature = 2 * (probed - loss + PROBED_RATE * slope) / PROBED_RATE**2
    return slope / curvature if curvature > 0 else MAX_RATE


@torch.enable_grad()
def curvatures(
    layer: DecoderLayer,
    start: Mapping[str, QuantizedWeight],
    windows: TuningWindows,
    parts: Sequence[Sequence[int]],
    generator: torch.Generator,
) -> dict[str, torch.Tensor]:
    """About the second derivative of the loss by each weight [out, in], at the start.

    It is the Gauss-Newton matrix's diagonal, by Hutchinson's estimate: with a random sign for each
    output, the square of the gradient of their sum has that expectation. Rows and columns are
    averaged, because one draw says little about one weight: curvature = row x column / mean.
    """
    squares = {name: torch.zeros(()) for name in start}
    dense = {name: weight.dequantize() for name, weight in start.items()}
    for part in parts:
        for name, weight in dense.items():
            device = windows.context.device
            layer.linears[name].weight = weight.to(device).detach().requires_grad_()
        inputs, targets = windows.get(part)
        outputs = layer(inputs, *windows.layer_inputs(layer.index, part))
        signs = torch.randint(0, 2, outputs.shape, generator=generator).to(outputs) * 2 - 1
        factors = 2 * _token_weights(targets) / (outputs.numel() * len(parts))
        (outputs * signs * factors.sqrt().unsqueeze(1)).sum().backward()
        for name in dense:
            gradient = layer.linears[name].weight.grad
            assert gradient is not None
            squares[name] = squares[name].to(gradient.device) + gradient.square()
    return {
        name: square.mean(1, keepdim=True)
        * square.mean(0, keepdim=True)
        / square.mean().clamp(min=MIN_CURVATURE)
        for name, square in squares.items()
    }


def _set_weights(layer: DecoderLayer, weights: Mapping[str, QuantizedWeight]) -> None:
    for name, weight in weights.items():
        layer.linears[name].weight = weight.dequantize().to(layer.linears[name].weight.device)


def _relative_loss(
    layer: DecoderLayer, windows: TuningWindows, chosen: Sequence[int]
) -> torch.Tensor:
    """The mean over tokens of the layer output's squared error, weighted by `_token_weights`."""
    inputs, targets = windows.get(chosen)
    outputs = layer(inputs, *windows.layer_inputs(layer.index, chosen))
    return ((outputs - targets).square().mean(1) * _token_weights(targets)).mean()


def _token_weights(targets: torch.Tensor) -> torch.Tensor:
    """The weight [T] of each token's squared error: one over its mean square, or over the median.

    The larger of the two counts. Later layers see errors relative to a token, and a few tokens,
    such as the first, may be a thousand times as large as others: their errors would be all that
    counts. Small tokens get no larger weight, because later layers make them as large as others.
    """
    squares = targets.square().mean(1)
    return 1 / squares.clamp(min=squares.median().item())


@torch.no_grad()
def _total_loss(
    layer: DecoderLayer, windows: TuningWindows, parts: Sequence[Sequence[int]]
) -> float:
    """The sum of the relative losses of the parts (see `TuningWindows.parts`)."""
    return sum(_relative_loss(layer, windows, part).item() for part in parts)
