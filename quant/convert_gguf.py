"""`llmkit convert --format gguf`: integer weights in blocks of Q4_0, Q4_1 or Q8_0."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from llmkit.checkpoint.gguf import GgufModel
from llmkit.checkpoint.gguf_blocks import GGUF_TYPES, GgufBlocks
from llmkit.checkpoint.gguf_integers import INTEGER_TYPES, unpack_blocks
from llmkit.checkpoint.quantized_weight import QuantizedWeight, Scheme
from llmkit.checkpoint.safetensors_header import TensorInfo
from llmkit.checkpoint.writer import CheckpointWriter, HeaderFunction
from llmkit.common.errors import InputError
from llmkit.common.progress import Progress
from llmkit.model.dequantized_checkpoint import dequantized_checkpoint
from llmkit.model.families import require_native
from llmkit.quant.convert_difference import (
    does_not_carry_over,
    in_groups,
    pre_quant_scale_reason,
    stored_difference,
)
from llmkit.quant.convert_source import ConvertSource, StoredWeight
from llmkit.quant.gguf_parameter_writer import GgufParameterWriter
from llmkit.quant.gguf_plan import GgufPlan, make_gguf_plan
from llmkit.quant.gguf_weight import GgufWeight
from llmkit.quant.output_layout import output_files

_GROUP = 32  # values of a block
_BITS = (4, 8)


@dataclass(frozen=True)
class GgufConvertPlan:
    """A checked conversion to a GGUF file. See `ConvertPlan`."""

    source: ConvertSource
    gguf: GgufPlan
    types: dict[str, str]  # of each weight

    format = "gguf"

    @property
    def written(self) -> dict[str, Scheme]:
        """The output's scheme of each weight."""
        return {name: INTEGER_TYPES[kind] for name, kind in self.types.items()}

    @property
    def files(self) -> dict[str, list[TensorInfo]]:
        """The tensors of the file."""
        return {self.gguf.file: list(self.gguf.infos)}

    @property
    def headers(self) -> HeaderFunction:
        """What makes the file's header."""
        return self.gguf.headers

    @property
    def identity(self) -> dict[str, object]:
        """What decides the bytes, beside the source."""
        return {"types": dict(self.gguf.types)}

    @property
    def float32_tensors(self) -> list[str]:
        """None: other tensors keep their dtype."""
        return []

    @property
    def config(self) -> None:
        """The file has its own config."""
        return

    def side_files(self) -> dict[str, bytes]:
        """The files beside the GGUF file."""
        return output_files(self.source.checkpoint, None, is_gguf=True)

    def output(self, writer: CheckpointWriter) -> GgufOutput:
        """What writes the weights."""
        return GgufOutput(self, writer)


class GgufOutput:
    """Writes the tensors of a plan, and reads weights back. See `CheckpointOutput`."""

    def __init__(self, plan: GgufConvertPlan, writer: CheckpointWriter) -> None:
        self._plan = plan
        dense = dequantized_checkpoint(plan.source.checkpoint, plan.source.spec)
        self.parameters = GgufParameterWriter(dense, plan.source.spec, None, plan.gguf, writer)
        self._model: GgufModel | None = None  # opened when the vectors of its config are written

    def write_weight(self, weight: StoredWeight, values: QuantizedWeight) -> None:
        """Write a weight in blocks."""
        kind = self._plan.types[weight.name]
        blocks = _blocks(kind, values)
        part = GgufWeight(weight.shape, {weight.name: blocks}, {}, INTEGER_TYPES[kind])
        self.parameters.write_quantized(weight.parameter, part)

    def read_back(self, weight: StoredWeight) -> QuantizedWeight:
        """A weight that was written."""
        if self._model is None:
            reader = self.parameters.as_checkpoint({}).row_reader
            assert isinstance(reader, GgufModel)
            self._model = reader
        return unpack_blocks(self._plan.types[weight.name], self._model.blocks(weight.name))

    def stored_bytes(self, name: str) -> int:
        """About the size of a tensor in the file."""
        weight = self._plan.source.weights.get(name)
        if weight is None:
            return self._plan.source.checkpoint.tensors[name].nbytes
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[self._plan.types[name]]]
        return weight.shape[0] * weight.shape[1] // block * block_bytes


