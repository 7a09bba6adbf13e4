"""Grids, rounding and GPTQ on single matrices, against an independent float64 GPTQ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from llmkit.checkpoint.quantized_weight import QuantizedWeight, Scheme
from llmkit.kernels.activation_quant import FP8
from llmkit.model.parameter import Parameter, SourceTensor
from llmkit.quant.algorithm import QuantizeResult, QuantTarget
from llmkit.quant.gptq import GptqQuantizer, asymmetric_target, gptq
from llmkit.quant.grid import ERROR_NORM, FULL_SEARCH, Grid, fit_grid, round_to_nearest
from llmkit.quant.input_stats import MAX_SAMPLE_ROWS, InputStats


@dataclass
class Result:
    weight: QuantizedWeight
    dampening_frac: float | None


def input_stats_of(hessian: torch.Tensor) -> InputStats:
    input_stats = InputStats(len(hessian), {"hessian"})
    input_stats.num_tokens = 1
    input_stats.hessian = hessian.clone()
    return input_stats


def run_gptq(weight: torch.Tensor, hessian: torch.Tensor, scheme: Scheme, **options: Any) -> Result:
    if options:
        grid = fit_grid(
            weight, scheme, torch.float16, FULL_SEARCH, hessian.diagonal().clamp(min=0).sqrt()
        )
        found, dampening_frac, lost = gptq(weight, input_stats_of(hessian), grid, **options)
        quantized = QuantizeResult(
            found, "gptq", dampening_frac, None, lost / (((weight @ hessian) * weight).sum()).item()
        )
    else:
        row = Parameter(
            "layers.0.attn.o.weight",
            (SourceTensor("o", tuple(weight.shape)),),
            (0,),
            is_linear=True,
        )
        quantized = GptqQuantizer().quantize(
            QuantTarget(row, "attn.o", scheme, torch.float16), weight, input_stats_of(hessian)
        )
    if quantized.dampening_frac is not None:  # what the loop lost is what the definition says
        measured = relative_error(weight, quantized.weight.dequantize(), hessian)
        assert quantized.error == pytest.approx(measured, rel=0.02, abs=1e-6)
    return Result(quantized.weight, quantized.dampening_frac)


def relative_error(weight: torch.Tensor, quantized: torch.Tensor, hessian: torch.Tensor) -> float:
    delta = weight - quantized
    return (((delta @ hessian) * delta).sum() / ((weight @ hessian) * weight).sum()).item()


def correlated_inputs(columns: int, tokens: int = 1024, seed: int = 0) -> torch.Tensor:
    """Inputs with strong correlations and columns of very different size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    size = torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=generator)]
    return torch.randn(tokens, columns, generator=generator) @ mixing * size


def hessian_of(inputs: torch.Tensor) -> torch.Tensor:
    input_stats = InputStats(inputs.shape[1], {"hessian"})
    input_stats.add(inputs)
    assert input_stats.hessian is not None
    return input_stats.hessian


