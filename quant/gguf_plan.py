"""What `quantize --format gguf` writes: the type of each tensor, and the file's metadata."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.gguf_blocks import GGUF_TYPES
from llmkit.checkpoint.gguf_vocabulary import vocabulary_metadata
from llmkit.checkpoint.gguf_writer import write_gguf_header
from llmkit.checkpoint.safetensors_header import TensorInfo
from llmkit.checkpoint.writer import HeaderFunction
from llmkit.model.gguf_export import GgufExport, gguf_export
from llmkit.model.spec import ModelSpec

_QUANTIZATION_VERSION = 2  # of ggml's blocks
# Parts of the names of matrices that stay in 16 or 32 bits, as in llama.cpp: they are small, or
# choose experts.
_FLOAT32 = ("_norm.weight", "ffn_gate_inp", "shortconv.conv", "ssm_conv1d")
_NEVER_QUANTIZED = (*_FLOAT32, "per_layer_model_proj")
_OUTPUT = "output.weight"
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
_VALUES = ("attn_v.weight", "attn_qkv.weight")


@dataclass(frozen=True)
class GgufPreset:
    """One of llama.cpp's mixtures of types, by the name that files have."""

    name: str
    file_type: int  # its number in the metadata
    type: str  # of most tensors
    more: str = ""  # of tensors that suffer most; "": all have `type`


PRESETS = {
    row.name: row
    for row in (
        GgufPreset("F16", 1, "F16"),
        GgufPreset("BF16", 32, "BF16"),
        GgufPreset("Q4_0", 2, "Q4_0"),
        GgufPreset("Q4_1", 3, "Q4_1"),
        GgufPreset("Q5_0", 8, "Q5_0"),
        GgufPreset("Q5_1", 9, "Q5_1"),
        GgufPreset("Q8_0", 7, "Q8_0"),
        GgufPreset("Q4_K_M", 15, "Q4_K", more="Q6_K"),
        GgufPreset("Q5_K_M", 17, "Q5_K", more="Q6_K"),
        GgufPreset("Q6_K", 18, "Q6_K"),
    )
}


@dataclass(frozen=True)
class GgufPlan:
    """The GGUF file of a run.

    types: of the file's tensors. infos: the file's tensors, in its order, with their types.
    """

    preset: GgufPreset
    export: GgufExport
    types: Mapping[str, str]
    infos: tuple[TensorInfo, ...]
    metadata: dict[str, Any]

    @property
    def file(self) -> str:
        """The name of the file."""
        return f"model-{self.preset.name}.gguf"

    @property
    def headers(self) -> HeaderFunction:
        """What makes the file's header of its tensors."""
        return partial(write_gguf_header, self.metadata)

    def type_of(self, tensor: str) -> str:
        """The type of a checkpoint tensor. The metadata has numbers in float32."""
        place = self.export.places[tensor]
        return self.types[place.name] if place.names else "F32"

    def report_entries(self) -> dict[str, Any]:
        """The file, its tensors by type, and those that have another type than the preset's."""
        return {
            "file": self.file,
            "types": dict(Counter(self.types.values())),
            "replaced": {name: list(pair) for name, pair in self._replaced().items()},
        }

    def replaced_note(self) -> str:
        """What to tell the user about types that do not fit; "": all do."""
        counts = Counter(self._replaced().values())
        if not counts:
            return ""
        texts = [f"{count} {wanted} as {found}" for (wanted, found), count in counts.items()]
        return (
            f"{sum(counts.values())} tensors have rows that are not made of whole blocks of their"
            f" type, so they are stored in another, as llama.cpp does: {', '.join(texts)}"
        )

    def _replaced(self) -> dict[str, tuple[str, str]]:
        """The tensors whose rows are not made of whole blocks: the preset's type, and their own."""
        wanted = _wanted_types(self.export, self.preset)
        return {
            name: (kind, self.types[name])
            for name, kind in wanted.items()
            if self.export.shapes[name][-1] % GGUF_TYPES[kind].block
            and self.types[name] == _fitting_type(kind, self.export.shapes[name])
        }


