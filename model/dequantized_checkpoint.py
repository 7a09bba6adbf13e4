"""A quantized checkpoint, read as the dense one that it stands for."""

from __future__ import annotations

from dataclasses import replace

import torch

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.model_files import without_quantization
from llmkit.checkpoint.quantized_formats import format_of
from llmkit.checkpoint.safetensors_header import TensorInfo, byte_count
from llmkit.common.errors import InputError
from llmkit.model.checkpoint_tensors import packed_name, scheme_of
from llmkit.model.parameter import Parameter, SourceTensor
from llmkit.model.parameter_table import parameters
from llmkit.model.spec import ModelSpec
from llmkit.model.weight_loader import read_source

DENSE_DTYPE = "F32"  # values times scales; 16 bits would round them


def dequantized_checkpoint(checkpoint: Checkpoint, spec: ModelSpec) -> Checkpoint:
    """A view of a quantized checkpoint with dense tensors, dequantized when they are read.

    The checkpoint must have passed `check_checkpoint`, and store a weight in a tensor of its own.
    Raises InputError for FP8 tensors that no parameter uses, such as those of MTP layers.
    """
    quantization = checkpoint.quantization
    assert quantization is not None
    quantized: dict[str, Parameter] = {}
    tensors = dict(checkpoint.tensors)
    for parameter in parameters(spec):
        for name in parameter.source_names:
            scheme = scheme_of(parameter, name, quantization)
            if scheme is None:
                continue
            rows = sum(source.shape[0] for source in parameter.sources_in(name))
            shape = (rows, parameter.shape[1])
            quantized[name] = parameter
            tensors[name] = TensorInfo(name, DENSE_DTYPE, shape, end=byte_count(DENSE_DTYPE, shape))
            for packed in format_of(quantization).tensors(scheme, *shape):
                stored = packed_name(name, packed.suffix)
                if stored != name:
                    del tensors[stored]
    left = [info.name for info in tensors.values() if info.dtype.startswith("F8_")]
    if left:
        raise InputError(
            f"{checkpoint.reference} has {len(left)} FP8 tensors that do not run here, such as"
            f" {left[0]}",
            "They would be copied as they are, without a config that describes them",
            "Quantize the checkpoint in 16 bits that it was made from",
        )
    return replace(
        checkpoint,
        config=without_quantization(checkpoint.config),
        tensors=tensors,
        quantization=None,
        manifest=None,  # `_DequantizedRows` reads through the checkpoint, which verifies the bytes
        row_reader=_DequantizedRows(checkpoint, quantized),
    )


class _DequantizedRows:
    """Reads rows of dense tensors. See `RowReader`.

    The last dequantized tensor is kept, because its rows are read in chunks.
    """

    def __init__(self, checkpoint: Checkpoint, quantized: dict[str, Parameter]) -> None:
        self._checkpoint = checkpoint
        self._quantized = quantized
        self._last: tuple[str, torch.Tensor] | None = None

    def rows(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """See `RowReader.rows`."""
        parameter = self._quantized.get(info.name)
        if parameter is None:
            return self._checkpoint.read_slice(info.name, [(start, stop)], 0)
        last = self._last  # threads read ahead: another may replace it
        if last is None or last[0] != info.name:
            whole = SourceTensor(info.name, info.shape)
            last = info.name, read_source(self._checkpoint, parameter, whole)
            self._last = last
        return last[1][start:stop].clone()
