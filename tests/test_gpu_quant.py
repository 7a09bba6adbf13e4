"""On a CUDA device: quantizing gives what it gives on the CPU (`make gpu`)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gptq_blocks import CASES, Case, assert_same, copied, rounding_block
from tiny import tiny_checkpoint

from llmkit.checkpoint.progress import SilentProgress
from llmkit.quant.gptq_block import quantize_block, quantize_block_reference
from llmkit.quant.quantize import QuantizeOptions, quantize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

WIDE = [Case(128, 4096, 15), Case(128, 1000, 15, symmetric=False), Case(128, 1000, 0)]


@pytest.mark.parametrize("case", [*CASES, *WIDE], ids=lambda case: case.label)
def test_a_gptq_block_equals_that_of_the_cpu(case: Case) -> None:
    pytest.importorskip("triton")
    result = quantize_block(*copied(case.block(), "cuda"))
    assert all(tensor.is_cuda for tensor in result)
    assert_same(result, quantize_block_reference(*case.block()))


@pytest.mark.parametrize("top", [15, 255, 0])
def test_codes_are_rounded_as_on_the_cpu(top: int) -> None:
    steps, errors = quantize_block(*copied(rounding_block(top), "cuda"))
    expected_steps, expected_errors = quantize_block_reference(*rounding_block(top))
    assert torch.equal(steps.cpu(), expected_steps)
    torch.testing.assert_close(errors.cpu(), expected_errors)


@pytest.mark.parametrize("changes", [{}, {"bits": 8}, {"symmetric": False, "format": "compressed-tensors"}], ids=str)
def test_a_gptq_run_costs_what_it_costs_on_the_cpu(changes: dict[str, object], tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source")
    options = replace(QuantizeOptions("gptq", samples=4, seq_len=64, evaluate=False), **changes)
    errors: dict[str, dict[str, float]] = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        report = quantize(str(source), str(out), replace(options, device=device), SilentProgress())
        errors[device] = {entry["name"]: entry["error"] for entry in report["linears"]}
        assert report["fallbacks"] == []
    assert len(errors["cpu"]) == 8
    assert errors["cuda"] == pytest.approx(errors["cpu"], rel=0.02)
