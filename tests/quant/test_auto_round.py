"""Learned rounding starts from given values, lowers a layer's error and never raises it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from support import tiny_models as tiny

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.quantized_weight import QuantizedWeight, Scheme
from llmkit.model.decoder import DecoderLayer
from llmkit.model.families import model_spec
from llmkit.model.linear import ActivationQuant
from llmkit.quant.algorithm import AutoRound
from llmkit.quant.auto_round import (
    LearnedRounding,
    StraightThroughQuant,
    TuningWindows,
    curvatures,
    layer_targets,
    tune_rounding,
)
from llmkit.quant.grid import FULL_SEARCH, round_to_nearest
from llmkit.quant.layer_stream import LayerStream, MicroBatch, StoredTensor
from llmkit.quant.number_formats import NUMBER_FORMATS


@pytest.mark.parametrize(
    "scheme", [Scheme(4, 32), Scheme(4, 32, symmetric=False), Scheme(8)], ids=lambda s: s.label
)
def test_learned_rounding_starts_from_the_given_values(scheme: Scheme) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 64, generator=generator)
    start = round_to_nearest(weight, scheme, torch.float16, FULL_SEARCH)
    start.q = (
        (start.q.int() + torch.randint(-1, 2, start.q.shape, generator=generator))
        .clamp(0, 2**scheme.bits - 1)
        .to(torch.uint8)
    )
    learned = LearnedRounding(weight, start)
    assert torch.equal(learned.result().q, start.q)
    assert torch.equal(learned.result().scales, start.scales)
    torch.testing.assert_close(learned.dense(), start.dequantize())


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_learned_rounding_starts_from_the_given_fp4_values(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 64, generator=generator)
    start = round_to_nearest(weight, NUMBER_FORMATS[name].scheme, torch.float32, FULL_SEARCH)
    moved = start.q ^ (torch.rand(start.q.shape, generator=generator) < 0.3).to(torch.uint8)
    start.q = moved  # a neighbour of some values
    learned = LearnedRounding(weight, start)
    assert torch.equal(learned.result().dequantize(), start.dequantize())
    assert torch.equal(learned.dense(), start.dequantize())
    with torch.no_grad():
        learned.rounding_offset += 1  # a step up
        learned.scale_delta += 0.2
    result = learned.result()
    assert (result.values() >= start.values()).all()
    assert (result.values() > start.values()).float().mean() > 0.7
    if name == "nvfp4":  # scales are still e4m3 times the global scale
        assert result.global_scale is not None
        steps = result.scales / result.global_scale
        torch.testing.assert_close(steps.to(torch.float8_e4m3fn).float(), steps, rtol=1e-6, atol=0)
        assert (result.scales > start.scales).float().mean() > 0.95
    else:
        assert torch.equal(result.scales, start.scales)


def test_straight_through_quant_passes_gradients_to_inputs() -> None:
    quant = ActivationQuant.of(NUMBER_FORMATS["mxfp4"].scheme)
    assert quant is not None
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rounded = StraightThroughQuant(**vars(quant))(x)
    assert torch.equal(rounded, quant(x.detach()))
    rounded.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_learned_rounding_has_gradients_for_rounding_and_scales() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    learned = LearnedRounding(weight, round_to_nearest(weight, Scheme(4, 32), torch.float16))
    learned.dense().square().sum().backward()
    assert learned.rounding_offset.grad is not None and bool(learned.rounding_offset.grad.any())
    assert learned.scale_delta.grad is not None and bool(learned.scale_delta.grad.any())
    before = learned.dense().detach().square().sum()
    learned.descend(torch.full((8, 64), 2.0), 0.5)
    assert learned.dense().square().sum() < before


def test_learned_rounding_moves_values_by_gradient_over_curvature() -> None:
    """Offsets move by gradient over curvature, at most by a whole quantization step."""
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    learned = LearnedRounding(weight, round_to_nearest(weight, Scheme(4, 32), torch.float16))
    before = learned.rounding_offset.detach().clone()
    scales = learned.scales.expand_as(before)
    gradient = torch.linspace(-3, 3, 512).view_as(before)  # by weights, in steps of their group
    learned.rounding_offset.grad = gradient * scales.square()
    learned.descend(torch.ones(8, 64), 0.1)
    moved = before - learned.rounding_offset.detach()
    torch.testing.assert_close(moved, 0.1 * gradient.clamp(-1, 1), rtol=1e-4, atol=1e-6)


GATED_DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
}


class FirstLayer(NamedTuple):
    """A tiny model's first layer, its token windows, its inputs and its outputs."""

    stream: LayerStream
    windows: torch.Tensor  # [48, 32]
    inputs: list[MicroBatch]
    outputs: list[MicroBatch]
    layer: DecoderLayer

    @property
    def targets(self) -> list[StoredTensor]:
        """The outputs. Before the first layer there are no errors to correct."""
        return layer_targets(self.layer, self.inputs, self.outputs, 0.5)


