"""The inline PTX of packed weights: the same function as plain arithmetic, for every word."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from llmkit.checkpoint.quantized_weight import FP4_VALUES
from llmkit.kernels.unpack_ptx import (
    field_offsets,
    raw_powers,
    unpack_fp4_ptx,
    unpack_ptx,
    unpack_raw_ptx,
)

FLOATS = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}
WORDS = np.arange(1 << 16, dtype=np.uint32)
# Each register holds two words, so that no half leaks into the other unnoticed.
PAIRS = WORDS | (WORDS * 40503 + 77 & 0xFFFF) << 16


def run_ptx(text: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run the few instructions that `unpack_ptx` uses on arrays of uint32 registers."""
    registers = dict(inputs)
    statements = [part.strip() for part in text.strip("{} ").split(";") if part.strip()]
    declared = set(re.findall(r"\w+", statements[0].removeprefix(".reg .b32")))
    for statement in statements[1:]:
        name, rest = statement.split(" ", 1)
        target, *operands = [part.strip() for part in rest.split(",")]
        values = [
            registers[operand] if operand in registers else np.uint32(int(operand, 0))
            for operand in operands
        ]
        assert target.startswith("$") or target in declared
        if name == "mov.b32":
            registers[target] = np.broadcast_to(values[0], PAIRS.shape)
        elif name == "shl.b32":
            registers[target] = values[0] << values[1]
        elif name == "shr.u32":
            registers[target] = values[0] >> values[1]
        elif name == "lop3.b32":
            registers[target] = lop3(*values)
        else:
            registers[target] = multiply_add(FLOATS[name.removeprefix("fma.rn.")], values)
    return registers


def lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Bit i of the table is the result where the bits of a, b and c spell i."""
    result = np.zeros(PAIRS.shape, np.uint32)
    for index in range(8):
        if int(table) >> index & 1:
            parts = [v if index >> place & 1 else ~v for v, place in ((a, 2), (b, 1), (c, 0))]
            result |= parts[0] & parts[1] & parts[2]
    return result


def halves(registers: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """[N, 2]: the two numbers in each register."""
    flat = np.ascontiguousarray(np.broadcast_to(registers, PAIRS.shape)).view(np.int16)
    return torch.from_numpy(flat.copy()).view(dtype).view(-1, 2)


def multiply_add(dtype: torch.dtype, values: list[np.ndarray]) -> np.ndarray:
    """a * b + c of both halves, rounded once."""
    a, b, c = (halves(value, dtype).double() for value in values)
    return (a * b + c).to(dtype).view(torch.int16).numpy().view(np.uint32).reshape(-1)


def register(value: torch.Tensor) -> np.ndarray:
    """A register with a number in both halves."""
    return value.repeat(2).view(torch.int16).numpy().view(np.uint32)


def fields(bits: int) -> list[torch.Tensor]:
    """[N, 2] for each field: the integers in both words of `PAIRS`."""
    words = torch.from_numpy(PAIRS.view(np.uint16).astype(np.int32)).view(-1, 2)
    return [(words >> place & (1 << bits) - 1).double() for place in range(0, 16, bits)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
def test_unpack_ptx_is_exact_for_every_word(bits: int, dtype: torch.dtype) -> None:
    for q, text, with_zeros, offset in zip(
        fields(bits),
        unpack_ptx(bits, dtype, symmetric=True, scaled=False),
        unpack_ptx(bits, dtype, symmetric=False, scaled=False),
        field_offsets(bits, dtype),
        strict=True,
    ):
        got = run_ptx(text, {"$1": PAIRS})["$0"]
        assert torch.equal(halves(got, dtype).double(), q - (1 << bits - 1))
        for zero in (0, 3, (1 << bits) - 1):
            term = torch.tensor(-offset - zero, dtype=dtype)
            assert float(term) == -offset - zero  # so that nothing is lost before the subtraction
            got = run_ptx(with_zeros, {"$1": PAIRS, "$2": register(term)})["$0"]
            assert torch.equal(halves(got, dtype).double(), q - zero)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_unpack_raw_ptx_is_exact_for_every_word(dtype: torch.dtype) -> None:
    for q, text, power in zip(fields(4), unpack_raw_ptx(dtype), raw_powers(dtype), strict=True):
        got = run_ptx(text, {"$1": PAIRS})["$0"]
        assert torch.equal(halves(got, dtype).double(), q + power)
        # What the kernel adds to the sums is exact, too.
        assert float(torch.tensor(-power - 8, dtype=dtype)) == -power - 8


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_unpack_ptx_rounds_scaled_weights_once(dtype: torch.dtype, symmetric: bool) -> None:
    texts = unpack_ptx(4, dtype, symmetric, scaled=True)
    for q, text, offset in zip(fields(4), texts, field_offsets(4, dtype), strict=True):
        scale = 0.0996
        high = torch.tensor(scale).to(dtype)
        low = (scale - high.double()).to(dtype)
        zero = 8 if symmetric else 3
        terms = [] if symmetric else [torch.tensor(-offset - zero, dtype=dtype)]
        operands = map(register, (*terms, high, low))
        inputs = {f"${index}": operand for index, operand in enumerate(operands, 2)}
        got = halves(run_ptx(text, {"$1": PAIRS, **inputs})["$0"], dtype)
        exact = ((q - zero) * scale).to(dtype)
        assert torch.equal(got, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_unpack_fp4_ptx_is_exact_for_every_word(dtype: torch.dtype) -> None:
    values = torch.tensor(FP4_VALUES, dtype=torch.float64)
    values = torch.cat((values, -values))
    scale = torch.tensor(1.625, dtype=dtype)  # e4m3; products have at most 6 digits
    plain, scaled = (unpack_fp4_ptx(dtype, has_scales) for has_scales in (False, True))
    for q, text, scaled_text in zip(fields(4), plain, scaled, strict=True):
        got = run_ptx(text, {"$1": PAIRS})["$0"]
        assert torch.equal(halves(got, dtype).double(), values[q.long()])
        got = run_ptx(scaled_text, {"$1": PAIRS, "$2": register(scale)})["$0"]
        assert torch.equal(halves(got, dtype).double(), values[q.long()] * 1.625)
