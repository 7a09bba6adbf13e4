"""FP8 block products: Triton kernels interpreted against torch, and compiled for two GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.fp8_files import pack_fp8, round_inputs
from support.quantized_linear_cases import assert_close
from support.triton_checks import HOPPER_SHARED_BYTES, SHARED_BYTES, compiled_for, interpreted

from llmkit.checkpoint.block_scales import expand_block_scales
from llmkit.checkpoint.quantized_weight import QuantizedWeight, Scheme
from llmkit.kernels import fp8_block_linear
from llmkit.kernels.activation_quant import fake_quantize_per_group
from llmkit.kernels.fp8_block_linear import TILES, WEIGHT_ONLY_TILES, Fp8BlockLinear
from llmkit.model import linear
from llmkit.model.linear import ActivationQuant, PackedLinear, serving_linear, supported_on_gpu

HALF = torch.float16
# rows, outputs, columns, dtype, group size, with bias, splits, with rounded inputs
CASES = [
    (1, 64, 256, HALF, 128, False, 1, True),
    (3, 80, 320, HALF, 128, True, 2, True),
    (70, 72, 200, torch.float32, 64, True, 1, True),
    (2, 130, 96, torch.float32, 32, False, 3, True),
    (5, 64, 256, HALF, 128, True, 1, False),
    (17, 40, 130, torch.float32, 128, False, 2, False),
]
BLOCK_ROWS = 48


def make_case(
    rows: int,
    outputs: int,
    columns: int,
    dtype: torch.dtype,
    group_size: int,
    has_bias: bool,
    splits: int,
    quantize_inputs: bool,
) -> tuple[tuple[Any, ...], torch.Tensor, torch.Tensor]:
    """The arguments of `run_fp8_block_linear`, the product in float64 and the dense weight."""
    draw = torch.Generator().manual_seed(rows)
    weight = torch.randn(outputs, columns, generator=draw) * torch.rand(
        outputs, 1, generator=draw
    ).exp2().mul(0.1)
    weight[0, :3] = torch.tensor([1e-4, -1e-4, 0.0])  # subnormal numbers of e4m3
    packed = pack_fp8(weight, (BLOCK_ROWS, group_size))
    scheme = Scheme(8, group_size, kind="float", inputs="group", block_rows=BLOCK_ROWS)
    scales = expand_block_scales(packed.scales, scheme, outputs)
    x = torch.randn(rows, columns, generator=draw).to(dtype)
    bias = torch.randn(outputs, generator=draw).to(dtype) if has_bias else None
    inputs = round_inputs(x.float(), group_size) if quantize_inputs else x
    expected = inputs.double() @ packed.dense.double().T
    if bias is not None:
        expected = expected + bias.double()
    arguments = (x, packed.q, scales, group_size, bias, splits, quantize_inputs)
    return arguments, expected, packed.dense


def test_fp8_block_linear_matches_dequantized(tmp_path: Path) -> None:
    cases = [make_case(*case) for case in CASES]
    calls = [arguments for arguments, _, _ in cases]
    results = interpreted("support.fp8_block_cases", "run_fp8_block_linear", calls, tmp_path)
    for (arguments, expected, dense), (y, dequantized) in zip(cases, results, strict=True):
        assert torch.equal(dequantized, dense)
        assert y.dtype == arguments[0].dtype
        assert_close(y, expected, 1e-5 if y.dtype == torch.float32 else 1e-3)


def test_fp8_block_linear_quantizes_groups_as_the_reference(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(5, 2200, generator=draw) * torch.logspace(-3, 3, 5)[:, None]
    x[1, :256] = 0
    calls = [(x, 128), (x.half(), 64), (x[:, :40].contiguous(), 32)]
    results = interpreted("support.fp8_block_cases", "run_quantize_groups", calls, tmp_path)
    for (inputs, size), (q, scales) in zip(calls, results, strict=True):
        expected = fake_quantize_per_group(inputs.float(), "fp8", size)
        found = q.float() * scales.repeat_interleave(size, dim=1)[:, : inputs.shape[1]]
        assert torch.equal(found, expected)
        assert torch.equal(expected, round_inputs(inputs.float(), size))


def test_mxfp8_quantizes_groups_as_the_reference(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(4)
    x = torch.randn(7, 224, generator=draw) * torch.logspace(-40, 30, 7)[:, None]
    x[2, :32] = 0
    x[3, 40] = torch.nan
    x[4, 100] = torch.inf
    calls = [(x, 32, "e8m0")]
    ((q, scales),) = interpreted("support.fp8_block_cases", "run_quantize_groups", calls, tmp_path)
    expected = fake_quantize_per_group(x, "fp8", 32, "e8m0")
    found = q.float() * scales.repeat_interleave(32, dim=1)
    assert found[3, 32:64].isnan().all() and found[4, 96:128].isnan().all()
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize(
    ("tile", "group_size"),
    zip(TILES, (128, 64, 128), strict=True),
    ids=lambda value: str(value[1] if isinstance(value, tuple) else value),
)
def test_fp8_block_linear_kernel_compiles(
    tile: tuple[int, ...], group_size: int, tmp_path: Path
) -> None:
    compiled = compile_product(90, tile, group_size, tmp_path, quantize_inputs=True)
    assert compiled.stack_bytes == 0
    assert compiled.shared_bytes <= HOPPER_SHARED_BYTES // 2
    assert "QGMMA" in compiled.code  # Hopper's products of 8-bit floats


@pytest.mark.parametrize(
    ("tile", "capability"), [(WEIGHT_ONLY_TILES[0], 80), (WEIGHT_ONLY_TILES[1], 90)]
)
def test_fp8_block_linear_kernel_compiles_weight_only(
    tile: tuple[int, ...], capability: int, tmp_path: Path
) -> None:
    compiled = compile_product(capability, tile, 128, tmp_path, quantize_inputs=False)
    assert compiled.stack_bytes == 0
    assert compiled.shared_bytes <= SHARED_BYTES[capability]


def compile_product(
    capability: int, tile: tuple[int, ...], group_size: int, folder: Path, *, quantize_inputs: bool
) -> Any:
    _, BM, BN, warps, stages = tile
    kinds = {"x": "*fp8e4nv", "row_scales": "*fp32", "w": "*fp8e4nv"}
    constants: dict[str, Any] = {"GROUP": group_size, "BM": BM, "BN": BN, "STAGES": stages}
    if not quantize_inputs:
        kinds = {"x": "*bf16", "w": "*u8"}
        constants["row_scales"] = None
    kinds |= {"scales": "*fp32", "bias": "*bf16", "y": "*bf16"}
    kinds |= dict.fromkeys(("M", "N", "K", "groups_per_split"), "i32")
    kernel = fp8_block_linear._fp8_block_linear_kernel
    return compiled_for(capability, kernel, kinds, constants, folder, num_warps=warps)


@pytest.mark.parametrize(
    ("group_size", "capability", "expected"),
    [
        (128, (9, 0), True),
        (64, (8, 9), True),
        (128, (8, 0), True),
        (128, (7, 5), False),
        (48, (9, 0), False),
        (8, (9, 0), False),
    ],
)
def test_fp8_blocks_stay_packed_on_gpus_with_a_kernel(
    group_size: int, capability: tuple[int, int], expected: bool
) -> None:
    scheme = Scheme(8, group_size, kind="float", inputs="group", block_rows=128)
    assert supported_on_gpu(scheme, (200, 72), torch.bfloat16, capability) is expected


@pytest.mark.parametrize(("capability", "rounds"), [((9, 0), True), ((8, 0), False)])
def test_fp8_blocks_on_a_gpu_round_inputs_where_it_multiplies_fp8(
    capability: tuple[int, int], rounds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "gpu_capability", lambda _: capability)
    scheme = Scheme(8, 64, kind="float", inputs="group", block_rows=64)
    q = torch.zeros(64, 128, dtype=torch.float8_e4m3fn)
    zeros = torch.zeros(64, 2, dtype=torch.uint8)
    weight = QuantizedWeight(q, torch.ones(64, 2), zeros, scheme)
    quant = ActivationQuant("fp8", None, 64)
    layer = serving_linear([weight], None, quant, torch.bfloat16, "cuda")
    assert isinstance(layer, PackedLinear) and isinstance(layer.kernel, Fp8BlockLinear)
    assert layer.activation_quant is None
    assert layer.kernel.quantize_inputs is rounds
    assert layer.kernel.nbytes == 64 * 128 + 64 * 2 * 4
