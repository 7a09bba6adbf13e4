"""Packs values of 4 or 8 bits into int32 words along the last dimension, lowest bits first."""

from __future__ import annotations

import sys

import torch

# Words are viewed as bytes, which is correct only on a little-endian machine.
assert sys.byteorder == "little", "packed checkpoints are little-endian"


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [..., n], each below 2^bits, to int32 [..., ceil(n * bits / 32)].

    The last word is filled with zeros.
    """
    per_word = 32 // bits
    missing = -values.shape[-1] % per_word
    if missing:
        values = torch.nn.functional.pad(values, (0, missing))
    if bits == 4:
        values = values[..., 0::2] | (values[..., 1::2] << 4)
    # The tensor is flattened first: a view as words needs stride 1, and a dimension of size 1 may
    # have any stride.
    return values.reshape(-1).view(torch.int32).reshape(*values.shape[:-1], values.shape[-1] // 4)


def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """int32 [..., w] to the first `count` values of each row, uint8 [..., count]."""
    values = words.contiguous().view(torch.uint8)
    if bits == 4:
        values = torch.stack((values & 15, values >> 4), -1).flatten(-2)
    return values[..., :count].contiguous()
