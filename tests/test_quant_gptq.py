"""Scales, rounding and GPTQ on single matrices, against an independent float64 GPTQ and hand-made cases."""

from __future__ import annotations

import pytest
import torch

from llmkit.checkpoint.quantized import QuantizedWeight
from llmkit.quant.gptq import Hessian, gptq, relative_error
from llmkit.quant.grid import NORM, group_scales, nearest, round_to_nearest


def correlated_inputs(columns: int, tokens: int = 1024, seed: int = 0) -> torch.Tensor:
    """Inputs with strong correlations and columns of very different size, as a transformer's are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    size = torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=generator)]
    return torch.randn(tokens, columns, generator=generator) @ mixing * size


def hessian_of(inputs: torch.Tensor) -> torch.Tensor:
    hessian = Hessian(inputs.shape[1])
    hessian.add(inputs)
    return hessian.matrix


def random_weight(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def naive_gptq(
    weight: torch.Tensor, hessian: torch.Tensor, scales: torch.Tensor, bits: int, group: int, order: torch.Tensor
) -> torch.Tensor:
    """Optimal Brain Surgeon column by column, the inverse Hessian updated by Gaussian elimination: O(in^3) a weight.

    It inverts H of the columns not yet rounded, which is what GPTQ's Cholesky factor stands for.
    """
    weight, hessian = weight.double().clone(), hessian.double().clone()
    hessian += torch.eye(len(hessian), dtype=torch.float64) * (0.01 * hessian.diagonal().mean())
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    left = order.tolist()
    half = 1 << (bits - 1)
    while left:
        inverse = torch.linalg.inv(hessian[left][:, left])
        column = left[0]
        scale = scales[:, column // group].double()
        code = (weight[:, column] / scale).round().clamp(-half, half - 1)
        codes[:, column] = (code + half).to(torch.uint8)
        error = (weight[:, column] - code * scale) / inverse[0, 0]
        weight[:, left] -= error[:, None] * inverse[0]
        left = left[1:]
    return codes


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_agree_with_an_independent_float64_gptq(bits: int, act_order: bool) -> None:
    columns, group = 64, 16
    hessian = hessian_of(correlated_inputs(columns))
    weight = random_weight(24, columns)
    result = gptq(weight, hessian, bits, group, act_order=act_order, block=16)
    scales = group_scales(weight, bits, group, search=True, importance=hessian.diagonal().sqrt())
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True) if act_order else torch.arange(columns)
    expected = naive_gptq(weight, hessian, scales.float(), bits, group, order)
    assert torch.equal(result.weight.scales, scales)
    assert result.damp == 0.01
    assert (result.weight.codes == expected).float().mean() > 0.995
    ours = relative_error(weight, result.weight.dequantize(), hessian)
    reference = QuantizedWeight(expected, scales, result.weight.zeros, bits, group)
    assert ours == pytest.approx(relative_error(weight, reference.dequantize(), hessian), rel=0.02)


def test_block_size_does_not_matter() -> None:
    hessian, weight = hessian_of(correlated_inputs(96)), random_weight(16, 96)
    one = gptq(weight, hessian, 4, 32, block=96).weight.codes
    two = gptq(weight, hessian, 4, 32, block=7).weight.codes
    assert (one == two).float().mean() > 0.995


@pytest.mark.parametrize("group", [32, -1])
def test_gptq_beats_rounding_on_the_weighted_error(group: int) -> None:
    hessian, weight = hessian_of(correlated_inputs(128)), random_weight(64, 128)
    ours = relative_error(weight, gptq(weight, hessian, 4, group).weight.dequantize(), hessian)
    searched = relative_error(weight, round_to_nearest(weight, 4, group, search=True).dequantize(), hessian)
    plain = relative_error(weight, round_to_nearest(weight, 4, group, search=False).dequantize(), hessian)
    assert ours < 0.5 * min(searched, plain)


def test_act_order_helps_and_leaves_the_groups_in_place() -> None:
    hessian, weight = hessian_of(correlated_inputs(128)), random_weight(64, 128)
    ordered, plain = gptq(weight, hessian, 4, 32), gptq(weight, hessian, 4, 32, act_order=False)
    assert torch.equal(ordered.weight.scales, plain.weight.scales)
    errors = [relative_error(weight, result.weight.dequantize(), hessian) for result in (ordered, plain)]
    assert errors[0] < errors[1]


def test_inputs_are_not_changed() -> None:
    hessian, weight = hessian_of(correlated_inputs(32)), random_weight(8, 32)
    hessian[3], hessian[:, 3] = 0, 0
    before = hessian.clone(), weight.clone()
    gptq(weight, hessian, 4, 32)
    assert torch.equal(hessian, before[0])
    assert torch.equal(weight, before[1])


def test_hessian_is_the_mean_over_all_batches() -> None:
    inputs = correlated_inputs(16, tokens=300)
    hessian = Hessian(16)
    for part in (inputs[:100], inputs[100:101], inputs[101:101], inputs[101:].view(199, 1, 16)):
        hessian.add(part)
    assert hessian.tokens == 300
    torch.testing.assert_close(hessian.matrix, 2 / 300 * inputs.T @ inputs, rtol=1e-4, atol=1e-4)


def test_a_dead_column_becomes_zero_and_disturbs_nothing() -> None:
    inputs = correlated_inputs(64)
    inputs[:, 5] = 0
    weight = random_weight(16, 64)
    weight[:, 5] = 100.0
    result = gptq(weight, hessian_of(inputs), 4, 32)
    assert result.damp == 0.01
    dense = result.weight.dequantize()
    assert bool((dense[:, 5] == 0).all())
    assert relative_error(weight, dense, hessian_of(inputs)) < 0.02


def test_damping_grows_until_the_hessian_is_positive_definite() -> None:
    indefinite = torch.eye(32) * 2
    indefinite[0, 1] = indefinite[1, 0] = 2.07  # eigenvalues 4.07 and -0.07: damping 0.05 * 2 is enough, 0.025 * 2 not
    result = gptq(random_weight(8, 32), indefinite, 4, 32)
    assert result.damp == pytest.approx(0.05)


@pytest.mark.parametrize("broken", [torch.full((32, 32), torch.nan), -torch.eye(32)])
def test_a_hopeless_hessian_falls_back_to_rounding(broken: torch.Tensor) -> None:
    weight = random_weight(8, 32)
    result = gptq(weight, broken, 4, 32)
    assert result.damp is None
    assert torch.equal(result.weight.codes, nearest(weight, result.weight.scales, 4, 32).codes)
    assert bool(torch.isfinite(result.weight.dequantize()).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("search", [False, True])
def test_zero_and_tiny_groups_get_a_usable_scale(search: bool, dtype: torch.dtype) -> None:
    weight = random_weight(4, 64)
    weight[1] = 0
    weight[2, :32] = 1e-12
    result = round_to_nearest(weight, 4, 32, search=search, dtype=dtype)
    assert bool((result.scales >= torch.finfo(dtype).tiny).all())
    assert bool(torch.isfinite(result.scales).all())
    assert bool((result.dequantize()[1] == 0).all())
    assert bool((result.codes[1] == 8).all())


def test_gptq_of_a_zero_row_stays_zero() -> None:
    weight = random_weight(8, 64)
    weight[3] = 0
    dense = gptq(weight, hessian_of(correlated_inputs(64)), 4, 32).weight.dequantize()
    assert bool((dense[3] == 0).all())
    assert bool(torch.isfinite(dense).all())


@pytest.mark.parametrize("value", [0.3, -0.3])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_constant_row_is_kept_almost_exactly(value: float, bits: int) -> None:
    weight = torch.full((2, 64), value)
    result = round_to_nearest(weight, bits, 64, search=True).dequantize()
    assert (result - weight).abs().max() < 0.01 * abs(value)


def test_full_range_scales_are_twice_absmax_over_the_steps() -> None:
    weight = random_weight(8, 64)
    scales = group_scales(weight, 4, 32, search=False)
    assert torch.equal(scales, (weight.view(8, 2, 32).abs().amax(2) * (2 / 15)).half())
    channel = group_scales(weight, 8, -1, search=False, dtype=torch.bfloat16)
    assert torch.equal(channel, (weight.abs().amax(1, keepdim=True) / 127.5).bfloat16())


def test_the_range_search_finds_the_best_of_its_shrinks() -> None:
    weight = random_weight(3, 32) ** 3
    found = group_scales(weight, 4, 32, search=True).float()
    full = weight.abs().amax(1, keepdim=True) * (2 / 15)

    def loss(scales: torch.Tensor) -> torch.Tensor:
        return ((weight / scales).round().clamp(-8, 7) * scales - weight).abs().double().pow(NORM).sum(1)

    shrinks = [15 / 14, *(1 - step / 100 for step in range(81))]
    tried = torch.stack([loss((full * shrink).half().float()) for shrink in shrinks])
    torch.testing.assert_close(loss(found), tried.amin(0), rtol=1e-3, atol=0)
    assert bool((found < full).any())


def test_the_range_search_favours_important_columns() -> None:
    weight = random_weight(16, 64)
    weight[:, 0] *= 6
    importance = torch.ones(64)
    importance[0] = 1e6
    errors = []
    for chosen in (None, importance):
        scales = group_scales(weight, 4, 64, search=True, importance=chosen)
        errors.append((nearest(weight, scales, 4, 64).dequantize() - weight)[:, 0].abs().mean())
    assert errors[1] < 0.5 * errors[0]


def test_rounding_uses_the_stored_scales() -> None:
    weight = random_weight(8, 64)
    result = round_to_nearest(weight, 4, 32, search=True)
    assert result.scales.dtype == torch.float16
    again = nearest(result.dequantize(), result.scales, 4, 32)
    assert torch.equal(again.codes, result.codes)
