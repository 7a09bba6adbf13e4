"""The compiled CPU kernels against torch's, in sizes that their blocks divide and do not divide."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import pytest
import torch
from support.packed_caches import packed
from torch.nn import functional

from llmkit.checkpoint.quantized_weight import QuantizedWeight, Scheme
from llmkit.common.options import CpuActivations
from llmkit.kernels.activation_quant import fake_quantize_per_token
from llmkit.kernels.attention import paged_attention
from llmkit.kernels.attention_metadata import AttentionBatch
from llmkit.kernels.cpu import cpu_attention, cpu_kernels
from llmkit.kernels.cpu.cpu_kernels import InputType, PackedWeight
from llmkit.kernels.cpu.cpu_linear import CpuLinear
from llmkit.kernels.cpu.cpu_mlp import CpuMlp
from llmkit.kernels.cpu.packed_cache import pack_blocks, unpack_blocks
from llmkit.kernels.elementwise import (
    act_and_mul,
    add_layer_norm,
    add_norm_quantized,
    add_residual,
    add_rms_norm,
    apply_rotary_emb_,
    layer_norm,
    rms_norm,
)
from llmkit.kernels.input_quant import QuantizedInput
from llmkit.kernels.kv_cache import KV_CACHE_DTYPES, KVCache
from llmkit.kernels.sampling import FULL_VOCAB
from llmkit.model.linear import pack_weight, supports_w8a8
from llmkit.quant.grid import round_to_nearest

needs_library = pytest.mark.skipif(
    cpu_kernels.library is None, reason=f"compiled kernels: {cpu_kernels.status()}"
)
SIZES = [
    (1, 1, 1),
    (2, 7, 5),
    (3, 33, 70),
    (4, 64, 96),
    (5, 40, 64),
    (7, 100, 1538),
    (17, 64, 512),
    (97, 48, 130),
]
TOKENS = [1, 2, 3, 4, 6, 7, 13, 96, 97]  # in the order of the tiles that they are cut into


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(autouse=True, params=cpu_kernels.levels() or ["none"])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run each test at every level that this processor has."""
    level: str = request.param
    if cpu_kernels.library is None:
        yield level
        return
    library = cpu_kernels.library
    library.set_level(level)
    yield level
    library.set_level(cpu_kernels.levels()[-1])


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Call `.setattr(cpu_kernels, "library", None)` on it to have torch's kernels."""
    return monkeypatch


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed_linear(
    parts: Sequence[torch.Tensor | QuantizedWeight],
    bias: torch.Tensor | None = None,
    *,
    inputs: InputType = "float32",
) -> CpuLinear:
    return CpuLinear([pack_weight(part) for part in parts], bias, inputs=inputs)


def close(y: torch.Tensor, expected: torch.Tensor, limit: float = 2e-6) -> None:
    """y is as far from the float64 values as `limit` times the largest, at most."""
    assert y.shape == expected.shape
    assert (y.double() - expected).abs().max() <= limit * expected.abs().max()


def test_cpu_kernels_load_on_x86() -> None:
    """CI has a compiler. Without this test, a failed build would only skip the others."""
    flags = torch.backends.cpu.get_cpu_capability()
    if sys.platform == "linux" and flags.startswith("AVX"):
        assert cpu_kernels.status() == "on"


def test_cpu_kernels_refuse_other_dtypes_devices_and_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert cpu_kernels.supports(torch.zeros(1)) == (cpu_kernels.library is not None)
    assert not cpu_kernels.supports(torch.zeros(1, dtype=torch.bfloat16))
    assert not cpu_kernels.supports(torch.zeros(1, device="meta"))
    with torch.inference_mode(False), torch.enable_grad():
        assert not cpu_kernels.supports(torch.zeros(1))
    monkeypatch.setattr(cpu_kernels, "library", None)
    assert not cpu_kernels.supports(torch.zeros(1))
    assert cpu_kernels.status().startswith("off")


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "out", "columns"), SIZES)
def test_cpu_linear_with_dense_weights(
    tokens: int, out: int, columns: int, dtype: torch.dtype
) -> None:
    weight = random(out, columns).to(dtype)
    x = random(tokens, columns, seed=1)
    bias = random(out, seed=2)
    for added in (None, bias):
        expected = functional.linear(
            x.double(), weight.double(), None if added is None else added.double()
        )
        close(packed_linear([weight], added)(x), expected)


