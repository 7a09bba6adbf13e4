"""The types of GGUF files whose integers other formats can hold: Q4_0, Q4_1 and Q8_0.

A row is made of blocks of 32 values, with a float16 scale d at the start:

    Q4_0  W = d * (q - 8)   16 bytes; byte i has value i in its low bits and i + 16 in its high ones
    Q4_1  W = d * q + m     m in float16 after d, then as Q4_0
    Q8_0  W = d * q         32 bytes, q as int8
"""

from __future__ import annotations

import torch

from llmkit.checkpoint.quantized_weight import QuantizedWeight, Scheme
from llmkit.checkpoint.stored_tensors import check_scales
from llmkit.common.errors import InputError

INTEGER_TYPES = {
    "Q4_0": Scheme(4, 32),
    "Q4_1": Scheme(4, 32, symmetric=False),
    "Q8_0": Scheme(8, 32),
}


def unpack_blocks(ggml_type: str, blocks: torch.Tensor) -> QuantizedWeight:
    """The weight of stored blocks, uint8 [out, B, bytes of a block], of one of INTEGER_TYPES.

    Raises InputError for scales that are not finite, and for a Q4_1 weight with a minimum that is
    no integer times the scale: it has no zero points.
    """
    scheme = INTEGER_TYPES[ggml_type]
    scales = _halves(blocks, 0)
    check_scales("the scales of blocks", scales, "finite")
    if ggml_type == "Q8_0":
        q = blocks[:, :, 2:] ^ 128  # from -128 .. 127 to 0 .. 255
        zeros = torch.full(scales.shape, scheme.half, dtype=torch.uint8)
        return QuantizedWeight(q.flatten(1), scales, zeros, scheme)
    packed = blocks[:, :, 4 if ggml_type == "Q4_1" else 2 :]
    q = torch.cat((packed & 15, packed >> 4), dim=-1).flatten(1)
    if ggml_type == "Q4_0":
        zeros = torch.full(scales.shape, scheme.half, dtype=torch.uint8)
        return QuantizedWeight(q, scales, zeros, scheme)
    minima = _halves(blocks, 2).float()
    zeros = torch.where(scales == 0, 0.0, -minima / scales.float()).round().nan_to_num()
    zeros = zeros.clamp(0, (1 << scheme.bits) - 1)
    differs = scales.float() * zeros != -minima
    if bool(differs.any()):
        raise InputError(
            f"{int(differs.sum())} of {differs.numel()} minima of Q4_1 blocks are no integer times"
            " the scale of the block",
            "Zero points from 0 to 15 were expected",
        )
    return QuantizedWeight(q, scales, zeros.to(torch.uint8), scheme)


def _halves(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The float16 numbers at byte `start` of the blocks, [out, B]."""
    return blocks[:, :, start : start + 2].contiguous().view(torch.float16).squeeze(2)
