"""The compiled gated MLP against its three operations, at every level of instructions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.cpu_levels import computing_at

from llmkit.checkpoint.quantized_weight import Scheme
from llmkit.kernels.cpu import cpu_kernels
from llmkit.kernels.cpu.cpu_kernels import InputType, PackedWeight
from llmkit.kernels.cpu.cpu_linear import CpuLinear
from llmkit.kernels.cpu.cpu_mlp import CpuMlp
from llmkit.model.linear import pack_weight
from llmkit.quant.grid import round_to_nearest

pytestmark = pytest.mark.skipif(
    cpu_kernels.library is None, reason=f"compiled kernels: {cpu_kernels.status()}"
)
SWIGLU = 3.0, 1.7
HIDDEN = 96
TOKENS = 229  # two blocks of rows of the AMX kernel, the last with a part of a tile


@pytest.fixture(autouse=True, params=cpu_kernels.levels() or ["none"])
def level(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run each test at every level that this processor has."""
    with computing_at(request.param), torch.inference_mode():
        yield


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


WEIGHTS: dict[str, tuple[Scheme | torch.dtype | None, InputType]] = {
    "float32": (torch.float32, "float32"),
    "bfloat16": (torch.bfloat16, "bfloat16"),
    "bfloat16, float32": (torch.bfloat16, "float32"),
    "float16": (torch.float16, "float32"),
    "int8": (Scheme(8), "float32"),
    "w8a8": (Scheme(8), "int8"),
    "int4": (Scheme(4, 32, symmetric=False), "float32"),
    "int4, int8": (Scheme(4, 32, symmetric=False), "int8"),
    "int4 symmetric, int8": (Scheme(4, 32), "int8"),
    "fp4, int8": (None, "int8"),
}


def mlp_linear(name: str, rows: int, columns: int, bias: bool, seed: int) -> CpuLinear:
    scheme, wanted = WEIGHTS[name]
    weight = random(rows, columns, seed=seed) / columns**0.5
    if scheme is None:
        codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
        packed = PackedWeight.pack(codes, weight[:, ::32].abs(), four_bit_type="fp4")
    elif isinstance(scheme, Scheme):
        packed = pack_weight(round_to_nearest(weight, scheme, torch.float32))
    else:
        packed = PackedWeight.pack(weight.to(scheme))
    return CpuLinear([packed], random(rows, seed=seed + 1) if bias else None, inputs=wanted)


def by_parts(gate_up: CpuLinear, down: CpuLinear, x: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "swiglu_clamped":
        return down(cpu_kernels.swiglu_clamped(gate_up(x), *SWIGLU))
    return down(cpu_kernels.act_and_mul(gate_up(x), activation))


@pytest.mark.parametrize("intermediate", [32, 160])
@pytest.mark.parametrize("name", WEIGHTS)
def test_cpu_mlp_has_the_bits_of_its_parts(name: str, intermediate: int) -> None:
    gate_up = mlp_linear(name, 2 * intermediate, HIDDEN, bias=intermediate == 32, seed=1)
    down = mlp_linear(name, HIDDEN, intermediate, bias=intermediate == 32, seed=2)
    mlp = CpuMlp(gate_up, down, "silu")
    x = random(TOKENS, HIDDEN + 32, seed=3)[:, :HIDDEN]  # rows have a distance
    y = mlp(x)
    for rows in (1, 2, 5, 40, TOKENS):
        assert torch.equal(mlp(x[:rows]), y[:rows]), rows
        assert torch.equal(by_parts(gate_up, down, x[:rows], "silu"), y[:rows]), rows


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu2", "swiglu_clamped"])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "w8a8"])
def test_cpu_mlp_with_other_activations(name: str, activation: str) -> None:
    gate_up = mlp_linear(name, 128, HIDDEN, bias=True, seed=1)
    down = mlp_linear(name, HIDDEN, 64, bias=False, seed=2)
    x = random(50, HIDDEN, seed=3) * 4
    mlp = CpuMlp(gate_up, down, activation, SWIGLU)
    assert torch.equal(mlp(x), by_parts(gate_up, down, x, activation))


def test_cpu_mlp_keeps_nan_in_its_row() -> None:
    gate_up = mlp_linear("bfloat16", 128, HIDDEN, bias=False, seed=1)
    mlp = CpuMlp(gate_up, mlp_linear("bfloat16", HIDDEN, 64, bias=False, seed=2), "silu")
    x = random(40, HIDDEN)
    clean = mlp(x)
    x[7, 3] = torch.nan
    y = mlp(x)
    assert y[7].isnan().all()
    y[7] = clean[7]
    assert torch.equal(y, clean)


def test_cpu_mlp_takes_whole_panels_of_one_weight() -> None:
    down = mlp_linear("float32", HIDDEN, 64, bias=False, seed=2)
    assert CpuMlp.supports(mlp_linear("float32", 128, HIDDEN, bias=False, seed=1), down)
    assert not CpuMlp.supports(mlp_linear("float32", 144, HIDDEN, bias=False, seed=1), down)
    half = PackedWeight.pack(random(64, HIDDEN))
    assert not CpuMlp.supports(CpuLinear([half, half]), down)