def make_gguf_plan(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    preset: str,
    dense_dtype: str,
    ignore: Collection[str] = (),
) -> GgufPlan:
    """The plan of a GGUF file. The checkpoint stores experts one by one.

    preset: a key of PRESETS. dense_dtype: of matrices that are not quantized, F16, BF16 or F32.
    ignore: checkpoint modules that are not quantized.
    Raises InputError for models and tokenizers that a GGUF file cannot hold.
    """
    export = gguf_export(checkpoint, spec)
    row = PRESETS[preset]
    ignored = {f"{module}.weight" for module in ignore}
    kept = {
        stored for name, place in export.places.items() if name in ignored for stored in place.names
    }
    types = dict.fromkeys(export.shapes, "F32")
    for name, shape in export.shapes.items():
        if len(shape) > 1 and name.endswith(".weight") and not any(p in name for p in _FLOAT32):
            types[name] = dense_dtype
    wanted = _wanted_types(export, row)
    types |= {
        name: _fitting_type(kind, export.shapes[name])
        for name, kind in wanted.items()
        if name not in kept
    }
    for place in export.places.values():
        if place.names and place.moves_rows_only:  # rows of one weight are quantized together
            types |= dict.fromkeys(place.names, types[place.name])
    infos = tuple(
        TensorInfo(name, "F32", shape, ggml_type=types[name])
        for name, shape in export.shapes.items()
    )
    name = checkpoint.path.stem if checkpoint.file_format == "gguf" else checkpoint.path.name
    metadata = {
        "general.architecture": export.architecture,
        "general.type": "model",
        "general.name": name,
        "general.file_type": row.file_type,
        "general.quantization_version": _QUANTIZATION_VERSION,
        **export.metadata,
        **vocabulary_metadata(
            checkpoint.reference,
            checkpoint.side_files(),
            {**checkpoint.config, **checkpoint.generation_config},
            spec.vocab_size,
            export.architecture,
        ),
    }
    return GgufPlan(row, export, types, infos, metadata)


def _wanted_types(export: GgufExport, preset: GgufPreset) -> dict[str, str]:
    """The types of the matrices that are quantized, by llama.cpp's rules for a preset.

    The rules are in `llama_tensor_get_type_impl` of llama.cpp's llama-quant.cpp.
    """
    if preset.type not in GGUF_TYPES:
        return {}
    shapes = export.shapes
    num_experts = export.metadata.get(f"{export.architecture}.expert_count", 0)
    num_layers = export.metadata[f"{export.architecture}.block_count"]
    with_values = [name for name in shapes if name.endswith(_VALUES)]
    has_output = _OUTPUT in shapes
    types = {}
    for name, shape in shapes.items():
        is_matrix = len(shape) > 1 and name.endswith(".weight")
        if not is_matrix or any(part in name for part in _NEVER_QUANTIZED):
            continue
        kind = preset.type
        layer = int(name.split(".")[1]) if name.startswith("blk.") else 0
        if name == _OUTPUT or (name in _EMBEDDINGS and not has_output):
            if shape[-1] % GGUF_TYPES[kind].block:
                kind = "Q8_0"
            elif kind != "Q8_0":
                kind = "Q6_K"
        elif name.endswith(_VALUES):
            if preset.more and _has_more_bits(with_values.index(name), len(with_values)):
                kind = preset.more
            if num_experts == 8:
                kind = "Q8_0"
        elif name.endswith("attn_k.weight") and num_experts == 8:
            kind = "Q8_0"
        elif "ffn_down" in name and preset.more and _has_more_bits(layer, num_layers):
            kind = preset.more
        elif name.endswith("attn_output.weight") and num_experts == 8 and preset.name == "Q4_K_M":
            kind = "Q5_K"
        types[name] = kind
    return types


def _has_more_bits(layer: int, num_layers: int) -> bool:
    """Whether a layer is one of the first or last eighth, or every third between them."""
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def _fitting_type(kind: str, shape: tuple[int, ...]) -> str:
    """The type, or a smaller block's when the rows are not made of whole blocks."""
    while kind in GGUF_TYPES and shape[-1] % GGUF_TYPES[kind].block:
        kind = GGUF_TYPES[kind].fallback or "F16"
    return kind


def round_dense(values: torch.Tensor, kind: str) -> torch.Tensor:
    """Values in a type without blocks."""
    return values.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind])
