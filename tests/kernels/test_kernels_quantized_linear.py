"""Quantized linear layers: their Triton kernels interpreted, and compiled for two GPUs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.quantized_linear_cases import FP8, Case, assert_close
from support.synthetic_checkpoint import LLAMA
from support.triton_checks import HOPPER_SHARED_BYTES, SHARED_BYTES, compiled_for, interpreted

from llmkit.bench.gpu.kernel_code import TARGETS, KernelCode, kernel_code, weight_only_case
from llmkit.checkpoint.quantized_weight import QuantizationConfig, QuantizedWeight, Scheme
from llmkit.kernels import quantized_linear, tuned_configs, w8a8_linear
from llmkit.kernels.activation_quant import quantize_per_token, quantize_static
from llmkit.kernels.fp8_block_linear import Fp8BlockLinear
from llmkit.kernels.quantized_linear import (
    FLOAT32_TILE,
    LARGE_TILES,
    LARGE_TILES_8,
    LARGE_TILES_10,
    MAX_FUSED_ROWS,
    TILE,
    TILES,
    WIDE_PROGRAMS,
    WIDE_TILE,
    WeightOnlyLinear,
    default_tile,
    takes_wide_tile,
)
from llmkit.kernels.w8a8_linear import W8A8Linear
from llmkit.model import linear
from llmkit.model.families import model_spec
from llmkit.model.linear import (
    ActivationQuant,
    PackedLinear,
    gpu_kernel_type,
    serving_linear,
    supported_on_gpu,
)
from llmkit.model.parameter_table import parameters
from llmkit.model.weight_loader import can_stay_packed

FLOAT = torch.float32
HALF = torch.float16
BRAIN = torch.bfloat16
CASES = [
    Case(4, 128, 1, 64, 512),
    Case(4, 128, 2, 130, 320, symmetric=False, biased=True, dtype=HALF),
    Case(4, 64, 5, 70, 320, biased=True, splits=2),
    Case(4, 32, 16, 64, 320, symmetric=False, dtype=HALF, splits=3),
    Case(4, -1, 33, 100, 200, symmetric=False, biased=True, dtype=HALF, splits=2),
    Case(4, 32, 64, 136, 256, dtype=HALF),
    Case(4, 256, 3, 1, 1152, symmetric=False, splits=4),
    Case(4, 96, 1, 16, 288, symmetric=False),
    Case(4, 128, 2, 64, 512, symmetric=False, dtype=HALF),
    Case(8, 128, 1, 72, 576, dtype=HALF, splits=5),
    Case(8, 64, 2, 64, 256, symmetric=False, biased=True),
    Case(8, 32, 5, 33, 320, symmetric=False, dtype=HALF, splits=4),
    Case(8, -1, 16, 130, 200, biased=True),
    Case(8, -1, 33, 64, 64, symmetric=False, dtype=HALF),
    Case(8, 128, 64, 129, 192, dtype=HALF, splits=2),
    Case(8, 32, 70, 24, 80, dtype=HALF),
    Case(4, 64, 66, 130, 320, symmetric=False, biased=True, dtype=HALF, splits=2),
    Case(4, 128, 130, 40, 512, dtype=HALF),
    Case(4, 64, 66, 130, 192, symmetric=False, dtype=HALF, major=8),
    Case(4, 64, 66, 130, 192, symmetric=False, dtype=HALF, major=12),
    Case(4, -1, 8, 128, 600, biased=True, dtype=HALF, splits=2),
    Case(4, 128, 1, 64, 512, dtype=HALF),
    Case(4, 32, 16, 70, 320, dtype=HALF, splits=2),
    Case(4, 96, 9, 40, 288, dtype=HALF),
    # With the wide tile; the last is no multiple of its outputs.
    Case(4, 128, 1, 384, 512, dtype=HALF, num_cores=1),
    Case(4, 64, 8, 400, 512, biased=True, dtype=HALF, num_cores=1),
]


@pytest.fixture(scope="module")
def on_triton(
    tmp_path_factory: pytest.TempPathFactory,
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("interpreted")
    return interpreted(
        "support.quantized_linear_cases",
        "run_weight_only_linear",
        [case.arguments() for case in CASES],
        folder,
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_weight_only_linear_matches_the_dense_weight(case: Case, on_triton: list[Any]) -> None:
    y, again, dense = on_triton[CASES.index(case)]
    weight = case.weight().dequantize()
    assert torch.equal(dense, weight)  # so words are unpacked as they were packed
    assert y.dtype == case.dtype
    assert_close(y, case.expected(weight), 3e-6 if case.dtype == FLOAT else 2e-3)
    assert torch.equal(y, again)


@pytest.mark.parametrize(
    ("case", "inputs"),
    [
        (Case(4, 128, 1, 24, 512), 512),
        (Case(8, 32, 1, 40, 192), 192),
        (Case(4, 64, 1, 24, 576), 640),
    ],
)
def test_weight_only_linear_nbytes(case: Case, inputs: int) -> None:
    weight = case.weight()
    product = WeightOnlyLinear(weight.q, weight.scales, weight.zeros, case.bits, case.group)
    assert product.nbytes == case.outputs * inputs * case.bits // 8 + 4 * weight.scales.numel()


def outliers(rows: int, columns: int) -> torch.Tensor:
    """Rows of different sizes; one of zeros, one with an infinity, one with NaN."""
    x = (
        torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
        * torch.logspace(-3, 3, rows)[:, None]
    )
    x[1] = 0
    x[2, 5] = torch.inf
    x[3, 7] = torch.nan
    return x


SCALE = torch.tensor([0.01])
ROWS = [
    (outliers(5, 576), torch.int8, None),
    (outliers(4, 70).half(), torch.int8, None),
    (outliers(9, 1030), FP8, None),
    (outliers(6, 64), FP8, SCALE),
]


def test_quantize_input_matches_the_reference(tmp_path: Path) -> None:
    results = interpreted("support.quantized_linear_cases", "run_quantize_rows", ROWS, tmp_path)
    for (x, dtype, scale), (quantized, scales) in zip(ROWS, results, strict=True):
        kind = "int8" if dtype == torch.int8 else "fp8"
        expected, own = quantize_per_token(x, kind)
        if scale is not None:
            expected = quantize_static(x.float(), scale, kind)
            own = scale.expand(len(x), 1)
        assert quantized.dtype == dtype
        torch.testing.assert_close(scales, own, rtol=0, atol=0, equal_nan=True)
        finite = [row for row in range(len(x)) if row not in (2, 3)]
        assert torch.equal(quantized[finite].float(), expected[finite])
        if scale is None:  # what is not finite makes its row so
            assert not (quantized.float() * scales)[2:4].isfinite().all(1).any()


EIGHT_BITS = [
    (1, 24, 64, torch.int8, FLOAT, None),
    (33, 16, 576, torch.int8, HALF, None),
    (3, 32, 64, FP8, HALF, None),
    (70, 16, 144, FP8, BRAIN, SCALE),
]
# Of `torch._scaled_mm`: FP8 as on sm_89 before torch 2.12.
SEPARATE_SCALES = [(3, 32, 64, FP8, HALF, None), (17, 32, 64, FP8, BRAIN, SCALE)]


def test_w8a8_linear_matches_dequantized(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    calls = []
    wanted = []
    for case in (*EIGHT_BITS, *SEPARATE_SCALES):
        rows, outputs, columns, kind, dtype, scale = case
        quantized = torch.randint(-127, 128, (outputs, columns), generator=generator).to(kind)
        scales = torch.rand(outputs, 1, generator=generator) * 0.01
        x = torch.randn(rows, columns, generator=generator).to(dtype)
        bias = torch.randn(outputs, generator=generator).to(dtype) if rows != 33 else None
        calls.append((x, quantized, scales, bias, scale, case not in SEPARATE_SCALES))
        steps, own = quantize_per_token(x, "int8" if kind == torch.int8 else "fp8")
        if scale is not None:
            steps = quantize_static(x.float(), scale, "fp8")
            own = scale
        exact = (steps.double() @ quantized.double().T) * own * scales.T
        wanted.append(exact if bias is None else exact + bias)
    results = interpreted("support.quantized_linear_cases", "run_w8a8_linear", calls, tmp_path)
    for (x, quantized, *_), expected, y in zip(calls, wanted, results, strict=True):
        assert y.dtype == x.dtype
        assert_close(
            y,
            expected,
            1e-6 if x.dtype == FLOAT else 1e-3 if quantized.dtype == torch.int8 else 8e-3,
        )


@pytest.mark.parametrize(
    ("capability", "version", "expected"),
    [
        ((8, 9), "2.11.0+cu130", False),  # it ignores the stream that a graph captures
        ((8, 9), "2.9.1", False),
        ((8, 9), "2.12.0", True),
        ((8, 9), "2.13.0a0+git1234", True),
        ((8, 9), "3.0", True),
        ((9, 0), "2.11.0+cu130", True),
        ((12, 0), "2.11.0", True),
    ],
)
def test_fp8_rows_are_scaled_by_torch_where_graphs_capture_it(
    capability: tuple[int, int], version: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "gpu_capability", lambda _: capability)
    monkeypatch.setattr(torch, "__version__", version)
    scheme = Scheme(8, kind="float", inputs="token")
    q = torch.ones(16, 32).to(FP8)
    weight = QuantizedWeight(q, torch.ones(16, 1), torch.zeros(16, 1, dtype=torch.uint8), scheme)
    quant = ActivationQuant("fp8")
    layer = serving_linear([weight], None, quant, BRAIN, "cuda")
    assert isinstance(layer, PackedLinear) and isinstance(layer.kernel, W8A8Linear)
    given = []

    def scaled_mm(*arguments: Any) -> torch.Tensor:
        given.append(arguments)
        return torch.zeros(len(arguments[0]), 16, dtype=arguments[6])

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(w8a8_linear, "epilogue", lambda sums, rows, *_: sums[0, :rows])
    x = layer.kernel.input_quant.empty(3, 32, torch.zeros(0, dtype=BRAIN))
    assert layer(x).shape == (3, 16)
    ((values, _, row_scales, scales, *_, dtype, _),) = given
    assert len(values) == 17
    assert (row_scales.shape == (17, 1) and scales.shape == (1, 16)) == expected
    assert (row_scales.numel() == scales.numel() == 1) != expected
    assert dtype == (BRAIN if expected else FLOAT)


@pytest.mark.parametrize(("measured", "rows", "expected"), [(1, 3, 3), (17, 3, 17), (17, 40, 40)])
def test_fp8_rows_are_padded_as_measured(
    measured: int, rows: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = W8A8Linear(torch.ones(16, 32).to(FP8), torch.ones(16, 1), None)
    shapes = []

    def choose(shape: tuple[object, ...], _: tuple[int, ...]) -> tuple[int, ...]:
        shapes.append(shape)
        return (measured,)

    monkeypatch.setitem(tuned_configs.trials, "scaled_mm_rows", choose)
    assert len(kernel.input_quant.empty(rows, 32, torch.zeros(0)).values) == expected
    assert shapes == [(16, 32)]


WHOLE = 1 << 30
SHARED_80 = 99 * 1024  # the least that GPUs from 8.0 on have
# Bits, group size, symmetric, inputs' type, and whether the inputs are split.
FORMS = [
    (4, 128, True, "bf16", True),
    (4, 32, False, "bf16", False),
    (4, 64, False, "fp16", True),
    (8, WHOLE, True, "bf16", False),
    (8, 64, False, "bf16", True),
]


def compiled_product(
    target: str, tile: tuple[int, ...], form: tuple[int, int, bool, str, bool] = FORMS[0]
) -> KernelCode:
    pytest.importorskip("triton")
    bits, group, symmetric, dtype, split = form
    case = weight_only_case(
        "product",
        tile,
        capability=TARGETS[target],
        bits=bits,
        group=group,
        symmetric=symmetric,
        dtype=dtype,
        split=split,
    )
    return kernel_code(case, target)


ON_HOPPER = [(tile, form) for tile in TILES + LARGE_TILES for form in FORMS[:2]]
ON_HOPPER += [(TILES[1], form) for form in FORMS[2:]]
ON_OLDER = [("sm_80", tile, FORMS[0]) for tile in TILES + LARGE_TILES_8]
ON_OLDER += [(target, LARGE_TILES_8[0], FORMS[1]) for target in ("sm_86", "sm_89")]
ON_OLDER += [("sm_120a", tile, FORMS[0]) for tile in TILES[:2] + LARGE_TILES_8]
ON_OLDER += [("sm_120a", tile, FORMS[1]) for tile in (TILES[0], LARGE_TILES_8[1])]


def some(cases: Sequence[tuple[object, ...]]) -> list[Any]:
    """Every second case in `make test`, the others as slow ones."""
    return [
        pytest.param(*case, marks=[pytest.mark.slow] if index % 2 else [])
        for index, case in enumerate(cases)
    ]


@pytest.mark.parametrize(("tile", "form"), some(ON_HOPPER))
def test_weight_only_linear_kernel_compiles_for_hopper(
    tile: tuple[int, ...], form: tuple[int, int, bool, str, bool]
) -> None:
    code = compiled_product("sm_90a", tile, form)
    assert code.spill_bytes == 0
    assert code.shared_bytes * tile[-1] <= HOPPER_SHARED_BYTES
    loop = code.hottest
    assert loop is not None
    opcodes = " ".join(loop.opcodes)
    assert ("HGMMA" if tile[1] >= 32 else "HMMA") in opcodes
    assert "LOP3" in opcodes
    # Few rows of symmetric 4-bit weights need no arithmetic on weights.
    is_raw = form[0] == 4 and form[2] and tile[1] <= 16
    assert ("HFMA2" in opcodes or "HADD2" in opcodes) != is_raw
    assert "I2F" not in opcodes and "PRMT" not in opcodes  # nothing is converted or repacked


@pytest.mark.parametrize(("target", "tile", "form"), some(ON_OLDER))
def test_weight_only_linear_kernel_compiles_for_older_gpus(
    target: str, tile: tuple[int, ...], form: tuple[int, int, bool, str, bool]
) -> None:
    code = compiled_product(target, tile, form)
    assert code.spill_bytes == 0
    assert code.shared_bytes <= SHARED_80


@pytest.mark.parametrize(
    ("tile", "form"),
    [
        (TILES[0], FORMS[0]),
        (LARGE_TILES_10[0], FORMS[0]),
        (LARGE_TILES_10[0], (8, *FORMS[0][1:])),
        (LARGE_TILES_10[2], FORMS[0]),
    ],
)
def test_weight_only_linear_kernel_compiles_for_blackwell(
    tile: tuple[int, ...], form: tuple[int, int, bool, str, bool]
) -> None:
    code = compiled_product("sm_100a", tile, form)
    assert code.spill_bytes == 0
    assert code.shared_bytes * tile[-1] <= HOPPER_SHARED_BYTES
    opcodes = " ".join(opcode for loop in code.loops for opcode in loop.opcodes)
    assert ("UTCHMMA" if tile[1] >= 32 else "HMMA") in opcodes


@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        ("sm_90a", "bf16"),
        pytest.param("sm_90a", "fp16", marks=pytest.mark.slow),
        ("sm_80", "bf16"),
        pytest.param("sm_86", "bf16", marks=pytest.mark.slow),
        pytest.param("sm_89", "bf16", marks=pytest.mark.slow),
        pytest.param("sm_100a", "bf16", marks=pytest.mark.slow),
        ("sm_100a", "fp16"),
        pytest.param("sm_120a", "bf16", marks=pytest.mark.slow),
        pytest.param("sm_120a", "fp16", marks=pytest.mark.slow),
    ],
)
def test_weight_only_linear_wide_tile_needs_fewer_instructions(target: str, dtype: str) -> None:
    """And as many of its programs run at once as fill a multiprocessor."""
    form = (4, 128, True, dtype, False)
    wide = compiled_product(target, WIDE_TILE, form)
    narrow = compiled_product(target, TILES[0], form)
    assert wide.spill_bytes == 0
    assert wide.shared_bytes <= SHARED_80
    num_programs = {"sm_80": WIDE_PROGRAMS, "sm_90a": WIDE_TILE[-1], "sm_100a": WIDE_TILE[-1]}
    if target in num_programs:
        # Each program takes 1 KiB more, and each thread registers by eights.
        registers = -(-wide.registers // 8) * 8 * 32 * wide.warps
        assert registers * num_programs[target] <= 65536
        shared_bytes = SHARED_BYTES[80] if target == "sm_80" else HOPPER_SHARED_BYTES
        assert (wide.shared_bytes + 1024) * num_programs[target] <= shared_bytes + 1024
    assert wide.per_unit() < 0.95 * narrow.per_unit()


@pytest.mark.parametrize(
    ("outputs", "change", "expected"),
    [
        (51200, {}, True),  # gate and up of Qwen3-32B
        (28672, {}, False),  # gate and up of Llama-3.1-8B: 224 programs for 132 multiprocessors
        (28672, {"num_cores": 46}, True),
        (51200, {"major": 8}, True),
        (51200, {"major": 8, "dtype": HALF}, False),
        (51200, {"dtype": HALF}, True),
        (51200, {"dtype": FLOAT}, False),
        (51200, {"SYMMETRIC": False}, False),
        (51200, {"BITS": 8}, False),
        (51200, {"SCALES": "e8m0"}, False),
        (51200, {"columns": 5120 + 128}, False),
    ],
)
def test_wide_tile_is_taken_where_its_programs_fill_the_gpu(
    outputs: int, change: dict[str, Any], expected: bool
) -> None:
    weight: dict[str, int | str] = {"BITS": 4, "SYMMETRIC": True, "W": 64, "SCALES": "float"}
    weight |= {name: value for name, value in change.items() if name in weight}
    columns = change.get("columns", 5120)
    num_cores = change.get("num_cores", 132)
    dtype = change.get("dtype", BRAIN)
    major = change.get("major", 9)
    assert takes_wide_tile(weight, dtype, outputs, columns, num_cores, major) is expected


def test_wide_tile_has_no_partial_sums() -> None:
    """As `WordsLinear` counts splits, with the fewest programs that the tile may have."""
    num_cores = 132
    outputs = WIDE_PROGRAMS * num_cores * WIDE_TILE[2]
    weight: dict[str, int | str] = {"BITS": 4, "SYMMETRIC": True, "W": 64, "SCALES": "float"}
    assert takes_wide_tile(weight, BRAIN, outputs, 4096, num_cores, 9)
    assert not takes_wide_tile(weight, BRAIN, outputs - WIDE_TILE[2], 4096, num_cores, 9)
    assert WIDE_TILE[-1] * num_cores // (outputs // WIDE_TILE[2]) == 1


@pytest.mark.parametrize(
    ("major", "tiles"),
    [(8, LARGE_TILES_8), (9, LARGE_TILES), (10, LARGE_TILES_10), (12, LARGE_TILES_8)],
)
def test_default_tile_by_compute_capability(major: int, tiles: tuple[tuple[int, ...], ...]) -> None:
    assert default_tile(64, BRAIN, major) == tiles[0]
    assert default_tile(MAX_FUSED_ROWS, BRAIN, major) == tiles[-1]


@pytest.mark.parametrize(("rows", "limit"), [(1, 850), (16, 1080), (256, 3300)])
def test_weight_only_linear_instructions_for_256_weights_of_64_outputs(
    rows: int, limit: int
) -> None:
    """Of all warps; 2,022 for up to 16 rows with single fields, and 11,888 for 256 rows."""
    code = compiled_product("sm_90a", default_tile(rows, BRAIN, 9))
    assert 0 < code.per_unit() <= limit


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(
    "form", [FORMS[0], (4, 32, True, "bf16", True), (4, 128, True, "fp16", False)], ids=str
)
def test_weight_only_linear_of_few_rows_fits_into_registers(
    target: str, form: tuple[int, int, bool, str, bool]
) -> None:
    """For every tile that `doctor --tune` may choose, but the one with the most sums a thread.

    That spills in float16 under Triton 3.6, and the tuner refuses what spills.
    """
    rows, outputs, warps, *_ = TILE.choices
    for tile in itertools.product(rows[:2], outputs, warps):
        if tile == (16, 128, 2):
            continue
        code = compiled_product(target, (tile[0], *tile, 4, 4), form)
        assert code.spill_bytes == 0, tile


def test_weight_only_linear_gives_amd_compilers_their_own_options(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A launch with an option that its compiler does not know fails."""
    options: dict[str, dict[str, int]] = {}
    for name, is_amd in (("cuda", False), ("hip", True)):
        monkeypatch.setattr(torch.version, "hip", "7.2" if is_amd else None)
        options[name] = quantized_linear.compiler_options(8)
    assert options == {"cuda": {"maxnreg": 255}, "hip": {}}


