"""On a CUDA device: quantizing gives what it gives on the CPU (`make gpu`)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.gptq_blocks import CASES, BlockCase, assert_close_block, rounding_block, to_device
from support.tiny_models import tiny_checkpoint

from llmkit.common.progress import SilentProgress
from llmkit.quant.gptq_block import quantize_block, quantize_block_reference
from llmkit.quant.quantize_checkpoint import quantize
from llmkit.quant.quantize_options import QuantizeOptions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

WIDE = [
    BlockCase(128, 4096, 15),
    BlockCase(128, 1000, 15, symmetric=False),
    BlockCase(128, 1000, 0),
]


@pytest.mark.parametrize("case", [*CASES, *WIDE], ids=lambda case: case.label)
def test_quantize_block_on_cuda_equals_the_reference(case: BlockCase) -> None:
    pytest.importorskip("triton")
    result = quantize_block(*to_device(case.block(), "cuda"))
    assert all(tensor.is_cuda for tensor in result)
    assert_close_block(result, quantize_block_reference(*case.block()))


@pytest.mark.parametrize("max_q", [15, 255, 0])
def test_quantize_block_on_cuda_rounds_as_on_the_cpu(max_q: int) -> None:
    steps, errors = quantize_block(*to_device(rounding_block(max_q), "cuda"))
    expected_steps, expected_errors = quantize_block_reference(*rounding_block(max_q))
    assert torch.equal(steps.cpu(), expected_steps)
    torch.testing.assert_close(errors.cpu(), expected_errors)


@pytest.mark.parametrize(
    "changes", [{}, {"bits": 8}, {"symmetric": False, "format": "compressed-tensors"}], ids=str
)
def test_gptq_run_on_cuda_has_the_errors_of_the_cpu(
    changes: dict[str, object], tmp_path: Path
) -> None:
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


@pytest.mark.parametrize("changes", [{}, {"method": "auto", "scheme": "nvfp4"}], ids=str)
def test_learned_rounding_on_cuda_has_about_the_errors_of_the_cpu(
    changes: dict[str, object], tmp_path: Path
) -> None:
    source = tiny_checkpoint(tmp_path / "source")
    options = QuantizeOptions("gptq", samples=4, seq_len=64, evaluate=False, effort="high")
    options = replace(options, **changes)
    errors: dict[str, float] = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        report = quantize(str(source), str(out), replace(options, device=device), SilentProgress())
        errors[device] = sum(entry["error"] for entry in report["linears"])
        assert any("learned" in entry["method"] for entry in report["linears"])
    assert errors["cuda"] == pytest.approx(errors["cpu"], rel=0.1)
