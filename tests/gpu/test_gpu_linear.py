"""On a CUDA device: linears with quantized weights give what dense ones give (`make gpu`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.float_format_cases import INPUT_SCALE, SCHEMES, random_quantized
from support.quantized_linear_cases import Case, assert_close
from support.tiny_models import tiny_checkpoint

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.quantized_weight import QuantizedWeight, Scheme
from llmkit.common.progress import SilentProgress
from llmkit.kernels.fp8_block_linear import Fp8BlockLinear
from llmkit.kernels.quantized_linear import MAX_FUSED_ROWS, WeightOnlyLinear
from llmkit.kernels.w4a4_linear import W4A4Linear
from llmkit.kernels.w8a8_linear import W8A8Linear
from llmkit.model.full_forward import window_logits
from llmkit.model.linear import (
    MIN_FP4_CAPABILITY,
    ActivationQuant,
    PackedLinear,
    gpu_capability,
    serving_linear,
)
from llmkit.model.weight_loader import load_model
from llmkit.quant.grid import round_to_nearest
from llmkit.quant.quantize_checkpoint import quantize
from llmkit.quant.quantize_options import QuantizeOptions
from llmkit.runtime.memory_plan import loaded_bytes, weight_bytes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
FLOAT = torch.float32
HALF = torch.float16
BRAIN = torch.bfloat16
LIMITS = {FLOAT: 3e-5, HALF: 2e-3, BRAIN: 1.2e-2}


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Memory that is not written to holds NaN."""
    pytest.importorskip("triton")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def needs_fp8() -> None:
    if gpu_capability("cuda") < (8, 9):
        pytest.skip("FP8 products need compute capability 8.9")


def captured(served: PackedLinear, x: torch.Tensor) -> torch.Tensor:
    """What a CUDA graph of the call gives, which cannot be captured where the host waits."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        served(x)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        y = served(x)
    y.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    return y


SHAPES = [(4096, 4096), (1000, 576), (72, 14336)]
ROWS = [1, 2, 16, 17, 33, 64, 65, 200, MAX_FUSED_ROWS, MAX_FUSED_ROWS + 90]


@pytest.mark.parametrize("dtype", [BRAIN, HALF, FLOAT], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("bits", "group", "symmetric"),
    [
        (4, 128, True),
        (4, 64, False),
        (4, 32, True),
        (4, -1, False),
        (8, -1, True),
        (8, 128, False),
        (8, 32, True),
    ],
)
def test_weight_only_linear_on_gpu(
    bits: int, group: int, symmetric: bool, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    general = Case(bits, group, 1, *shape, symmetric, True, dtype)
    weight, (_, bias) = general.weight().to("cuda"), general.inputs()
    assert bias is not None
    served = serving_linear([weight], bias.cuda(), None, dtype, "cuda")
    assert isinstance(served, PackedLinear) and isinstance(served.kernel, WeightOnlyLinear)
    dense = weight.dequantize().cpu()
    for rows in ROWS:
        case = replace(general, rows=rows)
        x = case.inputs(seed=0)[0].cuda()
        y = served(x)
        assert y.dtype == dtype
        assert_close(y, case.expected(dense), LIMITS[dtype])
        again = captured(served, x)
        assert (
            torch.equal(y, again) if rows <= MAX_FUSED_ROWS else torch.allclose(y, again, 0.02, 0.1)
        )


@pytest.mark.parametrize("dtype", [BRAIN, HALF, FLOAT], ids=str)
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 576), (80, 14336)], ids=str)
@pytest.mark.parametrize("given", [None, 0.011])
def test_w8a8_linear_on_gpu(
    kind: str, shape: tuple[int, int], dtype: torch.dtype, given: float | None
) -> None:
    if kind == "fp8":
        needs_fp8()
    if (kind, dtype) == ("fp8", FLOAT) or (kind == "int8" and given):
        pytest.skip("dense" if dtype == FLOAT else "no format stores it")
    generator = torch.Generator().manual_seed(shape[1])
    scheme = Scheme(
        8,
        kind="int" if kind == "int8" else "float",
        inputs="tensor" if given else "token",
    )
    parts = [
        round_to_nearest(torch.randn(rows, shape[1], generator=generator) * 0.05, scheme, FLOAT)
        for rows in (shape[0] - 16, 16)
    ]
    bias = torch.randn(shape[0], generator=generator).to(dtype)
    how = ActivationQuant(kind, None if given is None else torch.tensor([given]))
    on_gpu = ActivationQuant(kind, None if how.scale is None else how.scale.cuda())
    served = serving_linear([part.to("cuda") for part in parts], bias.cuda(), on_gpu, dtype, "cuda")
    assert isinstance(served, PackedLinear) and isinstance(served.kernel, W8A8Linear)
    dense = torch.cat([part.dequantize() for part in parts]).double()
    for rows in ROWS:
        x = torch.randn(rows, shape[1], generator=generator).to(dtype)
        y = served(x.cuda())
        expected = torch.nn.functional.linear(how(x.float()).double(), dense, bias.double())
        assert y.dtype == dtype
        assert_close(y, expected, 1e-4 if dtype == FLOAT else LIMITS[BRAIN])
        assert torch.equal(y, captured(served, x.cuda()))
        x[0, 3] = torch.nan  # must not be lost: an answer with it is refused
        assert not served(x.cuda())[0].isfinite().any()


@pytest.mark.parametrize("dtype", [BRAIN, HALF, FLOAT], ids=str)
@pytest.mark.parametrize("shape", [(4096, 4096), (1000, 576), (72, 14336)], ids=str)
@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "mxfp8", "fp8 blocks", "w4afp8"])
def test_float_format_linear_on_gpu(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Inputs stay as they are where weights are INT4, or FP4 without products of FP4."""
    scheme = SCHEMES[name]
    if scheme.is_fp8:
        needs_fp8()
    weight = random_quantized(scheme, *shape)
    quant = ActivationQuant.of(scheme, INPUT_SCALE.cuda() if scheme.has_input_scale else None)
    served = serving_linear([weight.to("cuda")], None, quant, dtype, "cuda")
    assert isinstance(served, PackedLinear) and served.activation_quant is None
    is_quantizing = isinstance(served.kernel, Fp8BlockLinear | W4A4Linear)
    has_fp4 = gpu_capability("cuda") >= MIN_FP4_CAPABILITY and dtype != FLOAT
    assert is_quantizing == (scheme.is_fp8 or (scheme.is_fp4 and has_fp4))
    dense = weight.dequantize().double()
    generator = torch.Generator().manual_seed(shape[1])
    for rows in ROWS:
        x = torch.randn(rows, shape[1], generator=generator).to(dtype)
        inputs: torch.Tensor = x
        if is_quantizing and quant is not None:
            inputs = quant(x.float().cuda()).cpu()
        y = served(x.cuda())
        assert y.dtype == dtype
        assert_close(y, inputs.double() @ dense.T, max(LIMITS[dtype], 1e-4))


