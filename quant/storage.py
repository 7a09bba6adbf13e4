"""From parameters to stored tensors: what the output will hold, and casting and packing into it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from llmkit.checkpoint.errors import InputError
from llmkit.checkpoint.formats import format_of
from llmkit.checkpoint.output import partial_path
from llmkit.checkpoint.progress import Progress
from llmkit.checkpoint.quantized import QuantizationConfig, QuantizedWeight
from llmkit.checkpoint.reading import SafetensorsRows
from llmkit.checkpoint.safetensors_header import DTYPES, NAMES, read_header
from llmkit.checkpoint.source import Checkpoint
from llmkit.checkpoint.writer import CheckpointWriter, PlannedTensor
from llmkit.model.layout import Parameter
from llmkit.model.loader import stored_tensors
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
        tensor = source.read(name)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            nan, infinite = int(tensor.isnan().sum()), int(tensor.isinf().sum())
            raise InputError(
                f"tensor {name} holds {nan} NaN and {infinite} infinite values of {tensor.numel()}",
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
        self._dtypes = {tensor.name: DTYPES[tensor.dtype] for tensor in planned}
        self._names: dict[str, list[str]] = {}
        for tensor in stored_tensors(spec, quantization).values():
            self._names.setdefault(tensor.parameter.name, []).append(tensor.name)
        self._records = partial_path(writer.out) / RECORDS
        self.overflows: dict[str, int] = {}  # by tensor: values beyond the dtype's range, stored as its largest

    def done(self, rows: Iterable[Parameter]) -> bool:
        """Whether all tensors of the rows are written and committed."""
        return all(self.writer.done(name) for row in rows for name in self._names[row.name])

    def cast(self, row: Parameter) -> None:
        """Write a parameter that is not quantized: its tensors in their planned dtypes."""
        for name in row.tensors:
            value = self.source.read(name)
            dtype = self._dtypes[name]
            limit = torch.finfo(dtype).max
            # Rounding to the largest number is no overflow, so it is counted after the cast.
            stored = value.to(dtype)
            if beyond := int(stored.isinf().sum()):
                self.overflows[name] = beyond
                stored = stored.clamp(-limit, limit)
            self._put(name, stored)

    def pack(self, row: Parameter, weight: QuantizedWeight) -> None:
        """Write a quantized parameter: its rows divided among its checkpoint tensors, each in the output's format."""
        assert self.quantization is not None
        layout = format_of(self.quantization)
        for tensor, part in split_rows(row, weight).items():
            module = tensor.removesuffix(".weight")
            for suffix, value in layout.pack(self.quantization, part).items():
                self._put(f"{module}.{suffix}", value)

    def record(self, layer: int, linears: list[dict[str, Any]]) -> None:
        """Keep what the report says of a layer; to be called before the layer's tensors are committed."""
        with self._records.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"layer": layer, "linears": linears}) + "\n")

    def recorded(self) -> dict[int, list[dict[str, Any]]]:
        """What `record` kept, by layer, in an interrupted run too."""
        found: dict[int, list[dict[str, Any]]] = {}
        if self._records.exists():
            for line in self._records.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:  # the machine stopped while this line was written
                    continue
                found[entry["layer"]] = entry["linears"]
        return found

    def written(self, config: Mapping[str, Any]) -> Checkpoint:
        """The output as a checkpoint with this `config`; each tensor can be read once it has been written."""
        folder = partial_path(self.writer.out)
        files = tuple(sorted(file.name for file in folder.glob("*.safetensors")))
        tensors = {name: info for file in files for name, info in read_header(folder / file).items()}
        return Checkpoint(
            str(self.writer.out), folder, "safetensors", dict(config), self.source.generation_config, tensors,
            self.quantization, None, files, SafetensorsRows(folder), self.source.side_files,
        )  # fmt: skip

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
            weight.bits, weight.group_size,
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
        config["quantization_config"] = format_of(quantization).config_dict(quantization)
    return config


def output_files(source: Checkpoint, quantization: QuantizationConfig | None) -> dict[str, bytes]:
    """The files that go along: the source's tokenizer and licences, and what the format asks for."""
    return source.side_files() | (format_of(quantization).extra_files(quantization) if quantization else {})
