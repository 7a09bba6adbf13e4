"""FP4 linears on a GPU: the Triton kernel interpreted, and compiled for two GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.float_format_cases import SCHEMES, random_quantized
from support.quantized_linear_cases import assert_close
from support.triton_checks import HOPPER_SHARED_BYTES, interpreted

from llmkit.bench.gpu.kernel_code import TARGETS, KernelCode, kernel_code, weight_only_case
from llmkit.checkpoint.quantized_weight import QuantizedWeight
from llmkit.kernels.quantized_linear import (
    FLOAT32_TILE,
    LARGE_TILES,
    LARGE_TILES_8,
    TILES,
    Fp4Linear,
)

SHARED_80 = 163 * 1024
FLOAT = torch.float32
HALF = torch.float16


@dataclass(frozen=True)
class Fp4Case:
    scheme: str  # of SCHEMES
    rows: int
    outputs: int
    columns: int
    dtype: torch.dtype = torch.float32
    biased: bool = False
    splits: int = 1
    major: int = 9  # of the GPU's compute capability

    def weight(self) -> QuantizedWeight:
        return random_quantized(SCHEMES[self.scheme], self.outputs, self.columns)

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x, and the bias."""
        generator = torch.Generator().manual_seed(self.rows)
        x = torch.randn(self.rows, self.columns, generator=generator).to(self.dtype)
        bias = torch.randn(self.outputs, generator=generator).to(self.dtype)
        return x, bias if self.biased else None

    def arguments(self) -> tuple[Any, ...]:
        """Of `run_fp4_linear`."""
        weight = self.weight()
        size = weight.scheme.group_size
        parts = (weight.q, weight.scales, size, weight.global_scale)
        return (*parts, *self.inputs(), self.splits, self.major)


CASES = [
    Fp4Case("mxfp4a16", 1, 64, 512),
    Fp4Case("nvfp4a16", 1, 64, 512),
    Fp4Case("nvfp4a16", 5, 70, 208, biased=True, splits=2),
    Fp4Case("mxfp4a16", 16, 33, 96, HALF, biased=True),
    Fp4Case("nvfp4a16", 17, 130, 80, HALF, splits=3),
    Fp4Case("nvfp4a16", 130, 40, 256, HALF),
    Fp4Case("mxfp4a16", 130, 72, 352, HALF, biased=True),
    Fp4Case("nvfp4a16", 66, 40, 144, HALF, major=8),
]


def run_fp4_linear(
    codes: torch.Tensor,
    scales: torch.Tensor,
    group_size: int,
    global_scale: torch.Tensor | None,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    splits: int,
    major: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The product, and the dense weight."""
    from llmkit.kernels import quantized_linear

    quantized_linear.gpu_major = lambda _: major
    product = Fp4Linear(codes, scales, group_size, bias, global_scale)
    return product(x, splits), product.dequantize(x.shape[1], torch.float32)


@pytest.fixture(scope="module")
def on_triton(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("interpreted")
    calls = [case.arguments() for case in CASES]
    return interpreted("kernels.test_fp4_linear", "run_fp4_linear", calls, folder)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fp4_linear_matches_the_dense_weight(case: Fp4Case, on_triton: list[Any]) -> None:
    y, dense = on_triton[CASES.index(case)]
    x, bias = case.inputs()
    expected = case.weight().dequantize()
    torch.testing.assert_close(dense, expected, rtol=1e-6, atol=0.0)
    product = torch.nn.functional.linear(
        x.double(), expected.double(), None if bias is None else bias.double()
    )
    assert y.dtype == case.dtype
    assert_close(y, product, 3e-6 if case.dtype == FLOAT else 2e-3)


@pytest.mark.parametrize("name", ["mxfp4a16", "nvfp4a16"])
def test_fp4_linear_holds_codes_in_half_a_byte_and_scales_in_one(name: str) -> None:
    weight = random_quantized(SCHEMES[name], 48, 512)
    size = weight.scheme.group_size
    kernel = Fp4Linear(weight.q, weight.scales, size, None, weight.global_scale)
    assert kernel.nbytes == 48 * 512 // 2 + 48 * 512 // size + 4 * 48


def test_fp4_linear_has_a_global_scale_for_each_part_of_its_rows() -> None:
    first, second = (random_quantized(SCHEMES["nvfp4a16"], 16, 64, seed) for seed in (0, 1))
    assert second.global_scale is not None
    second.scales = second.scales / second.global_scale * 0.5
    joined = torch.cat((first.scales, second.scales))
    factors = torch.cat((torch.full((16,), 0.0123), torch.full((16,), 0.5)))
    kernel = Fp4Linear(torch.cat((first.q, second.q)), joined, 16, None, factors)
    assert kernel.factors is not None
    bytes_ = kernel.scales.T.contiguous().view(torch.float8_e4m3fn).float()
    torch.testing.assert_close(bytes_ * kernel.factors[:, None] / 256, joined, rtol=1e-6, atol=0.0)


def compiled_product(target: str, tile: tuple[int, ...], group: int, dtype: str) -> KernelCode:
    capability = TARGETS[target]
    scales = "e4m3" if group == 16 else "e8m0"
    case = weight_only_case(
        "product", tile, capability=capability, group=group, dtype=dtype, scales=scales
    )
    return kernel_code(case, target)


@pytest.mark.parametrize(
    ("tile", "group", "dtype"),
    [
        (TILES[0], 16, "bf16"),
        (LARGE_TILES[1], 32, "fp16"),
        pytest.param(TILES[1], 32, "bf16", marks=pytest.mark.slow),
        pytest.param(LARGE_TILES[1], 16, "bf16", marks=pytest.mark.slow),
        pytest.param(LARGE_TILES[2], 16, "bf16", marks=pytest.mark.slow),
    ],
)
def test_fp4_linear_kernel_compiles_for_hopper(
    tile: tuple[int, ...], group: int, dtype: str
) -> None:
    code = compiled_product("sm_90a", tile, group, dtype)
    assert code.spill_bytes == 0
    assert code.shared_bytes * tile[-1] <= HOPPER_SHARED_BYTES
    assert code.hottest is not None
    opcodes = " ".join(code.hottest.opcodes)
    assert ("HGMMA" if tile[1] >= 32 else "HMMA") in opcodes
    assert "LOP3" in opcodes and "I2F" not in opcodes  # no code is converted from an integer


@pytest.mark.slow
@pytest.mark.parametrize("tile", [TILES[1], LARGE_TILES_8[1]])
@pytest.mark.parametrize("group", [16, 32])
def test_fp4_linear_kernel_compiles_for_older_gpus(tile: tuple[int, ...], group: int) -> None:
    code = compiled_product("sm_80", tile, group, "bf16")
    assert code.spill_bytes == 0
    assert code.shared_bytes <= SHARED_80


@pytest.mark.slow
def test_fp4_linear_kernel_compiles_for_float32() -> None:
    assert compiled_product("sm_90a", FLOAT32_TILE, 16, "fp32").spill_bytes == 0