def test_serving_linear_parts_of_different_schemes_are_dense() -> None:
    weights = [Case(4, 32, 1, 16, 64).weight(), Case(4, 32, 1, 16, 64).weight()]
    weights[1] = QuantizedWeight(
        weights[1].q, weights[1].scales.float(), weights[1].zeros, weights[1].scheme
    )
    served = serving_linear([weight.to("cuda") for weight in weights], None, None, BRAIN, "cuda")
    assert not isinstance(served, PackedLinear)
    assert served.weight.is_cuda


FORMATS = [
    QuantizeOptions("rtn"),
    QuantizeOptions("rtn", format="gptq"),
    QuantizeOptions("rtn", format="awq"),
    QuantizeOptions("int8"),
    QuantizeOptions("int8", activations=True),
    QuantizeOptions("fp8"),
    QuantizeOptions("fp8", static_activations=True),
]


@pytest.mark.parametrize(
    "options", FORMATS, ids=lambda options: f"{options.method}-{options.format}"
)
def test_packed_model_matches_dense_logits_on_gpu(options: QuantizeOptions, tmp_path: Path) -> None:
    if options.method == "fp8":
        needs_fp8()
    source = tiny_checkpoint(tmp_path / "source")
    options = replace(options, samples=2, seq_len=64, evaluate=False, device="cpu")
    quantize(str(source), str(tmp_path / "out"), options, SilentProgress())
    checkpoint = open_checkpoint(tmp_path / "out")
    windows = torch.randint(3, 500, (2, 100), generator=torch.Generator().manual_seed(3))
    packed = load_model(checkpoint, BRAIN, "cuda", packed=True)
    expected = torch.cat(list(window_logits(load_model(checkpoint, FLOAT), windows)))
    logits = torch.cat(list(window_logits(packed, windows))).cpu()
    assert all(
        isinstance(one, PackedLinear) for layer in packed.layers for one in layer.linears.values()
    )
    limit = (
        0.2 if options.method == "fp8" or options.activations else 0.04
    )  # bfloat16 changes quantized inputs
    assert (logits - expected).norm() <= limit * expected.norm()
    planned = weight_bytes(checkpoint, packed.spec, BRAIN, torch.device("cuda"))
    assert loaded_bytes(packed) == pytest.approx(
        planned, rel=0.25
    )  # blocks of so few inputs are filled up


def test_experts_stay_dense_on_gpu(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "mixtral")
    options = replace(QuantizeOptions("rtn"), samples=2, seq_len=64, evaluate=False, device="cpu")
    quantize(str(source), str(tmp_path / "out"), options, SilentProgress())
    model = load_model(open_checkpoint(tmp_path / "out"), BRAIN, "cuda", packed=True)
    for name, linear in model.layers[0].linears.items():
        assert isinstance(linear, PackedLinear) == name.startswith("attn.")
