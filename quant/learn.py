"""Learned rounding: signed gradient descent on the rounding and the scales of a decoder layer (Cheng et al., 2023,
arXiv 2309.05516), so that the output of the layer comes close to that of the unquantized model.

It starts from the codes that another method chose, which are kept when nothing better is found. The layer is given what
the quantized layers before it put out, and is to give what the unquantized model gives: errors made before are made up
for where that is possible. Legend: `out` rows, `in` columns, `G` groups along `in`, `g` columns in a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from llmkit.checkpoint.quantized import QuantizedWeight
from llmkit.kernels.attention import KvCache
from llmkit.model.decoder import DecoderLayer
from llmkit.quant.algorithm import Learn
from llmkit.quant.stream import LayerStream, MicroBatch

HELD = 2  # steps' worth of windows that the result is judged on
INSIDE = 0.45  # of a code's cell: how far from its middle a weight may start, so that gradients can move it out


class Learned:
    """One weight [out, in] while its rounding is learnt: codes = round(weight / scale + shift) + zero."""

    def __init__(self, weight: torch.Tensor, start: QuantizedWeight) -> None:
        self.start, self.scheme = start, start.scheme
        rows, groups = start.scales.shape
        self.weight = weight.detach().clone().view(rows, groups, -1)
        self.scales = start.scales.float().unsqueeze(2)
        self.zeros = start.zeros.float().unsqueeze(2)
        wanted = start.codes.float().view_as(self.weight) - self.zeros
        distance = wanted - self.weight / self.scales
        # No further than needed to stay in the cell of the code that it has.
        self.shift = (distance - distance.clamp(-INSIDE, INSIDE)).requires_grad_()
        self.stretch = torch.zeros_like(self.scales).requires_grad_()

    def dense(self) -> torch.Tensor:
        """The weight that the codes stand for; differentiable, as if rounding were the identity."""
        scales = _as_stored(self.scales * (1 + self.stretch), self.start.scales.dtype)
        steps = self.weight / scales + self.shift
        codes = (_straight(steps, steps.round()) + self.zeros).clamp(0, (1 << self.scheme.bits) - 1)
        return ((codes - self.zeros) * scales).view(self.start.codes.shape)

    @torch.no_grad()
    def descend(self, learn: Learn, share: float) -> None:
        """One step of signed gradient descent, at `share` of the full rate."""
        for values, rate in ((self.shift, learn.rounding_rate), (self.stretch, learn.scale_rate)):
            assert values.grad is not None
            values.sub_(values.grad.sign_(), alpha=rate * share / learn.steps)
            values.grad = None

    @torch.no_grad()
    def result(self) -> QuantizedWeight:
        """The codes and scales as they are now."""
        scales = (self.scales * (1 + self.stretch)).to(self.start.scales.dtype)
        steps = (self.weight / scales.float() + self.shift).round_().add_(self.zeros)
        codes = steps.clamp_(0, (1 << self.scheme.bits) - 1).to(torch.uint8).view(self.start.codes.shape)
        return QuantizedWeight(codes, scales.squeeze(2), self.start.zeros, self.scheme, self.start.input_scale)


def _straight(values: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    return values + (rounded - values).detach()


def _as_stored(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return _straight(scales, scales.to(dtype).float())


class Windows:
    """Pairs of a layer's inputs and wanted outputs, `count` windows [L, H] at a time."""

    def __init__(
        self,
        inputs: Sequence[MicroBatch],
        targets: Sequence[MicroBatch],
        length: int,
        learn: Learn,
        stream: LayerStream,
    ) -> None:
        self.inputs, self.targets, self.length = inputs, targets, length
        self.places = [(batch, start) for batch, one in enumerate(inputs) for start in range(0, one.tokens, length)]
        self.count = min(len(self.places), max(1, learn.tokens // length))
        self.step = stream.step(self.count, length)

    def get(self, chosen: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets [count * L, H] of some windows."""
        places = [self.places[index] for index in chosen]
        device = self.step.device
        one = torch.cat([self.inputs[batch].hidden[start : start + self.length] for batch, start in places])
        two = torch.cat([self.targets[batch].hidden[start : start + self.length] for batch, start in places])
        return one.to(device), two.to(device)


def learn_layer(
    layer: DecoderLayer,
    weights: Mapping[str, torch.Tensor],
    found: Mapping[str, QuantizedWeight],
    windows: Windows,
    learn: Learn,
    seed: int,
    note: Callable[[str], None],
) -> dict[str, QuantizedWeight]:
    """Better codes for the linears `found` of a layer, whose unquantized weights are `weights`.

    The layer is left with the weights of the result. Returns `found` itself when learning did not help.
    """
    learned = {name: Learned(weights[name], start) for name, start in found.items()}
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(windows.places), generator=generator).tolist()
    held = order[: HELD * windows.count] if len(order) > 2 * HELD * windows.count else []
    pool = torch.tensor(order[len(held) :])
    judged = held or order[: HELD * windows.count]
    _use(layer, found)
    before = _loss(layer, windows, judged)
    for index in range(learn.steps):
        chosen = pool[torch.randperm(len(pool), generator=generator)[: windows.count]].tolist()
        with torch.enable_grad():
            for name, one in learned.items():
                layer.linears[name].weight = one.dense()
            inputs, targets = windows.get(chosen)
            loss = (_run(layer, windows, inputs) - targets).square().mean() / targets.square().mean()
            loss.backward()
        for one in learned.values():
            one.descend(learn, 1 - index / learn.steps)
        if index % 10 == 0:
            note(f"learning, step {index} of {learn.steps}, error {loss.item():.2e}")
    results = {name: one.result() for name, one in learned.items()}
    _use(layer, results)
    if _loss(layer, windows, judged) < before:
        return results
    _use(layer, found)
    return dict(found)


def _use(layer: DecoderLayer, weights: Mapping[str, QuantizedWeight]) -> None:
    for name, weight in weights.items():
        layer.linears[name].weight = weight.dequantize().to(layer.linears[name].weight.device)


def _run(layer: DecoderLayer, windows: Windows, inputs: torch.Tensor) -> torch.Tensor:
    """The layer's output; into a cache of its own, as gradients go back through it."""
    step = windows.step
    return layer(inputs, step.rotations, step.batch, KvCache(torch.zeros_like(step.cache.kv)))


@torch.no_grad()
def _loss(layer: DecoderLayer, windows: Windows, chosen: Sequence[int]) -> float:
    lost = 0.0
    for start in range(0, len(chosen), windows.count):
        part = chosen[start : start + windows.count]
        if len(part) == windows.count:
            inputs, targets = windows.get(part)
            lost += ((_run(layer, windows, inputs) - targets).square().mean() / targets.square().mean()).item()
    return lost
