"""The quantized types of GGUF files that are written: their blocks, as numbers and as bytes.

A row of a tensor is made of blocks. Each has its values, in `bits`, and a 16-bit scale d. The K
types have super-blocks of 256 values; their groups have scales (and minima) in 6 or 8 bits of their
own, which d (and dmin) are multiplied with.
(https://github.com/ggml-org/ggml, ggml-common.h)

Legend: `out` rows, `in` columns, B blocks of a row, G groups of a row.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch


@dataclass(frozen=True)
class GgufType:
    """A type of blocks. W = scale * (q - zero) - minimum, for the values q of a group."""

    name: str
    block: int  # values of a block
    group: int  # values that share a scale
    bits: int
    zero: int = 0
    has_min: bool = False
    # The largest scale of a group, in units of d; 0: groups have no scales of their own.
    max_scale: int = 0
    # The bytes of blocks, uint8 [out, B, bytes], of a weight and its values, uint8 [out, B, block].
    pack: Callable[[GgufBlocks, torch.Tensor], torch.Tensor] = lambda weight, q: q
    # The type of rows that are not made of whole blocks; "": float16.
    fallback: str = ""

    @property
    def max_q(self) -> int:
        """The largest value of q."""
        return (1 << self.bits) - 1

    @property
    def min_q(self) -> int:
        """The smallest value of q. That of 8 bits is not used, so that they are symmetric."""
        return 1 if self.bits == 8 else 0


@dataclass
class GgufBlocks:
    """A weight [out, in] in blocks of one type.

    q: uint8 [out, in]. d, d_min: float32 [out, B], multiples of float16; d_min is None for types
    without minima. scales, minima: int16 [out, G] in units of d and d_min; None where groups have
    none of their own.
    """

    type: GgufType
    q: torch.Tensor
    d: torch.Tensor
    d_min: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    minima: torch.Tensor | None = None

    @property
    def group_scales(self) -> torch.Tensor:
        """The scale of each group, float32 [out, G]."""
        return _of_groups(self.d, self.scales)

    @property
    def group_minima(self) -> torch.Tensor:
        """What is subtracted from each group, float32 [out, G]."""
        if self.d_min is None:
            return torch.zeros_like(self.group_scales)
        return _of_groups(self.d_min, self.minima)

    def dequantize(self) -> torch.Tensor:
        """The weight, float32 [out, in], bit by bit what readers compute."""
        groups: torch.Tensor = self.q.float().unflatten(1, (-1, self.type.group))
        groups.sub_(self.type.zero).mul_(self.group_scales.unsqueeze(2))
        if self.d_min is not None:
            groups.sub_(self.group_minima.unsqueeze(2))
        return groups.flatten(1)

    def with_values(self, q: torch.Tensor) -> GgufBlocks:
        """The same scales with other values, uint8 [out, in]."""
        return replace(self, q=q)

    def split(self, sizes: list[int]) -> list[GgufBlocks]:
        """The weights of consecutive rows, so many each."""
        ends = list(accumulate(sizes, initial=0))
        pieces = [slice(*pair) for pair in pairwise(ends)]
        return [self._map(operator.itemgetter(piece)) for piece in pieces]

    def to_bytes(self) -> torch.Tensor:
        """The stored bytes, uint8 [out, bytes of a row]."""
        blocks = self.q.unflatten(1, (-1, self.type.block))
        return self.type.pack(self, blocks).flatten(1)

    def to(self, device: torch.device | str) -> GgufBlocks:
        """The same weight on another device."""
        return self._map(lambda values: values.to(device))

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> GgufBlocks:
        """The weight with a function of each of its tensors."""
        optional = (self.d_min, self.scales, self.minima)
        mapped = [None if values is None else function(values) for values in optional]
        return GgufBlocks(self.type, function(self.q), function(self.d), *mapped)


def concatenate(parts: list[GgufBlocks]) -> GgufBlocks:
    """The weight whose rows are those of `parts`, which have one type."""

    def rows(name: str) -> torch.Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    first = parts[0]
    return GgufBlocks(
        first.type,
        torch.cat([part.q for part in parts]),
        torch.cat([part.d for part in parts]),
        rows("d_min"),
        rows("scales"),
        rows("minima"),
    )


def _of_groups(d: torch.Tensor, units: torch.Tensor | None) -> torch.Tensor:
    if units is None:
        return d
    by_block: torch.Tensor = units.unflatten(1, (d.shape[1], -1))
    return (by_block.float() * d.unsqueeze(2)).flatten(1)


def _half(values: torch.Tensor) -> torch.Tensor:
    """Two bytes [out, B, 2] of each value [out, B]."""
    return values.half().unsqueeze(2).contiguous().view(torch.uint8)


def _offset_half(weight: GgufBlocks) -> torch.Tensor:
    """The bytes of what Q4_1 and Q5_1 add to a block: less its minimum."""
    assert weight.d_min is not None
    return _half(-weight.d_min)


def _nibbles(q: torch.Tensor) -> torch.Tensor:
    """Bytes of the low 4 bits of both halves of the last dimension."""
    low, high = (q & 15).chunk(2, dim=-1)
    return low | high << 4


def _bits(values: torch.Tensor) -> torch.Tensor:
    """Bytes of 8 bits each, along the last dimension; the first is the lowest."""
    bits: torch.Tensor = values.unflatten(-1, (-1, 8))
    weights = 1 << torch.arange(8, device=values.device, dtype=torch.int32)
    return (bits.int() * weights).sum(-1).to(torch.uint8)


def _q4_0(weight: GgufBlocks, q: torch.Tensor) -> torch.Tensor:
    return torch.cat((_half(weight.d), _nibbles(q)), dim=2)


def _q4_1(weight: GgufBlocks, q: torch.Tensor) -> torch.Tensor:
    return torch.cat((_half(weight.d), _offset_half(weight), _nibbles(q)), dim=2)


def _q5_0(weight: GgufBlocks, q: torch.Tensor) -> torch.Tensor:
    return torch.cat((_half(weight.d), _bits(q >> 4), _nibbles(q)), dim=2)


def _q5_1(weight: GgufBlocks, q: torch.Tensor) -> torch.Tensor:
    return torch.cat((_half(weight.d), _offset_half(weight), _bits(q >> 4), _nibbles(q)), dim=2)


def _q8_0(weight: GgufBlocks, q: torch.Tensor) -> torch.Tensor:
    return torch.cat((_half(weight.d), q - 128), dim=2)  # uint8 wraps around, as int8 bits do


def _k_scales(weight: GgufBlocks, num_blocks: int) -> torch.Tensor:
    """12 bytes of 8 scales and 8 minima in 6 bits each, uint8 [out, B, 12].

    The first four of each have a byte, whose two highest bits are those of the last four.
    """
    assert weight.d_min is not None and weight.scales is not None and weight.minima is not None
    scales, minima = (
        units.to(torch.uint8).unflatten(1, (num_blocks, 8))
        for units in (weight.scales, weight.minima)
    )
    first_scales, last_scales = scales.chunk(2, dim=2)
    first_minima, last_minima = minima.chunk(2, dim=2)
    packed = torch.cat(
        (
            first_scales | (last_scales >> 4) << 6,
            first_minima | (last_minima >> 4) << 6,
            (last_scales & 15) | (last_minima & 15) << 4,
        ),
        dim=2,
    )
    return torch.cat((_half(weight.d), _half(weight.d_min), packed), dim=2)


def _k_nibbles(q: torch.Tensor) -> torch.Tensor:
    """128 bytes of the low 4 bits of 256 values; a byte has those of two neighbouring groups."""
    return _nibbles(q.unflatten(2, (4, 64))).flatten(2)


def _q4_k(weight: GgufBlocks, q: torch.Tensor) -> torch.Tensor:
    return torch.cat((_k_scales(weight, q.shape[1]), _k_nibbles(q)), dim=2)


def _q5_k(weight: GgufBlocks, q: torch.Tensor) -> torch.Tensor:
    # A byte has the fifth bit of one value of each group.
    high = _bits((q >> 4).unflatten(2, (8, 32)).transpose(2, 3)).flatten(2)
    return torch.cat((_k_scales(weight, q.shape[1]), high, _k_nibbles(q)), dim=2)


def _q6_k(weight: GgufBlocks, q: torch.Tensor) -> torch.Tensor:
    assert weight.scales is not None
    low = _nibbles(q.unflatten(2, (2, 128))).flatten(2)
    quarters = (q >> 4).unflatten(2, (2, 4, 32))
    first, second, third, fourth = quarters.unbind(3)
    high = first | second << 2 | third << 4 | fourth << 6
    scales = weight.scales.to(torch.int8).view(torch.uint8).unflatten(1, (q.shape[1], 16))
    return torch.cat((low, high.flatten(2), scales, _half(weight.d)), dim=2)


GGUF_TYPES = {
    row.name: row
    for row in (
        GgufType("Q4_0", 32, 32, 4, zero=8, pack=_q4_0),
        GgufType("Q4_1", 32, 32, 4, has_min=True, pack=_q4_1),
        GgufType("Q5_0", 32, 32, 5, zero=16, pack=_q5_0),
        GgufType("Q5_1", 32, 32, 5, has_min=True, pack=_q5_1),
        GgufType("Q8_0", 32, 32, 8, zero=128, pack=_q8_0),
        GgufType("Q4_K", 256, 32, 4, has_min=True, max_scale=63, pack=_q4_k, fallback="Q5_0"),
        GgufType("Q5_K", 256, 32, 5, has_min=True, max_scale=63, pack=_q5_k, fallback="Q5_1"),
        GgufType("Q6_K", 256, 16, 6, zero=32, max_scale=127, pack=_q6_k, fallback="Q8_0"),
    )
}
