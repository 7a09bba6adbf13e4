"""Weights in host memory: the same results, and no buffer is overwritten while it is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support.fake_streams import LateCuda
from support.quantized_linear_cases import Case
from support.tiny_models import tiny_checkpoint

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.cli import main, serve
from llmkit.common.errors import InputError, ShortageError
from llmkit.kernels.quantized_linear import WeightOnlyLinear
from llmkit.kernels.w8a8_linear import W8A8Linear
from llmkit.model.decoder import Decoder, DecoderLayer
from llmkit.model.families import model_spec
from llmkit.model.full_forward import window_logits
from llmkit.model.linear import Linear, PackedLinear
from llmkit.model.weight_loader import load_model
from llmkit.runtime import engine_plan, part_loader
from llmkit.runtime import weight_offload as offload
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_config import EngineConfig
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.weight_offload import OffloadPlan, WeightOffload, plan_offload

CPU = torch.device("cpu")
WINDOWS = torch.randint(3, 500, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=["qwen2", "mixtral"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("offload"), request.param, num_hidden_layers=6)


def model(path: Path) -> Decoder:
    return load_model(open_checkpoint(path), torch.float32)


def hosted(path: Path, count: int, cuda: LateCuda) -> Decoder:
    found = model(path)
    WeightOffload(found.layers[-count:], CPU, cuda)
    return found


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_offload_gives_the_same_logits(
    path: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "PINNED_PIECE_BYTES", 5000)  # not a multiple of anything
    expected = torch.cat(list(window_logits(model(path), WINDOWS)))
    found = hosted(path, count, LateCuda())
    for _ in range(2):
        assert torch.equal(torch.cat(list(window_logits(found, WINDOWS))), expected)


def test_offload_gives_the_same_outputs(path: Path) -> None:
    config = EngineConfig(64, 16, CPU, torch.float32)
    sampling = SamplingParams(temperature=0.8, seed=3, max_tokens=12, ignore_eos=True)
    prompts = [[5, 6, 7], [9] * 20]
    expected = Engine(model(path), config).generate(prompts, sampling)
    assert Engine(hosted(path, 4, LateCuda()), config).generate(prompts, sampling) == expected


def runs(cuda: LateCuda, layers: list[DecoderLayer]) -> None:
    """Note in the log when the layers run."""
    for index, layer in enumerate(layers):
        present = layer.weights_on_device

        @contextmanager
        def noted(index: int = index, present: object = present) -> Iterator[None]:
            with present():  # type: ignore[operator]
                cuda.log.append(f"layer {index}")
                yield

        layer.weights_on_device = noted


def test_offload_copies_a_layer_while_the_one_before_it_runs(path: Path) -> None:
    cuda = LateCuda()
    found = hosted(path, 4, cuda)
    runs(cuda, found.layers)
    list(window_logits(found, WINDOWS))  # two steps
    fetch = ["side waits for current", "copy"]
    done = ["copied"]
    step = [
        "layer 0",
        "layer 1",
        *done,
        "layer 2",
        *fetch,
        *done,
        "layer 3",
        *fetch,
        *done,
        "layer 4",
        *fetch,
        *done,
        "layer 5",
        *fetch,
    ]
    assert cuda.log == [*fetch, *fetch, *step, *step]


def test_offload_recovers_from_a_step_that_failed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = torch.cat(list(window_logits(model(path), WINDOWS)))
    found = hosted(path, 5, LateCuda())
    run = DecoderLayer._mlp_or_moe

    def fails(self: DecoderLayer, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        if self is found.layers[3]:
            raise RuntimeError("out of memory")
        return run(self, x, residual)

    with monkeypatch.context() as patched:
        patched.setattr(DecoderLayer, "_mlp_or_moe", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            list(window_logits(found, WINDOWS))
    assert torch.equal(torch.cat(list(window_logits(found, WINDOWS))), expected)


def packed_layer(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> tuple[DecoderLayer, list[tuple[object, str]]]:
    """A layer of packed linears, as a GPU has them, and where their weights are."""
    weight = Case(4, 32, seed, 48, 128).weight()
    quantized = torch.randint(
        -128, 128, (48, 128), dtype=torch.int8, generator=torch.Generator().manual_seed(seed)
    )
    grouped = WeightOnlyLinear(weight.q, weight.scales, weight.zeros, 4, 32)
    rounded = W8A8Linear(quantized, torch.rand(48, 1), torch.rand(48))
    layer = DecoderLayer.__new__(DecoderLayer)
    layer.linears = {
        "attn.qkv": PackedLinear(grouped, (48, 128)),
        "attn.o": PackedLinear(rounded, (48, 128)),
        "mlp.down": Linear(torch.rand(3, 5), torch.rand(3)),
    }
    return layer, [
        (grouped, "words"),
        (grouped, "scales"),
        (rounded, "q"),
        (rounded, "scales"),
        (layer.linears["mlp.down"], "weight"),
    ]


def test_offload_keeps_the_layout_of_packed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, places = zip(*(packed_layer(monkeypatch, seed) for seed in (1, 2, 3)), strict=True)
    before = [[getattr(owner, name) for owner, name in own] for own in places]
    WeightOffload(layers, CPU, LateCuda())
    for layer, own, wanted in zip(layers, places, before, strict=True):
        with layer.weights_on_device():
            for (owner, name), tensor in zip(own, wanted, strict=True):
                got = getattr(owner, name)
                assert got is not tensor
                assert (
                    got.dtype == tensor.dtype
                    and got.stride() == tensor.stride()
                    and torch.equal(got, tensor)
                )


def test_load_weights_keeps_the_last_layers_in_host_memory(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        part_loader,
        "WeightOffload",
        lambda layers, device: WeightOffload(layers, device, LateCuda()),
    )
    monkeypatch.setattr(
        part_loader, "load_model", lambda *args, packed, **more: load_model(*args, **more)
    )
    checkpoint = open_checkpoint(path)
    expected = torch.cat(list(window_logits(model(path), WINDOWS)))
    spec = model_spec(checkpoint.config)
    report = part_loader.StartupReport()
    found = part_loader.load_weights(
        checkpoint, spec, torch.float32, CPU, report, num_offloaded_layers=4
    )
    assert torch.equal(torch.cat(list(window_logits(found, WINDOWS))), expected)
    storages = [
        {linear.weight.untyped_storage().data_ptr() for linear in layer.linears.values()}
        for layer in found.layers
    ]
    assert storages[2] == storages[4] != storages[3] == storages[5], "two buffers by turns"
    assert all(len(each) == 1 for each in storages[2:]) and not storages[1] & storages[2]


GPU = torch.device("cuda")


def test_plan_offload_fills_the_limit(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(path)
    spec = model_spec(checkpoint.config)
    layer = sum(linear.weight.nbytes for linear in model(path).layers[0].linears.values()) // 2

    def planned(limit: int) -> OffloadPlan:
        return plan_offload(checkpoint, spec, torch.bfloat16, GPU, limit)

    assert planned(0) == OffloadPlan(0, 0, 0)
    assert planned(layer) == planned(2 * layer - 1) == OffloadPlan(1, layer, 2 * layer)
    assert planned(4 * layer + 7) == OffloadPlan(4, 4 * layer, 2 * layer)
    assert planned(1 << 50) == OffloadPlan(6, 6 * layer, 2 * layer)
    with pytest.raises(InputError, match="is less than a layer"):
        planned(layer - 1)
    monkeypatch.setattr(offload, "free_bytes", lambda *_: 2 * layer)
    with pytest.raises(ShortageError, match="of host memory"):
        planned(3 * layer)


def test_plan_engine_counts_offloaded_layers(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_plan, "resolve_device", lambda _: GPU)
    monkeypatch.setattr(engine_plan, "free_bytes", lambda *_: 1 << 32)
    checkpoint = open_checkpoint(path)
    plain, away = (
        engine_plan.plan_engine(
            checkpoint, EngineOptions(cpu_offload=size, max_cudagraph_capture_size=0)
        )
        for size in (0, 1 << 40)
    )
    assert away.memory.weight_bytes == (
        plain.memory.weight_bytes - away.offload.weight_bytes + away.offload.buffer_bytes
    )
    assert away.as_dict()["host_layers"] == 6 and "host_layers" not in plain.as_dict()
    shown, other = (dict(serve.memory_rows(one.as_dict())) for one in (away, plain))
    assert shown.keys() - other.keys() == {"weights in host memory"}


def test_offload_without_a_gpu_is_refused(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["serve", str(path), "--plan", "--device", "cpu", "--cpu-offload", "1GiB"]) == 4
    assert "--cpu-offload needs a CUDA device. Leave it out" in capsys.readouterr().err
