"""The small Triton kernels against torch: by the interpreter, and compiled for Hopper."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from triton_checks import compiled_for_hopper, interpreted

from llmkit.kernels import elementwise
from llmkit.kernels.activation import gated
from llmkit.kernels.rope import rotate_


def turned(tokens: int, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.rand(tokens, 1, half, generator=torch.Generator().manual_seed(half)) * 6
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def test_rotation(tmp_path: Path) -> None:
    """Of the first heads of a wider row, whole or in part; the other dimensions and heads stay."""
    sizes = [(6, 64, 32), (4, 80, 40), (5, 128, 16), (3, 16, 4)]
    cases = [(size, dtype) for size in sizes for dtype in (torch.float32, torch.float16)]
    wide = [
        torch.randn(7, heads + 2, dim, generator=torch.Generator().manual_seed(1)).to(dtype)
        for (heads, dim, _), dtype in cases
    ]
    calls = [(x.clone()[:, :heads], *turned(7, half)) for x, ((heads, _, half), _) in zip(wide, cases, strict=True)]
    results = interpreted("test_kernels_elementwise", "rotated", calls, tmp_path)
    for x, ((heads, _, half), dtype), got in zip(wide, cases, results, strict=True):
        expected = x.clone()
        with torch.enable_grad():  # torch's own form
            rotate_(expected[:, :heads], *turned(7, half))
        torch.testing.assert_close(got, expected, rtol=1e-3 if dtype == torch.float16 else 1e-6, atol=1e-6)
        assert torch.equal(got[:, heads:], x[:, heads:])


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """What is left of the whole storage after the first heads of it were rotated."""
    elementwise.rotate(x, cos, sin)
    return x.as_strided((x.shape[0], x.stride(0) // x.shape[2], x.shape[2]), (x.stride(0), x.shape[2], 1), 0)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_activation(activation: str, tmp_path: Path) -> None:
    calls = [
        (torch.randn(rows, 2 * size, generator=torch.Generator().manual_seed(2)).to(dtype) * 4, activation != "silu")
        for rows, size in ((1, 1536), (5, 100), (3, 2048))
        for dtype in (torch.float32, torch.float16)
    ]
    calls[0][0][0, :3] = torch.tensor([90.0, -90.0, 0.0])
    for (x, _), got in zip(calls, interpreted("llmkit.kernels.elementwise", "gate", calls, tmp_path), strict=True):
        with torch.enable_grad():  # torch's own form
            expected = gated(x.float(), activation).to(x.dtype)  # type: ignore[arg-type]
        torch.testing.assert_close(got, expected, rtol=2e-3 if x.dtype == torch.float16 else 1e-5, atol=1e-5)


def test_both_compile_for_hopper(tmp_path: Path) -> None:
    rotate = {"x": "*bf16", "cos": "*fp32", "sin": "*fp32", "stride": "i32", "heads": "i32"}
    sizes = {"DIM": 128, "HALF": 64, "PADDED": 64, "HEADS": 64}
    assert compiled_for_hopper(elementwise._rotate, rotate, sizes, tmp_path).stack_bytes == 0
    gate = {"x": "*bf16", "y": "*bf16", "size": "i32"}
    for gelu in (False, True):
        used = compiled_for_hopper(elementwise._gate, gate, {"GELU": gelu, "TILE": 1024}, tmp_path)
        assert used.stack_bytes == 0
