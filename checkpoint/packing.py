"""Packs values of 2, 3, 4 or 8 bits into int32 words along the last dimension, lowest bits first.

Values follow each other without gaps. 3 bits do not divide a word, so that three words hold 32
values, and two of them lie in two words.
"""

from __future__ import annotations

import sys
from fractions import Fraction

import torch
from torch.nn.functional import pad

# Words are viewed as bytes, which is correct only on a little-endian machine.
assert sys.byteorder == "little", "packed checkpoints are little-endian"

_SHIFTS = 3 * torch.arange(8)  # eight values of 3 bits are three bytes


def word_values(bits: int) -> int | Fraction:
    """The values in a word; with 3 bits ten and two thirds.

    Its numerator is how many values fill whole words.
    """
    return Fraction(32, bits) if 32 % bits else 32 // bits


def word_count(count: int, bits: int) -> int:
    """The words that hold `count` values."""
    return -(-count * bits // 32)


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [..., n], each below 2^bits, to int32 [..., word_count(n, bits)].

    The last word is filled with zeros.
    """
    count = values.shape[-1]
    missing = -count % word_values(bits).numerator  # to whole words
    if missing:
        values = pad(values, (0, missing))
    if bits == 3:
        return _pack_3_bits(values)[..., : word_count(count, bits)].contiguous()
    if bits == 2:
        values = values[..., 0::2] | (values[..., 1::2] << 2)
    if bits in (2, 4):
        values = values[..., 0::2] | (values[..., 1::2] << 4)
    # The tensor is flattened first: a view as words needs stride 1, and a dimension of size 1 may
    # have any stride.
    return values.reshape(-1).view(torch.int32).reshape(*values.shape[:-1], values.shape[-1] // 4)


def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """int32 [..., w] to the first `count` values of each row, uint8 [..., count]."""
    words = words.contiguous()
    if bits == 3:
        triples = _triples(pad(words, (0, -words.shape[-1] % 3)))
        shifts = _SHIFTS.to(words.device, torch.int32)
        values = ((triples >> shifts) & 7).to(torch.uint8).flatten(-2)
        return values[..., :count].contiguous()
    values = words.view(torch.uint8)
    if bits in (2, 4):
        values = torch.stack((values & 15, values >> 4), -1).flatten(-2)
    if bits == 2:
        values = torch.stack((values & 3, values >> 2), -1).flatten(-2)
    return values[..., :count].contiguous()


def _pack_3_bits(values: torch.Tensor) -> torch.Tensor:
    """uint8 [..., n] to int32 [..., n * 3 / 32]; n is a multiple of 32."""
    fields = values.unflatten(-1, (-1, 8)).int()
    shifts = _SHIFTS.to(values.device, torch.int32)
    triples = (fields << shifts).sum(-1, dtype=torch.int32)
    data = torch.stack([(triples >> shift & 255).to(torch.uint8) for shift in (0, 8, 16)], -1)
    shape = (*values.shape[:-1], values.shape[-1] * 3 // 32)
    return data.reshape(-1).view(torch.int32).reshape(shape)


def _triples(words: torch.Tensor) -> torch.Tensor:
    """int32 [..., w] to the numbers of three bytes that they hold, int32 [..., w * 4 / 3, 1]."""
    data: torch.Tensor = words.view(torch.uint8).unflatten(-1, (-1, 3)).int()
    return (data[..., 0] | data[..., 1] << 8 | data[..., 2] << 16).unsqueeze(-1)
