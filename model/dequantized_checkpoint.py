"""A quantized checkpoint, read as the dense one that it stands for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.dtypes import FLOATS
from llmkit.checkpoint.model_files import without_quantization
from llmkit.checkpoint.quantized_formats import packed_tensors
from llmkit.checkpoint.quantized_weight import Scheme
from llmkit.checkpoint.safetensors_header import TensorInfo, byte_count
from llmkit.common.errors import InputError
from llmkit.model.checkpoint_tensors import kv_scales, packed_name, scheme_of
from llmkit.model.parameter import ExpertSlice, Parameter, SourceTensor
from llmkit.model.parameter_table import parameters
from llmkit.model.spec import ModelSpec
from llmkit.model.weight_loader import read_source


def dequantized_checkpoint(checkpoint: Checkpoint, spec: ModelSpec) -> Checkpoint:
    """A view of a quantized checkpoint with dense tensors, dequantized when they are read.

    The checkpoint must have passed `check_checkpoint`. The scales of its KV cache are left out.
    Raises InputError for quantized tensors that no parameter uses, such as those of MTP layers.
    """
    quantization = checkpoint.quantization
    assert quantization is not None
    # The rows of the parameter table that a dense tensor is read by: one for each of its experts.
    rows_by_name: dict[str, list[Parameter]] = {}
    tensors = dict(checkpoint.tensors)
    packed_suffixes: set[str] = set()
    for parameter in parameters(spec):
        for scale in kv_scales(parameter, quantization).values():
            del tensors[scale]
        for name in parameter.source_names:
            scheme = scheme_of(parameter, name, quantization)
            if scheme is None:
                continue
            rows_by_name.setdefault(name, []).append(parameter)
            if len(rows_by_name[name]) > 1:
                continue  # the tensor was found for the first of its experts
            rows = sum(source.shape[0] for source in parameter.sources_in(name))
            columns = parameter.shape[1]
            shape = _stored_shape(parameter.expert_slice(name), rows, columns)
            dtype = _dense_dtype(scheme)
            tensors[name] = TensorInfo(name, dtype, shape, end=byte_count(dtype, shape))
            module = name.removesuffix(".weight")
            for packed in packed_tensors(quantization, module, scheme, rows, columns):
                packed_suffixes.add(packed.suffix)
                stored = packed_name(name, packed.suffix)
                if stored != name:
                    del tensors[stored]
    _check_rest(checkpoint, tensors.values(), packed_suffixes, set(rows_by_name))
    return replace(
        checkpoint,
        config=without_quantization(checkpoint.config),
        tensors=tensors,
        quantization=None,
        manifest=None,  # `_DequantizedRows` reads through the checkpoint, which verifies the bytes
        row_reader=_DequantizedRows(checkpoint, rows_by_name),
    )


def _stored_shape(part: ExpertSlice | None, rows: int, columns: int) -> tuple[int, ...]:
    """The shape of the dense tensor that holds a weight [rows, columns], or that of all experts."""
    if part is None:
        return rows, columns
    return (part.num_experts, *((columns, rows) if part.transposed else (rows, columns)))


def _dense_dtype(scheme: Scheme) -> str:
    """The dtype that holds values times scales without a loss."""
    return "BF16" if scheme.scale_format == "e8m0" else "F32"


def _check_rest(
    checkpoint: Checkpoint,
    tensors: Iterable[TensorInfo],
    packed_suffixes: set[str],
    dense_names: set[str],
) -> None:
    """Raises InputError when tensors are left that only a quantization config explains."""
    left = []
    for info in tensors:
        if info.name in dense_names:
            continue
        suffix = info.name.rpartition(".")[2]
        is_packed = suffix in packed_suffixes and not (suffix == "weight" and info.dtype in FLOATS)
        if is_packed or info.dtype.startswith("F8_"):
            left.append(info.name)
    if left:
        raise InputError(
            f"{checkpoint.reference} has {len(left)} quantized tensors that do not run here, such"
            f" as {left[0]}",
            "They would be copied as they are, without a config that describes them",
            "Quantize the checkpoint in 16 bits that it was made from",
        )


class _DequantizedRows:
    """Reads rows of dense tensors. See `RowReader`.

    The last dequantized tensor is kept, because its rows are read in chunks.
    """

    def __init__(self, checkpoint: Checkpoint, rows_by_name: dict[str, list[Parameter]]) -> None:
        self._checkpoint = checkpoint
        self._rows_by_name = rows_by_name
        self._last: tuple[str, torch.Tensor] | None = None

    def rows(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """See `RowReader.rows`."""
        found = self._rows_by_name.get(info.name)
        if found is None:
            return self._checkpoint.read_slice(info.name, [(start, stop)], 0)
        if found[0].expert_slice(info.name) is not None:
            return torch.stack([self._expert(found, info, index) for index in range(start, stop)])
        last = self._last  # threads read ahead: another may replace it
        if last is None or last[0] != info.name:
            whole = SourceTensor(info.name, info.shape)
            last = info.name, read_source(self._checkpoint, found[0], whole)
            self._last = last
        return last[1][start:stop].clone()

    def _expert(self, rows: list[Parameter], info: TensorInfo, index: int) -> torch.Tensor:
        """The matrix of one expert of a tensor that holds those of a layer."""
        for parameter in rows:
            part = parameter.expert_slice(info.name)
            if part is not None and part.index == index:
                shape = info.shape[:0:-1] if part.transposed else info.shape[1:]
                whole = SourceTensor(info.name, shape, expert=part)
                matrix = read_source(self._checkpoint, parameter, whole)
                return matrix.T if part.transposed else matrix
        raise AssertionError(f"{info.name} has no expert {index}")
