"""Small floats in Triton: E2M1 (FP4), e4m3 (FP8) and e8m0 (powers of two), from their bits."""

from __future__ import annotations

from llmkit.kernels.triton_support import jit, tl

E4M3_DIVISOR = 256  # `e4m3_times_2_to_minus_8` gives values that are so much smaller


@jit
def e4m3_times_2_to_minus_8(bits: tl.tensor) -> tl.tensor:
    """The values of e4m3 bits, int16, divided by 256, as float16, exactly; NaN is not kept.

    With its exponent and mantissa in the upper bits of those of a float16, a value is 2^8 times
    smaller, because the biases of the exponents are 7 and 15.
    """
    half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    return half.to(tl.float16, bitcast=True)


@jit
def e2m1(code: tl.tensor) -> tl.tensor:
    """The values of 4-bit floats, int32, as float32: sign, two bits of exponent, one of mantissa.

    In the upper bits of a float16's exponent and mantissa, a value is 2^14 times smaller.
    """
    half = ((code & 8) << 12) | ((code & 7) << 9)
    return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0


@jit
def scale_of_byte(byte: tl.tensor, SCALES: tl.constexpr) -> tl.tensor:
    """Scales in a byte as float32: "e8m0", of which 2^-127 counts as 0, or "e4m3" / 256."""
    if SCALES == "e8m0":
        scale = (byte.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    else:
        scale = e4m3_times_2_to_minus_8(byte.to(tl.int16)).to(tl.float32)
    return scale
