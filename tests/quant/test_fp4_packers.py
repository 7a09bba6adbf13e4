"""FP4 and MX codes and scales of round to nearest beside those of other projects' packers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.fp4_peers import peer_cases, read_peer_case

from llmkit.checkpoint.quantized_formats import FORMATS
from llmkit.checkpoint.quantized_weight import QuantizedWeight
from llmkit.quant.grid import fit_grid

# By case: the group's largest magnitude over its power of two, from which on the packer takes a
# scale twice that of OCP MX 1.0. 2: never; what is beyond the type's largest value is clamped.
CASES = {
    "compressed-tensors NVFP4A16": 2.0,
    "modelopt NVFP4": 2.0,
    "torchao NVFP4": 2.0,
    "torchao MXFP4": 2.0,
    "compressed-tensors MXFP4A16": 1.75,
    "compressed-tensors MXFP8A16": 1.75,
    "modelopt MXFP8": 1.75,
}


def read_case(case: str) -> tuple[torch.Tensor, QuantizedWeight]:
    """What a packer was given, float32 [out, in], and what it wrote, as llmkit reads it."""
    peer = read_peer_case(case)
    weight = FORMATS[peer.details["format"]].unpack(peer.scheme, peer.stored)
    return peer.source.float(), weight


def differing(first: QuantizedWeight, second: QuantizedWeight) -> torch.Tensor:
    """Which codes differ, bool [out, G, group]. The sign of a zero counts."""
    codes = (weight.q.contiguous().view(torch.uint8) for weight in (first, second))
    return torch.ne(*codes).unflatten(1, (-1, first.scheme.group_size))


def test_packers_are_those_of_the_file() -> None:
    assert peer_cases() == sorted(CASES)


@pytest.mark.parametrize("case", CASES)
def test_round_to_nearest_gives_the_codes_and_scales_of_other_packers(case: str) -> None:
    source, theirs = read_case(case)
    grid = fit_grid(source, theirs.scheme, torch.float32)
    ours = grid.round(source)
    largest = source.unflatten(1, (-1, theirs.scheme.group_size)).abs().amax(2)
    mantissa, _ = torch.frexp(largest)  # at least 0.5
    is_doubled = 2 * mantissa >= CASES[case]
    assert bool(is_doubled.any()) is (CASES[case] < 2)
    is_same = ~is_doubled & (largest > 0)
    assert int(is_same.sum()) >= 13
    assert torch.equal(ours.scales[is_same], theirs.scales[is_same])
    assert torch.equal(ours.scales[is_doubled] * 2, theirs.scales[is_doubled])
    if theirs.global_scale is not None:
        assert ours.global_scale is not None
        assert torch.equal(ours.global_scale, theirs.global_scale)
    # Any scale stands for a group of zeros.
    assert int((largest == 0).sum()) == 32 // theirs.scheme.group_size
    assert int(differing(ours, theirs)[~is_doubled].sum()) == 0
    scales = torch.where(is_doubled, ours.scales * 2, ours.scales)
    with_their_rule = replace(grid, scales=scales).round(source)
    assert int(differing(with_their_rule, theirs).sum()) == 0


def test_mxfp4_of_compressed_tensors_differs_where_its_scales_do() -> None:
    """57 of 512 codes, of two groups whose largest values OCP MX 1.0 clamps."""
    source, theirs = read_case("compressed-tensors MXFP4A16")
    ours = fit_grid(source, theirs.scheme, torch.float32).round(source)
    assert int(differing(ours, theirs).sum()) == 57
    assert int(differing(ours, theirs).any(2).sum()) == 2
