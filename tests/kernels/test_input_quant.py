"""Quantizing inputs within norms and activations: the bits of the separate kernels, by interpreter.

Also compiled for GPUs, and passed through the decoder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.elementwise_cases import add_norm_arguments
from support.triton_checks import compiled_for, interpreted

from llmkit.kernels import elementwise, input_quant
from llmkit.kernels.activation_quant import FP8
from llmkit.kernels.input_quant import InputQuant, QuantizedInput, quantize_input

QUANTS = {
    "fp8 rows": InputQuant(FP8, min_rows=17),
    "int8 rows": InputQuant(torch.int8, min_rows=32),
    "fp8 groups of 128": InputQuant(FP8, 128),
    "fp8 groups of 32": InputQuant(FP8, 32),
    "fp8 static": InputQuant(FP8, scale=torch.tensor([0.01])),
}
SHAPES = [(2, 576), (3, 200), (2, 2500)]
Parts = tuple[torch.Tensor, torch.Tensor]


def parts(inputs: QuantizedInput) -> Parts:
    """The bits of values and scales."""
    count = len(inputs)
    return (
        inputs.values[:count].view(torch.uint8),
        inputs.scales[:count].view(torch.int32),
    )


def fused_and_separate(label: str, rows: int, size: int, dtype: torch.dtype) -> list[Parts]:
    """For norms and activations: the fused kernel's bits, then those of two kernels."""
    quant = QUANTS[label]
    elementwise.MAX_ACTIVATED = 1024  # so that rows have several tiles
    residual, update, scale, weight, eps = add_norm_arguments(rows, size, dtype)
    if rows == 3:
        residual[0, 3] = torch.nan
    found = []
    for subtract_mean in (False, True):
        bias = weight if subtract_mean else None
        norm = (residual, update, scale, weight)
        if subtract_mean:
            total, normed = elementwise.add_layer_norm_triton(*norm, bias, eps)
        else:
            total, normed = elementwise.add_rms_norm_triton(*norm, eps)
        got = elementwise.add_norm_quantized_triton(*norm, bias, eps, quant, subtract_mean)
        assert torch.equal(got[0].view(torch.uint8), total.view(torch.uint8))
        found += [parts(got[1]), parts(quantize_input(normed, quant))]
    draw = torch.Generator().manual_seed(1)
    gate_up = (torch.randn(rows, 2 * size, generator=draw) * 4).to(dtype)
    if rows == 3:
        gate_up[-1, 5] = torch.inf
    for activation in ("silu", "gelu_tanh"):
        plain = elementwise.act_and_mul_triton(gate_up, activation)
        fused = elementwise.act_and_mul_quantized_triton(gate_up, activation, quant)
        assert fused.values.shape == quant.empty(rows, size, gate_up).values.shape
        found += [parts(fused), parts(quantize_input(plain, quant))]
    return found


def test_input_quant_in_norms_and_activations_has_the_bits_of_separate_kernels(
    tmp_path: Path,
) -> None:
    calls = [
        (label, rows, size, dtype)
        for label in QUANTS
        for rows, size in SHAPES
        for dtype in (torch.float16, torch.float32)
        if dtype == torch.float16 or rows == 3
    ]
    results = interpreted("kernels.test_input_quant", "fused_and_separate", calls, tmp_path)
    for call, found in zip(calls, results, strict=True):
        for (values, scales), (expected, wanted) in zip(found[::2], found[1::2], strict=True):
            assert torch.equal(values, expected), call
            assert torch.equal(scales, wanted), call
            assert values.any(), call


@pytest.mark.parametrize(
    ("dtype", "min_rows", "rows", "expected"),
    [
        (FP8, 1, 3, 3),
        (FP8, 17, 3, 17),
        (FP8, 17, 40, 40),
        (torch.int8, 32, 3, 32),
        (torch.int8, 32, 33, 40),
    ],
)
def test_input_quant_has_the_rows_that_products_want(
    dtype: torch.dtype, min_rows: int, rows: int, expected: int
) -> None:
    empty = InputQuant(dtype, min_rows=min_rows).empty(rows, 64, torch.zeros(0).half())
    assert empty.values.shape == (expected, 64) and empty.scales.shape == (expected, 1)
    assert len(empty) == rows and empty.dtype == torch.float16
    grouped = InputQuant(dtype, 32, min_rows=min_rows).empty(rows, 70, torch.zeros(0))
    assert grouped.scales.shape == (expected, 3)


