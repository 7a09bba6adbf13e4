"""Blocks for GPTQ's inner loop, shared by the tests on the CPU and on a CUDA device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmkit.checkpoint.quantized_weight import FP4_VALUES

FP8 = torch.float8_e4m3fn
# The arguments of `quantize_block`.
BlockArguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]
# Its quantized values and errors.
BlockResult = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class BlockCase:
    columns: int
    width: int
    max_q: int  # 15, 255, 0 for FP8, or -1 for FP4
    symmetric: bool = True

    @property
    def label(self) -> str:
        symmetry = "" if self.symmetric else "-asymmetric"
        return f"{self.columns}x{self.width}-max_q{self.max_q}{symmetry}"

    def block(self, seed: int = 0, group: int = 16) -> BlockArguments:
        """Weights with correlated inputs, on grids that cut off a little of their range."""
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(4 * self.columns, self.columns, generator=generator)
        inputs = (
            inputs
            @ torch.randn(self.columns, self.columns, generator=generator)
            / self.columns**0.5
            + inputs
        )
        hessian = (inputs.T @ inputs).double() / len(inputs)
        hessian += torch.eye(self.columns) * 0.01 * hessian.diagonal().mean()
        # The block is not contiguous where GPTQ takes it out of the whole factor.
        whole = torch.zeros(self.columns, self.columns + 3)
        whole[:, 1:-2] = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).float()
        factor = whole[:, 1:-2]
        weight = torch.randn(self.columns, self.width, generator=generator) * 0.05
        groups = torch.arange(self.columns) // group
        shape = (int(groups[-1]) + 1, self.width)
        largest = torch.rand(shape, generator=generator) * 0.05 + 0.1
        if self.max_q <= 0:
            scales = (largest / (448 if self.max_q == 0 else 6))[groups]
            return weight, factor, scales, torch.zeros_like(weight), self.max_q
        middle = torch.full(shape, (self.max_q + 1) / 2)
        if not self.symmetric:
            middle = torch.randint(0, self.max_q + 1, shape, generator=generator).float()
        return weight, factor, (2 * largest / self.max_q)[groups], middle[groups], self.max_q


CASES = [
    BlockCase(128, 40, 15),
    BlockCase(70, 33, 15, symmetric=False),
    BlockCase(37, 70, 255),
    BlockCase(64, 32, 255, symmetric=False),
    BlockCase(96, 45, 0),
    BlockCase(48, 41, -1),
    BlockCase(1, 5, 15),
]


def rounding_block(max_q: int) -> BlockArguments:
    """One column with scale 1: values on, between and just beside the grid, beyond it, and tiny."""
    if max_q > 0:
        grid = torch.arange(-300, 300).float()
    elif max_q == -1:
        grid = torch.tensor([*(-value for value in FP4_VALUES[:0:-1]), *FP4_VALUES])
    else:
        grid = torch.arange(256, dtype=torch.uint8).view(FP8).float()
        grid = grid[grid.isfinite()].sort().values
    between = (grid[1:] + grid[:-1]) / 2
    exact = torch.cat(
        (
            grid,
            between,
            torch.tensor([0.0, 1e-30, -1e-12, 448.1, 464.0, 1e4, -3e7, 1e30, -1e38]),
        )
    )
    beside = [torch.nextafter(exact, torch.tensor(towards)) for towards in (-torch.inf, torch.inf)]
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randn(4096, generator=generator) * torch.exp2(
        torch.rand(4096, generator=generator) * 24 - 12
    )
    values = torch.cat((exact, *beside, sizes))[None]
    zeros = torch.full_like(values, (max_q + 1) // 2 if max_q > 0 else 0)
    return values, torch.ones(1, 1), torch.ones_like(values), zeros, max_q


def to_device(block: BlockArguments, device: str = "cpu") -> BlockArguments:
    """The block's own tensors are used up by a call."""
    weight, factor, scales, zeros, max_q = block
    weight = weight.to(device, copy=True)
    return weight, factor.to(device), scales.to(device), zeros.to(device), max_q


def assert_close_block(result: BlockResult, expected: BlockResult) -> None:
    """Almost all values are equal.

    Round-off may turn a value that lies between two; all after it in that output may then differ.
    """
    (steps, errors), (expected_steps, expected_errors) = (
        [t.cpu() for t in pair] for pair in (result, expected)
    )
    same = (steps == expected_steps).all(0)
    assert same.float().mean() >= 0.98
    assert (steps == expected_steps).float().mean() >= 0.999
    limit = expected_errors.abs().max().item()
    torch.testing.assert_close(
        errors[:, same], expected_errors[:, same], rtol=1e-3, atol=1e-4 * limit
    )