@needs_library
@pytest.mark.parametrize(
    "scheme", [Scheme(8), Scheme(8, 32), Scheme(4, 32), Scheme(4, 64, symmetric=False)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_cpu_linear_with_quantized_weights(scheme: Scheme, dtype: torch.dtype) -> None:
    weight = round_to_nearest(random(70, 192) * 0.1, scheme, dtype)
    bias = random(70, seed=2)
    product = packed_linear([weight])
    assert product.nbytes <= 0.26 * 4 * 80 * 192 * scheme.bits / 8 + 2 * 4 * 80 * 6
    for tokens in TOKENS:
        x = random(tokens, 192, seed=tokens)
        dense = weight.dequantize().double()
        close(product(x), x.double() @ dense.T, 4e-6)
        close(packed_linear([weight], bias)(x), x.double() @ dense.T + bias.double(), 4e-6)


@needs_library
def test_cpu_linear_with_fp8_and_uneven_groups() -> None:
    x = random(9, 64, seed=1)
    fp8 = round_to_nearest(random(33, 64), Scheme(8, kind="float", inputs="token"), torch.float32)
    close(packed_linear([fp8])(x), x.double() @ fp8.dequantize().double().T)
    quantized = torch.arange(32 * 64).view(32, 64).remainder(16).byte()
    short = QuantizedWeight(quantized, random(32, 2), torch.full((32, 2), 8).byte(), Scheme(4, 48))
    close(packed_linear([short])(x), x.double() @ short.dequantize().double().T)


@needs_library
def test_cpu_linear_joins_parts_of_several_types() -> None:
    four, eight = (
        round_to_nearest(random(rows, 64), Scheme(bits, 32), torch.float16)
        for rows, bits in ((5, 4), (21, 8))
    )
    parts = [random(7, 64, seed=3), four, random(1, 64, seed=4).half(), eight]
    dense = torch.cat(
        [part.dequantize() if isinstance(part, QuantizedWeight) else part.float() for part in parts]
    )
    x = random(3, 2, 64, seed=1)
    bias = random(34, seed=2)
    close(packed_linear(parts, bias)(x), x.double() @ dense.double().T + bias.double())


@needs_library
def test_cpu_linear_row_does_not_depend_on_the_batch() -> None:
    int8 = round_to_nearest(random(100, 576), Scheme(8), torch.float32)
    products = [
        *(
            packed_linear([random(100, 576).to(dtype)])
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
        ),
        packed_linear([int8]),
        packed_linear(
            [round_to_nearest(random(100, 576), Scheme(4, 64, symmetric=False), torch.float16)]
        ),
        packed_linear([int8], inputs="int8"),
        packed_linear(
            [round_to_nearest(random(100, 576), Scheme(4, 64), torch.float16)], inputs="int8"
        ),
        packed_linear([random(100, 576).bfloat16()], inputs="bfloat16"),
    ]
    x = random(210, 576, seed=1)
    for product in products:
        whole = product(x)
        for rows in (
            slice(0, 1),
            slice(5, 7),
            slice(9, 12),
            slice(20, 25),
            slice(90, 100),
            slice(100, 210),
        ):
            assert torch.equal(product(x[rows]), whole[rows])


@needs_library
def test_cpu_linear_w8a8_quantizes_each_token() -> None:
    for rows, columns in ((33, 70), (64, 576), (16, 8192)):
        quantized = torch.randint(
            1, 256, (rows, columns), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
        )
        weight = QuantizedWeight(
            quantized,
            random(rows, 1, seed=1).exp(),
            torch.full((rows, 1), 128).byte(),
            Scheme(8, inputs="token"),
        )
        assert supports_w8a8(weight)
        bias = random(rows, seed=2)
        dense = weight.dequantize().double()
        for tokens in TOKENS:
            x = random(tokens, columns, seed=tokens)
            x[0] *= tokens % 2  # a token of zeros stays zeros
            expected = fake_quantize_per_token(x, "int8").double() @ dense.T + bias.double()
            close(packed_linear([weight], bias, inputs="int8")(x), expected)
    x[2, 3] = torch.nan
    y = packed_linear([weight], inputs="int8")(x)
    assert y[2].isnan().all()
    assert y[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("has_update", [False, True])
@pytest.mark.parametrize("scheme", [None, Scheme(4, 32), Scheme(8)], ids=str)
@needs_library
def test_cpu_norm_rounds_for_linear_layers(
    rows: int, has_update: bool, scheme: Scheme | None
) -> None:
    if not cpu_kernels.has_bfloat16():
        pytest.skip("a level without products of bfloat16")
    weight: torch.Tensor | QuantizedWeight = random(48, 128).bfloat16()
    if scheme is not None:
        weight = round_to_nearest(random(48, 128), scheme, torch.float32)
    linear = packed_linear([weight], inputs="bfloat16")
    assert linear.input_quant is not None
    residual = random(rows, 128, seed=1)
    update = random(rows, 128, seed=2) if has_update else None
    norm_weight = random(128, seed=3)
    total, rounded = add_norm_quantized(
        residual, update, 0.5, norm_weight, None, 1e-5, linear.input_quant, subtract_mean=False
    )
    expected_total, normed = add_rms_norm(residual, update, 0.5, norm_weight, 1e-5)
    assert isinstance(rounded, QuantizedInput)
    assert torch.equal(total, expected_total)
    assert torch.equal(rounded.values[:rows], normed.bfloat16())
    assert torch.equal(linear(rounded), linear(normed))
    gate_up = packed_linear([random(64, 128).bfloat16()], inputs="bfloat16")
    mlp = CpuMlp(gate_up, packed_linear([random(128, 32).bfloat16()], inputs="bfloat16"), "silu")
    assert mlp.takes(rounded) and torch.equal(mlp(rounded), mlp(normed))


@needs_library
def test_cpu_linear_takes_rounded_inputs_of_whole_words_and_groups() -> None:
    inputs: InputType = "bfloat16" if cpu_kernels.has_bfloat16() else "float32"
    weight = random(16, 128).bfloat16()
    takes_rounded = cpu_kernels.has_bfloat16()
    assert (packed_linear([weight], inputs=inputs).input_quant is not None) == takes_rounded
    assert packed_linear([weight], inputs="float32").input_quant is None
    assert packed_linear([random(16, 72).bfloat16()], inputs=inputs).input_quant is None
    assert packed_linear([weight, random(16, 128)], inputs=inputs).input_quant is None
    codes = torch.zeros(16, 192).byte()
    for num_groups, has_offsets, takes in ((1, 0, 1), (6, 0, 1), (8, 0, 0), (1, 1, 0)):
        scales = torch.ones(16, num_groups)
        packed = PackedWeight.pack(codes, scales, scales if has_offsets else None)
        taken = CpuLinear([packed], inputs=inputs).input_quant is not None
        assert taken == (takes_rounded and bool(takes))


def test_supports_w8a8_refuses_other_schemes() -> None:
    def weight(columns: int, groups: int = 1, scheme: Scheme | None = None) -> QuantizedWeight:
        shape = (4, groups)
        return QuantizedWeight(
            torch.zeros(4, columns).byte(),
            torch.ones(shape),
            torch.zeros(shape).byte(),
            scheme or Scheme(8),
        )

    assert supports_w8a8(weight(7))
    assert not supports_w8a8(weight(64, 2, Scheme(8, 32)))
    assert not supports_w8a8(weight(6, scheme=Scheme(8, symmetric=False)))
    assert not supports_w8a8(weight(6, scheme=Scheme(4, 6)))


def quantized_by_group(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """x [T, K] rounded to int8 with a scale for each token and group, as float64."""
    groups = x.unflatten(1, (-1, group_size))
    return fake_quantize_per_token(groups, "int8").flatten(1).double()


@needs_library
@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(4, 32),
        Scheme(4, 64, symmetric=False),
        Scheme(4, 192),
        Scheme(8, 32),
        Scheme(8),
        Scheme(8, symmetric=False),
    ],
    ids=str,
)
def test_cpu_linear_with_int8_inputs_has_a_scale_for_each_group(scheme: Scheme) -> None:
    weight = round_to_nearest(random(70, 192) * 0.1, scheme, torch.float32)
    bias = random(70, seed=2)
    group_size = 192 if scheme.group_size == -1 else scheme.group_size
    for tokens in TOKENS:
        x = random(tokens, 192, seed=tokens)
        expected = quantized_by_group(x, group_size) @ weight.dequantize().double().T
        close(packed_linear([weight], bias, inputs="int8")(x), expected + bias.double(), 4e-6)


@needs_library
def test_cpu_linear_with_int8_inputs_and_fp4_weights() -> None:
    codes = torch.randint(16, (40, 128), generator=torch.Generator().manual_seed(0)).byte()
    scales = random(40, 4, seed=1).exp()
    packed = PackedWeight.pack(codes, scales, four_bit_type="fp4")
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    dense = (
        torch.cat((values, -values))[codes.long()].unflatten(1, (4, 32))
        * scales.double()[..., None]
    )
    for tokens in TOKENS:
        x = random(tokens, 128, seed=tokens)
        expected = quantized_by_group(x, 32) @ dense.flatten(1).T
        close(CpuLinear([packed], inputs="int8")(x), expected, 4e-6)


@needs_library
def test_cpu_linear_with_bfloat16_inputs(level: str) -> None:
    if not cpu_kernels.library.has_bfloat16():
        pytest.skip(f"{level} has no bfloat16 products")
    bias = random(70, seed=2)
    for columns in (33, 70, 512):
        weight = random(70, columns).bfloat16()
        for tokens in TOKENS:
            x = random(tokens, columns, seed=tokens)
            expected = x.bfloat16().double() @ weight.double().T + bias.double()
            close(packed_linear([weight], bias, inputs="bfloat16")(x), expected, 4e-6)
    # Weights with a scale for each group of inputs, as FP8 has.
    values = random(40, 256).bfloat16()
    scales = random(40, 4, seed=1).exp()
    dense = (values.double().unflatten(1, (4, 64)) * scales.double()[..., None]).flatten(1)
    x = random(9, 256, seed=3)
    y = CpuLinear([PackedWeight.pack(values, scales)], inputs="bfloat16")(x)
    close(y, x.bfloat16().double() @ dense.T, 4e-6)


@needs_library
def test_cpu_linear_holds_bfloat16_compressed_where_that_saves_memory(level: str) -> None:
    if not cpu_kernels.has_compression():
        pytest.skip(f"{level} does not read compressed weights")
    weight = random(80, 576)
    weight[3, 5] = torch.inf
    weight[7:9] = 0
    packed = PackedWeight.pack(weight.bfloat16())
    compressed = packed.compressed()
    assert compressed.is_compressed
    assert compressed.dtype == torch.bfloat16
    assert 0.75 < compressed.nbytes / packed.nbytes < 0.8
    assert packed_linear([weight.bfloat16()], inputs="bfloat16").nbytes == compressed.nbytes
    for tokens in TOKENS:
        x = random(tokens, 576, seed=tokens)
        expected, y = torch.empty(tokens, 80), torch.empty(tokens, 80)
        cpu_kernels.linear(x, packed, None, expected, 0, "bfloat16")
        cpu_kernels.linear(x, compressed, None, y, 0, "bfloat16")
        assert torch.equal(y.view(torch.int32), expected.view(torch.int32))
    # Exponents of a wide range, other inputs than bfloat16, and scales.
    wide = PackedWeight.pack(torch.exp(12 * random(80, 576)).bfloat16())
    assert wide.compressed() is wide
    for inputs in ("float32", "int8"):
        assert packed_linear([weight.bfloat16()], inputs=inputs).nbytes == packed.nbytes
        assert not cpu_kernels.supports_inputs(compressed, inputs)
    scaled = PackedWeight.pack(weight.bfloat16(), torch.ones(80, 1))
    assert CpuLinear([scaled], inputs="bfloat16").nbytes == scaled.nbytes


@needs_library
@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(4, 32),
        Scheme(4, 24),
        Scheme(4, 64, symmetric=False),
        Scheme(4, 24, symmetric=False),
        Scheme(4, -1),
        Scheme(8, 32),
        Scheme(8),
        Scheme(8, symmetric=False),
        Scheme(4, 16, kind="float", scale_format="e4m3"),
        Scheme(4, 32, kind="float", scale_format="e8m0"),
    ],
    ids=str,
)
def test_cpu_linear_with_bfloat16_inputs_and_weights_of_few_bits(
    scheme: Scheme, level: str
) -> None:
    if not cpu_kernels.library.has_bfloat16():
        pytest.skip(f"{level} has no bfloat16 products")
    weight = round_to_nearest(random(70, 192) * 0.1, scheme, torch.float32)
    bias = random(70, seed=2)
    kernel = packed_linear([weight], bias, inputs="bfloat16")
    x = random(max(TOKENS), 192, seed=3)
    whole = kernel(x)
    rounded = x.bfloat16().double() if level != "amx" or scheme.group_size != 24 else x.double()
    close(whole, rounded @ weight.dequantize().double().T + bias.double(), 4e-6)
    for tokens in TOKENS:
        assert torch.equal(kernel(x[:tokens]), whole[:tokens])


