"""Writes the model's parameters to the output checkpoint: cast, packed or with new values."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from safetensors.torch import load, save

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.dtypes import DTYPES
from llmkit.checkpoint.output_directory import partial_path, replace_file, write_errors
from llmkit.checkpoint.quantized_formats import format_of
from llmkit.checkpoint.quantized_weight import (
    PRE_QUANT_SCALE,
    QuantizationConfig,
    QuantizedWeight,
    Scheme,
)
from llmkit.checkpoint.safetensors_header import TensorInfo, read_header
from llmkit.checkpoint.tensor_reader import CHUNK_BYTES, SafetensorsRows, row_chunks, tensor_bytes
from llmkit.checkpoint.writer import CheckpointWriter
from llmkit.model.checkpoint_tensors import carried_tensors, checkpoint_tensors, scheme_of
from llmkit.model.parameter import Parameter
from llmkit.model.spec import ModelSpec
from llmkit.quant.gguf_weight import GgufWeight

# A file of the partial output only: the report's entries of the layers that are already written.
LAYER_RECORDS = "linears.jsonl"
# A folder of the partial output only: values that a later step changes before they are written.
STAGED_FOLDER = "staged"
# An interrupted run copies at most about this much of the carried tensors again.
CARRIED_COMMIT_BYTES = 2**30


class ParameterWriter:
    """Writes parameters through a CheckpointWriter.

    Writing a parameter again after a resume does nothing: its bytes would be the same.
    """

    def __init__(
        self,
        source: Checkpoint,
        spec: ModelSpec,
        quantization: QuantizationConfig | None,
        planned: Sequence[TensorInfo],
        checkpoint_writer: CheckpointWriter,
    ) -> None:
        self.source = source
        self.spec = spec
        self.quantization = quantization
        self.dtypes = {tensor.name: DTYPES[tensor.dtype] for tensor in planned}
        self._checkpoint_writer = checkpoint_writer
        # The output's tensors by parameter. A tensor of several experts is that of the first.
        self._tensor_names: dict[str, list[str]] = {}
        for name, (parameter, _) in checkpoint_tensors(spec, quantization).items():
            self._tensor_names.setdefault(parameter.name, []).append(name)
        self._records_file = partial_path(checkpoint_writer.out) / LAYER_RECORDS
        self._staged_folder = partial_path(checkpoint_writer.out) / STAGED_FOLDER
        # By tensor: how many values exceeded the dtype's range and were clamped to it.
        self.overflows: dict[str, int] = {}
        for record in self._read_records():
            self.overflows |= record.get("overflows", {})

    def scheme(self, parameter: Parameter) -> Scheme | None:
        """How a parameter is quantized; None when it is not. All its tensors have one scheme."""
        return scheme_of(parameter, parameter.source_names[0], self.quantization)

    def is_written(self, parameters: Iterable[Parameter]) -> bool:
        """Whether all tensors of the parameters are written and committed."""
        return all(
            self._checkpoint_writer.is_written(tensor)
            for parameter in parameters
            for tensor in self._tensor_names.get(parameter.name, ())
        )

    def commit(self) -> None:
        """Make everything written so far survive an interruption."""
        self._checkpoint_writer.commit()

    def write_cast(self, parameter: Parameter) -> None:
        """Write an unquantized parameter in its planned dtypes, a chunk of rows at a time."""
        for name in parameter.source_names:
            self.write_cast_tensor(name)

    def write_cast_tensor(self, name: str) -> None:
        """Write an unquantized tensor in its planned dtype, a chunk of rows at a time."""
        if not self._checkpoint_writer.is_written(name):
            self._write_in_chunks(name)

    def read_as_stored(self, parameter: Parameter, device: torch.device) -> torch.Tensor:
        """An unquantized parameter in float32, rounded as the output stores it."""
        stored = {
            name: self._cast(name, self.source.read(name))[0] for name in parameter.source_names
        }
        if not parameter.shape:
            return stored[parameter.source_names[0]].to(device, torch.float32)
        parts = [part.rows_of(stored[part.name]) for part in parameter.sources]
        return torch.cat(parts).to(device, torch.float32)

    def write_value(self, parameter: Parameter, value: torch.Tensor) -> None:
        """Write an unquantized parameter with a new value, given as the runtime tensor."""
        for name, rows in rows_by_tensor(parameter).items():
            stored, overflowed = self._cast(name, _gather(value, rows).cpu())
            self._write(name, stored)
            self._record_overflow(name, overflowed)

    def write_quantized(self, parameter: Parameter, weight: QuantizedWeight | GgufWeight) -> None:
        """Write a quantized parameter, each of its checkpoint tensors in the output's format."""
        assert isinstance(weight, QuantizedWeight), "a GGUF file has a writer of its own"
        for tensor, rows in split_rows(parameter, weight).items():
            self.write_quantized_tensor(tensor, rows)

    def write_quantized_tensor(self, tensor: str, weight: QuantizedWeight) -> None:
        """Write a quantized checkpoint tensor in the output's format."""
        assert self.quantization is not None
        assert weight.pre_quant_scale is None, "its values would be lost"
        module = tensor.removesuffix(".weight")
        for suffix, value in format_of(self.quantization).pack(weight.scheme, weight).items():
            self._write(f"{module}.{suffix}", value)
        if self.quantization.has_pre_quant_scale(module):
            # The scales of AWQ are in the layers before.
            name = f"{module}.{PRE_QUANT_SCALE}"
            self._write(name, torch.ones(weight.shape[1], dtype=self.dtypes[name]))

    def write_carried(self) -> None:
        """Copy the tensors of parts that do not run, byte for byte.

        Those of a GGUF file are rounded to their planned dtype.
        """
        uncommitted = 0
        for name, info in carried_tensors(self.source, self.spec).items():
            if self._checkpoint_writer.is_written(name):
                continue
            if info.nbytes <= CHUNK_BYTES or not info.shape:
                stored, overflowed = self._cast(name, self.source.read(name))
                self._checkpoint_writer.write(name, stored)
                self._record_overflow(name, overflowed)
            else:
                self._write_in_chunks(name)
            uncommitted += info.nbytes
            if uncommitted >= CARRIED_COMMIT_BYTES:
                self.commit()
                uncommitted = 0
        self.commit()

    def write_kv_scale(self, name: str, scale: torch.Tensor) -> None:
        """Write the scale [1] of a layer's keys or values."""
        self._write(name, scale.float().cpu().reshape(1))

    def stage_values(self, layer: int, values: Mapping[str, torch.Tensor]) -> None:
        """Keep values of a layer's parameters, by name, that a later step changes and writes.

        They survive an interruption.
        """
        with write_errors(self._staged_folder):
            self._staged_folder.mkdir(exist_ok=True)
        stored = {name: value.cpu().contiguous() for name, value in values.items()}
        replace_file(self._staged_folder / f"layer-{layer}.safetensors", save(stored))

    def staged_values(self) -> dict[str, torch.Tensor]:
        """The values that `stage_values` has kept, including those of an interrupted run."""
        values: dict[str, torch.Tensor] = {}
        for file in self._staged_folder.glob("*.safetensors"):
            values |= load(file.read_bytes())
        return values

    def record_layer(self, layer: int, linears: list[dict[str, Any]]) -> None:
        """Save the report's entries of a layer, before the layer's tensors are committed."""
        self._append_record({"layer": layer, "linears": linears})

    def recorded_layers(self) -> dict[int, list[dict[str, Any]]]:
        """The saved entries by layer, including those of an interrupted run."""
        records = self._read_records()
        return {record["layer"]: record["linears"] for record in records if "layer" in record}

    def as_checkpoint(self, config: Mapping[str, Any]) -> Checkpoint:
        """The output as a checkpoint with this `config`. Tensors can be read once written."""
        out = self._checkpoint_writer.out
        folder = partial_path(out)
        files = tuple(sorted(file.name for file in folder.glob("*.safetensors")))
        tensors = {
            name: info for file in files for name, info in read_header(folder / file).items()
        }
        return Checkpoint(
            str(out),
            folder,
            "safetensors",
            dict(config),
            self.source.generation_config,
            self.source.side_files,
            tensors,
            self.quantization,
            None,
            files,
            SafetensorsRows(folder),
        )

    def _cast(self, name: str, value: torch.Tensor) -> tuple[torch.Tensor, int]:
        """`value` in the planned dtype, and how many values were clamped to the dtype's range."""
        stored = value.to(self.dtypes[name])
        # Rounding to the largest number is no overflow, so overflows are counted after the cast.
        overflowed = int(stored.isinf().sum()) if stored.dtype != value.dtype else 0
        if overflowed:
            limit = torch.finfo(stored.dtype).max
            stored = stored.clamp(-limit, limit)
        return stored, overflowed

    def _write_in_chunks(self, name: str) -> None:
        """Write a tensor of the source in its planned dtype, a chunk of rows at a time."""
        (file,) = self._checkpoint_writer.files_with(name)
        offset = 0
        overflowed = 0
        for rows in row_chunks(self.source.tensors[name]):
            chunk = self.source.read_slice(name, [rows], 0)
            stored, chunk_overflowed = self._cast(name, chunk)
            data = tensor_bytes(stored)
            self._checkpoint_writer.write_chunk(file, name, offset, data)
            offset += len(data)
            overflowed += chunk_overflowed
        self._record_overflow(name, overflowed)

    def _write(self, name: str, tensor: torch.Tensor) -> None:
        if not self._checkpoint_writer.is_written(name):
            self._checkpoint_writer.write(name, tensor)

    def _record_overflow(self, name: str, count: int) -> None:
        if count:
            self.overflows[name] = count
            self._append_record({"overflows": {name: count}})

    def _append_record(self, record: dict[str, Any]) -> None:
        with (
            write_errors(self._records_file),
            self._records_file.open("a", encoding="utf-8") as file,
        ):
            file.write(json.dumps(record) + "\n")

    def _read_records(self) -> Iterator[dict[str, Any]]:
        if not self._records_file.exists():
            return
        for line in self._records_file.read_text(encoding="utf-8").splitlines():
            # A line is incomplete when the machine stopped while it was written.
            with suppress(ValueError):
                yield json.loads(line)


def split_rows(parameter: Parameter, weight: QuantizedWeight) -> dict[str, QuantizedWeight]:
    """Split a fused parameter's quantized weight into its checkpoint tensors."""
    return {
        tensor: weight.select(partial(_gather, rows=rows))
        for tensor, rows in rows_by_tensor(parameter).items()
    }


def rows_by_tensor(parameter: Parameter) -> dict[str, list[slice]]:
    """The rows of the runtime tensor that each checkpoint tensor holds, in its order."""
    first = 0
    # The first row within the checkpoint tensor, and the rows of the runtime tensor.
    pieces: dict[str, list[tuple[int, slice]]] = {tensor: [] for tensor in parameter.source_names}
    for part in parameter.sources:
        for first_row, num_rows in part.blocks:
            pieces[part.name].append((first_row, slice(first, first + num_rows)))
            first += num_rows
    return {
        tensor: [rows for _, rows in sorted(found, key=lambda piece: piece[0])]
        for tensor, found in pieces.items()
    }


def _gather(values: torch.Tensor, rows: list[slice]) -> torch.Tensor:
    return torch.cat([values[piece] for piece in rows])