def first_layer(tmp_path: Path, architecture: str) -> FirstLayer:
    sizes = GATED_DELTA_NET if architecture == "qwen3_5_text" else {}
    checkpoint = open_checkpoint(tiny.tiny_checkpoint(tmp_path / "model", architecture, **sizes))
    stream = LayerStream.from_checkpoint(checkpoint, model_spec(checkpoint.config))
    windows = torch.randint(0, tiny.VOCAB, (48, 32), generator=torch.Generator().manual_seed(0))
    inputs = stream.embed(windows, 128)
    outputs = stream.embed(windows, 128)
    layer = stream.layer(0)
    stream.run_layer(layer, outputs)
    return FirstLayer(stream, windows, inputs, outputs, layer)


@pytest.mark.parametrize("correction", [0.0, 0.25, 1.0])
def test_layer_targets_correct_a_share_of_earlier_errors(tmp_path: Path, correction: float) -> None:
    first = first_layer(tmp_path, "llama")
    generator = torch.Generator().manual_seed(2)
    for micro_batch in first.inputs:
        shape = micro_batch.hidden.shape
        micro_batch.hidden = micro_batch.hidden + 0.1 * torch.randn(shape, generator=generator)
    wrong = [micro_batch.snapshot() for micro_batch in first.inputs]
    first.stream.run_layer(first.layer, wrong)
    in_memory = layer_targets(first.layer, first.inputs, first.outputs, correction)
    on_disk = layer_targets(first.layer, first.inputs, first.outputs, correction, tmp_path)
    for target, stored, output, own in zip(in_memory, on_disk, first.outputs, wrong, strict=True):
        expected = correction * output.hidden + (1 - correction) * own.hidden
        torch.testing.assert_close(target.read(), expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(target.read(), stored.read())
        assert not torch.allclose(own.hidden, output.hidden, atol=1e-2)


def test_curvatures_are_about_those_of_the_last_linears_inputs(tmp_path: Path) -> None:
    """The layer's output has the last linear's as a summand: its curvatures are known exactly."""
    first = first_layer(tmp_path, "llama")
    stream, _, inputs, _, layer = first
    start = {
        name: round_to_nearest(linear.weight, Scheme(8, 32), torch.float32)
        for name, linear in layer.linears.items()
    }
    examples = TuningWindows(inputs, first.targets, 32, AutoRound(tokens=1536), stream)
    chosen = examples.parts(range(48))
    assert len(chosen) == 1
    read: list[torch.Tensor] = []
    hook = layer.linears["mlp.down"].register_forward_hook(
        lambda _, arguments, __: read.append(arguments[0])
    )
    generator = torch.Generator().manual_seed(1)
    found = curvatures(layer, start, examples, chosen, generator)["mlp.down"]
    hook.remove()
    _, outputs = examples.get(chosen[0])
    squares = outputs.square().mean(1, keepdim=True)
    weights = 1 / torch.maximum(squares, squares.median())
    expected = 2 * (read[0].square() * weights).sum(0) / outputs.numel()
    assert found.shape == start["mlp.down"].q.shape
    assert found.mean().item() == pytest.approx(expected.mean().item(), rel=0.2)
    ratios = found.mean(0) / expected
    assert ratios.min().item() > 0.4
    assert ratios.max().item() < 2.2
    assert ratios.std().item() < 0.4


@pytest.mark.parametrize(
    ("steps", "architecture"),
    [
        (0, "llama"),
        (60, "gemma3_text"),
        (0, "phi3"),
        (60, "qwen3_5_text"),
        pytest.param(60, "llama", marks=pytest.mark.slow),
        pytest.param(60, "phi3", marks=pytest.mark.slow),
    ],
)
def test_tune_rounding_lowers_the_layers_error(
    tmp_path: Path, architecture: str, steps: int
) -> None:
    first = first_layer(tmp_path, architecture)
    stream, windows, inputs, expected, layer = first
    weights = {name: linear.weight for name, linear in layer.linears.items()}
    start = {
        name: round_to_nearest(weight, Scheme(4, 32), torch.float16)
        for name, weight in weights.items()
    }

    def error(found: dict[str, QuantizedWeight]) -> float:
        quantized = stream.layer(0)
        for name, weight in found.items():
            quantized.linears[name].weight = weight.dequantize()
        outputs = stream.embed(windows, 128)
        stream.run_layer(quantized, outputs)
        pairs = zip(outputs, expected, strict=True)
        return sum((one.hidden - two.hidden).square().sum().item() for one, two in pairs)

    learn = AutoRound(steps=steps, tokens=512)
    examples = TuningWindows(inputs, first.targets, 32, learn, stream)
    assert (len(examples.positions), examples.count) == (48, 16)
    found = tune_rounding(layer, weights, start, examples, learn, 0, lambda _: None)
    if steps:
        assert error(found) < 0.85 * error(start)
        again = stream.layer(0)
        second = tune_rounding(again, weights, start, examples, learn, 0, lambda _: None)
        assert all(torch.equal(found[name].q, second[name].q) for name in found)
    else:
        assert all(found[name] is start[name] for name in found)
    for name, weight in found.items():
        assert torch.equal(layer.linears[name].weight, weight.dequantize())