def test_weight_only_linear_kernel_compiles_for_float32() -> None:
    code = compiled_product("sm_90a", FLOAT32_TILE, (4, 128, True, "fp32", True))
    assert code.spill_bytes == 0
    assert code.shared_bytes <= SHARED_80


OTHERS: list[tuple[str, dict[str, str], dict[str, Any]]] = [
    (
        "_dequantize_kernel",
        {"words": "*i16", "scales_and_zeros": "*i32", "weight": "*bf16", "N": "i32", "K": "i32"},
        {
            "factors": None,
            "BITS": 4,
            "GROUP": 128,
            "SYMMETRIC": False,
            "W": 64,
            "SCALES": "float",
            "BN": 64,
        },
    ),
    (
        "_epilogue_kernel",
        {"sums": "*fp32", "y": "*bf16", "M": "i32", "N": "i32", "splits": "i32"},
        {"row_scales": None, "scales": None, "bias": None, "MAX_SPLITS": 16, "TILE": 512},
    ),
    (
        "_epilogue_kernel",
        {
            "sums": "*i32",
            "row_scales": "*fp32",
            "scales": "*fp32",
            "bias": "*bf16",
            "y": "*bf16",
            "M": "i32",
            "N": "i32",
            "splits": "i32",
        },
        {"MAX_SPLITS": 1, "TILE": 512},
    ),
]