def plan_gguf(source: ConvertSource, progress: Progress) -> GgufConvertPlan:
    """Read all weights, and plan a GGUF file. Nothing is written.

    Raises InputError, naming the tensor and what would be lost, when a weight does not carry over,
    and for models that a GGUF file cannot hold.
    """
    require_native(source.spec, "--format gguf")
    for weight in source.weights.values():
        reason = _scheme_reason(weight)
        if reason:
            raise does_not_carry_over(source, weight.name, reason)
    _gguf_plan(source, dict.fromkeys(source.weights, "Q8_0"))  # refuses models and tokenizers
    types: dict[str, str] = {}
    progress.start("check", len(source.weights), "weights")
    for weight in source.weights.values():
        values = source.read(weight)
        kind = _type_of(values)
        reason = _value_reason(kind, values)
        if reason:
            raise does_not_carry_over(source, weight.name, reason)
        types[weight.name] = kind
        progress.advance(1, weight.name)
    progress.finish()
    return GgufConvertPlan(source, _gguf_plan(source, types), types)


def _scheme_reason(weight: StoredWeight) -> str:
    """Why no type holds weights of this scheme; "" when one may."""
    scheme = weight.scheme
    if scheme.kind != "int" or scheme.inputs != "none" or scheme.bits not in _BITS:
        types = ", ".join(INTEGER_TYPES)
        return f"{types} have integers of 4 or 8 bits, and this is {scheme.label}"
    columns = weight.shape[1]
    size = columns if scheme.group_size == -1 else scheme.group_size
    if size % _GROUP or columns % _GROUP:
        return (
            f"blocks have {_GROUP} values, and groups of {size} in {columns} are not made of them"
        )
    return ""


def _type_of(weight: QuantizedWeight) -> str:
    """The type for a weight of 4 or 8 bits."""
    if weight.scheme.bits == 8:
        return "Q8_0"
    return "Q4_0" if bool((weight.zeros == weight.scheme.half).all()) else "Q4_1"


def _blocks(kind: str, weight: QuantizedWeight) -> GgufBlocks:
    """A weight as blocks of a type. What float16 does not hold is rounded."""
    weight = in_groups(weight, _GROUP)
    d = weight.scales.float()
    d_min = d * weight.zeros.float() if GGUF_TYPES[kind].has_min else None
    return GgufBlocks(GGUF_TYPES[kind], weight.q, d, d_min)


def _value_reason(kind: str, weight: QuantizedWeight) -> str:
    """What blocks of a type would lose of a weight's values; "" when they hold them."""
    if weight.pre_quant_scale is not None:
        return pre_quant_scale_reason(kind)
    if kind == "Q8_0" and not bool((weight.zeros == weight.scheme.half).all()):
        return "Q8_0 has no zero points"
    stored = _blocks(kind, weight).to_bytes()
    num_blocks = weight.shape[1] // _GROUP
    try:
        found = unpack_blocks(kind, stored.unflatten(1, (num_blocks, -1)))
    except InputError as error:
        return f"{error.what}, in float16"
    return stored_difference(in_groups(weight, _GROUP), found)


def _gguf_plan(source: ConvertSource, types: dict[str, str]) -> GgufPlan:
    """The file, with the types of the weights, and the dtypes that other tensors have."""
    preset = Counter(types.values()).most_common(1)[0][0]
    dense = dequantized_checkpoint(source.checkpoint, source.spec)
    plan = make_gguf_plan(dense, source.spec, preset, "BF16")
    of_file: dict[str, str] = {}
    for name, place in plan.export.places.items():
        kind = types.get(name)
        if kind is None:
            # Vectors and small matrices are in float32 in these files.
            is_float32 = plan.type_of(name) == "F32"
            kind = "F32" if is_float32 else source.dense_dtype(name)
        if name in types and not place.moves_rows_only:
            raise does_not_carry_over(
                source, name, "the file has its values in other rows, and groups would be torn"
            )
        if any(of_file.setdefault(stored, kind) != kind for stored in place.names):
            raise does_not_carry_over(
                source, name, f"the experts of a layer have one type, and are {kind} and others"
            )
        if place.move is not None and place.move.kind == "values":
            values = source.checkpoint.read(name).float()
            if not torch.equal(place.restore(*place.arrange(values)), values):
                raise does_not_carry_over(
                    source, name, "the file has other values, from which these are rounded"
                )
    all_types = dict(plan.types) | of_file
    infos = tuple(replace(info, ggml_type=all_types[info.name]) for info in plan.infos)
    return replace(plan, types=all_types, infos=infos)
