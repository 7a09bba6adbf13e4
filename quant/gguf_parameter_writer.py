"""Writes the model's parameters to a GGUF file: cast, or in blocks of their types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.gguf_blocks import GGUF_TYPES, GgufBlocks
from llmkit.checkpoint.gguf_writer import padded_bytes, stored_bytes
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.output_directory import partial_path
from llmkit.checkpoint.quantized_weight import QuantizationConfig, QuantizedWeight
from llmkit.checkpoint.tensor_reader import row_chunks, tensor_bytes
from llmkit.checkpoint.writer import CheckpointWriter
from llmkit.model.checkpoint_tensors import carried_tensors
from llmkit.model.parameter import Parameter
from llmkit.model.spec import ModelSpec
from llmkit.quant.gguf_plan import GgufPlan, round_dense
from llmkit.quant.gguf_quantizer import encode_moved
from llmkit.quant.gguf_scales import fit_blocks
from llmkit.quant.gguf_weight import GgufWeight, MovedTensor, Stored, values_of
from llmkit.quant.parameter_writer import ParameterWriter, rows_by_tensor


class GgufParameterWriter(ParameterWriter):
    """Writes parameters to a GGUF file, through a CheckpointWriter of that file.

    Tensors have Hugging Face's names here, and are written to their places in the file.
    """

    def __init__(
        self,
        source: Checkpoint,
        spec: ModelSpec,
        quantization: QuantizationConfig | None,
        gguf: GgufPlan,
        checkpoint_writer: CheckpointWriter,
    ) -> None:
        # The checkpoint tensors of a GGUF file are those of a checkpoint that is not quantized.
        super().__init__(source, spec, None, (), checkpoint_writer)
        self.quantization = quantization
        self.gguf = gguf
        self._infos = {info.name: info for info in gguf.infos}
        self.dtypes = {
            name: torch.float32 if gguf.type_of(name) == "F32" else torch.bfloat16
            for name in gguf.export.places
        }
        places = gguf.export.places
        self._tensor_names = {
            parameter: [stored for name in names for stored in places[name].names]
            for parameter, names in self._tensor_names.items()
        }

    def write_cast_tensor(self, name: str) -> None:
        """Write a tensor without calibration in its type."""
        self._write_from_source(name)

    def read_as_stored(self, parameter: Parameter, device: torch.device) -> torch.Tensor:
        """A parameter in float32, rounded as the file stores it."""
        stored = {}
        for name in parameter.source_names:
            stored[name] = values_of(self._encode(name, self.source.read(name).float()))
        if not parameter.shape:
            return stored[parameter.source_names[0]].to(device)
        parts = [part.rows_of(stored[part.name]) for part in parameter.sources]
        return torch.cat(parts).to(device)

    def write_value(self, parameter: Parameter, value: torch.Tensor) -> None:
        """Write a parameter with a new value, given as the runtime tensor."""
        for name, rows in rows_by_tensor(parameter).items():
            values = torch.cat([value[piece] for piece in rows]).float().cpu()
            self._write_encoded(name, self._encode(name, values))

    def write_quantized(self, parameter: Parameter, weight: QuantizedWeight | GgufWeight) -> None:
        """Write a quantized parameter."""
        assert isinstance(weight, GgufWeight)
        for name, part in weight.parts.items():
            self._write_encoded(name, part)

    def write_carried(self) -> None:
        """Write the tensors of parts that do not run, and those that hold parts of the config."""
        for name in carried_tensors(self.source, self.spec):
            self._write_from_source(name)
        for name, vector in self.gguf.export.vectors.items():
            if not self._checkpoint_writer.is_written(name):
                self._write_bytes(name, 0, vector.float().contiguous().view(torch.uint8))
        self.commit()

    def write_kv_scale(self, name: str, scale: torch.Tensor) -> None:
        """GGUF files have no place for the scales of a KV cache."""
        raise AssertionError(name)

    def as_checkpoint(self, config: Mapping[str, Any]) -> Checkpoint:
        """The output as a checkpoint. The file has its own config. Raises as `open_checkpoint`."""
        folder = partial_path(self._checkpoint_writer.out)
        return open_checkpoint(folder / self.gguf.file, dequantize_gguf=True)

    def _write_from_source(self, name: str) -> None:
        """Write a tensor of the source, some rows at a time where their order stays."""
        if self._is_stored(name):
            return
        place = self.gguf.export.places[name]
        if place.move is not None or len(place.shapes[0]) == 1:
            self._write_encoded(name, self._encode(name, self.source.read(name).float()))
            return
        offset = 0
        for rows in row_chunks(self.source.tensors[name]):
            values = self.source.read_slice(name, [rows], 0).float()
            offset = self._write_rows(name, self._encode(name, values), offset)

    def _encode(self, name: str, values: torch.Tensor) -> Stored | MovedTensor:
        """Float32 rows of a tensor in its type. Values beyond a dtype's range are clamped to it.

        Rows are in the order of the checkpoint, unless the file has the values in other rows.
        """
        place = self.gguf.export.places[name]
        kind = self.gguf.type_of(name)
        if not place.moves_rows_only:
            moved = encode_moved(place, values, self.gguf.types)
            clamped = tuple(
                part if isinstance(part, GgufBlocks) else self._clamp(name, part)
                for part in moved.stored
            )
            return replace(moved, stored=clamped)
        if kind in GGUF_TYPES:
            return fit_blocks(values, GGUF_TYPES[kind])
        return self._clamp(name, round_dense(values, kind))

    def _clamp(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        overflowed = int(stored.isinf().sum())
        if not overflowed:
            return stored
        limit = torch.finfo(stored.dtype).max
        self._record_overflow(name, overflowed)
        return stored.clamp(-limit, limit)

    def _write_encoded(self, name: str, values: Stored | MovedTensor) -> None:
        """Write a whole tensor."""
        if not self._is_stored(name):
            self._write_rows(name, values, 0)

    def _write_rows(self, name: str, values: Stored | MovedTensor, offset: int) -> int:
        """Write rows from byte `offset` of the tensor; returns the offset of the next ones."""
        place = self.gguf.export.places[name]
        if isinstance(values, MovedTensor):
            parts = tuple(map(_bytes_of, values.stored))
        else:
            stored = values.to_bytes() if isinstance(values, GgufBlocks) else values
            parts = tuple(map(_bytes_of, place.arrange(stored)))
        for stored_as, part in zip(place.names, parts, strict=True):
            first = offset
            if place.expert is not None:
                size = stored_bytes(self._infos[stored_as])
                first += place.expert * size // place.shapes[0][0]
            self._write_bytes(stored_as, first, part)
        return offset + parts[0].numel()

    def _is_stored(self, tensor: str) -> bool:
        return all(map(self._checkpoint_writer.is_written, self.gguf.export.places[tensor].names))

    def _write_bytes(self, name: str, offset: int, data: torch.Tensor) -> None:
        """Write bytes of a tensor of the file, and after its last ones the padding."""
        info = self._infos[name]
        size = stored_bytes(info)
        view = tensor_bytes(data.contiguous())
        if offset + len(view) == size and padded_bytes(info) > size:
            view = memoryview(bytes(view) + bytes(padded_bytes(info) - size))
        self._checkpoint_writer.write_chunk(self.gguf.file, name, offset, view)


def _bytes_of(values: Stored) -> torch.Tensor:
    """The bytes of blocks, of dense values, or bytes, uint8 [n]."""
    stored = values.to_bytes() if isinstance(values, GgufBlocks) else values
    return stored.contiguous().reshape(-1).view(torch.uint8)
