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

from llmkit.checkpoint.errors import InputError, ShortageError
from llmkit.checkpoint.source import open_checkpoint
from llmkit.cli import main, serve
from llmkit.kernels.quantized_linear import GroupedProduct, RoundedProduct
from llmkit.model.decoder import Decoder, DecoderLayer
from llmkit.model.families import model_spec
from llmkit.model.linear import Linear, PackedLinear
from llmkit.model.loader import load_model
from llmkit.model.sequence import logits_of
from llmkit.runtime import load, offload
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.types import EngineConfig, EngineOptions, SamplingParams
from llmkit.runtime.offload import HostLayers, Offload, host_layers

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
    fetch, done = ["side waits for current", "copy"], ["copied"]
    step = [
        "layer 0", "layer 1", *done, "layer 2", *fetch, *done, "layer 3", *fetch,
        *done, "layer 4", *fetch, *done, "layer 5", *fetch,
    ]  # fmt: skip
    assert cuda.log == [*fetch, *fetch, *step, *step]


def test_after_a_step_that_failed_the_right_layers_are_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = torch.cat(list(logits_of(model(path), WINDOWS)))
    found = hosted(path, 5, LateCuda())
    run = DecoderLayer._feed

    def fails(self: DecoderLayer, hidden: torch.Tensor) -> torch.Tensor:
        if self is found.layers[3]:
            raise RuntimeError("out of memory")
        return run(self, hidden)

    with monkeypatch.context() as patched:
        patched.setattr(DecoderLayer, "_feed", fails)
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
    Offload(layers, CPU, LateCuda())
    for layer, own, wanted in zip(layers, places, before, strict=True):
        with layer.present():
            for (owner, name), tensor in zip(own, wanted, strict=True):
                got = getattr(owner, name)
                assert got is not tensor
                assert got.dtype == tensor.dtype and got.stride() == tensor.stride() and torch.equal(got, tensor)


def test_the_last_layers_are_loaded_into_host_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "Offload", lambda layers, device: Offload(layers, device, LateCuda()))
    monkeypatch.setattr(load, "load_model", lambda *args, packed, **more: load_model(*args, **more))
    checkpoint = open_checkpoint(path)
    expected = torch.cat(list(logits_of(model(path), WINDOWS)))
    spec = model_spec(checkpoint.config)
    found = load._load(checkpoint, spec, torch.float32, CPU, load.StartUp(), offloaded=4)
    assert torch.equal(torch.cat(list(logits_of(found, WINDOWS))), expected)
    storages = [
        {linear.weight.untyped_storage().data_ptr() for linear in layer.linears.values()} for layer in found.layers
    ]
    assert storages[2] == storages[4] != storages[3] == storages[5], "two buffers by turns"
    assert all(len(each) == 1 for each in storages[2:]) and not storages[1] & storages[2]


GPU = torch.device("cuda")


def test_what_stays_in_host_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(path)
    spec = model_spec(checkpoint.config)
    layer = sum(linear.weight.nbytes for linear in model(path).layers[0].linears.values()) // 2

    def planned(limit: int) -> HostLayers:
        return host_layers(checkpoint, spec, torch.bfloat16, GPU, limit)

    assert planned(0) == HostLayers(0, 0, 0)
    assert planned(layer) == planned(2 * layer - 1) == HostLayers(1, layer, 2 * layer)
    assert planned(4 * layer + 7) == HostLayers(4, 4 * layer, 2 * layer)
    assert planned(1 << 50) == HostLayers(6, 6 * layer, 2 * layer)
    with pytest.raises(InputError, match="is less than a layer"):
        planned(layer - 1)
    monkeypatch.setattr(offload, "free_bytes", lambda *_: 2 * layer)
    with pytest.raises(ShortageError, match="of host memory"):
        planned(3 * layer)


def test_the_plan_of_a_gpu_counts_them(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "resolve_device", lambda _: GPU)
    monkeypatch.setattr(load, "free_bytes", lambda *_: 1 << 32)
    checkpoint = open_checkpoint(path)
    plain, away = (load.plan_engine(checkpoint, EngineOptions(cpu_offload=size)) for size in (0, 1 << 40))
    assert away.memory.weights == plain.memory.weights - away.host.bytes + away.host.buffers
    assert away.as_dict()["host_layers"] == 6 and "host_layers" not in plain.as_dict()
    shown, other = (dict(serve._memory_rows(one.as_dict())) for one in (away, plain))
    assert shown.keys() - other.keys() == {"weights in host memory"}


def test_without_a_gpu_it_is_refused(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["serve", str(path), "--plan", "--device", "cpu", "--cpu-offload", "1GiB"]) == 4
    assert "--cpu-offload needs a CUDA device. Leave it out" in capsys.readouterr().err
