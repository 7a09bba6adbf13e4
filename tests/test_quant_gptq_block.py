"""GPTQ's inner loop: the reference against a plain loop, the Triton kernel against the reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gptq_blocks import CASES, FP8, Block, Case, Result, assert_same, copied, rounding_block
from triton_checks import HOPPER_SHARED_BYTES, compiled_for_hopper, interpreted

from llmkit.quant import gptq_block as gptq
from llmkit.quant.gptq_block import quantize_block, quantize_block_reference

TOPS = [15, 255, 0]


def plain_loop(
    weight: torch.Tensor, factor: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, top: int
) -> Result:
    """The same in float64, as the definition has it."""
    weight, factor, scales, zeros = (t.double() for t in (weight, factor, scales, zeros))
    steps, errors = torch.empty_like(weight), torch.empty_like(weight)
    for i in range(len(weight)):
        value = weight[i] - sum((factor[j, i] * errors[j] for j in range(i)), torch.zeros_like(weight[i]))
        if top:
            steps[i] = ((value / scales[i]).round() + zeros[i]).clamp(0, top)
        else:
            steps[i] = (value / scales[i]).float().clamp(-448, 448).to(FP8).double()
        errors[i] = (value - (steps[i] - zeros[i]) * scales[i]) / factor[i, i]
    return steps.float(), errors.float()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_the_reference_equals_a_plain_float64_loop(case: Case) -> None:
    block = case.block()
    result = quantize_block(*copied(block))
    assert_same(result, plain_loop(*block))
    if case.columns > 1:  # the errors are indeed passed on
        nearest = plain_loop(block[0], torch.diag(block[1].diagonal()), *block[2:])
        assert (result[0] != nearest[0]).float().mean() > 0.1


@pytest.fixture(scope="module")
def on_triton(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    """What the Triton kernel makes of every case, then of every `rounding_block`."""
    blocks: list[Block] = [case.block() for case in CASES] + [rounding_block(top) for top in TOPS]
    folder = tmp_path_factory.mktemp("interpreted")
    return interpreted("llmkit.quant.gptq_block", "quantize_block_triton", list(map(copied, blocks)), folder)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_the_kernel_equals_the_reference(case: Case, on_triton: list[Result]) -> None:
    assert_same(on_triton[CASES.index(case)], quantize_block_reference(*case.block()))


@pytest.mark.parametrize("top", TOPS)
def test_the_kernel_rounds_as_torch_does(top: int, on_triton: list[Result]) -> None:
    steps, errors = on_triton[len(CASES) + TOPS.index(top)]
    expected_steps, expected_errors = quantize_block_reference(*rounding_block(top))
    assert torch.equal(steps, expected_steps)
    assert torch.equal(errors, expected_errors)


@pytest.mark.parametrize("top", TOPS)
def test_the_kernel_compiles_for_hopper(top: int, tmp_path: Path) -> None:
    tensors = ("weight", "columns", "scales", "zeros", "steps", "errors")
    arguments = dict.fromkeys(tensors, "*fp32") | {"width": "i32"}
    constants = {"TOP": top, "B": 128, "PADDED": 128, "TILE": 32}
    compiled = compiled_for_hopper(gptq._quantize_block, arguments, constants, tmp_path)
    assert compiled.stack_bytes == 0
    assert compiled.shared_bytes <= HOPPER_SHARED_BYTES
