"""Float grids: codes against a search in plain Python, scales against what their formats hold."""

from __future__ import annotations

import math

import pytest
import torch

from llmkit.checkpoint.quantized_weight import FP4_VALUES, QuantizedWeight, Scheme
from llmkit.model.parameter import Parameter, SourceTensor
from llmkit.quant.algorithm import QuantizeJob, QuantTarget
from llmkit.quant.float_scales import fp4_codes, nvfp4_global_scale
from llmkit.quant.gptq import GptqQuantizer
from llmkit.quant.grid import FULL_SEARCH, Grid, fit_grid, round_to_nearest
from llmkit.quant.input_stats import InputStats, fill_unseen_experts
from llmkit.quant.number_formats import NUMBER_FORMATS
from llmkit.quant.quantize_linear import quantize_linear
from llmkit.quant.round_to_nearest import RtnQuantizer, static_input_scale

FLOAT32 = torch.float32
# E2M1 and e4m3 by code, from their definitions.
E2M1 = [*FP4_VALUES, *(-value for value in FP4_VALUES)]


def e4m3(code: int) -> float:
    exponent, mantissa = code >> 3 & 15, code & 7
    value = mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -value if code & 128 else value


E4M3 = [e4m3(code) for code in range(127)]


def scheme_of(name: str) -> Scheme:
    return NUMBER_FORMATS[name].scheme


def random_weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Weights of which some are large and some groups are tiny or zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    weight *= 1 + 9 * (torch.rand(rows, columns, generator=generator) > 0.99)
    weight[0, :32] = 0
    weight[1, :32] *= 1e-6
    return weight


def target_of(name: str, rows: tuple[int, ...], columns: int) -> QuantTarget:
    """A linear layer whose rows come from checkpoint tensors of these numbers of rows."""
    sources = tuple(SourceTensor(f"m{i}.weight", (count, columns)) for i, count in enumerate(rows))
    parameter = Parameter("layers.0.attn.qkv.weight", sources, (0,), is_linear=True)
    return QuantTarget(parameter, "attn.qkv", scheme_of(name), FLOAT32)


def correlated_stats(columns: int, seed: int = 1) -> InputStats:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(4 * columns, columns, generator=generator)
    stats = InputStats(columns, {"hessian"})
    stats.add(inputs @ mixing + inputs)
    return stats


def test_fp4_codes_are_the_indices_of_the_values() -> None:
    assert fp4_codes(torch.tensor(E2M1)).tolist() == list(range(16))


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "mxfp4a16"])
@pytest.mark.parametrize("search", [None, FULL_SEARCH])
def test_fp4_codes_are_the_nearest_values(name: str, search: object) -> None:
    scheme = scheme_of(name)
    weight = random_weight(3, 96)
    quantized = round_to_nearest(weight, scheme, FLOAT32, search and FULL_SEARCH)
    for row in range(3):
        for column in range(96):
            scale = quantized.scales[row, column // scheme.group_size].item()
            step = weight[row, column].item() / scale
            code = int(quantized.q[row, column])
            nearest = min(abs(value - step) for value in E2M1)
            assert abs(E2M1[code] - step) == pytest.approx(nearest, abs=1e-6)


def test_nvfp4_scales_are_e4m3_numbers_times_the_global_scale() -> None:
    weight = random_weight(8, 64)
    scheme = scheme_of("nvfp4")
    grid = fit_grid(weight, scheme, FLOAT32)
    assert grid.global_scale is not None and grid.global_scale.shape == (1,)
    assert grid.global_scale.item() == pytest.approx(weight.abs().max().item() / (448 * 6))
    for row in range(8):
        for group in range(4):
            part = weight[row, 16 * group : 16 * (group + 1)]
            wanted = part.abs().max().item() / 6 / grid.global_scale.item()
            nearest = min(E4M3[1:], key=lambda number: abs(number - wanted))
            stored = grid.scales[row, group].item() / grid.global_scale.item()
            assert stored == pytest.approx(nearest, rel=1e-6)
    # The search chooses among the same numbers, by the squared error.
    searched = fit_grid(weight, scheme, FLOAT32, FULL_SEARCH)
    steps = (searched.scales / grid.global_scale).flatten().tolist()
    for step in steps:
        nearest = min(E4M3[1:], key=lambda number: abs(number - step))
        assert step == pytest.approx(nearest, rel=1e-6)


@pytest.mark.parametrize(("name", "largest_exponent"), [("mxfp4", 2), ("mxfp8", 8)])
def test_mx_scales_are_the_powers_of_two_of_ocp(name: str, largest_exponent: int) -> None:
    weight = random_weight(8, 64)
    grid = fit_grid(weight, scheme_of(name), FLOAT32)
    searched = fit_grid(weight, scheme_of(name), FLOAT32, FULL_SEARCH)
    for row in range(8):
        for group in range(2):
            largest = weight[row, 32 * group : 32 * (group + 1)].abs().max().item()
            scale = grid.scales[row, group].item()
            assert math.frexp(scale)[0] == 0.5
            if largest:
                assert scale == 2.0 ** (math.floor(math.log2(largest)) - largest_exponent)
            assert searched.scales[row, group].item() in (scale, 2 * scale)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "mxfp8"])
