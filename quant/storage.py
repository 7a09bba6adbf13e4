"""From parameters to stored tensors: what the output will hold, and casting and packing into it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from llmkit.checkpoint.dtypes import DTYPES, NAMES
from llmkit.checkpoint.errors import InputError
from llmkit.checkpoint.formats import format_of
from llmkit.checkpoint.output import partial_path, writing
from llmkit.checkpoint.progress import Progress
from llmkit.checkpoint.quantized import QuantizationConfig, QuantizedWeight, Scheme
from llmkit.checkpoint.reading import SafetensorsRows, row_chunks, tensor_bytes
from llmkit.checkpoint.safetensors_header import read_header
from llmkit.checkpoint.source import Checkpoint
from llmkit.checkpoint.writer import CheckpointWriter, PlannedTensor
from llmkit.model.families import model_spec
from llmkit.model.layout import Parameter, parameters
from llmkit.model.loader import scheme_of, stored_tensors
from llmkit.model.spec import ModelSpec

RECORDS = "linears.jsonl"  # in the partial output only: what the report will say of the layers already done
SIXTEEN_BITS = ("BF16", "F16")


def stored_dtype(source: Checkpoint, cast: torch.dtype | None) -> str:
    """The dtype of what is not quantized: `cast`, or the 16-bit dtype most of the source has (bfloat16 for F32)."""
    if cast is not None:
        return NAMES[cast]
    sizes = Counter({"BF16": 0})
    for info in source.tensors.values():
        if info.dtype in SIXTEEN_BITS:
            sizes[info.dtype] += info.nbytes
    return sizes.most_common(1)[0][0]


def planned_tensors(
    source: Checkpoint, spec: ModelSpec, quantization: QuantizationConfig | None, cast: torch.dtype | None
) -> list[PlannedTensor]:
    """Every tensor of the output. Without a `cast`, tensors of 16 bits keep their dtype."""
    other = stored_dtype(source, cast)
    planned = []
    for tensor in stored_tensors(spec, quantization).values():
        kept = source.tensors[tensor.name].dtype if tensor.dtype is None else tensor.dtype
        keep = tensor.dtype is not None or (cast is None and kept in SIXTEEN_BITS)
        planned.append(PlannedTensor(tensor.name, kept if keep else other, tensor.shape))
    return planned


def check_finite(source: Checkpoint, names: Sequence[str], progress: Progress) -> None:
    """Read the named tensors once. Raises InputError, naming tensor and count, when one holds NaN or infinity."""
    progress.start("check", len(names), "tensors")
    for name in names:
        nan = infinite = 0
        for rows in row_chunks(source.tensors[name]):
            part = source.read_slice(name, [rows], 0)
            if part.is_floating_point() and not bool(torch.isfinite(part).all()):
                nan, infinite = nan + int(part.isnan().sum()), infinite + int(part.isinf().sum())
        if nan or infinite:
            count = math.prod(source.tensors[name].shape)
            raise InputError(
                f"tensor {name} holds {nan} NaN and {infinite} infinite values of {count}",
                "Finite weights were expected",
                "Download the checkpoint again or get it from its maker",
            )
        progress.advance(1, name)
    progress.finish()


class Storage:
    """The output under construction. Writing a parameter again after a resume is a no-op: the bytes are the same."""

    def __init__(
        self,
        source: Checkpoint,
        spec: ModelSpec,
        quantization: QuantizationConfig | None,
        planned: Sequence[PlannedTensor],
        writer: CheckpointWriter,
    ) -> None:
        self.source, self.spec, self.quantization, self.writer = source, spec, quantization, writer
        self.dtypes = {tensor.name: DTYPES[tensor.dtype] for tensor in planned}
        self._names: dict[str, list[str]] = {}
        for tensor in stored_tensors(spec, quantization).values():
            self._names.setdefault(tensor.parameter.name, []).append(tensor.name)
        self._records = partial_path(writer.out) / RECORDS
        # By tensor: values beyond the dtype's range, stored as its largest.
        self.overflows: dict[str, int] = {}
        for entry in self._lines():
            self.overflows |= entry.get("overflows", {})

    def scheme(self, row: Parameter) -> Scheme | None:
        """How a parameter is quantized; the tensors of one parameter are quantized alike."""
        return scheme_of(row, row.tensors[0], self.quantization)

    def done(self, rows: Iterable[Parameter]) -> bool:
        """Whether all tensors of the rows are written and committed."""
        return all(self.writer.done(name) for row in rows for name in self._names[row.name])

    def cast(self, row: Parameter) -> None:
        """Write a parameter that is not quantized: its tensors in their planned dtypes, a chunk at a time."""
        for name in row.tensors:
            if self.writer.done(name):
                continue
            (file,), offset, beyond = self.writer.files_of(name), 0, 0
            for rows in row_chunks(self.source.tensors[name]):
                stored, more = self._stored(name, self.source.read_slice(name, [rows], 0))
                data = tensor_bytes(stored)
                self.writer.write_chunk(file, name, offset, data)
                offset, beyond = offset + len(data), beyond + more
            self._overflow(name, beyond)

    def as_stored(self, row: Parameter, device: torch.device) -> torch.Tensor:
        """A parameter that is not quantized as it will be read from the output, in float32."""
        dense = {name: self._stored(name, self.source.read(name))[0] for name in row.tensors}
        return torch.cat([dense[part.tensor][part.row : part.row + part.shape[0]] for part in row.parts]).to(
            device, torch.float32
        )

    def put(self, row: Parameter, value: torch.Tensor) -> None:
        """Write a parameter that is not quantized with a value of its own, the runtime tensor."""
        first = 0
        pieces: dict[str, list[tuple[int, torch.Tensor]]] = {tensor: [] for tensor in row.tensors}
        for part in row.parts:
            pieces[part.tensor].append((part.row, value[first : first + part.shape[0]]))
            first += part.shape[0]
        for name, found in pieces.items():
            rows = torch.cat([rows for _, rows in sorted(found, key=lambda piece: piece[0])])
            stored, beyond = self._stored(name, rows.cpu())
            self._put(name, stored)
            self._overflow(name, beyond)

    def pack(self, row: Parameter, weight: QuantizedWeight) -> None:
        """Write a quantized parameter: its rows divided among its checkpoint tensors, each in the output's format."""
        for tensor, part in split_rows(row, weight).items():
            self.pack_tensor(tensor, part)

    def pack_tensor(self, tensor: str, weight: QuantizedWeight) -> None:
        """Write a quantized checkpoint tensor in the output's format."""
        assert self.quantization is not None
        for suffix, value in format_of(self.quantization).pack(weight.scheme, weight).items():
            self._put(f"{tensor.removesuffix('.weight')}.{suffix}", value)

    def put_scale(self, name: str, scale: torch.Tensor) -> None:
        """Write a scale [1] that belongs to no linear: that of keys or values."""
        self._put(name, scale.float().cpu().reshape(1))

    def record(self, layer: int, linears: list[dict[str, Any]]) -> None:
        """Keep what the report says of a layer; to be called before the layer's tensors are committed."""
        self._append({"layer": layer, "linears": linears})

    def recorded(self) -> dict[int, list[dict[str, Any]]]:
        """What `record` kept, by layer, in an interrupted run too."""
        return {entry["layer"]: entry["linears"] for entry in self._lines() if "layer" in entry}

    def _append(self, entry: dict[str, Any]) -> None:
        with writing(self._records), self._records.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def _lines(self) -> Iterator[dict[str, Any]]:
        if self._records.exists():
            for line in self._records.read_text(encoding="utf-8").splitlines():
                with suppress(ValueError):  # the machine stopped while this line was written
                    yield json.loads(line)

    def _overflow(self, name: str, count: int) -> None:
        if count:
            self.overflows[name] = count
            self._append({"overflows": {name: count}})

    def written(self, config: Mapping[str, Any]) -> Checkpoint:
        """The output as a checkpoint with this `config`; each tensor can be read once it has been written."""
        folder = partial_path(self.writer.out)
        files = tuple(sorted(file.name for file in folder.glob("*.safetensors")))
        tensors = {name: info for file in files for name, info in read_header(folder / file).items()}
        return Checkpoint(
            str(self.writer.out), folder, "safetensors", dict(config), self.source.generation_config,
            self.source.side_files, tensors, self.quantization, None, files, SafetensorsRows(folder),
        )  # fmt: skip

    def _stored(self, name: str, value: torch.Tensor) -> tuple[torch.Tensor, int]:
        """`value` in the planned dtype, and how much is beyond its range and becomes its largest number."""
        stored = value.to(self.dtypes[name])
        # Rounding to the largest number is no overflow, so it is counted after the cast.
        beyond = int(stored.isinf().sum()) if stored.dtype != value.dtype else 0
        if beyond:
            limit = torch.finfo(stored.dtype).max
            stored = stored.clamp(-limit, limit)
        return stored, beyond

    def _put(self, name: str, tensor: torch.Tensor) -> None:
        if not self.writer.done(name):
            self.writer.write(name, tensor)


