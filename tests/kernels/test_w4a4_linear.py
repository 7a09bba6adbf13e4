"""FP4 products on a GPU: the kernels interpreted, and compiled for GPUs that multiply FP4."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.float_format_cases import INPUT_SCALE, SCHEMES, random_quantized
from support.quantized_linear_cases import assert_close
from support.triton_checks import compiled_for, interpreted

from llmkit.checkpoint.quantized_weight import FP4_VALUES
from llmkit.kernels import w4a4_linear
from llmkit.kernels.activation_quant import fake_quantize_per_group
from llmkit.kernels.w4a4_linear import TILES, W4A4Linear
from llmkit.model.linear import gpu_kernel_type

HALF = torch.float16
# rows, outputs, columns, dtype, with bias, splits. The interpreter knows no scales in e4m3.
CASES = [
    (1, 64, 512, torch.float32, False, 2),
    (5, 130, 96, HALF, True, 1),
    (33, 40, 288, torch.float32, True, 1),
]


def run_w4a4_linear(
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    x: torch.Tensor,
    splits: int,
) -> torch.Tensor:
    return W4A4Linear(codes, scales, bias)(x, splits)


def run_quantize(
    x: torch.Tensor, group_size: int, input_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    columns = x.shape[1]
    scales = torch.ones(16, columns // group_size)
    codes = torch.zeros(16, columns, dtype=torch.uint8)
    linear = W4A4Linear(codes, scales, None, input_scale, input_scale)
    got, found = linear.quantize(x)
    return got, found.view(torch.uint8)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_w4a4_linear_matches_quantized_inputs(tmp_path: Path) -> None:
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if not hasattr(interpreter.InterpreterBuilder, "create_dot_scaled"):
        pytest.skip("the interpreter of this Triton has no products of FP4")
    calls = []
    wanted = []
    for rows, outputs, columns, dtype, has_bias, splits in CASES:
        weight = random_quantized(SCHEMES["mxfp4"], outputs, columns)
        weight.scales = weight.scales / 16
        x = random(rows, columns, seed=rows).to(dtype)
        bias = random(outputs, seed=1).to(dtype) if has_bias else None
        calls.append((weight.q, weight.scales, bias, x, splits))
        inputs = fake_quantize_per_group(x.float(), "fp4", 32, "e8m0").double()
        product = inputs @ weight.dequantize().double().T
        wanted.append(product if bias is None else product + bias.double())
    results = interpreted("kernels.test_w4a4_linear", "run_w4a4_linear", calls, tmp_path)
    for (*_, x, _), y, expected in zip(calls, results, wanted, strict=True):
        assert y.dtype == x.dtype
        assert_close(y, expected, 1e-5 if x.dtype == torch.float32 else 2e-3)


def test_w4a4_linear_quantizes_inputs_as_the_reference(tmp_path: Path) -> None:
    x = random(6, 5024, seed=3) * torch.logspace(-3, 3, 6)[:, None]
    x[1, :64] = 0
    x[2, 40] = torch.nan
    x[3, 100] = -torch.inf
    calls: list[Any] = [(x, 32, None), (x, 16, INPUT_SCALE)]
    results = interpreted("kernels.test_w4a4_linear", "run_quantize", calls, tmp_path)
    for (_, size, input_scale), (codes, stored) in zip(calls, results, strict=True):
        if input_scale is None:
            scales = torch.where(stored == 255, torch.nan, (stored.float() - 127).exp2())
            expected = fake_quantize_per_group(x, "fp4", size, "e8m0")
        else:
            scales = stored.view(torch.float8_e4m3fn).float() * input_scale
            expected = fake_quantize_per_group(x, "fp4", size, "e4m3", input_scale)
        positive = torch.tensor(FP4_VALUES)
        both = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
        values = torch.cat((positive, -positive))[both.int()]
        found = values * scales.repeat_interleave(size, dim=1)
        assert found[2].isnan().sum() == found[3].isnan().sum() == size
        torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0, equal_nan=True)


ON_BLACKWELL = r"tcgen05\.mma\S*mxf4"
ON_SMALLER_BLACKWELL = r"mma\.sync\S*mxf4"


@pytest.mark.parametrize(
    ("capability", "product", "group"),
    [
        (100, ON_BLACKWELL, 16),
        pytest.param(100, ON_BLACKWELL, 32, marks=pytest.mark.slow),
        pytest.param(120, ON_SMALLER_BLACKWELL, 16, marks=pytest.mark.slow),
        pytest.param(120, ON_SMALLER_BLACKWELL, 32, marks=pytest.mark.slow),
    ],
)
def test_w4a4_linear_kernel_compiles_to_products_of_fp4(
    capability: int, product: str, group: int
) -> None:
    triton = pytest.importorskip("triton")
    if not hasattr(triton.knobs.nvidia, "ptxas_blackwell"):
        pytest.skip("this Triton has no compiler for these GPUs")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for _, BM, BN, BK, warps, stages in TILES:
        scale = "*fp8e4nv" if group == 16 else "*u8"
        kinds = {"x": "*u8", "row_scales": scale, "w": "*u8", "scales": scale}
        kinds |= {"bias": "*bf16", "y": "*bf16"}
        kinds |= dict.fromkeys(("M", "N", "K", "steps_per_split"), "i32")
        constants: dict[str, Any] = {"GROUP": group, "BM": BM, "BN": BN, "BK": BK}
        constants["STAGES"] = stages
        if group == 16:
            kinds["factors"] = "*fp32"
        else:
            constants["factors"] = None
        kernel = w4a4_linear._w4a4_linear_kernel
        names = [name for name in kernel.arg_names if name in kinds]
        aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in names}
        signature = {name: kinds.get(name, "constexpr") for name in kernel.arg_names}
        source = ASTSource(kernel, signature, constants, aligned)
        options = {"num_warps": warps, "enable_fp_fusion": True}
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert re.search(product, compiled.asm["ptx"])
        limit = 227 if capability == 100 else 99
        assert compiled.metadata.shared <= limit * 1024


@pytest.mark.parametrize("group", [16, 32])
def test_quantize_fp4_kernel_compiles(group: int, tmp_path: Path) -> None:
    kinds = {"x": "*bf16", "codes": "*u8", "scales": "*u8", "input_scale": "*fp32", "K": "i32"}
    constants: dict[str, Any] = {"GROUP": group, "TILE": 4096}
    if group == 32:
        del kinds["input_scale"]
        constants["input_scale"] = None
    kernel = w4a4_linear._quantize_fp4_kernel
    compiled = compiled_for(90, kernel, kinds, constants, tmp_path, num_warps=8)
    assert compiled.stack_bytes == 0


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_w4a4_linear_serves_gpus_that_multiply_fp4(name: str) -> None:
    def kind(scheme: str, capability: tuple[int, int], is_expert: bool = False) -> object:
        return gpu_kernel_type(SCHEMES[scheme], (64, 128), torch.bfloat16, capability, is_expert)

    assert kind(name, (10, 0)) is kind(name, (12, 0)) is W4A4Linear
    for other in (kind(name, (9, 0)), kind(f"{name}a16", (10, 0)), kind(name, (10, 0), True)):
        assert other is not None and other is not W4A4Linear
