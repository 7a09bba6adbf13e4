"""The scales of GGUF's types, against simpler choices of them."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from llmkit.checkpoint.gguf_blocks import GGUF_TYPES
from llmkit.quant.gguf_scales import fit_blocks


def weight(rows: int = 16, columns: int = 512) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(rows, columns, generator=generator) * 0.02


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_gguf_scales_are_better_than_those_of_the_range(name: str) -> None:
    """The gguf package takes the range of each block. The error is a tenth lower, or more."""
    dense = weight()
    kind = gguf.GGMLQuantizationType[name]
    plain = gguf.quants.dequantize(gguf.quants.quantize(dense.numpy(), kind), kind)
    plain_error = float(np.square(plain - dense.numpy()).sum())
    found = fit_blocks(dense, GGUF_TYPES[name], torch.ones(512)).dequantize()
    least = 0.98 if name == "Q8_0" else 0.92
    assert (found - dense).square().sum().item() < least * plain_error


@pytest.mark.parametrize(("name", "most"), [("Q4_K", 6e-3), ("Q5_K", 1.5e-3), ("Q6_K", 4e-4)])
def test_gguf_k_types_are_as_good_as_groups_with_float_scales(name: str, most: float) -> None:
    """6 and 8 bits for a group's scale and minimum cost little."""
    dense = weight()
    kind = GGUF_TYPES[name]
    found = fit_blocks(dense, kind, torch.ones(512)).dequantize()
    error = (found - dense).square().sum() / dense.square().sum()
    groups = dense.unflatten(1, (-1, kind.group))
    highest = groups.amax(2, keepdim=True)
    lowest = groups.amin(2, keepdim=True)
    if not kind.has_min:
        highest = groups.abs().amax(2, keepdim=True)
        lowest = -highest
    step = (highest - lowest) / kind.max_q
    plain = ((groups - lowest) / step).round() * step + lowest
    plain_error = (plain - groups).square().sum() / groups.square().sum()
    assert error < most
    assert error < 1.1 * plain_error


@pytest.mark.parametrize("name", GGUF_TYPES)
def test_gguf_scales_weigh_columns_by_importance(name: str) -> None:
    dense = weight()
    importance = torch.ones(512)
    importance[::7] = 100.0
    cost = importance * (dense.square() + dense.square().mean()).sqrt()

    def error(blocks_importance: torch.Tensor) -> float:
        found = fit_blocks(dense, GGUF_TYPES[name], blocks_importance).dequantize()
        return float(((found - dense).square() * cost).sum())

    assert error(importance) < 0.95 * error(torch.ones(512))


@pytest.mark.parametrize("name", GGUF_TYPES)
def test_gguf_scales_of_extreme_weights_are_finite(name: str) -> None:
    """Zeros, equal values, one sign, tiny and large values, and columns without importance."""
    dense = torch.zeros(6, 256)
    dense[1] = 0.5
    dense[2] = -0.25
    dense[3] = weight(1, 256).abs() + 1
    dense[4] = 1e-9 * weight(1, 256)
    dense[5] = 1e4 * weight(1, 256)
    for importance in (None, torch.zeros(256)):
        found = fit_blocks(dense, GGUF_TYPES[name], importance)
        values = found.dequantize()
        assert bool(torch.isfinite(values).all())
        stored = found.to_bytes().numpy()
        unpacked = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[name])
        np.testing.assert_array_equal(unpacked, values.numpy())
    exact = fit_blocks(dense, GGUF_TYPES[name]).dequantize()
    assert exact[0].abs().max() == 0
    assert (exact[1] - 0.5).abs().max() < 0.01
    assert (exact[2] + 0.25).abs().max() < 0.005
    relative = (exact[5] - dense[5]).square().sum() / dense[5].square().sum()
    assert relative < 0.02