def split_rows(row: Parameter, weight: QuantizedWeight) -> dict[str, QuantizedWeight]:
    """A fused parameter's quantized weight by checkpoint tensor, rows in each tensor's own order."""
    first = 0
    found: dict[str, list[tuple[int, slice]]] = {tensor: [] for tensor in row.tensors}
    for part in row.parts:
        found[part.tensor].append((part.row, slice(first, first + part.shape[0])))
        first += part.shape[0]

    def gather(values: torch.Tensor, pieces: list[tuple[int, slice]]) -> torch.Tensor:
        return torch.cat([values[piece] for _, piece in sorted(pieces, key=lambda piece: piece[0])])

    return {
        tensor: QuantizedWeight(
            gather(weight.codes, pieces), gather(weight.scales, pieces), gather(weight.zeros, pieces),
            weight.scheme, weight.input_scale,
        )
        for tensor, pieces in found.items()
    }  # fmt: skip


def output_config(source: Checkpoint, quantization: QuantizationConfig | None, dtype: str) -> dict[str, Any]:
    """The output's config.json: the source's, with the new dtype and quantization."""
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    named = str(DTYPES[dtype]).removeprefix("torch.")
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    config |= dict.fromkeys(keys, named)
    if quantization is not None:
        described = format_of(quantization).config_dict(quantization)
        if "dynamic" in described:  # which transformers does not read: it goes by the names of what is quantized
            rows = parameters(model_spec(source.config))
            names = [name for row in rows for name in row.tensors if scheme_of(row, name, quantization)]
            described["modules_in_block_to_quantize"] = [[name.removesuffix(".weight") for name in names]]
        config["quantization_config"] = described
    return config


def output_files(source: Checkpoint, quantization: QuantizationConfig | None) -> dict[str, bytes]:
    """The files that go along: the source's tokenizer and licences, and what the format asks for."""
    return source.side_files() | (format_of(quantization).extra_files(quantization) if quantization else {})