def test_input_quant_is_shared_by_layers_that_quantize_alike() -> None:
    scale = torch.ones(1)
    quant = InputQuant(FP8, min_rows=17)
    assert quant.is_same(InputQuant(FP8))  # layers take any number of rows
    assert not quant.is_same(None)
    assert not quant.is_same(InputQuant(torch.int8))
    assert not quant.is_same(InputQuant(FP8, 128))
    assert not quant.is_same(InputQuant(FP8, scale=scale))
    assert InputQuant(FP8, scale=scale).is_same(InputQuant(FP8, scale=scale))
    assert not InputQuant(FP8, scale=scale).is_same(InputQuant(FP8, scale=scale.clone()))


# kernel, arguments that are not constants, constants, warps
KERNELS: dict[str, tuple[Any, dict[str, str], dict[str, Any], int]] = {
    "quantize rows": (
        input_quant._quantize_input_kernel,
        {"x": "*bf16"},
        {"static_scale": None, "GROUP": 0, "TILE": 16384},
        16,
    ),
    "quantize groups": (
        input_quant._quantize_input_kernel,
        {"x": "*bf16"},
        {"static_scale": None, "GROUP": 128, "TILE": 2048},
        4,
    ),
    "norm": (
        elementwise._add_norm_kernel,
        dict.fromkeys(("residual", "update", "weight", "total"), "*bf16"),
        {"static_scale": None, "bias": None, "SUBTRACT_MEAN": False, "GROUP": 0, "TILE": 8192},
        16,
    ),
    "norm groups": (
        elementwise._add_norm_kernel,
        dict.fromkeys(("residual", "update", "weight", "total"), "*bf16"),
        {"static_scale": None, "bias": None, "SUBTRACT_MEAN": False, "GROUP": 128, "TILE": 8192},
        16,
    ),
    "act rows": (
        elementwise._act_and_mul_quantize_kernel,
        {"gate_up": "*bf16"},
        {"static_scale": None, "GROUP": 0, "IS_ONE_TILE": True, "TILE": 8192},
        16,
    ),
    "act long rows": (
        elementwise._act_and_mul_quantize_kernel,
        {"gate_up": "*bf16"},
        {"static_scale": None, "GROUP": 0, "IS_ONE_TILE": False, "TILE": 8192},
        16,
    ),
    "act groups": (
        elementwise._act_and_mul_quantize_kernel,
        {"gate_up": "*bf16"},
        {"static_scale": None, "GROUP": 128, "IS_ONE_TILE": True, "TILE": 1024},
        4,
    ),
}


def typed_arguments(
    kernel: Any, pointers: dict[str, str], constants: dict[str, Any], dtype: str
) -> tuple[dict[str, str], dict[str, Any]]:
    """The types of all arguments, and all constants, for inputs quantized to `dtype`."""
    scale_kinds = {"scales": "*fp32", "normed_scales": "*fp32", "q": dtype, "normed": dtype}
    scale_kinds |= {"size": "i32", "K": "i32", "num_scales": "i32", "scale": "fp32", "eps": "fp32"}
    kinds = pointers | {
        name: kind for name, kind in scale_kinds.items() if name in kernel.arg_names
    }
    constants = constants | {"MAX_VALUE": 127.0 if dtype == "*i8" else 448.0, "E8M0": False}
    if "ACTIVATION" in kernel.arg_names:
        constants["ACTIVATION"] = "silu"
    return kinds, constants


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("capability", "dtype"), [(90, "*fp8e4nv"), (80, "*i8")])
def test_input_quant_kernels_compile_without_spills(
    name: str, capability: int, dtype: str, tmp_path: Path
) -> None:
    kernel, pointers, constants, warps = KERNELS[name]
    if dtype == "*i8" and constants["GROUP"]:
        pytest.skip("int8 inputs have no groups")
    kinds, constants = typed_arguments(kernel, pointers, constants, dtype)
    compiled = compiled_for(capability, kernel, kinds, constants, tmp_path, num_warps=warps)
    assert compiled.stack_bytes == 0
    assert compiled.shared_bytes <= 32 * 1024