@needs_library
@pytest.mark.parametrize("activations", ["auto", "float32", "bfloat16", "int8"])
def test_cpu_activations_are_rounded_where_the_weight_allows_it(
    activations: CpuActivations, level: str
) -> None:
    weight = random(16, 64)
    has_bfloat16 = cpu_kernels.library is not None and cpu_kernels.library.has_bfloat16()
    of_bfloat16 = "bfloat16" if activations in ("auto", "bfloat16") and has_bfloat16 else "float32"
    of_integers = "int8" if activations == "int8" else of_bfloat16
    scales = torch.ones(16, 1)
    for values, expected in (
        (weight, "float32"),
        (weight.half(), "float32"),
        (weight.bfloat16(), of_bfloat16),
        (weight.to(torch.int8), of_integers),
    ):
        packed = PackedWeight.pack(values, scales if values.dtype == torch.int8 else None)
        assert cpu_kernels.inputs_for(packed, activations) == expected
    four_bits = PackedWeight.pack(torch.zeros(16, 64, dtype=torch.uint8), scales)
    assert cpu_kernels.inputs_for(four_bits, activations) == of_integers


SPECIAL = [0.0, -0.0, 1.0, -1.0, 2.5, float("inf"), float("-inf"), float("nan"), -float("nan")]


