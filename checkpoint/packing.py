"""Codes of 4 or 8 bits in int32 words, along the last dimension, the first code in the lowest bits."""

from __future__ import annotations

import sys

import torch

# Words are viewed as their bytes, which is the packing itself only where the lowest byte comes first.
assert sys.byteorder == "little", "packed checkpoints are little-endian"


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [..., n], each below 2^bits, to int32 [..., ceil(n * bits / 32)]; the last word is filled with zeros."""
    per_word = 32 // bits
    missing = -codes.shape[-1] % per_word
    if missing:
        codes = torch.nn.functional.pad(codes, (0, missing))
    if bits == 4:
        codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    # Flat first: a dimension of one element may have any stride, which a view as words refuses.
    return codes.reshape(-1).view(torch.int32).reshape(*codes.shape[:-1], codes.shape[-1] // 4)


def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """int32 [..., w] to the first `count` codes of each row, uint8 [..., count]."""
    codes = words.contiguous().view(torch.uint8)
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
    return codes[..., :count].contiguous()
