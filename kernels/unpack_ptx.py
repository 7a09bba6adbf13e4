"""Inline PTX that turns packed 4- and 8-bit weights into pairs of 16-bit floats.

A register holds two neighbouring words of 16 bits. One `lop3` isolates a field of both and writes
it into the lowest mantissa bits of a power of two: that is the power plus the field's value, times
the field's place. One multiply-add of two halves then subtracts the power and the zero point, which
is exact: no integer is converted.
"""

from __future__ import annotations

import math

import torch

# lop3's last operand is the table of a function of three bits.
AND_OR = "0xea"  # (a & b) | c
NOT_AND_OR = "0xae"  # (~a & b) | c


def field_offsets(bits: int, dtype: torch.dtype) -> list[float]:
    """What each field's floats are above q, before the zero point is subtracted as well."""
    if dtype == torch.bfloat16:
        return [128.0] * 4 if bits == 4 else [-128.0] * 2
    return [1024.0, 64.0] * 2 if bits == 4 else [1024.0] * 2


def raw_powers(dtype: torch.dtype) -> list[float]:
    """What each field's floats of `unpack_raw_ptx` are above q.

    A smaller power loses less when the products with it are subtracted. The first field of bfloat16
    has the only place in the mantissa that it reaches without a shift.
    """
    return [128.0, 16.0, 16.0, 16.0] if dtype == torch.bfloat16 else [256.0, 16.0, 256.0, 16.0]


def unpack_raw_ptx(dtype: torch.dtype) -> tuple[str, ...]:
    """For each field of 4 bits: PTX from two words to q of both, plus the field of `raw_powers`.

    The operands are the result and the words. The mantissa of float16 holds two fields, which share
    a shift; that of bfloat16 has 7 bits.
    """
    mantissa_bits = 7 if dtype == torch.bfloat16 else 10
    texts = []
    for field, power in enumerate(raw_powers(dtype)):
        place = mantissa_bits - int(math.log2(power))  # of the field in the mantissa
        shift = 4 * field - place
        lines = [".reg .b32 words;"]
        source = "$1"
        if shift:
            move = "shr.u32" if shift > 0 else "shl.b32"
            lines.append(f"{move} words, $1, {abs(shift)};")
            source = "words"
        mask = f"0x{(15 << place) * 0x10001:08x}"
        lines.append(f"lop3.b32 $0, {source}, {mask}, {_pair(power, dtype)}, {AND_OR};")
        texts.append("{ " + " ".join(lines) + " }")
    return tuple(texts)


def unpack_ptx(bits: int, dtype: torch.dtype, symmetric: bool, scaled: bool) -> tuple[str, ...]:
    """For each field: PTX from two words to q - zero of both, in bfloat16 or float16.

    The operands are the result, the words, and unless `symmetric`: -(offset + zero), see
    `field_offsets`. If `scaled`, the result is (q - zero) * scale; the last two operands are the
    scale's rounded value and what is missing.
    """
    is_brain = dtype == torch.bfloat16
    fma = "fma.rn.bf16x2" if is_brain else "fma.rn.f16x2"
    texts = []
    for field, offset in enumerate(field_offsets(bits, dtype)):
        lines = [".reg .b32 words, values, factor, term, q;"]
        place, step = field * bits, 1.0
        if bits == 4 and not is_brain and field % 2:
            # The mantissa of float16 is wide enough for a field that is not moved to its end.
            place, step = place - 4, 0.0625
        source = "$1"
        if place:
            lines.append(f"shr.u32 words, $1, {place};")
            source = "words"
        mask = "00f0" if step < 1 else "000f" if bits == 4 else "007f" if is_brain else "00ff"
        power = "4300" if is_brain else "6400"
        lines.append(f"lop3.b32 values, {source}, 0x{mask * 2}, 0x{power * 2}, {AND_OR};")
        lines.append(f"mov.b32 factor, {_pair(step, dtype)};")
        if bits == 8 and is_brain:
            # The mantissa has 7 bits. The eighth decides whether 128 or 256 is subtracted, which
            # gives q - 128.
            lines.append(f"lop3.b32 term, {source}, 0x00800080, 0xc300c300, {NOT_AND_OR};")
            lines.append(f"{fma} values, values, factor, term;")
        if symmetric:
            lines.append(f"mov.b32 term, {_pair(-offset - 2.0 ** (bits - 1), dtype)};")
        term = "term" if symmetric else "$2"
        lines.append(f"{fma} q, values, factor, {term};")
        if symmetric and offset == -(2.0 ** (bits - 1)):
            lines[-2:] = ["mov.b32 q, values;"]  # nothing is left to subtract
        if scaled:
            high, low = ("$2", "$3") if symmetric else ("$3", "$4")
            lines.append(f"mov.b32 factor, {_pair(-0.0, dtype)};")
            lines.append(f"{fma} term, q, {low}, factor;")
            lines.append(f"{fma} $0, q, {high}, term;")
        else:
            lines.append("mov.b32 $0, q;")
        texts.append("{ " + " ".join(lines) + " }")
    return tuple(texts)


def unpack_fp4_ptx(dtype: torch.dtype, scaled: bool) -> tuple[str, ...]:
    """For each field of 4 bits: PTX from two words to the values of both codes of E2M1.

    The operands are the result, the words, and if `scaled` the scales, which the values are
    multiplied with.
    A code's exponent and mantissa become the upper bits of those of a wider float, whose exponent
    has another bias: one multiplication mends that, exactly, also of subnormal numbers.
    """
    is_brain = dtype == torch.bfloat16
    fma = "fma.rn.bf16x2" if is_brain else "fma.rn.f16x2"
    mask = "01c0" if is_brain else "0e00"
    texts = []
    for field in range(4):
        lines = [".reg .b32 top, sign, size, factor, zero, q;"]
        source = "$1"
        if field < 3:  # the code to the top of its half
            lines.append(f"shl.b32 top, $1, {12 - 4 * field};")
            source = "top"
        lines += [
            "mov.b32 zero, 0x00000000;",
            f"lop3.b32 sign, {source}, 0x80008000, zero, {AND_OR};",
            f"shr.u32 size, {source}, {6 if is_brain else 3};",
            f"lop3.b32 q, size, 0x{mask * 2}, sign, {AND_OR};",
            f"mov.b32 factor, {_pair(2.0**126 if is_brain else 2.0**14, dtype)};",
            f"mov.b32 zero, {_pair(-0.0, dtype)};",
            f"{fma} q, q, factor, zero;",
        ]
        if scaled:
            lines.append(f"{fma} q, q, $2, zero;")
        lines.append("mov.b32 $0, q;")
        texts.append("{ " + " ".join(lines) + " }")
    return tuple(texts)


def _pair(value: float, dtype: torch.dtype) -> str:
    """A register with a number in both halves."""
    pattern = int(torch.tensor(value, dtype=dtype).view(torch.int16).item()) & 0xFFFF
    return f"0x{pattern:04x}{pattern:04x}"