def test_scale_search_finds_the_smallest_weighted_error(name: str) -> None:
    scheme = scheme_of(name)
    weight = random_weight(16, 64)
    importance = torch.rand(64, generator=torch.Generator().manual_seed(3)) + 0.1

    def loss(quantized: QuantizedWeight) -> torch.Tensor:
        errors = (quantized.dequantize() - weight).square() * importance
        return errors.view(16, -1, scheme.group_size).sum(dim=2)

    plain = fit_grid(weight, scheme, FLOAT32)
    searched = fit_grid(weight, scheme, FLOAT32, FULL_SEARCH, importance)
    plain_loss = loss(plain.round(weight))
    searched_loss = loss(searched.round(weight))
    assert bool((searched_loss <= plain_loss).all())
    assert searched_loss.sum() < 0.98 * plain_loss.sum()
    # No neighbour of a scale that was searched is better.
    for factor in (2.0,) if scheme.scale_format == "e8m0" else (1 / 0.9, 0.9):
        other = plain.scales * factor
        if plain.global_scale is not None:
            steps = (other / plain.global_scale).clamp(max=448).to(torch.float8_e4m3fn).float()
            other = steps.clamp(min=2.0**-9) * plain.global_scale
        grid = Grid(other, plain.zeros, scheme, plain.global_scale)
        assert bool((searched_loss <= loss(grid.round(weight)) + 1e-12).all())


def test_nvfp4_global_scale_survives_being_stored_as_its_inverse() -> None:
    largest = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 10
    scales = torch.stack([nvfp4_global_scale(value) for value in largest[:100]])
    assert torch.equal(1 / (1 / scales), scales)
    assert nvfp4_global_scale(torch.zeros(())).item() == 1


def test_fp8_blocks_share_a_scale_and_begin_with_each_tensor() -> None:
    target = target_of("fp8-block", (192, 64, 40), 320)
    weight = random_weight(296, 320)
    result = RtnQuantizer().quantize(target, weight, InputStats(320, frozenset()))
    scales = result.weight.scales
    assert scales.shape == (296, 3)
    for first, last in ((0, 128), (128, 192), (192, 256), (256, 296)):
        for group in range(3):
            block = weight[first:last, 128 * group : 128 * (group + 1)]
            expected = torch.full((last - first,), block.abs().max().item() / 448)
            torch.testing.assert_close(scales[first:last, group], expected)
    quantized = result.weight.q.float()
    exact = weight / scales.repeat_interleave(128, dim=1)[:, :320]
    numbers = torch.tensor(sorted({*E4M3, *(-number for number in E4M3)}))
    distance = (exact[:, :8, None] - numbers).abs().min(dim=2).values
    torch.testing.assert_close((quantized - exact)[:, :8].abs(), distance, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["nvfp4a16", "mxfp4a16", "mxfp8", "fp8-block"])
def test_gptq_on_float_grids_loses_less_than_rounding(name: str) -> None:
    columns = 160
    target = target_of(name, (48, 16), columns)
    weight = random_weight(64, columns)
    hessian = correlated_stats(columns).hessian
    assert hessian is not None

    def lost(quantized: QuantizedWeight) -> float:
        error = quantized.dequantize() - weight
        return float(((error @ hessian) * error).sum())

    rounded = RtnQuantizer(FULL_SEARCH).quantize(target, weight, correlated_stats(columns))
    result = GptqQuantizer().quantize(target, weight, correlated_stats(columns))
    assert result.method == "gptq"
    assert lost(result.weight) < 0.8 * lost(rounded.weight)
    assert result.error == pytest.approx(
        lost(result.weight) / float(((weight @ hessian) * weight).sum()), rel=0.02
    )
    # Values are numbers of the grid, and the scales those of the format.
    assert result.weight.q.dtype == rounded.weight.q.dtype
    assert (result.weight.global_scale is None) == (rounded.weight.global_scale is None)


def test_nvfp4_inputs_get_a_scale_from_calibration() -> None:
    columns = 32
    stats = correlated_stats(columns)
    job_stats = correlated_stats(columns)
    target = target_of("nvfp4", (16,), columns)
    result = quantize_linear(
        RtnQuantizer(), QuantizeJob(target, random_weight(16, columns), job_stats)
    )
    scale = result.weight.input_scale
    assert scale is not None
    assert scale.item() == pytest.approx(stats.max_abs.max().item() / (448 * 6))
    unseen = InputStats(columns, frozenset())
    assert static_input_scale(unseen.max_abs, target.scheme).item() == 1


def test_experts_without_tokens_get_the_scale_of_the_others_inputs() -> None:
    columns = 32
    stats = {f"mlp.experts.{i}.down": correlated_stats(columns, seed=i) for i in range(3)}
    stats["mlp.experts.3.down"] = InputStats(columns, frozenset())
    stats["mlp.experts.3.gate_up"] = InputStats(columns, frozenset())
    stats["attn.o"] = InputStats(columns, frozenset())
    fill_unseen_experts(stats)
    largest = max(stats[f"mlp.experts.{i}.down"].max_abs.max().item() for i in range(3))
    scheme = scheme_of("nvfp4")
    scale = static_input_scale(stats["mlp.experts.3.down"].max_abs, scheme).item()
    assert scale == pytest.approx(largest / (448 * 6))
    seen = static_input_scale(stats["mlp.experts.0.down"].max_abs, scheme).item()
    assert seen == pytest.approx(stats["mlp.experts.0.down"].max_abs.max().item() / (448 * 6))
    for name in ("mlp.experts.3.gate_up", "attn.o"):
        assert static_input_scale(stats[name].max_abs, scheme).item() == 1
