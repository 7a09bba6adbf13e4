"""Weights in FP4 and FP8 whose groups have a scale of one byte: NVFP4, MXFP4 and MXFP8.

A group is 16 or 32 neighbours in a row. For W[out, in] with groups of g:

    FP4 values     uint8 [out, in/2]  two codes of E2M1 in a byte, the first in the low half
    FP8 values     e4m3 [out, in]
    group scales   uint8 [out, in/g]  MXFP4, MXFP8: e8m0, the power of two 2^(byte - 127)
                   e4m3 [out, in/g]   NVFP4: times the global scale
    global scale   float32            NVFP4: one number for the weight
    input scale    float32            NVFP4 inputs: one number for the scales of their groups

compressed-tensors and Model-Optimizer store these under different names (`MicroscalingLayout`).
Specifications: OCP Microscaling Formats 1.0; NVFP4 in NVIDIA's Transformer Engine and cuDNN.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from llmkit.checkpoint.quantized_weight import PackedTensor, QuantizedWeight, Scheme
from llmkit.checkpoint.stored_tensors import E8M0_NAN, check_stored
from llmkit.common.errors import InputError

E8M0_BIAS = 127
GROUP_SIZES = {"e8m0": 32, "e4m3": 16}
# How far a scale may be from the product of its two stored factors, in parts of the scale.
_ROUNDING_ERROR = 1e-6


def pack_fp4(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [..., n] codes below 16, n even, to uint8 [..., n/2]."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack_fp4(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [..., n/2] to uint8 [..., n] codes below 16."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def encode_e8m0(scales: torch.Tensor) -> torch.Tensor:
    """Powers of two as e8m0, uint8. Raises InputError for other numbers."""
    mantissa, exponent = torch.frexp(scales.float())  # scale = mantissa * 2^exponent
    encoded = exponent - 1 + E8M0_BIAS
    if bool(((mantissa != 0.5) | (encoded < 0) | (encoded >= E8M0_NAN)).any()):
        raise InputError("A scale does not fit into e8m0", "Powers of two from 2^-127 to 2^127")
    return encoded.to(torch.uint8)


def decode_e8m0(encoded: torch.Tensor) -> torch.Tensor:
    """The scales that e8m0 bytes stand for, float32. 255, which is no number, is checked before."""
    encoded = encoded.view(torch.uint8)
    ones = torch.ones_like(encoded, dtype=torch.float32)
    return torch.ldexp(ones, encoded.int() - E8M0_BIAS)


def encode_e4m3(scales: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """What the scales of groups are times `global_scale` [1], as e4m3.

    Raises InputError for scales that are no such products.
    """
    steps = (scales.float() / global_scale).to(torch.float8_e4m3fn)
    error = (steps.float() * global_scale - scales.float()).abs()
    if not bool((error <= scales.float().abs() * _ROUNDING_ERROR).all()):  # also for NaN
        raise InputError(
            "A scale does not fit into NVFP4",
            "Numbers of e4m3 times the weight's global scale were expected",
        )
    return steps


@dataclass(frozen=True)
class MicroscalingLayout:
    """How a format names and stores the tensors of such weights."""

    packed_weight: str  # FP4 values; FP8 values are called "weight"
    global_scale: str
    input_scale: str
    stores_inverse: bool  # whether the last two are stored as 1 / scale
    scalar_shape: tuple[int, ...]  # of the last two: () or (1,)

    def tensors(self, scheme: Scheme, out: int, in_: int) -> tuple[PackedTensor, ...]:
        """The stored tensors of an [out, in_] weight.

        Raises InputError for groups that do not divide the columns.
        """
        size = scheme.group_size
        if in_ % size:
            raise InputError(
                f"{scheme.label.partition(',')[0]} cannot store a [{out}, {in_}] weight",
                f"A multiple of {size} input features was expected",
            )
        if scheme.is_fp4:
            weight = PackedTensor(self.packed_weight, "U8", (out, in_ // 2), (0, 1), (1, 2))
        else:
            weight = PackedTensor("weight", "F8_E4M3", (out, in_), (0, 1), (1, 1))
        scale_type = "U8" if scheme.scale_format == "e8m0" else "F8_E4M3"
        scales = PackedTensor(
            "weight_scale",
            scale_type,
            (out, in_ // size),
            (0, 1),
            (1, size),
            scale="not negative",
        )
        return (
            weight,
            scales,
            *(
                PackedTensor(suffix, "F32", self.scalar_shape, None, None, scale="positive")
                for suffix in self._scalars(scheme)
            ),
        )

    def pack(self, scheme: Scheme, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """The stored tensors by suffix. Raises InputError for scales that do not fit."""
        if scheme.is_fp4:
            stored = {self.packed_weight: pack_fp4(weight.q)}
        else:
            stored = {"weight": weight.q.contiguous()}
        if scheme.scale_format == "e8m0":
            stored["weight_scale"] = encode_e8m0(weight.scales)
        else:
            assert weight.global_scale is not None
            stored["weight_scale"] = encode_e4m3(weight.scales, weight.global_scale)
            stored[self.global_scale] = self._stored_scalar(weight.global_scale)
        if scheme.has_input_scale and weight.input_scale is not None:
            stored[self.input_scale] = self._stored_scalar(weight.input_scale)
        return stored

    def unpack(self, scheme: Scheme, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """The weight from its stored tensors by suffix.

        Raises InputError as `check_stored`.
        """
        name = self.packed_weight if scheme.is_fp4 else "weight"
        values = tensors[name]
        if values.ndim != 2:
            raise InputError(f"{name} has shape {list(values.shape)}", "Two sizes were expected")
        out, columns = values.shape
        in_ = columns * 2 if scheme.is_fp4 else columns
        check_stored(self.tensors(scheme, out, in_), tensors)
        scalars = {suffix: self._read_scalar(tensors, suffix) for suffix in self._scalars(scheme)}
        global_scale = scalars.get(self.global_scale)
        if global_scale is None:
            scales = decode_e8m0(tensors["weight_scale"])
        else:
            scales = tensors["weight_scale"].float() * global_scale
        return QuantizedWeight(
            unpack_fp4(values) if scheme.is_fp4 else values,
            scales,
            torch.zeros(scales.shape, dtype=torch.uint8, device=scales.device),
            scheme,
            scalars.get(self.input_scale),
            global_scale,
        )

    def _scalars(self, scheme: Scheme) -> list[str]:
        """The suffixes of the scales that are one number."""
        suffixes = [self.global_scale] if scheme.scale_format == "e4m3" else []
        if scheme.has_input_scale:
            suffixes.append(self.input_scale)
        return suffixes

    def _stored_scalar(self, scale: torch.Tensor) -> torch.Tensor:
        # A scale that was read as 1 / x is stored as x again: rounding does not change it. Of other
        # scales, one of seven is the rounded inverse of no float32 number.
        stored = 1.0 / scale.float() if self.stores_inverse else scale.float()
        return stored.reshape(self.scalar_shape)

    def _read_scalar(self, tensors: Mapping[str, torch.Tensor], suffix: str) -> torch.Tensor:
        """A scale, float32 [1]."""
        stored = tensors[suffix].float().reshape(1)
        return 1.0 / stored if self.stores_inverse else stored
