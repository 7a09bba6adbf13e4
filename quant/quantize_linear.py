"""Quantizes one linear, and makes its entry in the report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from llmkit.checkpoint.quantized_weight import QuantizationConfig, QuantizedWeight
from llmkit.model.checkpoint_tensors import scheme_of
from llmkit.model.parameter import Parameter
from llmkit.quant.algorithm import QuantizeJob, Quantizer, QuantizeResult, QuantTarget
from llmkit.quant.gguf_quantizer import GgufQuantizer
from llmkit.quant.grid import FULL_SEARCH
from llmkit.quant.input_stats import InputStats, lost_fraction, output_energy, sum_of_squares
from llmkit.quant.methods import scale_dtype
from llmkit.quant.round_to_nearest import RtnQuantizer, static_input_scale

ERROR_ROWS = 1024  # rows of a weight whose error is measured at a time

Entry = dict[str, Any]  # the report's entry of a linear


def quant_target(
    parameter: Parameter, quantization: QuantizationConfig | None
) -> QuantTarget | None:
    """The target of a row of the parameter table; None when it is not quantized."""
    scheme = scheme_of(parameter, parameter.source_names[0], quantization)
    if scheme is None or quantization is None:
        return None
    name = parameter.module.removeprefix(f"layers.{parameter.layers[0]}.")
    return QuantTarget(parameter, name, scheme, scale_dtype(quantization.format, scheme))


def quantize_linear(quantizer: Quantizer, job: QuantizeJob) -> QuantizeResult:
    """Quantize one linear and measure its error.

    A job with a fallback reason is rounded to nearest, with a range search.
    """
    if job.fallback is not None:
        rtn: Quantizer = RtnQuantizer(FULL_SEARCH)
        if isinstance(quantizer, GgufQuantizer):
            rtn = quantizer.without_calibration()
        result = rtn.quantize(job.target, job.weight, job.input_stats)
        result.fallback = job.fallback
    else:
        result = quantizer.quantize(job.target, job.weight, job.input_stats)
    if job.target.scheme.has_input_scale:
        result.weight.input_scale = static_input_scale(job.input_stats.max_abs, job.target.scheme)
    if result.error is None:
        assert isinstance(result.weight, QuantizedWeight), "GgufQuantizer measures its errors"
        result.error = output_error(job.weight, result.weight, job.input_stats)
    result.num_tokens = job.input_stats.num_tokens
    return result


def solve_locally(quantizer: Quantizer, jobs: Iterable[QuantizeJob]) -> Iterator[QuantizeResult]:
    """The default solver: one job after the other, in this process."""
    return (quantize_linear(quantizer, job) for job in jobs)


def output_error(
    weight: torch.Tensor, quantized: QuantizedWeight, input_stats: InputStats
) -> float:
    """The fraction of the output's energy that quantizing loses, a chunk of rows at a time.

    With a Hessian it is tr(dW H dW') / tr(W H W'). Else it is measured on sampled inputs, and
    without those on the weights themselves.
    """
    sample = None
    if input_stats.hessian is None and input_stats.has_sample:
        sample = input_stats.sample

    def energy(rows: torch.Tensor) -> float:
        if input_stats.hessian is not None and input_stats.num_tokens:
            return output_energy(rows, input_stats.hessian)
        return sum_of_squares(rows if sample is None else sample @ rows.T)

    lost = 0.0
    total = 0.0
    for start in range(0, len(weight), ERROR_ROWS):
        rows = slice(start, start + ERROR_ROWS)
        total += energy(weight[rows])
        lost += energy(weight[rows] - quantized.rows(rows).dequantize())
    return lost_fraction(lost, total)


def report_entry(
    target: QuantTarget,
    method: str,
    error: float,
    num_tokens: int = 0,
    dampening_frac: float | None = None,
    fallback: str | None = None,
) -> Entry:
    """The report's entry of a linear. fallback: why it was not quantized by the chosen method."""
    return {
        "name": target.parameter.module,
        "tensors": list(target.parameter.source_names),
        "shape": list(target.parameter.shape),
        "method": method,
        "bits": target.scheme.bits,
        "group_size": target.scheme.group_size,
        "error": error,
        "tokens": num_tokens,
        "damp": dampening_frac,
        "fallback": fallback,
    }
