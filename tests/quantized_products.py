"""Cases for products with quantized weights, shared by the tests under the interpreter and on a CUDA device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmkit.checkpoint.quantized import QuantizedWeight, Scheme
from llmkit.kernels.quantized_linear import GroupedProduct, RoundedProduct, finish, quantize_rows

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Case:
    bits: int
    group: int
    rows: int
    outputs: int
    columns: int
    symmetric: bool = True
    biased: bool = False
    dtype: torch.dtype = torch.float32
    splits: int = 1

    @property
    def label(self) -> str:
        flags = f"{'' if self.symmetric else '-zeros'}{'-bias' if self.biased else ''}"
        kind = str(self.dtype).removeprefix("torch.")
        form = f"w{self.bits}g{self.group}{flags}-{kind}-split{self.splits}"
        return f"{form}-{self.rows}x{self.outputs}x{self.columns}"

    def weight(self) -> QuantizedWeight:
        """Codes of the whole range; scales of several sizes; float16 scales, as GPTQ and AWQ have them."""
        top, size = 1 << self.bits, (self.outputs, Scheme(self.bits, self.group).groups(self.columns))
        generator = torch.Generator().manual_seed(self.bits * self.columns + self.rows)
        codes = torch.randint(0, top, (self.outputs, self.columns), generator=generator, dtype=torch.uint8)
        scales = (torch.rand(size, generator=generator) + 0.1).mul_(0.02).half()
        zeros = torch.full(size, top // 2, dtype=torch.uint8)
        if not self.symmetric:
            zeros = torch.randint(0, top, size, generator=generator, dtype=torch.uint8)
        return QuantizedWeight(codes, scales, zeros, Scheme(self.bits, self.group, self.symmetric))

    def inputs(self, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x, and the bias."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.rows, self.columns, generator=generator).to(self.dtype)
        bias = torch.randn(self.outputs, generator=generator.manual_seed(seed + 1)).to(self.dtype)
        return x, bias if self.biased else None

    def arguments(self) -> tuple[object, ...]:
        """Of `grouped`."""
        weight, (x, bias) = self.weight(), self.inputs()
        return x, weight.codes, weight.scales, weight.zeros, self.bits, self.group, bias, self.splits

    def expected(self, dense: torch.Tensor) -> torch.Tensor:
        """The product with a dense weight, in float64."""
        x, bias = self.inputs()
        return torch.nn.functional.linear(x.double(), dense.double(), None if bias is None else bias.double())


def grouped(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int, group: int,
    bias: torch.Tensor | None, splits: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The product twice, and the dense weight."""
    product = GroupedProduct(codes, scales, zeros, bits, group, bias)
    return product(x, splits), product(x, splits), product.dequantize(x.shape[1], torch.float32)


def rounded(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor | None
) -> torch.Tensor:
    return RoundedProduct(codes, scales, bias, scale)(x)


def rows(x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scales = quantize_rows(x, dtype, scale)
    return codes[: len(x)], scales


def finished(
    sums: torch.Tensor, count: int, dtype: torch.dtype, bias: torch.Tensor | None, row_scales: torch.Tensor | None,
    scales: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    return finish(sums, count, dtype, bias, row_scales, scales)


def assert_close(got: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
    """Within a share of the largest value."""
    assert got.isfinite().all()
    assert (got.double().cpu() - expected.cpu()).abs().max() <= limit * expected.abs().max()


def tried(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int, group: int,
    bias: torch.Tensor | None, splits: int,
) -> dict[tuple[int, ...], float | None]:  # fmt: skip
    """What tuning the product makes of each configuration, with a clock that knows no better: None if it is refused."""
    from llmkit.bench.tune import LIMITS, Trials
    from llmkit.kernels.quantized_linear import TILE

    product = GroupedProduct(codes, scales, zeros, bits, group, bias)
    expected = torch.nn.functional.linear(x.float(), product.dequantize(x.shape[1], torch.float32), bias)
    trials = Trials(TILE, lambda: product(x, splits), expected, LIMITS[x.dtype], lambda run: 1.0)
    trials.search()
    return trials.times
