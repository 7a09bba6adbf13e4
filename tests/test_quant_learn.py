"""Learned rounding: it starts from the codes it was given, lowers the layer's error, and never makes it worse."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from llmkit.checkpoint.quantized import QuantizedWeight, Scheme
from llmkit.checkpoint.source import open_checkpoint
from llmkit.model.families import model_spec
from llmkit.quant.algorithm import Learn
from llmkit.quant.grid import FULL_SEARCH, round_to_nearest
from llmkit.quant.learn import Learned, Windows, learn_layer
from llmkit.quant.stream import LayerStream


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(4, 32, symmetric=False), Scheme(8)], ids=lambda s: s.label)
def test_it_starts_from_the_codes_it_is_given(scheme: Scheme) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 64, generator=generator)
    start = round_to_nearest(weight, scheme, torch.float16, FULL_SEARCH)
    start.codes = (start.codes.int() + torch.randint(-1, 2, start.codes.shape, generator=generator)).clamp(
        0, 2**scheme.bits - 1
    ).to(torch.uint8)  # fmt: skip
    learned = Learned(weight, start)
    assert torch.equal(learned.result().codes, start.codes)
    assert torch.equal(learned.result().scales, start.scales)
    torch.testing.assert_close(learned.dense(), start.dequantize())


def test_gradients_go_to_the_rounding_and_the_scales() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    learned = Learned(weight, round_to_nearest(weight, Scheme(4, 32), torch.float16))
    learned.dense().square().sum().backward()
    assert learned.shift.grad is not None and bool(learned.shift.grad.any())
    assert learned.stretch.grad is not None and bool(learned.stretch.grad.any())
    before = learned.dense().detach().square().sum()
    learned.descend(Learn(steps=1), 1.0)
    assert learned.dense().square().sum() < before


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "phi3"])
@pytest.mark.parametrize("steps", [0, 60])
def test_the_layers_error_goes_down(tmp_path: Path, architecture: str, steps: int) -> None:
    checkpoint = open_checkpoint(tiny.tiny_checkpoint(tmp_path / "model", architecture))
    stream = LayerStream.of(checkpoint, model_spec(checkpoint.config))
    windows = torch.randint(0, tiny.VOCAB, (48, 32), generator=torch.Generator().manual_seed(0))
    inputs, targets = stream.embed(windows, 128), stream.embed(windows, 128)
    layer = stream.layer(0)
    stream.advance(layer, targets)
    weights = {name: linear.weight for name, linear in layer.linears.items()}
    start = {name: round_to_nearest(weight, Scheme(4, 32), torch.float16) for name, weight in weights.items()}

    def error(found: dict[str, QuantizedWeight]) -> float:
        quantized = stream.layer(0)
        for name, weight in found.items():
            quantized.linears[name].weight = weight.dequantize()
        outputs = stream.embed(windows, 128)
        stream.advance(quantized, outputs)
        pairs = zip(outputs, targets, strict=True)
        return sum((one.hidden - two.hidden).square().sum().item() for one, two in pairs)

    learn = Learn(steps=steps, tokens=192)
    examples = Windows(inputs, targets, 32, learn, stream)
    assert (len(examples.places), examples.count) == (48, 6)
    found = learn_layer(layer, weights, start, examples, learn, 0, lambda _: None)
    if steps:
        assert error(found) < 0.85 * error(start)
        again = stream.layer(0)
        second = learn_layer(again, weights, start, examples, learn, 0, lambda _: None)
        assert all(torch.equal(found[name].codes, second[name].codes) for name in found)
    else:
        assert all(found[name] is start[name] for name in found)
    for name, weight in found.items():
        assert torch.equal(layer.linears[name].weight, weight.dequantize())
