"""GPTQ's inner loop: the reference against a plain loop, the kernel against the reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.gptq_blocks import (
    CASES,
    FP8,
    BlockArguments,
    BlockCase,
    BlockResult,
    assert_close_block,
    rounding_block,
    to_device,
)
from support.triton_checks import HOPPER_SHARED_BYTES, compiled_for_hopper, interpreted

from llmkit.quant import gptq_block as gptq
from llmkit.quant.gptq_block import (
    FP4_VALUES,
    FP8_VALUES,
    quantize_block,
    quantize_block_reference,
)

TOPS = [15, 255, FP8_VALUES, FP4_VALUES]


def nearest_fp4(number: float) -> float:
    """The nearest number of E2M1; between two, the one whose mantissa is even."""
    magnitudes = (0.0, 1.0, 2.0, 4.0, 0.5, 1.5, 3.0, 6.0)  # those with even mantissas first
    magnitude = min(magnitudes, key=lambda value: abs(abs(number) - value))
    return -magnitude if number < 0 else magnitude


def plain_loop(
    weight: torch.Tensor,
    factor: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    max_q: int,
) -> BlockResult:
    """The same in float64, as the definition has it."""
    weight, factor, scales, zeros = (t.double() for t in (weight, factor, scales, zeros))
    steps = torch.empty_like(weight)
    errors = torch.empty_like(weight)
    for i in range(len(weight)):
        value = weight[i] - sum(
            (factor[j, i] * errors[j] for j in range(i)), torch.zeros_like(weight[i])
        )
        if max_q > 0:
            steps[i] = ((value / scales[i]).round() + zeros[i]).clamp(0, max_q)
        elif max_q == FP4_VALUES:
            numbers = (value / scales[i]).tolist()
            steps[i] = torch.tensor([nearest_fp4(number) for number in numbers])
        else:
            steps[i] = (value / scales[i]).float().clamp(-448, 448).to(FP8).double()
        errors[i] = (value - (steps[i] - zeros[i]) * scales[i]) / factor[i, i]
    return steps.float(), errors.float()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_quantize_block_reference_equals_a_plain_float64_loop(case: BlockCase) -> None:
    block = case.block()
    result = quantize_block(*to_device(block))
    assert_close_block(result, plain_loop(*block))
    if case.columns > 1:  # the errors are indeed passed on
        nearest = plain_loop(block[0], torch.diag(block[1].diagonal()), *block[2:])
        assert (result[0] != nearest[0]).float().mean() > 0.1


@pytest.fixture(scope="module")
def triton_results(tmp_path_factory: pytest.TempPathFactory) -> list[BlockResult]:
    """What the Triton kernel makes of every case, then of every `rounding_block`."""
    blocks: list[BlockArguments] = [case.block() for case in CASES] + [
        rounding_block(max_q) for max_q in TOPS
    ]
    folder = tmp_path_factory.mktemp("interpreted")
    return interpreted(
        "llmkit.quant.gptq_block", "quantize_block_triton", list(map(to_device, blocks)), folder
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_quantize_block_triton_equals_the_reference(
    case: BlockCase, triton_results: list[BlockResult]
) -> None:
    assert_close_block(triton_results[CASES.index(case)], quantize_block_reference(*case.block()))


@pytest.mark.parametrize("max_q", TOPS)
def test_quantize_block_triton_rounds_as_torch_does(
    max_q: int, triton_results: list[BlockResult]
) -> None:
    steps, errors = triton_results[len(CASES) + TOPS.index(max_q)]
    expected_steps, expected_errors = quantize_block_reference(*rounding_block(max_q))
    assert torch.equal(steps, expected_steps)
    assert torch.equal(errors, expected_errors)


@pytest.mark.parametrize("max_q", TOPS)
def test_quantize_block_triton_compiles_for_hopper(max_q: int, tmp_path: Path) -> None:
    tensors = ("weight", "hinv", "scales", "zeros", "q", "errors")
    arguments = dict.fromkeys(tensors, "*fp32") | {"outputs": "i32"}
    constants = {"MAX_Q": max_q, "B": 128, "PADDED": 128, "TILE": 32}
    compiled = compiled_for_hopper(gptq._quantize_block, arguments, constants, tmp_path)
    assert compiled.stack_bytes == 0
    assert compiled.shared_bytes <= HOPPER_SHARED_BYTES