@pytest.mark.parametrize("cols", [1, 7, 512, 513, 5000])
def test_cpu_argmax_is_that_of_torch(cols: int, without: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(cols)
    choices = torch.tensor(SPECIAL)
    rows = [random(6, cols), random(6, cols).round()]  # the latter with ties
    for count in (2, 3, 5, 7, 9):
        picked = torch.randint(count, (6, cols), generator=generator)
        rows.append(choices[picked])
        rows.append(-choices[picked])
    x = torch.cat([*rows, torch.full((1, cols), float("-inf")), torch.full((1, cols), -0.0)])
    wide = torch.cat([x, x], dim=1)[:, :cols]  # rows that are not adjacent
    found = [(FULL_VOCAB.argmax(y), FULL_VOCAB.rows_finite(y)) for y in (x, wide)]
    without.setattr(cpu_kernels, "library", None)
    for ids, is_finite in found:
        assert torch.equal(ids, FULL_VOCAB.argmax(x))
        assert torch.equal(is_finite, FULL_VOCAB.rows_finite(x))


def test_cpu_linear_with_int8_inputs_gives_the_same_bits_at_every_level(level: str) -> None:
    library = cpu_kernels.library
    weights = [
        round_to_nearest(random(70, 192), scheme, torch.float32)
        for scheme in (Scheme(8, inputs="token"), Scheme(4, 64), Scheme(4, 32, symmetric=False))
    ]
    for weight in weights:
        product = packed_linear([weight], random(70, seed=2), inputs="int8")
        for tokens in TOKENS:
            x = random(tokens, 192, seed=tokens)
            library.set_level(level)
            y = product(x)
            library.set_level(cpu_kernels.levels()[0])
            assert torch.equal(y, product(x))


@needs_library
def test_cpu_linear_keeps_16_bit_dtypes() -> None:
    weight = random(9, 40).bfloat16()
    x = random(3, 40, seed=1)
    for dtype in (torch.bfloat16, torch.float16):
        y = packed_linear([weight])(x.to(dtype))
        assert y.dtype == dtype
        close(y, x.to(dtype).double() @ weight.double().T, 2.0**-8)


@needs_library
@pytest.mark.parametrize("shape", [(1, 8), (3, 5), (2, 3, 64), (70, 576), (40, 1001)])
def test_cpu_rms_norm(shape: tuple[int, ...]) -> None:
    x = random(*shape)
    weight = random(shape[-1], seed=1)
    y = rms_norm(x, weight, 1e-5)
    close(y, functional.rms_norm(x.double(), weight.shape, weight.double(), 1e-5), 1e-6)


@needs_library
@pytest.mark.parametrize("bias", [None, random(70, seed=4)])
@pytest.mark.parametrize("rows", [1, 5, 300])
def test_cpu_add_norm_is_the_addition_and_the_norm(rows: int, bias: torch.Tensor | None) -> None:
    residual, update = random(rows, 70), random(rows, 70, seed=1)
    weight = random(70, seed=2)
    total = add_residual(residual, update, 0.25)
    close(total, residual.double() + 0.25 * update.double(), 1e-6)
    for ours, norm in (
        (add_rms_norm(residual, update, 0.25, weight, 1e-5), rms_norm(total, weight, 1e-5)),
        (
            add_layer_norm(residual, update, 0.25, weight, bias, 1e-5),
            layer_norm(total, weight, bias, 1e-5),
        ),
    ):
        assert torch.equal(ours[0], total)
        assert torch.equal(ours[1], norm)


@needs_library
@pytest.mark.parametrize(("dim", "turned"), [(64, 64), (16, 8), (80, 32), (128, 128)])
def test_cpu_rotary_emb_is_in_place_and_leaves_the_rest(
    dim: int, turned: int, without: pytest.MonkeyPatch
) -> None:
    whole = random(23, 7, dim)
    angles = random(23, 1, turned // 2, seed=1)
    cos = torch.cat((angles.cos(),) * 2, -1)
    sin = torch.cat((-angles.sin(), angles.sin()), -1)
    ours = whole.clone()
    theirs = whole.clone()
    apply_rotary_emb_(ours[:, :5], cos, sin)
    without.setattr(cpu_kernels, "library", None)
    apply_rotary_emb_(theirs[:, :5], cos, sin)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    assert torch.equal(ours[:, 5:], whole[:, 5:])
    assert torch.equal(ours[..., turned:], whole[..., turned:])


@needs_library
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(1, 16), (3, 48), (130, 3072)])
def test_cpu_act_and_mul(activation: Literal["silu", "gelu_tanh"], shape: tuple[int, int]) -> None:
    x = random(*shape) * 8
    x[0, :8] = torch.tensor([0.0, -0.0, 100, -100, 1e-30, 88, -88, 20])
    gate, up = x.double().chunk(2, -1)
    expected = (
        functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh")
    )
    torch.testing.assert_close(
        act_and_mul(x, activation).double(), expected * up, atol=1e-6, rtol=1e-6
    )
    x[0, 3] = torch.nan
    assert act_and_mul(x, activation)[0, 3].isnan()


