"""CPU linears with weights and inputs in FP8 and FP4, against fake quantization."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.cpu_levels import computing_at
from support.float_format_cases import INPUT_SCALE, SCHEMES, random_quantized

from llmkit.checkpoint.quantized_weight import Scheme
from llmkit.kernels.cpu import cpu_kernels
from llmkit.kernels.cpu.cpu_experts import CpuExperts
from llmkit.kernels.cpu.cpu_kernels import FourBitType, InputType, PackedWeight
from llmkit.kernels.cpu.cpu_linear import CpuLinear
from llmkit.kernels.cpu.cpu_mlp import CpuMlp
from llmkit.model.linear import (
    ActivationQuant,
    PackedLinear,
    cpu_input_type,
    pack_weight,
    serving_linear,
)

pytestmark = pytest.mark.skipif(
    cpu_kernels.library is None, reason=f"compiled kernels: {cpu_kernels.status()}"
)
TOKENS = (1, 3, 5, 33, 97)


@pytest.fixture(autouse=True, params=cpu_kernels.levels() or ["none"])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run each test at every level that this processor has."""
    level: str = request.param
    with torch.inference_mode(), computing_at(level):
        yield level


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def served(scheme: Scheme, out: int, columns: int, seed: int = 0) -> tuple[CpuLinear, torch.Tensor]:
    """The served kernel, which quantizes its inputs, and the dense weight."""
    weight = random_quantized(scheme, out, columns, seed)
    quant = ActivationQuant.of(scheme, INPUT_SCALE if scheme.has_input_scale else None)
    linear = serving_linear([weight], None, quant, torch.float32)
    assert isinstance(linear, PackedLinear) and linear.activation_quant is None
    assert isinstance(linear.kernel, CpuLinear)
    return linear.kernel, weight.dequantize().double()


