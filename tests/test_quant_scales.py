"""Scales that move across an edge, and clipped ranges: they lower the error they are chosen for, or are not used."""

from __future__ import annotations

import pytest
import torch

from llmkit.checkpoint.quantized import Scheme
from llmkit.kernels.rounding import round_tensor, round_tokens
from llmkit.model.layout import Parameter, Part
from llmkit.quant.algorithm import Site
from llmkit.quant.awq import AwqScales, Clipped, clipped, kept_rows
from llmkit.quant.edges import Edge
from llmkit.quant.grid import fit_grid, round_to_nearest
from llmkit.quant.smoothquant import SmoothQuant, normalized
from llmkit.quant.statistics import Statistics

INT4 = Scheme(4, 32, symmetric=False)
W8A8 = Scheme(8, inputs="token")
NORM = Edge("attn_norm", "attn.qkv", None)


def site(scheme: Scheme, out: int, columns: int, parts: int = 1) -> Site:
    row = Parameter(
        "layers.0.attn.qkv.weight", tuple(Part(f"p{i}", (out // parts, columns)) for i in range(parts)), (0,)
    )
    return Site(row, "attn.qkv", scheme, torch.float16 if scheme.bits == 4 else torch.float32)


def example(outliers: float, columns: int = 64, rows: int = 48) -> tuple[torch.Tensor, torch.Tensor, Statistics]:
    """A weight, inputs of which a few channels are `outliers` times larger, and their figures."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2000, columns, generator=generator)
    inputs[:, ::16] *= outliers
    seen = Statistics(columns, {"hessian", "sample"})
    seen.add(inputs)
    return torch.randn(rows, columns, generator=generator) * 0.05, inputs, seen


def test_awq_scales_lower_the_error_where_channels_differ() -> None:
    weight, inputs, seen = example(outliers=20.0)
    scales = AwqScales().scales(site(INT4, *weight.shape), NORM, weight, seen)
    assert scales is not None
    assert scales.max() * scales.min() == pytest.approx(1, rel=1e-4)
    assert bool((scales[::16] > scales[1::16]).all())

    def lost(s: torch.Tensor) -> float:
        rounded = round_to_nearest(weight * s, INT4, torch.float16).dequantize() / s
        return ((rounded - weight) @ inputs.T).square().sum().item()

    assert lost(scales) < 0.5 * lost(torch.ones(64))


def test_awq_scales_nothing_that_gains_nothing() -> None:
    """Weights that are on the grid already lose nothing without scaling."""
    weight, _, seen = example(outliers=5.0)
    weight = round_to_nearest(weight, INT4, torch.float16).dequantize()
    assert AwqScales().scales(site(INT4, *weight.shape), NORM, weight, seen) is None


def test_heads_that_share_values_share_their_scales() -> None:
    weight, _, seen = example(outliers=20.0, columns=64)
    edge = Edge("attn.qkv", "attn.o", slice(96, 128), (2, 16))
    scales = AwqScales().scales(site(INT4, *weight.shape), edge, weight, seen)
    assert scales is not None
    assert scales.shape == (32,)
    per_input = edge.per_input(scales)
    assert per_input.shape == (64,)
    assert torch.equal(per_input[:16], per_input[16:32])
    assert torch.equal(per_input[32:48], scales[16:])
    assert torch.equal(
        edge.per_source(torch.arange(64.0)), torch.cat([torch.arange(16.0) + 16, torch.arange(16.0) + 48])
    )


def test_clipping_lowers_every_groups_error_and_spares_q_and_k() -> None:
    weight, _, seen = example(outliers=3.0)
    weight[:, 5] *= 4
    assert seen.hessian is not None
    grid = fit_grid(weight, INT4, torch.float16)
    found = clipped(weight, seen.hessian, grid, keep=16)
    assert torch.equal(found.scales[:16], grid.scales[:16])
    assert bool((found.scales[16:] <= grid.scales[16:]).all())
    assert bool((found.scales[16:] < grid.scales[16:]).any())

    def losses(rounded: torch.Tensor) -> torch.Tensor:
        delta = (rounded - weight).view(48, 2, 32)
        blocks = torch.stack([seen.hessian[i : i + 32, i : i + 32] for i in (0, 32)])  # type: ignore[index]
        return torch.einsum("rgi,gij,rgj->rg", delta, blocks, delta)

    after, before = (losses(one.nearest(weight).dequantize()) for one in (found, grid))
    assert bool((after <= before * 1.0001).all())
    assert after[16:].sum() < 0.97 * before[16:].sum()
    assert kept_rows(site(INT4, 48, 64, parts=3)) == 32
    assert kept_rows(site(INT4, 48, 64)) == 0
    quantized = Clipped().quantize(site(INT4, 48, 64, parts=3), weight, seen)
    assert torch.equal(quantized.weight.scales, clipped(weight, seen.hessian, grid, keep=32).scales)


def test_smoothquant_lowers_the_error_of_rounded_products() -> None:
    weight, inputs, seen = example(outliers=50.0)
    scales = SmoothQuant().scales(site(W8A8, *weight.shape), NORM, weight, seen)
    assert scales is not None

    def lost(s: torch.Tensor) -> float:
        rounded = round_to_nearest(weight * s, W8A8, torch.float32).dequantize()
        return (round_tokens(inputs / s, "int") @ rounded.T - inputs @ weight.T).square().sum().item()

    assert lost(scales) < 0.2 * lost(torch.ones(64))


def test_scales_are_kept_around_one_and_usable() -> None:
    scales = normalized(torch.tensor([0.0, torch.inf, torch.nan, 4.0, 1e9]))
    assert bool(torch.isfinite(scales).all())
    assert bool((scales > 0).all())
    assert scales.max() * scales.min() == pytest.approx(1)


@pytest.mark.parametrize("kind", ["int", "float"])
def test_rounding_inputs_keeps_tokens_apart(kind: str) -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 5)[:, None]
    x[2] = 0
    rounded = round_tokens(x, kind)
    assert bool((rounded[2] == 0).all())
    error = (rounded - x).norm(dim=1) / x.norm(dim=1).clamp(min=1e-9)
    assert bool((error < 0.04).all())
    assert bool((error[[0, 1, 3, 4]] > 1e-4).all())
    assert torch.equal(round_tokens(x[3:4], kind), rounded[3:4])
    largest = x.abs().amax(dim=1, keepdim=True)
    torch.testing.assert_close(rounded.abs().amax(dim=1, keepdim=True), largest, rtol=1e-2, atol=0)
    fixed = round_tensor(torch.tensor([[1e9, -1e9]]), torch.tensor([0.5]), kind)
    assert fixed.tolist() == ([[63.5, -64.0]] if kind == "int" else [[224.0, -224.0]])
