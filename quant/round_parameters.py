"""Writes parameters without calibration, one tensor at a time: rounded to nearest, or cast."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from llmkit.checkpoint.quantized_weight import QuantizedWeight, Scheme
from llmkit.checkpoint.tensor_reader import row_chunks
from llmkit.common.progress import Progress
from llmkit.model.parameter import Parameter
from llmkit.model.parameter_table import parameters
from llmkit.model.weight_loader import read_parameter
from llmkit.quant.algorithm import QuantTarget
from llmkit.quant.gguf_parameter_writer import GgufParameterWriter
from llmkit.quant.gguf_quantizer import GgufQuantizer
from llmkit.quant.grid import RangeSearch, round_to_nearest
from llmkit.quant.input_stats import InputStats, sum_of_squares
from llmkit.quant.parameter_writer import ParameterWriter
from llmkit.quant.quantize_linear import Entry, quant_target, report_entry


@torch.no_grad()
def round_parameters(
    writer: ParameterWriter,
    device: torch.device,
    progress: Progress,
    search: RangeSearch | None = None,
) -> list[Entry]:
    """Write all parameters: quantized ones are rounded to nearest, the others cast.

    search: as of `write_parameter`.
    Returns the report's entries of the linears. Their error is that of the weights themselves.
    """
    rows = parameters(writer.spec)
    entries: list[Entry] = []
    progress.start("write", len(rows), "tensors")
    for parameter in rows:
        entries += write_parameter(parameter, writer, device, search)
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

    search: the range search for schemes of fewer than 8 bits, and of scales with few values.
    """
    target = quant_target(parameter, writer.quantization)
    if target is None:
        writer.write_cast(parameter)
        return []
    if isinstance(writer, GgufParameterWriter):
        return [_round_gguf_parameter(target, writer, device)]
    if target.scheme.bits >= 8 and target.scheme.scale_format == "float":
        search = None
    return [_round_parameter(target, writer, device, search)]


def _round_gguf_parameter(
    target: QuantTarget, writer: GgufParameterWriter, device: torch.device
) -> Entry:
    """Quantize a parameter to GGUF's types without calibration, and write it."""
    gguf = writer.gguf
    quantizer = GgufQuantizer(gguf.types, gguf.export.places, calibrated=False)
    weight = read_parameter(writer.source, target.parameter, torch.float32, device)
    result = quantizer.quantize(target, weight, InputStats(weight.shape[1], frozenset()))
    assert result.error is not None
    writer.write_quantized(target.parameter, result.weight.to("cpu"))
    return report_entry(target, result.method, result.error)


def _round_parameter(
    target: QuantTarget, writer: ParameterWriter, device: torch.device, search: RangeSearch | None
) -> Entry:
    """Round a parameter's tensors, a chunk of rows at a time, and write them."""
    lost = 0.0
    energy = 0.0
    max_abs = None
    if _needs_max_abs(target.scheme):
        max_abs = _max_abs(target, writer, device)
    for tensor in target.parameter.source_names:
        chunks: list[QuantizedWeight] = []
        for dense in _row_chunks(tensor, target, writer, device):
            quantized = round_to_nearest(
                dense, target.scheme, target.scale_dtype, search, max_abs=max_abs
            )
            lost += sum_of_squares(dense - quantized.dequantize())
            energy += sum_of_squares(dense)
            chunks.append(quantized.to("cpu"))
        weight = QuantizedWeight(
            torch.cat([chunk.q for chunk in chunks]),
            torch.cat([chunk.scales for chunk in chunks]),
            torch.cat([chunk.zeros for chunk in chunks]),
            target.scheme,
            global_scale=chunks[0].global_scale,
        )
        writer.write_quantized_tensor(tensor, weight)
    return report_entry(target, "rtn", lost / energy if energy else 0.0)


def _needs_max_abs(scheme: Scheme) -> bool:
    """Whether scales depend on the whole weight. Tensors that a model fuses then share a scale."""
    return scheme.block_rows == -1 or scheme.scale_format == "e4m3"


def _max_abs(target: QuantTarget, writer: ParameterWriter, device: torch.device) -> torch.Tensor:
    """The largest magnitude of all tensors of a parameter."""
    found = [
        dense.abs().max()
        for tensor in target.parameter.source_names
        for dense in _row_chunks(tensor, target, writer, device)
    ]
    return torch.stack(found).max()


def _row_chunks(
    tensor: str, target: QuantTarget, writer: ParameterWriter, device: torch.device
) -> Iterator[torch.Tensor]:
    """A dense tensor in float32, in chunks of whole blocks of rows."""
    block_rows = max(1, target.scheme.block_rows)
    for rows in row_chunks(writer.source.tensors[tensor], block_rows=block_rows):
        yield writer.source.read_slice(tensor, [rows], 0).to(device, torch.float32)
