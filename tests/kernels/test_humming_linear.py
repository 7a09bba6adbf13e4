"""humming-kernels: what it is given, when it is chosen, and how the tuner measures it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from support import fake_humming
from support.synthetic_checkpoint import LLAMA
from torch.nn.functional import linear as dense_linear

from llmkit.bench.gpu import tune_kernels as tune
from llmkit.checkpoint.quantized_weight import QuantizedWeight, Scheme
from llmkit.cli import doctor
from llmkit.kernels import humming_linear, tuned_configs
from llmkit.kernels.humming_linear import HUMMING, LIBRARY, OURS, HummingLinear
from llmkit.kernels.quantized_linear import WeightOnlyLinear
from llmkit.model import linear
from llmkit.model.kernel_choice import Gpu, gpu_kernel_choices
from llmkit.model.linear import PackedLinear, serving_linear
from llmkit.runtime.weight_offload import _weights

BRAIN = torch.bfloat16
CPU = torch.device("cpu")
N, K = 128, 192
NAME = f"NVIDIA H100 sm_90; triton 3.6.0; w4a16_library; 4 64 {N} {K} bfloat16 symmetric 0.1.19"


@pytest.fixture(autouse=True)
def user_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An H100 and a user who has measured nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    gpu = SimpleNamespace(name="NVIDIA H100", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    version = SimpleNamespace(__version__="3.6.0")
    monkeypatch.setattr(tuned_configs.triton_support, "triton", version)
    for module in (linear, tune):
        monkeypatch.setattr(module, "gpu_capability", lambda _: (9, 0))
    tuned_configs.read_configs.cache_clear()
    tuned_configs.measured_config.cache_clear()
    yield tmp_path / "llmkit" / "tuned.json"
    tuned_configs.read_configs.cache_clear()
    tuned_configs.measured_config.cache_clear()


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> list[fake_humming.HummingLayer]:
    """The library is installed; the layers that it builds."""
    return fake_humming.install(monkeypatch)


def make_weight(group_size: int = 64, symmetric: bool = True) -> QuantizedWeight:
    draw = torch.Generator().manual_seed(group_size)
    scheme = Scheme(4, group_size, symmetric=symmetric)
    q = torch.randint(0, 16, (N, K), generator=draw, dtype=torch.uint8)
    scales = (torch.rand(N, scheme.groups(K), generator=draw) / 8).to(BRAIN)
    zeros = torch.full(scales.shape, 8, dtype=torch.uint8)
    if not symmetric:
        zeros = torch.randint(0, 16, scales.shape, generator=draw, dtype=torch.uint8)
    return QuantizedWeight(q, scales, zeros, scheme)


def serve(weight: QuantizedWeight, bias: torch.Tensor | None = None) -> object:
    layer = serving_linear([weight], bias, None, BRAIN, "cuda")
    assert isinstance(layer, PackedLinear)
    return layer.kernel


def measured(choice: int, name: str = NAME, path: Path | None = None) -> None:
    result = tune.TuningResult(name, (choice,), 1.0, (OURS,), 2.0, 2, 0)
    tune.save_results([result], path or tuned_configs.user_file())


@pytest.mark.parametrize(
    ("group_size", "symmetric", "has_bias"),
    [(64, True, False), (32, False, True), (-1, False, True)],
)
@pytest.mark.parametrize("dtype", [BRAIN, torch.float16])
def test_humming_linear_gets_the_weight_as_it_expects(
    dtype: torch.dtype,
    group_size: int,
    symmetric: bool,
    has_bias: bool,
    layers: list[fake_humming.HummingLayer],
) -> None:
    weight = make_weight(group_size, symmetric)
    bias = torch.randn(N).to(dtype) if has_bias else None
    zeros = None if symmetric else weight.zeros
    kernel = HummingLinear(weight.q, weight.scales, zeros, group_size, dtype, bias)
    dense = replace(weight, scales=weight.scales.to(dtype)).dequantize().float()
    x = torch.randn(2, 3, K).to(dtype)
    expected = dense_linear(x.float(), dense, None if bias is None else bias.float()).to(dtype)
    y = kernel(x)
    assert y.dtype == dtype and torch.equal(y, expected)
    assert len(layers) == 1 and layers[0].has_zero_point is not symmetric
    groups = weight.scales.shape[1]
    sizes = [N * K // 2, N * groups * 2, 0 if symmetric else N // 2 * groups, N * 2 * has_bias]
    assert kernel.nbytes == sum(sizes)


def test_humming_linear_runs_only_where_it_was_measured_to_be_faster(
    layers: list[fake_humming.HummingLayer],
) -> None:
    weight = make_weight()
    assert isinstance(serve(weight), WeightOnlyLinear)
    measured(OURS)
    assert isinstance(serve(weight), WeightOnlyLinear)
    measured(HUMMING)
    assert isinstance(serve(make_weight(32)), WeightOnlyLinear)
    assert isinstance(serve(make_weight(symmetric=False)), WeightOnlyLinear)
    assert layers == []
    assert isinstance(serve(weight, torch.ones(N, dtype=BRAIN)), HummingLinear)
    assert len(layers) == 1


def test_humming_linear_of_another_version_or_card_is_not_used(
    layers: list[fake_humming.HummingLayer], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(HUMMING, NAME.replace("H100", "H200"))
    assert isinstance(serve(make_weight()), WeightOnlyLinear)
    measured(HUMMING)
    monkeypatch.setattr(humming_linear, "installed_version", lambda: "0.2.0")
    assert isinstance(serve(make_weight()), WeightOnlyLinear)
    monkeypatch.setattr(humming_linear, "installed_version", lambda: None)
    assert isinstance(serve(make_weight()), WeightOnlyLinear)
    assert layers == []


def test_humming_linear_that_fails_is_replaced_by_ours(
    layers: list[fake_humming.HummingLayer],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(self: object) -> None:
        raise RuntimeError("Could not locate the NVRTC library in CUDA path")

    monkeypatch.setattr(fake_humming.HummingLayer, "transform", fail)
    measured(HUMMING)
    assert isinstance(serve(make_weight()), WeightOnlyLinear)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("llmkit: warning: humming-kernels failed for a weight [128, 192] (Could")


@pytest.mark.parametrize(
    ("shape", "bits", "group_size", "dtype"),
    [
        ((N + 8, K), 4, 64, BRAIN),
        ((N, K + 8), 4, -1, BRAIN),
        ((N, K), 4, 128, BRAIN),
        ((N, K), 8, 64, BRAIN),
        ((N, K), 4, 64, torch.float32),
    ],
)
def test_humming_linear_refuses_what_the_library_does_not_take(
    shape: tuple[int, int],
    bits: int,
    group_size: int,
    dtype: torch.dtype,
    layers: list[fake_humming.HummingLayer],
) -> None:
    assert humming_linear.supports((N, K), 4, 64, BRAIN)
    assert not humming_linear.supports(shape, bits, group_size, dtype)


def test_humming_linear_gives_its_weight_to_cpu_offload(
    layers: list[fake_humming.HummingLayer],
) -> None:
    measured(HUMMING)
    kernel = serve(make_weight(), torch.ones(N, dtype=BRAIN))
    assert isinstance(kernel, HummingLinear)
    packed = PackedLinear(kernel, (N, K))
    found = list(_weights(SimpleNamespace(linears={"o_proj": packed})))  # type: ignore[arg-type]
    assert {name for _, name, _ in found} == {"weight", "weight_scale"}
    x = torch.randn(3, K).to(BRAIN)
    before = kernel(x)
    for owner, name, tensor in found:
        setattr(owner, name, tensor.clone())
        tensor.zero_()
    assert torch.equal(kernel(x), before)


class OurProduct:
    """In the place of a WeightOnlyLinear, whose kernel needs a GPU."""

    def __init__(self, *arguments: object) -> None:
        q, scales, zeros, bits, group_size, _ = arguments
        scheme = Scheme(bits, group_size)  # type: ignore[arg-type]
        weight = QuantizedWeight(q, scales, zeros, scheme)  # type: ignore[arg-type]
        self.dense = weight.dequantize()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return dense_linear(x.float(), self.dense.float()).to(x.dtype)


def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tuner's tensors stay on the CPU, and layers are those of a GPU."""
    monkeypatch.setattr(linear, "WeightOnlyLinear", OurProduct)
    monkeypatch.setattr(tune, "LIBRARY_ROWS", (1, 4))
    monkeypatch.setattr(
        tune, "serving_linear", lambda *arguments: serving_linear(*arguments[:-1], "cuda")
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("faster", [OURS, HUMMING])
def test_tuner_keeps_the_faster_library(
    faster: int,
    symmetric: bool,
    layers: list[fake_humming.HummingLayer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend_gpu(monkeypatch)
    rows: list[int] = []

    def clock(run: Callable[[], object]) -> float:
        y = run()
        assert isinstance(y, torch.Tensor)
        rows.append(len(y))
        is_humming = isinstance(run.func, HummingLinear)  # type: ignore[attr-defined]
        return len(y) * (1.0 if is_humming is (faster == HUMMING) else 2.0)

    scheme = Scheme(4, 64, symmetric=symmetric)
    (found,) = tune.tune_library(scheme, (N, K), BRAIN, CPU, clock)
    assert rows == [1, 4] * 2
    assert (found.config, found.tried, found.refused) == ((faster,), 2, 0)
    assert found.ms == pytest.approx(2.0)  # the geometric mean of 1 and 4
    assert found.safe_ms == pytest.approx(2.0 if faster == OURS else 4.0)
    zeros = "symmetric" if symmetric else "asymmetric"
    assert found.name == NAME.replace(" symmetric", f" {zeros}")
    tune.save_results([found], tuned_configs.user_file())
    assert isinstance(serve(make_weight(64, symmetric)), HummingLinear) is (faster == HUMMING)


def test_tuner_refuses_a_library_that_is_wrong_or_fails(
    layers: list[fake_humming.HummingLayer], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_gpu(monkeypatch)
    right = fake_humming.HummingLayer.forward
    monkeypatch.setattr(
        fake_humming.HummingLayer, "forward", lambda self, inputs: right(self, inputs) * 1.1
    )
    arguments = (Scheme(4, 64), (N, K), BRAIN, CPU, lambda run: 1.0)
    (wrong,) = tune.tune_library(*arguments)
    assert (wrong.config, wrong.refused) == ((OURS,), 1) and len(layers) == 1
    monkeypatch.setattr(fake_humming, "_codes", lambda words: 1 / 0)
    (failed,) = tune.tune_library(*arguments)
    assert (failed.config, failed.refused) == ((OURS,), 1) and len(layers) == 2


def test_tuner_compares_libraries_after_it_tuned_ours(
    layers: list[fake_humming.HummingLayer], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tune.shapes_target(LLAMA | {"hidden_size": 256, "intermediate_size": 512})
    names = [name for name, _ in target.problems()]
    compared = [name for name in names if name.startswith("w4a16 library, ")]
    assert compared and all("4 bits, groups of 128" in name for name in compared)
    for name in compared:
        assert names.index(name) == names.index(name.removeprefix("w4a16 library, ")) + 1
    monkeypatch.setattr(humming_linear, "installed_version", lambda: None)
    assert [name for name, _ in target.problems()] == [n for n in names if n not in compared]


def test_doctor_names_humming_where_it_is_chosen(
    layers: list[fake_humming.HummingLayer], capsys: pytest.CaptureFixture[str]
) -> None:
    device = torch.device("cuda", 0)
    assert humming_linear.status(device) == ""
    measured(OURS)
    assert humming_linear.status(device) == ""
    measured(HUMMING, NAME.replace(" 64 ", " 32 "))
    measured(HUMMING, NAME.replace("0.1.19", "0.1.18"))
    why = "humming-kernels 0.1.19 was faster for 1 of 2 measured shapes"
    assert humming_linear.status(device) == why
    found = {
        choice.work: choice
        for choice in gpu_kernel_choices(Gpu(capability=(9, 0), w4a16_library=why))
    }
    assert (found["W4A16"].kernel, found["W4A16"].why) == ("humming, Triton for other shapes", why)
    assert "humming" not in found["FP8"].kernel
    result = tune.TuningResult(NAME, (HUMMING,), 1.0, (OURS,), 2.0, 2, 0)
    doctor._show_tuned(Console(), [result])
    assert "humming" in capsys.readouterr().out
    assert LIBRARY.choices == ((OURS, HUMMING),)
