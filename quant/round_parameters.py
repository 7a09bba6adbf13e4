"""Writes parameters without calibration, one tensor at a time: rounded to nearest, or cast."""

from __future__ import annotations

import torch

from llmkit.checkpoint.quantized_weight import QuantizedWeight
from llmkit.checkpoint.tensor_reader import row_chunks
from llmkit.common.progress import Progress
from llmkit.model.parameter import Parameter
from llmkit.model.parameter_table import parameters
from llmkit.quant.algorithm import QuantTarget
from llmkit.quant.grid import RangeSearch, round_to_nearest
from llmkit.quant.input_stats import sum_of_squares
from llmkit.quant.parameter_writer import ParameterWriter
from llmkit.quant.quantize_linear import Entry, quant_target, report_entry


@torch.no_grad()
def round_parameters(
    writer: ParameterWriter, device: torch.device, progress: Progress
) -> list[Entry]:
    """Write all parameters: quantized ones are rounded to nearest, the others cast.

    Returns the report's entries of the linears. Their error is that of the weights themselves.
    """
    rows = parameters(writer.spec)
    entries: list[Entry] = []
    progress.start("write", len(rows), "tensors")
    for parameter in rows:
        entries += write_parameter(parameter, writer, device)
        writer.commit()
        progress.advance(1, parameter.name)
    progress.finish()
    return entries


def write_parameter(
    parameter: Parameter,
    writer: ParameterWriter,
    device: torch.device,
    search: RangeSearch | None = None,
) -> list[Entry]:
    """Write one parameter, rounded or cast, and return the report's entry if it was rounded.

    search: the range search for schemes of fewer than 8 bits.
    """
    target = quant_target(parameter, writer.quantization)
    if target is None:
        writer.write_cast(parameter)
        return []
    if target.scheme.bits >= 8:
        search = None
    return [_round_parameter(target, writer, device, search)]


def _round_parameter(
    target: QuantTarget, writer: ParameterWriter, device: torch.device, search: RangeSearch | None
) -> Entry:
    """Round a parameter's tensors, a chunk of rows at a time, and write them."""
    lost = 0.0
    energy = 0.0
    for tensor in target.parameter.source_names:
        chunks: list[QuantizedWeight] = []
        for rows in row_chunks(writer.source.tensors[tensor]):
            dense = writer.source.read_slice(tensor, [rows], 0).to(device, torch.float32)
            quantized = round_to_nearest(dense, target.scheme, target.scale_dtype, search)
            lost += sum_of_squares(dense - quantized.dequantize())
            energy += sum_of_squares(dense)
            chunks.append(quantized.to("cpu"))
        weight = QuantizedWeight(
            torch.cat([chunk.q for chunk in chunks]),
            torch.cat([chunk.scales for chunk in chunks]),
            torch.cat([chunk.zeros for chunk in chunks]),
            target.scheme,
        )
        writer.write_quantized_tensor(tensor, weight)
    return report_entry(target, "rtn", lost / energy if energy else 0.0)