def random_weight(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def naive_gptq(
    weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, order: torch.Tensor
) -> torch.Tensor:
    """Optimal Brain Surgeon, column by column, in O(in^3).

    The inverse Hessian is updated by Gaussian elimination.

    It inverts H of the columns not yet rounded, which is what GPTQ's Cholesky factor stands for.
    """
    weight = weight.double().clone()
    hessian = hessian.double().clone()
    hessian += torch.eye(len(hessian), dtype=torch.float64) * (0.01 * hessian.diagonal().mean())
    values = torch.empty(weight.shape, dtype=torch.uint8 if grid.scheme.kind == "int" else FP8)
    left = order.tolist()
    while left:
        inverse = torch.linalg.inv(hessian[left][:, left])
        column = left[0]
        group = 0 if grid.scheme.group_size == -1 else column // grid.scheme.group_size
        scale = grid.scales[:, group].double()
        zero = grid.zeros[:, group].double()
        if grid.scheme.kind == "int":
            code = ((weight[:, column] / scale).round() + zero).clamp(0, 2**grid.scheme.bits - 1)
        else:
            code = (weight[:, column] / scale).clamp(-448, 448).float().to(FP8).double()
        values[:, column] = code.to(values.dtype)
        error = (weight[:, column] - (code - zero) * scale) / inverse[0, 0]
        weight[:, left] -= error[:, None] * inverse[0]
        left = left[1:]
    return values


SCHEMES = [
    Scheme(4, 16),
    Scheme(8, 16),
    Scheme(4, 16, symmetric=False),
    Scheme(8),
    Scheme(8, kind="float"),
]


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_gptq_agrees_with_an_independent_float64_gptq(scheme: Scheme, act_order: bool) -> None:
    columns = 64
    hessian = hessian_of(correlated_inputs(columns))
    weight = random_weight(24, columns)
    result = run_gptq(weight, hessian, scheme, act_order=act_order, block_size=16)
    grid = fit_grid(weight, scheme, torch.float16, FULL_SEARCH, hessian.diagonal().sqrt())
    order = (
        torch.argsort(hessian.diagonal(), descending=True, stable=True)
        if act_order
        else torch.arange(columns)
    )
    expected = naive_gptq(weight, hessian, grid, order)
    assert torch.equal(result.weight.scales, grid.scales)
    assert torch.equal(result.weight.zeros, grid.zeros)
    assert result.dampening_frac == 0.01
    assert (result.weight.q.float() == expected.float()).float().mean() > 0.99
    ours = relative_error(weight, result.weight.dequantize(), hessian)
    reference = QuantizedWeight(expected, grid.scales, grid.zeros, scheme)
    assert ours == pytest.approx(relative_error(weight, reference.dequantize(), hessian), rel=0.03)


def test_gptq_block_size_does_not_matter() -> None:
    hessian = hessian_of(correlated_inputs(96))
    weight = random_weight(16, 96)
    one = run_gptq(weight, hessian, Scheme(4, 32), block_size=96).weight.q
    two = run_gptq(weight, hessian, Scheme(4, 32), block_size=7).weight.q
    assert (one == two).float().mean() > 0.995


@pytest.mark.parametrize("group", [32, -1])
def test_gptq_beats_rtn_on_the_weighted_error(group: int) -> None:
    hessian = hessian_of(correlated_inputs(128))
    weight = random_weight(64, 128)
    ours = relative_error(
        weight, run_gptq(weight, hessian, Scheme(4, group)).weight.dequantize(), hessian
    )
    searched = relative_error(
        weight,
        round_to_nearest(weight, Scheme(4, group), torch.float16, FULL_SEARCH).dequantize(),
        hessian,
    )
    plain = relative_error(
        weight, round_to_nearest(weight, Scheme(4, group), torch.float16).dequantize(), hessian
    )
    assert ours < 0.5 * min(searched, plain)


def test_act_order_helps_and_leaves_the_groups_in_place() -> None:
    hessian = hessian_of(correlated_inputs(128))
    weight = random_weight(64, 128)
    ordered = run_gptq(weight, hessian, Scheme(4, 32))
    plain = run_gptq(weight, hessian, Scheme(4, 32), act_order=False)
    assert torch.equal(ordered.weight.scales, plain.weight.scales)
    errors = [
        relative_error(weight, result.weight.dequantize(), hessian) for result in (ordered, plain)
    ]
    assert errors[0] < errors[1]


def test_gptq_does_not_change_its_inputs() -> None:
    hessian = hessian_of(correlated_inputs(32))
    weight = random_weight(8, 32)
    hessian[3] = 0
    hessian[:, 3] = 0
    before = hessian.clone(), weight.clone()
    run_gptq(weight, hessian, Scheme(4, 32))
    assert torch.equal(hessian, before[0])
    assert torch.equal(weight, before[1])


def test_input_stats_are_means_over_all_batches() -> None:
    inputs = correlated_inputs(16, tokens=300)
    stats = InputStats(16, {"hessian", "sample"})
    for part in (inputs[:100], inputs[100:101], inputs[101:101], inputs[101:].view(199, 1, 16)):
        stats.add(part)
    assert stats.num_tokens == 300
    torch.testing.assert_close(stats.hessian, 2 / 300 * inputs.T @ inputs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stats.max_abs, inputs.abs().amax(0))
    torch.testing.assert_close(stats.mean_abs, inputs.abs().mean(0))
    assert 1 <= len(stats.sample) <= MAX_SAMPLE_ROWS
    assert all(bool((row == inputs).all(1).any()) for row in stats.sample)
    scales = torch.linspace(0.5, 2, 16)
    stats.divide_inputs(scales)
    scaled = inputs / scales
    torch.testing.assert_close(stats.hessian, 2 / 300 * scaled.T @ scaled, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stats.max_abs, scaled.abs().amax(0))
    torch.testing.assert_close(stats.mean_abs, scaled.abs().mean(0))


def test_gptq_sets_a_dead_column_to_zero() -> None:
    inputs = correlated_inputs(64)
    inputs[:, 5] = 0
    weight = random_weight(16, 64)
    weight[:, 5] = 100.0
    result = run_gptq(weight, hessian_of(inputs), Scheme(4, 32))
    assert result.dampening_frac == 0.01
    dense = result.weight.dequantize()
    assert bool((dense[:, 5] == 0).all())
    assert relative_error(weight, dense, hessian_of(inputs)) < 0.02


def test_gptq_dampening_grows_until_the_hessian_is_positive_definite() -> None:
    indefinite = torch.eye(32) * 2
    indefinite[0, 1] = indefinite[1, 0] = (
        2.07  # eigenvalues 4.07 and -0.07: damping 0.05 * 2 is enough, 0.025 * 2 not
    )
    result = run_gptq(random_weight(8, 32), indefinite, Scheme(4, 32))
    assert result.dampening_frac == pytest.approx(0.05)


@pytest.mark.parametrize("broken", [torch.full((32, 32), torch.nan), -torch.eye(32)])
def test_gptq_falls_back_to_rtn_for_a_hopeless_hessian(broken: torch.Tensor) -> None:
    weight = random_weight(8, 32)
    result = run_gptq(weight, broken, Scheme(4, 32))
    assert result.dampening_frac is None
    assert torch.equal(
        result.weight.q,
        Grid(result.weight.scales, result.weight.zeros, Scheme(4, 32)).round(weight).q,
    )
    assert bool(torch.isfinite(result.weight.dequantize()).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("search", [False, True])
def test_grid_of_zero_and_tiny_groups_has_a_usable_scale(search: bool, dtype: torch.dtype) -> None:
    weight = random_weight(4, 64)
    weight[1] = 0
    weight[2, :32] = 1e-12
    result = round_to_nearest(weight, Scheme(4, 32), dtype, FULL_SEARCH if search else None)
    assert bool((result.scales >= torch.finfo(dtype).tiny).all())
    assert bool(torch.isfinite(result.scales).all())
    assert bool((result.dequantize()[1] == 0).all())
    assert bool((result.q[1] == 8).all())


def test_gptq_of_a_zero_row_stays_zero() -> None:
    weight = random_weight(8, 64)
    weight[3] = 0
    dense = run_gptq(weight, hessian_of(correlated_inputs(64)), Scheme(4, 32)).weight.dequantize()
    assert bool((dense[3] == 0).all())
    assert bool(torch.isfinite(dense).all())


@pytest.mark.parametrize("value", [0.3, -0.3])
@pytest.mark.parametrize("bits", [4, 8])
def test_grid_keeps_a_constant_row_almost_exactly(value: float, bits: int) -> None:
    weight = torch.full((2, 64), value)
    result = round_to_nearest(weight, Scheme(bits, 64), torch.float16, FULL_SEARCH).dequantize()
    assert (result - weight).abs().max() < 0.01 * abs(value)


def test_grid_of_the_full_range_covers_twice_absmax() -> None:
    weight = random_weight(8, 64)
    scales = fit_grid(weight, Scheme(4, 32), torch.float16).scales
    assert torch.equal(scales, (weight.view(8, 2, 32).abs().amax(2) * (2 / 15)).half())
    channel = fit_grid(weight, Scheme(8), torch.bfloat16).scales
    assert torch.equal(channel, (weight.abs().amax(1, keepdim=True) / 127.5).bfloat16())


def test_range_search_finds_the_best_factor() -> None:
    weight = random_weight(64, 32) ** 3
    found = fit_grid(weight, Scheme(4, 32), torch.float16, FULL_SEARCH).scales.float()
    full = weight.abs().amax(1, keepdim=True) * (2 / 15)

    def loss(scales: torch.Tensor) -> torch.Tensor:
        return (
            ((weight / scales).round().clamp(-8, 7) * scales - weight)
            .abs()
            .double()
            .pow(ERROR_NORM)
            .sum(1)
        )

    shrinks = [15 / 14, *(1 - step / 100 for step in range(81))]
    tried = torch.stack([loss((full * shrink).half().float()) for shrink in shrinks]).amin(0)
    # Coarse, then fine: the best of all hundredths in most groups, and close to it in the others.
    assert bool((loss(found) <= 1.5 * tried).all())
    assert (loss(found) / tried).mean() < 1.02
    assert bool((found < full).any())


def test_range_search_favours_important_columns() -> None:
    weight = random_weight(16, 64)
    weight[:, 0] *= 6
    importance = torch.ones(64)
    importance[0] = 1e6
    errors = []
    for chosen in (None, importance):
        grid = fit_grid(weight, Scheme(4, 64), torch.float16, FULL_SEARCH, chosen)
        errors.append((grid.round(weight).dequantize() - weight)[:, 0].abs().mean())
    assert errors[1] < 0.5 * errors[0]


def test_grid_rounds_with_the_stored_scales() -> None:
    weight = random_weight(8, 64)
    result = round_to_nearest(weight, Scheme(4, 32), torch.float16, FULL_SEARCH)
    assert result.scales.dtype == torch.float16
    again = Grid(result.scales, result.zeros, result.scheme).round(result.dequantize())
    assert torch.equal(again.q, result.q)


def test_asymmetric_grid_covers_the_range_and_zero() -> None:
    weight = random_weight(8, 64).abs() + 0.01
    weight[0] *= -1
    grid = fit_grid(weight, Scheme(4, 32, symmetric=False), torch.float16)
    assert set(grid.zeros.unique().tolist()) == {0, 15}
    dense = grid.round(weight).dequantize()
    assert ((dense - weight).abs() <= grid.scales.float().amax() * 0.51).all()
    assert bool((grid.round(torch.zeros(8, 64)).dequantize() == 0).all())


def test_fp8_rounds_as_torch_does() -> None:
    weight = random_weight(4, 64)
    rounded = round_to_nearest(weight, Scheme(8, kind="float", inputs="token"), torch.float32)
    scale = weight.abs().amax(1, keepdim=True) / 448
    assert rounded.q.dtype == FP8
    torch.testing.assert_close(rounded.dequantize(), (weight / scale).to(FP8).float() * scale)


def test_asymmetric_target_is_the_least_squares_solution() -> None:
    """The weight whose output on the inputs is closest to the dense output on the dense inputs."""
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(500, 32, generator=generator)
    dense_inputs = inputs + torch.randn(500, 32, generator=generator)
    weight = torch.randn(16, 32, generator=generator)
    seen = InputStats(32, {"hessian", "residual"})
    for rows in (slice(0, 100), slice(100, 350), slice(350, 500)):
        seen.add(inputs[rows], dense_inputs[rows])
    hessian = seen.hessian
    residual = seen.take_residual()
    assert hessian is not None and residual is not None
    expected = torch.linalg.lstsq(inputs, dense_inputs @ weight.T).solution.T
    target = asymmetric_target(weight, hessian, residual, 1.0, 1e-7)
    torch.testing.assert_close(target, expected, atol=1e-3, rtol=0)
    assert (target - weight).abs().max() > 0.5
    half = asymmetric_target(weight, hessian, residual, 0.5, 1e-7)
    torch.testing.assert_close(half, (weight + target) / 2)


def test_residual_follows_scaled_inputs() -> None:
    generator = torch.Generator().manual_seed(3)
    inputs, dense_inputs = torch.randn(2, 60, 8, generator=generator)
    scales = torch.rand(8, generator=generator) + 0.5
    scaled, seen = (InputStats(8, {"hessian", "residual"}) for _ in "12")
    scaled.add(inputs / scales, dense_inputs / scales)
    seen.add(inputs, dense_inputs)
    seen.divide_inputs(scales)
    assert seen.residual is not None and scaled.residual is not None
    torch.testing.assert_close(seen.residual, scaled.residual)