def expected_product(scheme: Scheme, x: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    quant = ActivationQuant.of(scheme, INPUT_SCALE if scheme.has_input_scale else None)
    return (x if quant is None else quant(x)).double() @ dense.T


def assert_close(y: torch.Tensor, expected: torch.Tensor) -> None:
    assert y.shape == expected.shape
    assert (y.double() - expected).abs().max() <= 4e-6 * expected.abs().max()


@pytest.mark.parametrize("name", SCHEMES)
def test_cpu_linear_equals_the_product_with_quantized_inputs(name: str) -> None:
    scheme = SCHEMES[name]
    kernel, dense = served(scheme, 70, 384)
    for tokens in TOKENS:
        x = random(tokens, 384, seed=tokens)
        x[1:2] = 0  # a token of zeros stays zeros
        x[-1] *= 1e-3
        assert_close(kernel(x), expected_product(scheme, x, dense))


@pytest.mark.parametrize("name", ["fp8 token", "fp8 static", "fp8"])
def test_cpu_linear_with_fp8_takes_odd_sizes(name: str) -> None:
    kernel, dense = served(SCHEMES[name], 19, 70)
    for tokens in (1, 6):
        x = random(tokens, 70, seed=tokens)
        assert_close(kernel(x), expected_product(SCHEMES[name], x, dense))


@pytest.mark.parametrize("name", SCHEMES)
def test_cpu_linear_with_float_formats_does_not_depend_on_the_batch(name: str) -> None:
    kernel, _ = served(SCHEMES[name], 50, 256)
    x = random(140, 256, seed=1)
    whole = kernel(x)
    for rows in (slice(0, 1), slice(5, 7), slice(9, 12), slice(20, 25), slice(30, 50)):
        assert torch.equal(kernel(x[rows]), whole[rows])


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_cpu_linear_with_float_formats_keeps_nan(name: str, wrong: float) -> None:
    scheme = SCHEMES[name]
    kernel, dense = served(scheme, 20, 128)
    x = random(4, 128, seed=1)
    x[2, 3] = wrong
    y = kernel(x)
    expected = expected_product(scheme, x, dense)
    assert torch.equal(y.isfinite(), expected.isfinite())
    assert y[[0, 1, 3]].isfinite().all()
    if scheme.inputs != "tensor" or wrong != wrong:  # a fixed scale clamps infinity
        assert not y[2].isfinite().any()


def test_cpu_linear_holds_fp8_in_one_byte_and_fp4_in_half_a_byte() -> None:
    fp8 = pack_weight(random_quantized(SCHEMES["fp8 token"], 64, 256))
    assert fp8.nbytes == 64 * 256 + 64 * 4
    factors = 64 * 4  # float32, one for each output
    nvfp4 = pack_weight(random_quantized(SCHEMES["nvfp4"], 64, 256))
    assert nvfp4.nbytes == 64 * 256 // 2 + 64 * 16 + factors
    mxfp4 = pack_weight(random_quantized(SCHEMES["mxfp4"], 64, 256))
    assert mxfp4.nbytes == 64 * 256 // 2 + 64 * 8 + factors
    mxfp8 = pack_weight(random_quantized(SCHEMES["mxfp8"], 64, 256))
    assert mxfp8.nbytes == 64 * 256 + 64 * 8 + factors


@pytest.mark.parametrize("name", [name for name in SCHEMES if name.startswith(("mx", "nv"))])
def test_cpu_linear_with_scales_in_a_byte_has_the_bits_of_float32_scales(name: str) -> None:
    weight = random_quantized(SCHEMES[name], 70, 384)
    packed = pack_weight(weight)
    assert packed.scales is not None and packed.scales.itemsize == 1
    four_bit_type: FourBitType = "fp4" if weight.scheme.is_fp4 else "uint4"
    of_floats = PackedWeight.pack(weight.q, weight.scales, four_bit_type=four_bit_type)
    assert of_floats.scales is not None and of_floats.scales.itemsize == 4
    quant = ActivationQuant.of(weight.scheme, INPUT_SCALE)
    kinds: list[InputType] = ["float32", "bfloat16", "int8"]
    if quant is not None:
        kinds.append(cpu_input_type(quant, [packed]) or "float32")
    for inputs in kinds:
        if not cpu_kernels.supports_inputs(packed, inputs):
            continue
        kernels = [
            CpuLinear([part], inputs=inputs, input_scale=INPUT_SCALE)
            for part in (packed, of_floats)
        ]
        for tokens in TOKENS:
            x = random(tokens, 384, seed=tokens)
            assert torch.equal(kernels[0](x), kernels[1](x))


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4a16"])
def test_serving_linear_multiplies_inputs_by_the_pre_quant_scale_before_it_quantizes_them(
    name: str,
) -> None:
    scheme = SCHEMES[name]
    weight = random_quantized(scheme, 70, 384)
    dense = weight.dequantize().double()
    weight.pre_quant_scale = random(384, seed=9).exp()
    quant = ActivationQuant.of(scheme, INPUT_SCALE if scheme.has_input_scale else None)
    layer = serving_linear([weight], None, quant, torch.float32)
    assert isinstance(layer, PackedLinear) and layer.input_quant is None
    for tokens in TOKENS:
        x = random(tokens, 384, seed=tokens)
        expected = expected_product(scheme, x * weight.pre_quant_scale, dense)
        assert_close(layer(x), expected)


def test_cpu_linear_keeps_every_scale_of_a_byte() -> None:
    q = torch.full((16, 256 * 8), 2, dtype=torch.uint8)  # code 2 of FP4 is 1
    e8m0 = torch.arange(255).repeat(16, 1).to(torch.uint8)
    e4m3 = torch.arange(127).repeat(16, 1).to(torch.uint8).view(torch.float8_e4m3fn)
    factors = torch.ldexp(torch.ones(16), -(torch.arange(16) % 4))
    powers = torch.ldexp(torch.ones(255), torch.arange(255) - 127)
    powers[0] = 0  # 2^-127 counts as 0
    for scales, values in ((e8m0, powers), (e4m3, e4m3[0].float())):
        columns = 8 * scales.shape[1]
        packed = PackedWeight.pack(
            q[:, :columns], scales, scale_factors=factors, four_bit_type="fp4"
        )
        x = torch.eye(columns)[::8]
        expected = values[:, None] * factors
        for rows in (slice(0, 3), slice(None)):
            assert torch.equal(CpuLinear([packed])(x[rows]), expected[rows])


def test_cpu_linear_takes_every_value_of_fp8_and_keeps_nan_of_weights() -> None:
    scheme = SCHEMES["fp8"]
    weight = random_quantized(scheme, 16, 256)
    codes = torch.arange(256).repeat(16, 1).to(torch.uint8)
    weight.q = codes.where((codes & 0x7F) != 0x7F, 0).view(torch.float8_e4m3fn)
    product = CpuLinear([pack_weight(weight)])
    assert torch.equal(product(torch.eye(256)).T, weight.dequantize())
    assert torch.equal(product(torch.eye(256)[:3]).T, weight.dequantize()[:, :3])
    weight.q = codes.view(torch.float8_e4m3fn)
    assert CpuLinear([pack_weight(weight)])(torch.eye(256))[127].isnan().all()


@pytest.mark.parametrize("inputs", ["bfloat16", "auto"])
def test_cpu_linear_with_fp8_takes_inputs_in_bfloat16(inputs: str) -> None:
    if not cpu_kernels.has_bfloat16():
        pytest.skip("a level without products of bfloat16")
    weight = random_quantized(SCHEMES["fp8"], 70, 192)
    kernel = CpuLinear([pack_weight(weight)], inputs=inputs)  # type: ignore[arg-type]
    x = random(97, 192, seed=3)
    whole = kernel(x)
    assert_close(whole, x.bfloat16().double() @ weight.dequantize().double().T)
    for tokens in (1, 7, 20, 40):
        assert torch.equal(kernel(x[:tokens]), whole[:tokens])


@pytest.mark.parametrize("name", SCHEMES)
def test_cpu_mlp_and_experts_quantize_inputs_alike(name: str) -> None:
    gate_up, _ = served(SCHEMES[name], 256, 128)
    down, _ = served(SCHEMES[name], 128, 128, seed=1)
    mlp = CpuMlp(gate_up, down, "silu")
    experts = CpuExperts([gate_up], [down], gated=True, activation="silu")
    for tokens in (1, 5, 40):
        x = random(tokens, 128, seed=tokens)
        gate, up = gate_up(x).chunk(2, dim=1)
        out = mlp(x)
        ids = torch.zeros(tokens, 1, dtype=torch.int64)
        assert torch.equal(experts(x, ids, torch.ones(tokens, 1)), out)
        hidden = torch.nn.functional.silu(gate) * up
        # Roundings of single values to FP8 or FP4 differ where the activation's last bit does.
        assert (out - down(hidden)).abs().mean() <= 2e-3 * out.abs().max()