HEADS = [
    (9, 3, 64),
    (4, 4, 16),
    (8, 1, 80),
    (2, 2, 40),
    (14, 2, 128),
    (6, 2, 256),
    (2, 1, 512),
]  # queries, keys, dimensions
MIXED = ([1, 1, 5, 40, 1, 130, 3], [1, 65, 5, 40, 300, 200, 67])  # new tokens, context


def tables(contexts: list[int], size: int = 16) -> tuple[list[list[int]], int]:
    """Blocks in no order, some of them nobody's."""
    counts = [-(-context // size) for context in contexts]
    free = torch.randperm(sum(counts) + 5, generator=torch.Generator().manual_seed(7)).tolist()
    return [[free.pop() for _ in range(count)] for count in counts], sum(counts) + 5


@needs_library
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
@pytest.mark.parametrize("window", [None, 1, 20, 100])
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("kind", [None, "int8"])
def test_cpu_attention(
    heads: int,
    kv_heads: int,
    dim: int,
    window: int | None,
    softcap: float | None,
    kind: str | None,
    without: pytest.MonkeyPatch,
) -> None:
    new, contexts = MIXED
    rows, blocks = tables(contexts)
    shape = (2 * kv_heads, blocks, 16, dim)
    kv = random(*shape) * 2
    nobody = sorted(set(range(blocks)) - {block for row in rows for block in row})
    if not kind:
        kv[:, nobody] = torch.nan
    cache = KVCache(kv)
    if kind:
        quantized = torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(1)).to(
            KV_CACHE_DTYPES[kind]
        )
        cache = KVCache(quantized, scales=random(2 * kv_heads, blocks, 16, 1).abs() * 0.03)
        if window:
            cache = KVCache(quantized, static_scales=random(2 * kv_heads, 1, 1).abs() * 0.03)
    cache = packed(cache)
    queries = random(sum(new), heads + 2, dim, seed=2)[
        :, :heads
    ]  # rows that do not lie side by side
    group = AttentionBatch.build(new, contexts, {None: rows}, 16).metadata(window)
    assert cpu_attention.supports(queries, cache)
    ours = paged_attention(queries, cache, group, dim**-0.5, softcap)
    without.setattr(cpu_kernels, "library", None)
    theirs = paged_attention(queries, cache, group, dim**-0.5, softcap)
    torch.testing.assert_close(ours, theirs, atol=3e-5, rtol=3e-5)


@needs_library
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "fp8"])
def test_cpu_attention_over_a_cache_of_another_dtype(
    heads: int, kv_heads: int, dim: int, kind: str, without: pytest.MonkeyPatch
) -> None:
    new, contexts = MIXED
    rows, blocks = tables(contexts)
    kv = random(2 * kv_heads, blocks, 16, dim) * 2
    kv[0, 0, 0, :8] = torch.tensor([0, -0.0, 2**-9, -(2**-7), 0.01, 448, -448, 1e-6])
    kv[:, sorted(set(range(blocks)) - {block for row in rows for block in row})] = torch.nan
    scales = random(2 * kv_heads, blocks, 16, 1).abs() + 0.1
    cache = KVCache(kv.to(KV_CACHE_DTYPES[kind]), scales if kind == "fp8" else None)
    plain = packed(KVCache(cache.kv.float() * scales if kind == "fp8" else cache.kv.float()))
    cache = packed(cache)
    queries = random(sum(new), heads, dim, seed=2)
    rounds = kind == "bfloat16" and cpu_kernels.library.has_bfloat16()
    if rounds:
        queries = queries.bfloat16().float()
    ours, exact = [], []
    for window in (None, 20):
        batch = AttentionBatch.build(new, contexts, {None: rows}, 16).metadata(window)
        assert cpu_attention.supports(queries, cache)
        ours.append(paged_attention(queries, cache, batch, 0.125))
        exact.append(paged_attention(queries, plain, batch, 0.125))
    if rounds:
        for one, other in zip(ours, exact, strict=True):  # probabilities are rounded
            assert (one - other).abs().max() < 0.03
            assert (one - other).square().mean() < 1e-5 * other.square().mean()
        return
    assert all(map(torch.equal, ours, exact)), "the kernel reads the exact values"
    without.setattr(cpu_kernels, "library", None)
    theirs = paged_attention(queries, cache, batch, 0.125)
    torch.testing.assert_close(ours[-1], theirs, atol=3e-5, rtol=3e-5)