@pytest.mark.parametrize(("name", "arguments", "constants"), OTHERS)
def test_quantized_linear_kernels_compile(
    name: str, arguments: dict[str, str], constants: dict[str, Any], tmp_path: Path
) -> None:
    for capability in (90, 80):
        compiled = compiled_for(
            capability, getattr(quantized_linear, name), arguments, constants, tmp_path
        )
        assert compiled.stack_bytes == 0


def test_weight_only_linear_has_a_tile_for_every_number_of_rows() -> None:
    for large in (LARGE_TILES, LARGE_TILES_10, LARGE_TILES_8):
        rows = [tile[0] for tile in TILES + large]
        assert rows == sorted(rows) and rows[-1] == MAX_FUSED_ROWS
    assert default_tile(256, HALF, 9)[1] == 256  # a weight is unpacked once for 256 rows
    assert default_tile(5, FLOAT, 8) == FLOAT32_TILE


@pytest.mark.parametrize(
    ("scheme", "shape", "dtype", "capability", "expected"),
    [
        (Scheme(4, 128), (7, 576), BRAIN, (8, 0), True),
        (Scheme(8), (7, 9), FLOAT, (9, 0), True),
        (Scheme(4, 40), (64, 80), BRAIN, (9, 0), False),
        (Scheme(4, 128), (64, 128), BRAIN, (7, 5), False),
        (Scheme(8, inputs="token"), (24, 64), FLOAT, (8, 0), True),
        (Scheme(8, inputs="token"), (20, 64), FLOAT, (8, 0), False),
        (Scheme(8, inputs="token"), (24, 60), FLOAT, (8, 0), False),
        (Scheme(8, kind="float", inputs="token"), (32, 64), BRAIN, (8, 9), True),
        (Scheme(8, kind="float", inputs="tensor"), (32, 64), HALF, (9, 0), True),
        (Scheme(8, kind="float", inputs="token"), (24, 64), BRAIN, (9, 0), True),
        (Scheme(8, kind="float", inputs="token"), (32, 64), BRAIN, (8, 6), True),
        (Scheme(8, kind="float", inputs="token"), (32, 64), BRAIN, (7, 5), False),
    ],
)
def test_supported_on_gpu_by_scheme_and_shape(
    scheme: Scheme,
    shape: tuple[int, int],
    dtype: torch.dtype,
    capability: tuple[int, int],
    expected: bool,
) -> None:
    assert supported_on_gpu(scheme, shape, dtype, capability) == expected


