"""Smoothing and clipping lower the error that they are searched for, or are not used."""

from __future__ import annotations

import pytest
import torch

from llmkit.checkpoint.quantized_weight import Scheme
from llmkit.kernels.activation_quant import fake_quantize_per_token, fake_quantize_static
from llmkit.model.linear import ActivationQuant
from llmkit.model.parameter import Parameter, SourceTensor
from llmkit.quant.algorithm import QuantTarget
from llmkit.quant.awq import AwqSmoother, ClippingQuantizer, clip_grid, num_unclipped_rows
from llmkit.quant.grid import FULL_SEARCH, fit_grid, round_to_nearest
from llmkit.quant.input_stats import InputStats
from llmkit.quant.number_formats import NUMBER_FORMATS
from llmkit.quant.smoothing_mappings import SmoothingMapping
from llmkit.quant.smoothquant import SmoothQuant, normalize_scales

INT4 = Scheme(4, 32, symmetric=False)
W8A8 = Scheme(8, inputs="token")
NORM = SmoothingMapping("attn_norm", "attn.qkv", None)


def quant_target(scheme: Scheme, out: int, columns: int, parts: int = 1) -> QuantTarget:
    row = Parameter(
        "layers.0.attn.qkv.weight",
        tuple(SourceTensor(f"p{i}", (out // parts, columns)) for i in range(parts)),
        (0,),
    )
    return QuantTarget(
        row, "attn.qkv", scheme, torch.float16 if scheme.bits == 4 else torch.float32
    )


def example(
    outliers: float, columns: int = 64, rows: int = 48
) -> tuple[torch.Tensor, torch.Tensor, InputStats]:
    """A weight, inputs of which a few channels are `outliers` times larger, and their figures."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2000, columns, generator=generator)
    inputs[:, ::16] *= outliers
    seen = InputStats(columns, {"hessian", "sample"})
    seen.add(inputs)
    return torch.randn(rows, columns, generator=generator) * 0.05, inputs, seen


def test_awq_smoother_lowers_the_error_of_uneven_channels() -> None:
    weight, inputs, seen = example(outliers=20.0)
    scales = AwqSmoother().scales(quant_target(INT4, *weight.shape), NORM, weight, seen)
    assert scales is not None
    assert scales.max() * scales.min() == pytest.approx(1, rel=1e-4)
    assert bool((scales[::16] > scales[1::16]).all())

    def lost(s: torch.Tensor) -> float:
        rounded = round_to_nearest(weight * s, INT4, torch.float16).dequantize() / s
        return ((rounded - weight) @ inputs.T).square().sum().item()

    assert lost(scales) < 0.5 * lost(torch.ones(64))


@pytest.mark.parametrize("outliers", [3.0, 20.0, 300.0])
def test_awq_smoother_takes_the_best_of_20_ratios(outliers: float) -> None:
    """|x|^r / |w|^(1 - r) for r = 0, 0.05 ... 0.95, with |w| relative to its group's largest."""
    weight, inputs, seen = example(outliers)
    weight = weight * torch.linspace(0.2, 3.0, 64)
    found = AwqSmoother().scales(quant_target(INT4, *weight.shape), NORM, weight, seen)
    groups = weight.double().abs().view(48, 2, 32)
    w = (groups / groups.amax(2, keepdim=True)).view(48, 64).mean(0)
    x = inputs.double().abs().mean(0)
    lost = []
    for step in range(20):
        r = step / 20
        scales = x**r / w ** (1 - r)
        scales = (scales / (scales.max() * scales.min()).sqrt()).float()
        rounded = round_to_nearest(weight * scales, INT4, torch.float16).dequantize() / scales
        error = ((rounded - weight) @ inputs.T).square().sum().item()
        lost.append((error, r, scales))
    error, ratio, scales = min(lost, key=lambda candidate: candidate[0])
    assert found is not None
    assert 0 < ratio < 0.95, "the best one is not at the end of the range"
    torch.testing.assert_close(found, scales, rtol=5e-3, atol=0)


def test_awq_smoother_returns_none_without_a_gain() -> None:
    """Weights that are on the grid already lose nothing without scaling."""
    weight, _, seen = example(outliers=5.0)
    weight = round_to_nearest(weight, INT4, torch.float16).dequantize()
    assert AwqSmoother().scales(quant_target(INT4, *weight.shape), NORM, weight, seen) is None


def test_awq_smoother_gives_query_heads_of_a_kv_group_one_scale() -> None:
    weight, _, seen = example(outliers=20.0, columns=64)
    mapping = SmoothingMapping("attn.qkv", "attn.o", slice(96, 128), (2, 16))
    scales = AwqSmoother().scales(quant_target(INT4, *weight.shape), mapping, weight, seen)
    assert scales is not None
    assert scales.shape == (32,)
    per_input = mapping.repeat_kv(scales)
    assert per_input.shape == (64,)
    assert torch.equal(per_input[:16], per_input[16:32])
    assert torch.equal(per_input[32:48], scales[16:])
    assert torch.equal(
        mapping.max_over_kv_group(torch.arange(64.0)),
        torch.cat([torch.arange(16.0) + 16, torch.arange(16.0) + 48]),
    )


def test_clip_grid_lowers_every_groups_error_and_spares_q_and_k() -> None:
    weight, _, seen = example(outliers=3.0)
    weight[:, 5] *= 4
    assert seen.hessian is not None
    grid = fit_grid(weight, INT4, torch.float16)
    found = clip_grid(weight, seen.hessian, grid, num_unclipped=16)
    assert torch.equal(found.scales[:16], grid.scales[:16])
    assert bool((found.scales[16:] <= grid.scales[16:]).all())
    assert bool((found.scales[16:] < grid.scales[16:]).any())

    def losses(rounded: torch.Tensor) -> torch.Tensor:
        delta = (rounded - weight).view(48, 2, 32)
        blocks = torch.stack([seen.hessian[i : i + 32, i : i + 32] for i in (0, 32)])
        return torch.einsum("rgi,gij,rgj->rg", delta, blocks, delta)

    after, before = (losses(one.round(weight).dequantize()) for one in (found, grid))
    assert bool((after <= before * 1.0001).all())
    assert after[16:].sum() < 0.97 * before[16:].sum()
    assert num_unclipped_rows(quant_target(INT4, 48, 64, parts=3)) == 32
    assert num_unclipped_rows(quant_target(INT4, 48, 64)) == 0
    quantized = ClippingQuantizer().quantize(quant_target(INT4, 48, 64, parts=3), weight, seen)
    assert torch.equal(
        quantized.weight.scales, clip_grid(weight, seen.hessian, grid, num_unclipped=32).scales
    )


def test_smoothquant_lowers_the_error_of_rounded_products() -> None:
    weight, inputs, seen = example(outliers=50.0)
    scales = SmoothQuant().scales(quant_target(W8A8, *weight.shape), NORM, weight, seen)
    assert scales is not None

    def lost(s: torch.Tensor) -> float:
        rounded = round_to_nearest(weight * s, W8A8, torch.float32).dequantize()
        return (
            (fake_quantize_per_token(inputs / s, "int8") @ rounded.T - inputs @ weight.T)
            .square()
            .sum()
            .item()
        )

    assert lost(scales) < 0.2 * lost(torch.ones(64))


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_smoothquant_lowers_the_error_of_fp4_inputs(name: str) -> None:
    scheme = NUMBER_FORMATS[name].scheme
    weight, inputs, seen = example(outliers=50.0)
    scales = SmoothQuant().scales(quant_target(scheme, *weight.shape), NORM, weight, seen)
    assert scales is not None

    def lost(s: torch.Tensor) -> float:
        scale = None
        if scheme.has_input_scale:
            scale = ((inputs / s).abs().max() / (448 * 6)).reshape(1)
        rounded = round_to_nearest(weight * s, scheme, torch.float32, FULL_SEARCH).dequantize()
        quant = ActivationQuant.of(scheme, scale)
        assert quant is not None
        return (quant(inputs / s) @ rounded.T - inputs @ weight.T).square().sum().item()

    assert lost(scales) < 0.95 * lost(torch.ones(64))


def test_normalize_scales_centers_them_around_one() -> None:
    scales = normalize_scales(torch.tensor([0.0, torch.inf, torch.nan, 4.0, 1e9]))
    assert bool(torch.isfinite(scales).all())
    assert bool((scales > 0).all())
    assert scales.max() * scales.min() == pytest.approx(1)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_fake_quantize_per_token_keeps_tokens_apart(kind: str) -> None:
    x = (
        torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
        * torch.logspace(-3, 3, 5)[:, None]
    )
    x[2] = 0
    rounded = fake_quantize_per_token(x, kind)
    assert bool((rounded[2] == 0).all())
    error = (rounded - x).norm(dim=1) / x.norm(dim=1).clamp(min=1e-9)
    assert bool((error < 0.04).all())
    assert bool((error[[0, 1, 3, 4]] > 1e-4).all())
    assert torch.equal(fake_quantize_per_token(x[3:4], kind), rounded[3:4])
    largest = x.abs().amax(dim=1, keepdim=True)
    torch.testing.assert_close(rounded.abs().amax(dim=1, keepdim=True), largest, rtol=1e-2, atol=0)
    fixed = fake_quantize_static(torch.tensor([[1e9, -1e9]]), torch.tensor([0.5]), kind)
    assert fixed.tolist() == ([[63.5, -64.0]] if kind == "int8" else [[224.0, -224.0]])
