"""Cases for quantized linear layers, for the interpreter and for a CUDA device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmkit.checkpoint.quantized_weight import QuantizedWeight, Scheme
from llmkit.kernels import quantized_linear
from llmkit.kernels.input_quant import InputQuant, quantize_input
from llmkit.kernels.quantized_linear import WeightOnlyLinear
from llmkit.kernels.w8a8_linear import W8A8Linear

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
    major: int = 9  # of the GPU's compute capability
    num_cores: int = 132  # multiprocessors of the GPU

    @property
    def label(self) -> str:
        flags = f"{'' if self.symmetric else '-zeros'}{'-bias' if self.biased else ''}"
        kind = str(self.dtype).removeprefix("torch.")
        form = f"w{self.bits}g{self.group}{flags}-{kind}-split{self.splits}"
        older = "" if self.major == 9 else f"-sm{self.major}"
        smaller = "" if self.num_cores == 132 else f"-cores{self.num_cores}"
        return f"{form}-{self.rows}x{self.outputs}x{self.columns}{older}{smaller}"

    def weight(self) -> QuantizedWeight:
        """All quantized values; scales of several sizes, in float16 as in GPTQ and AWQ."""
        top = 1 << self.bits
        size = (self.outputs, Scheme(self.bits, self.group).groups(self.columns))
        generator = torch.Generator().manual_seed(self.bits * self.columns + self.rows)
        q = torch.randint(
            0, top, (self.outputs, self.columns), generator=generator, dtype=torch.uint8
        )
        scales = (torch.rand(size, generator=generator) + 0.1).mul_(0.02).half()
        zeros = torch.full(size, top // 2, dtype=torch.uint8)
        if not self.symmetric:
            zeros = torch.randint(0, top, size, generator=generator, dtype=torch.uint8)
        return QuantizedWeight(q, scales, zeros, Scheme(self.bits, self.group, self.symmetric))

    def inputs(self, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x, and the bias."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.rows, self.columns, generator=generator).to(self.dtype)
        bias = torch.randn(self.outputs, generator=generator.manual_seed(seed + 1)).to(self.dtype)
        return x, bias if self.biased else None

    def arguments(self) -> tuple[object, ...]:
        """Of `run_weight_only_linear`."""
        weight, (x, bias) = self.weight(), self.inputs()
        return (
            x,
            weight.q,
            weight.scales,
            weight.zeros,
            self.bits,
            self.group,
            bias,
            self.splits,
            self.major,
            self.num_cores,
        )

    def expected(self, dense: torch.Tensor) -> torch.Tensor:
        """The product with a dense weight, in float64."""
        x, bias = self.inputs()
        return torch.nn.functional.linear(
            x.double(), dense.double(), None if bias is None else bias.double()
        )


def run_weight_only_linear(
    x: torch.Tensor,
    q: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bits: int,
    group: int,
    bias: torch.Tensor | None,
    splits: int,
    major: int = 9,
    num_cores: int = 132,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The product twice, and the dense weight. major, num_cores: of the GPU that has the tiles."""
    quantized_linear.gpu_major = lambda _: major
    quantized_linear.gpu_cores = lambda _: num_cores
    product = WeightOnlyLinear(q, scales, zeros, bits, group, bias)
    return product(x, splits), product(x, splits), product.dequantize(x.shape[1], torch.float32)


def run_w8a8_linear(
    x: torch.Tensor,
    q: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    row_scaling: bool,
) -> torch.Tensor:
    return W8A8Linear(q, scales, bias, scale, row_scaling=row_scaling)(x)


def run_quantize_rows(
    x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    got = quantize_input(x, InputQuant(dtype, scale=scale))
    return got.values[: len(x)], got.scales[: len(x)]


def assert_close(got: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
    """Within a share of the largest value."""
    assert got.isfinite().all()
    assert (got.double().cpu() - expected.cpu()).abs().max() <= limit * expected.abs().max()


def measure_configs(
    x: torch.Tensor,
    q: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bits: int,
    group: int,
    bias: torch.Tensor | None,
    splits: int,
    major: int,
    num_cores: int,
) -> dict[tuple[int, ...], float | None]:
    """The times by configuration that the tuner finds, with a clock that always says 1.

    None for a configuration that is refused. major, num_cores: of the GPU that has the tiles.
    """
    from llmkit.bench.gpu.tune_kernels import MAX_ERRORS, ConfigSearch
    from llmkit.kernels.quantized_linear import TILE

    quantized_linear.gpu_major = lambda _: major
    quantized_linear.gpu_cores = lambda _: num_cores
    product = WeightOnlyLinear(q, scales, zeros, bits, group, bias)
    expected = torch.nn.functional.linear(
        x.float(), product.dequantize(x.shape[1], torch.float32), bias
    )
    trials = ConfigSearch(
        TILE, lambda: product(x, splits), expected, MAX_ERRORS[x.dtype], lambda run: 1.0
    )
    trials.search()
    return trials.times
