"""Scales of blocks: a tile of a weight's rows and columns shares one scale.

For W[out, in] with blocks of R x C, the scales are [ceil(out/R), ceil(in/C)]. The last blocks may
be smaller. The formats that store such scales are `fp8_format` and `compressed_tensors`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from llmkit.checkpoint.quantized_weight import PackedTensor, QuantizedWeight, Scheme
from llmkit.checkpoint.stored_tensors import check_stored
from llmkit.common.errors import InputError


def block_scale_shape(scheme: Scheme, out: int, in_: int) -> tuple[int, int]:
    """The shape of the scales of an [out, in_] weight: a scale for each block."""
    rows = 1 if scheme.block_rows == -1 else -(-out // scheme.block_rows)
    return rows, scheme.groups(in_)


def covered_block_shape(
    scheme: Scheme, start: tuple[int, int], shape: tuple[int, int]
) -> tuple[int, int]:
    """The shape of the scales of all blocks that a slice covers, wholly or in part.

    start: the slice's first row and column in the whole weight; it may lie within a block.
    """
    sizes = (scheme.block_rows, scheme.group_size)
    rows, columns = (
        -(-(first + count) // size) - first // size
        for first, count, size in zip(start, shape, sizes, strict=True)
    )
    return rows, columns


def expand_block_scales(scales: torch.Tensor, scheme: Scheme, out: int) -> torch.Tensor:
    """The scales of every row, float32 [out, G], from those of blocks."""
    rows = out if scheme.block_rows == -1 else scheme.block_rows
    return scales.float().repeat_interleave(rows, dim=0)[:out].contiguous()


def gather_block_scales(scales: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The inverse of `expand_block_scales`. Raises InputError for rows of a block that differ."""
    rows = len(scales) if scheme.block_rows == -1 else scheme.block_rows
    blocks = scales[::rows]
    if not torch.equal(blocks.repeat_interleave(rows, dim=0)[: len(scales)], scales):
        raise InputError(
            f"The rows of a block have different scales, in blocks of {rows} rows",
            "One scale for each block was expected",
        )
    return blocks.contiguous()


def unpack_fp8(
    scheme: Scheme,
    tensors: Mapping[str, torch.Tensor],
    expected_tensors: Callable[[Scheme, int, int], tuple[PackedTensor, ...]],
    scale: str,
    input_scale: str,
) -> QuantizedWeight:
    """An FP8 weight from its stored tensors by suffix.

    expected_tensors: `QuantizedFormat.tensors`. scale, input_scale: the suffixes of the scales.
    Raises InputError as `check_stored`.
    """
    q = tensors["weight"]
    if q.ndim != 2:
        raise InputError(f"weight has shape {list(q.shape)}", "Two sizes were expected")
    out, in_ = q.shape
    check_stored(expected_tensors(scheme, out, in_), tensors)
    stored = tensors[scale].reshape(block_scale_shape(scheme, out, in_))
    scales = expand_block_scales(stored, scheme, out)
    zeros = torch.zeros(scales.shape, dtype=torch.uint8, device=scales.device)
    static_scale = None
    if scheme.inputs == "tensor":
        static_scale = tensors[input_scale].float().reshape(1)
    return QuantizedWeight(q, scales, zeros, scheme, static_scale)


def realigned_scheme(scheme: Scheme, start: tuple[int, int]) -> Scheme:
    """The scheme of a slice that begins at `start` (row, column) of the whole weight.

    Where the slice begins inside a block, its blocks are smaller, so that its first one is whole.
    """
    first_row, first_column = start
    if scheme.block_rows == -1:
        return scheme
    rows = math.gcd(scheme.block_rows, first_row)
    columns = -1 if scheme.group_size == -1 else math.gcd(scheme.group_size, first_column)
    return replace(scheme, block_rows=rows, group_size=columns)


def realign_block_scales(
    scales: torch.Tensor, scheme: Scheme, start: tuple[int, int], shape: tuple[int, int]
) -> torch.Tensor:
    """The scales of a slice in the blocks of `realigned_scheme`, with equal values.

    scales: of the blocks, in the sizes of `scheme`, that the slice covers wholly or in part.
    start: where the slice begins in the whole weight. shape: [rows, columns] of the slice.
    """
    smaller = realigned_scheme(scheme, start)
    if smaller == scheme:
        return scales
    sizes = ((scheme.block_rows, smaller.block_rows), (scheme.group_size, smaller.group_size))
    for dim, (size, smaller_size) in enumerate(sizes):
        skipped = start[dim] % size // smaller_size
        length = -(-shape[dim] // smaller_size)
        scales = scales.repeat_interleave(size // smaller_size, dim=dim)
        scales = scales.narrow(dim, skipped, length)
    return scales.contiguous()