@needs_library
def test_cpu_attention_over_fp8_keeps_nan() -> None:
    codes = torch.full((2, 1, 16, 16), 0x38, dtype=torch.uint8)  # 1.0
    codes[1, 0, 3, 5], codes[1, 0, 3, 6], codes[1, 0, 3, 7] = 0x7F, 0xFF, 0x7E
    cache = packed(KVCache(codes.view(KV_CACHE_DTYPES["fp8"]), static_scales=torch.ones(2, 1, 1)))
    batch = AttentionBatch.build([1], [4], {None: [[0]]}, 16).metadata(None)
    y = paged_attention(random(1, 1, 16), cache, batch, 0.25)[0, 0]
    assert y[5:7].isnan().all()
    close(y[[0, 7]], torch.tensor([1.0, (3 + 448) / 4]).double())


@needs_library
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("kind", [None, *KV_CACHE_DTYPES])
def test_cpu_attention_to_a_long_context_does_not_depend_on_batch_chunks_or_threads(
    kind: str | None, window: int | None
) -> None:
    """Its segments are computed by several threads in one case, one after the other in another."""
    rows, blocks = tables([700, 40, 90])
    values = (random(4, blocks, 16, 64) * 20).to(KV_CACHE_DTYPES[kind] if kind else torch.float32)
    cache = KVCache(values)
    if cache.quantized:
        cache = KVCache(values, static_scales=torch.full((4, 1, 1), 0.05))
    cache = packed(cache)
    sinks = torch.linspace(-1.0, 3.0, 6) if window else None
    queries = random(700, 6, 64, seed=1)
    library = cpu_kernels.library
    num_threads = library.num_threads()

    def attend(start: int, stop: int, threads: int, others: int = 0) -> torch.Tensor:
        library.set_num_threads(threads)
        new = [stop - start, 1, 30][: 1 + others]
        seen = [stop, 40, 90][: 1 + others]
        batch = AttentionBatch.build(new, seen, {None: rows[: len(new)]}, 16)
        q = torch.cat((queries[start:stop], queries[: sum(new[1:])]))
        y = paged_attention(q, cache, batch.metadata(window), 0.125, sinks=sinks)
        return y[: stop - start]

    try:
        whole = attend(0, 700, 2)
        for start, stop in ((699, 700), (256, 257), (500, 516), (511, 513), (690, 700)):
            for threads in (1, 2, 5):
                for others in (0, 2):
                    assert torch.equal(attend(start, stop, threads, others), whole[start:stop])
    finally:
        library.set_num_threads(num_threads)


