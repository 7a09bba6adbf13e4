"""Packs values of 2, 3, 4 or 8 bits into int32 words along the last dimension, lowest bits first.

3 bits do not divide a word. compressed-tensors puts ten values into a word and leaves two bits
empty. GPTQ lets values follow each other without gaps (`across_words`), so that three words hold 32
values, and two of them lie in two words.
"""

from __future__ import annotations

import sys

import torch

# Words are viewed as bytes, which is correct only on a little-endian machine.
assert sys.byteorder == "little", "packed checkpoints are little-endian"

_SHIFTS = {10: 3 * torch.arange(10), 8: 3 * torch.arange(8)}


def pack(values: torch.Tensor, bits: int, across_words: bool = False) -> torch.Tensor:
    """uint8 [..., n], each below 2^bits, to int32 [..., ceil(n / (32 // bits))].

    The last word is filled with zeros.
    across_words: to int32 [..., n * bits / 32], without gaps; n is a multiple of 32 for 3 bits.
    """
    if bits == 3 and across_words:
        return _pack_3_bits_across_words(values)
    per_word = 32 // bits
    missing = -values.shape[-1] % per_word
    if missing:
        values = torch.nn.functional.pad(values, (0, missing))
    if bits == 3:
        fields: torch.Tensor = values.unflatten(-1, (-1, per_word)).int()
        return (fields << _shifts(fields)).sum(-1, dtype=torch.int32)
    if bits == 2:
        values = values[..., 0::2] | (values[..., 1::2] << 2)
    if bits in (2, 4):
        values = values[..., 0::2] | (values[..., 1::2] << 4)
    # The tensor is flattened first: a view as words needs stride 1, and a dimension of size 1 may
    # have any stride.
    return values.reshape(-1).view(torch.int32).reshape(*values.shape[:-1], values.shape[-1] // 4)


def unpack(words: torch.Tensor, bits: int, count: int, across_words: bool = False) -> torch.Tensor:
    """int32 [..., w] to the first `count` values of each row, uint8 [..., count]."""
    words = words.contiguous()
    if bits == 3:
        parts = _triples(words) if across_words else words.unsqueeze(-1)
        per_part = 8 if across_words else 10
        shifts = _SHIFTS[per_part].to(words.device, torch.int32)
        values = ((parts >> shifts) & 7).to(torch.uint8).flatten(-2)
        return values[..., :count].contiguous()
    values = words.view(torch.uint8)
    if bits in (2, 4):
        values = torch.stack((values & 15, values >> 4), -1).flatten(-2)
    if bits == 2:
        values = torch.stack((values & 3, values >> 2), -1).flatten(-2)
    return values[..., :count].contiguous()


def _pack_3_bits_across_words(values: torch.Tensor) -> torch.Tensor:
    """Eight values are three bytes, and 32 of them three words."""
    fields = values.unflatten(-1, (-1, 8)).int()
    triples = (fields << _shifts(fields)).sum(-1, dtype=torch.int32)
    data = torch.stack([(triples >> shift & 255).to(torch.uint8) for shift in (0, 8, 16)], -1)
    shape = (*values.shape[:-1], values.shape[-1] * 3 // 32)
    return data.reshape(-1).view(torch.int32).reshape(shape)


def _triples(words: torch.Tensor) -> torch.Tensor:
    """int32 [..., w] to the numbers of three bytes that they hold, int32 [..., w * 4 / 3, 1]."""
    data: torch.Tensor = words.view(torch.uint8).unflatten(-1, (-1, 3)).int()
    return (data[..., 0] | data[..., 1] << 8 | data[..., 2] << 16).unsqueeze(-1)


def _shifts(fields: torch.Tensor) -> torch.Tensor:
    return _SHIFTS[fields.shape[-1]].to(fields.device, torch.int32)
