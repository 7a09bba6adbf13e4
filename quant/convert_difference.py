"""Compares a quantized weight with what another format makes of it."""

from __future__ import annotations

from dataclasses import replace

import torch

from llmkit.checkpoint.quantized_weight import QuantizedWeight
from llmkit.common.errors import InputError
from llmkit.quant.convert_source import ConvertSource

_CHUNK_VALUES = 1 << 24  # values that are compared at a time


def does_not_carry_over(source: ConvertSource, name: str, reason: str) -> InputError:
    """The error of a tensor whose values the target would change."""
    return InputError(
        f"{source.checkpoint.reference}: {name} does not carry over: {reason}",
        "Values that the other format holds bit for bit were expected",
        "Choose another --format, or quantize the original model: llmkit quantize",
    )


def pre_quant_scale_reason(target: str) -> str:
    """Why a format does not hold a weight whose inputs are multiplied by other numbers than 1."""
    return f"its inputs are multiplied by a pre_quant_scale, for which {target} has no place"


def stored_difference(weight: QuantizedWeight, other: QuantizedWeight) -> str:
    """What differs in codes, scales and zero points, and an example; "" when nothing does."""
    for name, one, two in (
        ("scale of inputs", weight.input_scale, other.input_scale),
        ("global scale", weight.global_scale, other.global_scale),
    ):
        if (one is None) != (two is None):
            return f"only one of the formats has a {name}"
        if one is not None and two is not None and not torch.equal(one.float(), two.float()):
            return f"its {name} {one.item()!r} would be {two.item()!r}"
    before, after = weight.scales.float(), other.scales.float()
    wrong = before != after
    if bool(wrong.any()):
        example = f"{before[wrong][0].item()!r} would be {after[wrong][0].item()!r}"
        return f"{int(wrong.sum())} of {before.numel()} scales are not exact there ({example})"
    if not torch.equal(weight.q.view(torch.uint8), other.q.view(torch.uint8)):
        return "quantized values differ"
    if not torch.equal(weight.zeros, other.zeros):
        return "zero points differ"
    return ""


def in_groups(weight: QuantizedWeight, size: int) -> QuantizedWeight:
    """The same weight in smaller groups, of which several have the same scales. -1: as they are."""
    scheme = weight.scheme
    if size in (-1, scheme.group_size):
        return weight
    columns = weight.shape[1]
    larger = columns if scheme.group_size == -1 else scheme.group_size
    index = torch.arange(0, columns, size) // larger
    scales, zeros = (values[:, index] for values in (weight.scales, weight.zeros))
    return replace(weight, scales=scales, zeros=zeros, scheme=replace(scheme, group_size=size))


def difference(weight: QuantizedWeight, other: QuantizedWeight) -> str:
    """What differs between two quantized weights; "" when nothing does.

    Beside what is stored, the dequantized values are compared, bit for bit in float32.
    """
    reason = stored_difference(in_groups(weight, other.scheme.group_size), other)
    if reason:
        return reason
    rows, columns = weight.shape
    step = max(1, _CHUNK_VALUES // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        dense = [values.rows(part).dequantize().view(torch.int32) for values in (weight, other)]
        if not torch.equal(*dense):
            return "dequantized values differ"
    return ""