@pytest.mark.parametrize(
    ("scheme", "dtype", "capability", "expected"),
    [
        (Scheme(8, kind="float", inputs="token"), BRAIN, (9, 0), W8A8Linear),
        (Scheme(8, kind="float", inputs="tensor"), BRAIN, (8, 9), W8A8Linear),
        (Scheme(8, kind="float", inputs="token"), BRAIN, (8, 6), Fp8BlockLinear),
        (Scheme(8, kind="float", inputs="tensor"), HALF, (8, 0), Fp8BlockLinear),
        (Scheme(8, kind="float", inputs="none"), BRAIN, (9, 0), Fp8BlockLinear),
        (Scheme(8, kind="float", inputs="token"), FLOAT, (9, 0), Fp8BlockLinear),
    ],
)
def test_fp8_weights_keep_their_bits_on_gpus_without_fp8_products(
    scheme: Scheme,
    dtype: torch.dtype,
    capability: tuple[int, int],
    expected: type,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert gpu_kernel_type(scheme, (32, 144), dtype, capability) is expected
    monkeypatch.setattr(linear, "gpu_capability", lambda _: capability)
    q, scales = quantize_per_token(torch.randn(32, 144), "fp8")
    weight = QuantizedWeight(q.to(FP8), scales, torch.zeros(32, 1, dtype=torch.uint8), scheme)
    quant = ActivationQuant("fp8") if scheme.inputs != "none" else None
    layer = serving_linear([weight], None, quant, dtype, "cuda")
    assert isinstance(layer, PackedLinear) and type(layer.kernel) is expected
    if isinstance(layer.kernel, Fp8BlockLinear):
        assert layer.input_quant is None
        assert torch.equal(layer.kernel.dequantize(), weight.dequantize())


def test_load_model_packs_linears_of_one_scheme(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llmkit.model.weight_loader.gpu_capability", lambda _: (8, 0))
    odd = ("model.layers.1.self_attn.v_proj", Scheme(8, 32))
    config = QuantizationConfig("compressed-tensors", Scheme(4, 32), overrides=(odd,))
    mixtral = {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": 2,
    }
    for changes, expected in (
        ({}, {"attn.qkv", "attn.o", "mlp.gate_up", "mlp.down"}),
        (mixtral | {"num_experts_per_tok": 1}, {"attn.qkv", "attn.o"}),
    ):
        rows = parameters(model_spec(LLAMA | changes))
        packed = {row.module for row in rows if can_stay_packed("cuda", row, config, BRAIN)}
        assert packed == {f"layers.{i}.{name}" for i in range(2) for name in expected} - {
            "layers.1.attn.qkv"
        }
        assert not any(can_stay_packed("cuda", row, None, BRAIN) for row in rows)
