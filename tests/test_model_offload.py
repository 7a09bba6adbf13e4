"""Layers in host memory: the same results, every layer there when it runs, none overwritten while it is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from quantized_products import Case
from streams import LateCuda
from tiny import tiny_checkpoint

from llmkit.checkpoint.source import open_checkpoint
from llmkit.kernels.quantized_linear import GroupedProduct, RoundedProduct
from llmkit.model import offload
from llmkit.model.decoder import Decoder, DecoderLayer
from llmkit.model.linear import Linear, PackedLinear
from llmkit.model.loader import load_model
from llmkit.model.offload import Offload, to_host
from llmkit.model.sequence import logits_of
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.types import EngineConfig, SamplingParams

CPU = torch.device("cpu")
WINDOWS = torch.randint(3, 500, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=["qwen2", "mixtral"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("offload"), request.param, num_hidden_layers=6)


def model(path: Path) -> Decoder:
    return load_model(open_checkpoint(path), torch.float32)


def hosted(path: Path, count: int, cuda: LateCuda) -> Decoder:
    found = model(path)
    Offload(found.layers[-count:], CPU, cuda)
    return found


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_logits_are_the_same(path: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "PIECE", 5000)  # not a multiple of anything
    expected = torch.cat(list(logits_of(model(path), WINDOWS)))
    found = hosted(path, count, LateCuda())
    for _ in range(2):
        assert torch.equal(torch.cat(list(logits_of(found, WINDOWS))), expected)


def test_an_engine_answers_the_same(path: Path) -> None:
    config = EngineConfig(64, 16, CPU, torch.float32)
    sampling = SamplingParams(temperature=0.8, seed=3, max_tokens=12, ignore_eos=True)
    prompts = [[5, 6, 7], [9] * 20]
    expected = Engine(model(path), config).generate(prompts, sampling)
    assert Engine(hosted(path, 4, LateCuda()), config).generate(prompts, sampling) == expected


def runs(cuda: LateCuda, layers: list[DecoderLayer]) -> None:
    """Note in the log when the layers run."""
    for index, layer in enumerate(layers):
        present = layer.present

        @contextmanager
        def noted(index: int = index, present: object = present) -> Iterator[None]:
            with present():  # type: ignore[operator]
                cuda.log.append(f"layer {index}")
                yield

        layer.present = noted


def test_a_layer_is_fetched_while_the_one_before_it_runs(path: Path) -> None:
    cuda = LateCuda()
    found = hosted(path, 4, cuda)
    runs(cuda, found.layers)
    list(logits_of(found, WINDOWS))  # two steps
    first, second = cuda.log[: cuda.log.index("layer 0", 1)], cuda.log[cuda.log.index("layer 0", 1) :]
    fetch, done = ["side waits for current", "copy"], ["copied"]
    assert first == [
        "layer 0", "layer 1", *fetch, *done, "layer 2", *fetch, *fetch, *done, *done, "layer 3", *fetch,
        *done, "layer 4", *fetch, *done, "layer 5", *fetch,
    ]  # fmt: skip
    assert second == [
        "layer 0", "layer 1", *done, "layer 2", *fetch, *done, "layer 3", *fetch,
        *done, "layer 4", *fetch, *done, "layer 5", *fetch,
    ]  # fmt: skip


def test_after_a_step_that_failed_the_right_layers_are_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = torch.cat(list(logits_of(model(path), WINDOWS)))
    found = hosted(path, 5, LateCuda())
    run = DecoderLayer.mlp_block

    def fails(self: DecoderLayer, hidden: torch.Tensor) -> torch.Tensor:
        if self is found.layers[3]:
            raise RuntimeError("out of memory")
        return run(self, hidden)

    with monkeypatch.context() as patched:
        patched.setattr(DecoderLayer, "mlp_block", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            list(logits_of(found, WINDOWS))
    assert torch.equal(torch.cat(list(logits_of(found, WINDOWS))), expected)


def packed_layer(monkeypatch: pytest.MonkeyPatch, seed: int) -> tuple[DecoderLayer, list[tuple[object, str]]]:
    """A layer of packed linears, as a GPU has them, and where their weights are."""
    weight = Case(4, 32, seed, 48, 128).weight()
    codes = torch.randint(-128, 128, (48, 128), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    grouped = GroupedProduct(weight.codes, weight.scales, weight.zeros, 4, 32)
    rounded = RoundedProduct(codes, torch.rand(48, 1), torch.rand(48))
    layer = DecoderLayer.__new__(DecoderLayer)
    layer.linears = {
        "attn.qkv": PackedLinear(grouped, (48, 128)), "attn.o": PackedLinear(rounded, (48, 128)),
        "mlp.down": Linear(torch.rand(3, 5), torch.rand(3)),
    }  # fmt: skip
    return layer, [(grouped, "_words"), (grouped, "_grids"), (rounded, "_codes"), (rounded, "_scales"),
                   (layer.linears["mlp.down"], "weight")]  # fmt: skip


def test_packed_weights_keep_their_form(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, places = zip(*(packed_layer(monkeypatch, seed) for seed in (1, 2, 3)), strict=True)
    before = [[getattr(owner, name) for owner, name in own] for own in places]
    Offload([layer for layer in layers for _ in [to_host(one) for one in layer.linears.values()][:1]], CPU, LateCuda())
    for layer, own, wanted in zip(layers, places, before, strict=True):
        with layer.present():
            for (owner, name), tensor in zip(own, wanted, strict=True):
                got = getattr(owner, name)
                assert got is not tensor
                assert got.dtype == tensor.dtype and got.stride() == tensor.stride() and torch.equal(got, tensor)