@needs_library
@pytest.mark.parametrize(("out", "columns"), [(1, 32), (16, 64), (40, 96), (100, 1536)])
def test_cpu_linear_with_mxfp4(out: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (out, columns), generator=generator)
    powers = torch.randint(-9, 5, (out, columns // 32), generator=generator)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    dense = torch.cat((values, -values))[codes] * (2.0**powers).repeat_interleave(32, 1)
    scales = (2.0**powers).float()
    weight = QuantizedWeight(
        codes.to(torch.uint8),
        scales,
        torch.zeros_like(scales).to(torch.uint8),
        Scheme(4, 32, kind="float", scale_format="e8m0"),
    )
    assert torch.equal(weight.dequantize().double(), dense)
    bias = random(out, seed=2)
    linear = packed_linear([weight], bias)
    padded = -(-columns // 64) * 64
    assert linear.nbytes <= -(-out // 16) * 16 * (padded // 2 + columns // 8 + 4)
    for rows in TOKENS:
        x = random(rows, columns, seed=1)
        close(linear(x), x.double() @ dense.T + bias.double())


@needs_library
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("quantized", [False, True])
def test_cpu_attention_with_sinks(
    window: int | None, quantized: bool, without: pytest.MonkeyPatch
) -> None:
    new, contexts = MIXED
    rows, blocks = tables(contexts)
    cache = KVCache(random(4, blocks, 16, 64) * 2)
    if quantized:
        values = (cache.kv * 20).round().clamp(-127, 127).to(torch.int8)
        cache = KVCache(values, scales=random(4, blocks, 16, 1).abs() * 0.03)
    cache = packed(cache)
    queries = random(sum(new), 8, 64, seed=2)
    group = AttentionBatch.build(new, contexts, {None: rows}, 16).metadata(window)
    sinks = torch.tensor([-4.0, 0.0, 1.0, 3.0, 9.0, 40.0, -90.0, 0.5])
    assert cpu_attention.supports(queries, cache)
    ours = paged_attention(queries, cache, group, 0.125, None, sinks)
    without.setattr(cpu_kernels, "library", None)
    theirs = paged_attention(queries, cache, group, 0.125, None, sinks)
    torch.testing.assert_close(ours, theirs, atol=3e-5, rtol=3e-5)


@needs_library
@pytest.mark.parametrize("sinks", [None, torch.linspace(-1.0, 3.0, 9)], ids=["plain", "sinks"])
def test_cpu_attention_does_not_depend_on_the_batch_or_chunks(sinks: torch.Tensor | None) -> None:
    rows, blocks = tables([230, 90])
    cache = packed(KVCache(random(6, blocks, 16, 64)))
    queries = random(320, 9, 64, seed=1)
    for window in (None, 50):
        whole = paged_attention(
            queries,
            cache,
            AttentionBatch.build([230, 90], [230, 90], {None: rows}, 16).metadata(window),
            0.125,
            sinks=sinks,
        )
        for start, stop in ((0, 1), (0, 100), (100, 230), (229, 230), (17, 18)):
            group = AttentionBatch.build([stop - start], [stop], {None: rows[:1]}, 16).metadata(
                window
            )
            assert torch.equal(
                paged_attention(queries[start:stop], cache, group, 0.125, sinks=sinks),
                whole[start:stop],
            )


@needs_library
def test_cpu_attention_does_not_read_freed_blocks() -> None:
    cache = packed(KVCache(random(6, 10, 16, 64)))
    queries = random(2, 9, 64, seed=1)
    kept = [[3, 4, 5, 6, 7, 8]]
    freed = [[-1, -1, 5, 6, 7, 8]]
    answers = [
        paged_attention(
            queries, cache, AttentionBatch.build([2], [90], {40: table}, 16).metadata(40), 0.125
        )
        for table in (kept, freed)
    ]
    assert torch.equal(*answers)


@needs_library
@pytest.mark.parametrize("dim", [64, 40])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kind", [None, *KV_CACHE_DTYPES])
def test_cpu_store_kv_writes_the_same_bits_as_torch(
    kind: str | None, static: bool, dim: int, without: pytest.MonkeyPatch
) -> None:
    qkv = random(70, 15, dim) * random(70, 15, 1, seed=1).exp()
    qkv[3] = 0
    qkv[4] *= 1e-4  # subnormal in FP8, with static scales, and in float16
    qkv[5] *= 1e-6
    qkv[6] *= 1e-3
    qkv[7, :, 1] = 1e20 if kind != "float16" else 1e4  # beyond the range, with static scales
    qkv[8, :, 2] = -1e20 if kind != "float16" else -1e4
    qkv[9] = torch.arange(dim) - dim / 2  # ties
    qkv[10] = 1 + (torch.arange(dim) - dim / 2) / 256
    slots = torch.randperm(160, generator=torch.Generator().manual_seed(1))[:70]

    def stored() -> KVCache:
        kv = torch.zeros(6, 10, 16, dim, dtype=KV_CACHE_DTYPES[kind] if kind else torch.float32)
        cache = KVCache(kv, is_packed=True)
        if cache.quantized and static:
            cache = replace(cache, static_scales=torch.linspace(0.01, 0.5, 6)[:, None, None])
        elif cache.quantized:
            cache = replace(cache, scales=torch.zeros(6, 10, 16, 1))
        cache.store(qkv[:, 9:], slots)
        return cache

    ours = stored()
    without.setattr(cpu_kernels, "library", None)
    theirs = stored()
    assert ours.kv.float().any()
    assert torch.equal(ours.kv.view(torch.uint8), theirs.kv.view(torch.uint8))
    if theirs.scales is not None:
        assert torch.equal(ours.scales, theirs.scales)


@needs_library
@pytest.mark.parametrize("kind", KV_CACHE_DTYPES)
def test_cpu_store_kv_keeps_nan(kind: str) -> None:
    kv = random(2, 2, 24)
    kv[1, 0, 20] = torch.nan
    cache = packed(KVCache(torch.zeros(2, 1, 16, 24, dtype=KV_CACHE_DTYPES[kind])))
    if cache.quantized:
        cache = replace(cache, scales=torch.zeros(2, 1, 16, 1))
    cache.store(kv, torch.tensor([3, 4]))
    stored = cache.gather(slice(0, 1), torch.float32)
    assert stored[0, 4, 20].isnan()
    assert stored[0, 3].isfinite().all()
    assert stored[1].isfinite().all()


@needs_library
@pytest.mark.parametrize("kind", [None, *KV_CACHE_DTYPES])
@pytest.mark.parametrize("block_size", [16, 64])
def test_cpu_attention_caches_are_packed_in_words(kind: str | None, block_size: int) -> None:
    """Keys by dimension, then token; values by token, then dimension; a word of 32 bits of each."""
    dtype = KV_CACHE_DTYPES[kind] if kind else torch.float32
    numbers = torch.randint(0, 100, (4, 3, block_size, 24)).to(dtype)
    cache = packed(KVCache(numbers))
    width = 4 // dtype.itemsize
    blocks = cache.kv.float().view(4, 3, block_size // 16, 16 * 24)
    for token, d in ((0, 0), (3, 5), (15, 23), (6, 10)):
        key = (d // width * 16 + token) * width + d % width
        value = (token // width * 24 + d) * width + token % width
        assert torch.equal(blocks[:2, :, 0, key], numbers[:2, :, token, d].float())
        assert torch.equal(blocks[2:, :, 0, value], numbers[2:, :, token, d].float())
    restored = unpack_blocks(pack_blocks(numbers))
    assert torch.equal(restored.float(), numbers.float())
    if cache.quantized:
        cache = replace(cache, static_scales=torch.ones(4, 1, 1))
    some = cache.gather(torch.tensor([2, 0]), torch.float32)
    assert torch.equal(some, numbers[:, [2, 0]].flatten(1, 2).float())


def test_cpu_attention_supports() -> None:
    def fits(
        heads: int = 9,
        kv_heads: int = 3,
        size: int = 16,
        dim: int = 64,
        dtype: torch.dtype = torch.float32,
    ) -> bool:
        cache = packed(KVCache(torch.zeros(2 * kv_heads, 2, size, dim).to(dtype)))
        return cpu_attention.supports(torch.zeros(1, heads, dim), cache)

    assert fits() == (cpu_kernels.library is not None)
    assert not fits(dim=60)
    assert fits(dim=512) == fits()
    assert not fits(dim=520)
    assert not fits(size=24)
    assert not fits(size=8)
    assert fits(size=64) == fits()
    assert not fits(heads=49, kv_heads=1)
    for dtype in KV_CACHE_DTYPES.values():
        assert fits(dtype=dtype) == fits()
    assert not fits(dtype=torch.float64)


@needs_library
def test_cpu_kernels_refuse_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="17 numbers were expected, 1 were given"):
        cpu_kernels.library.linear(1)
    with pytest.raises(TypeError):
        cpu_kernels.library.norm(0, 0, 0, 0, 0, "0", 0, 0, 0, 0, 1.0, 1.0)
