"""A model as a GGUF file has it: metadata, and the place of each of its tensors.

The tables of families are those of the reader (checkpoint/gguf_architectures.py), followed the
other way. Before anything is written the metadata is read back: a file that would be read as
another model is refused.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.gguf_architectures import (
    ARCHITECTURES,
    BARE_MODULES,
    EXPERTS,
    ONE_ROW_MODULES,
    TOP_MODULES,
    VARIANTS,
    GgufArchitecture,
    gguf_architecture,
    gguf_config,
)
from llmkit.checkpoint.gguf_metadata import GgufMetadata
from llmkit.checkpoint.hf_config import RopeSpec, complete_config
from llmkit.checkpoint.safetensors_header import TensorInfo
from llmkit.common.errors import InputError
from llmkit.model.checkpoint_tensors import carried_tensors, checkpoint_tensors
from llmkit.model.families import SUPPORTED, model_spec
from llmkit.model.gguf_keys import gguf_keys
from llmkit.model.spec import ModelSpec
from llmkit.model.wrappers import architecture_of, text_model

# Families whose files have another family's architecture: theirs is the same decoder.
_SAME_DECODER = {"mistral": "llama"}
# What two specs of one model may differ in: names of a checkpoint, and how it stores experts.
_NAMES = (
    "architecture",
    "tensor_prefix",
    "lm_head_name",
    "module_names",
    "carried",
    "mtp",
)


# What llama.cpp cannot load, by GGUF's architecture: tensors that its families have not.
_NO_OUTPUT_BIAS = r"blk\.\d+\.attn_output\.bias"
_NOT_LOADED = {
    **dict.fromkeys(
        (
            "gemma",
            "gemma2",
            "gemma3",
            "gemma4",
            "glm4",
            "olmo2",
            "exaone4",
            "hunyuan-dense",
            "olmoe",
            "glm4moe",
            "minimax-m2",
        ),
        _NO_OUTPUT_BIAS,
    ),
    **dict.fromkeys(("ernie4_5", "ernie4_5-moe"), r"blk\.\d+\.ffn_\w+\.bias"),
    **dict.fromkeys(("lfm2", "lfm2moe"), r"blk\.\d+\.shortconv\.\w+\.bias"),
}
# The only EXAONE 4 whose windows llama.cpp applies: the layers and the window of the 32B model.
_EXAONE4_WINDOWS = (64, 4096)


@dataclass(frozen=True)
class GgufPlace:
    """Where a checkpoint tensor goes.

    expert: its index in a tensor of all experts; None: it is the whole tensor.
    num_heads: RoPE's pairs of rows become neighbours in each of so many heads; 0: they stay.
    offset: is added to the values.
    """

    name: str  # of the tensor in the file
    shape: tuple[int, ...]  # of the tensor in the file
    expert: int | None = None
    num_heads: int = 0
    offset: float = 0.0

    @property
    def layer(self) -> int | None:
        """The layer that the tensor belongs to."""
        match = re.match(r"blk\.(\d+)\.", self.name)
        return None if match is None else int(match[1])

    def arrange_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows [out, ...] in the order of the file."""
        if not self.num_heads:
            return rows
        halves: torch.Tensor = rows.unflatten(0, (self.num_heads, 2, -1))
        return halves.transpose(1, 2).flatten(0, 2)


@dataclass(frozen=True)
class GgufExport:
    """A model's GGUF file without the tokenizer.

    metadata: by complete key. places: by the names of the checkpoint's tensors.
    vectors: tensors that the file has besides, float32.
    """

    architecture: str
    metadata: dict[str, Any]
    places: dict[str, GgufPlace]
    vectors: dict[str, torch.Tensor]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors of the file, in its order."""
        shapes = {place.name: place.shape for place in self.places.values()}
        return shapes | {name: tuple(vector.shape) for name, vector in self.vectors.items()}


def gguf_export(checkpoint: Checkpoint, spec: ModelSpec) -> GgufExport:
    """A model as a GGUF file has it. The checkpoint stores experts one by one.

    Raises InputError for families that GGUF has no architecture for, and for models that a file
    would not describe completely.
    """
    text = text_model(checkpoint.config, checkpoint.tensor_shapes)
    if text is not None:
        model_type = text.model_type
        config = text.config
    else:
        architecture = architecture_of(checkpoint.config)
        model_type = SUPPORTED[architecture][0] if architecture in SUPPORTED else architecture
        config = checkpoint.config
    name, row = _architecture(checkpoint.reference, model_type, spec)
    places = _places(checkpoint, spec, row)
    keys = gguf_keys(row, spec, complete_config(config, model_type))
    metadata = {f"{name}.{key}": value for key, value in keys.values.items()}
    num_layers = _num_layers(places, len(spec.layers))
    if num_layers > len(spec.layers):
        metadata[f"{name}.block_count"] = num_layers
        metadata[f"{name}.nextn_predict_layers"] = num_layers - len(spec.layers)
    export = GgufExport(name, metadata, places, keys.tensors)
    _check(checkpoint.reference, export, spec)
    _check_llama_cpp(checkpoint.reference, export, spec)
    return export


def _architecture(reference: str, model_type: str, spec: ModelSpec) -> tuple[str, GgufArchitecture]:
    """GGUF's name of a family, and its row."""
    wanted = _SAME_DECODER.get(model_type, model_type)
    for name, row in ARCHITECTURES.items():
        if row.model_type == wanted and row.is_written:
            return name, row
    for name, variants in VARIANTS.items():
        for row in variants.values():
            if row.model_type == wanted:
                return name, row
    known = [row.model_type for row in ARCHITECTURES.values() if row.is_written]
    known += [row.model_type for rows in VARIANTS.values() for row in rows.values()]
    raise InputError(
        f"{reference} is a {spec.architecture} ({model_type}), which is not written as GGUF",
        f"One of {', '.join(sorted([*known, *_SAME_DECODER]))} was expected",
        "Use another --format",
    )


def _places(checkpoint: Checkpoint, spec: ModelSpec, row: GgufArchitecture) -> dict[str, GgufPlace]:
    """Where each tensor of the checkpoint goes."""
    shapes = {name: packed.shape for name, (_, packed) in checkpoint_tensors(spec, None).items()}
    shapes |= {name: info.shape for name, info in carried_tensors(checkpoint, spec).items()}
    places = {}
    unknown = []
    for name, shape in shapes.items():
        place = _place(name, shape, spec, row)
        if place is None:
            unknown.append(name)
        else:
            places[name] = place
    if unknown:
        raise InputError(
            f"{checkpoint.reference} has {len(unknown)} tensors that a GGUF file of its family has"
            f" no place for ({', '.join(unknown[:5])})",
            "A language model without other parts was expected",
            "Use another --format",
        )
    return places


def _place(
    name: str, shape: tuple[int, ...], spec: ModelSpec, row: GgufArchitecture
) -> GgufPlace | None:
    """Where a tensor goes; None when the family's files have no such tensor."""
    prefix = re.escape(spec.tensor_prefix)
    if name == f"{spec.lm_head_name}.weight":
        return GgufPlace("output.weight", shape)
    match = re.fullmatch(rf"{prefix}\.(?:layers\.(\d+)\.)?(.+)", name)
    if match is None:
        return None
    layer, rest = match.groups()
    module, _, kind = rest.rpartition(".")
    if rest.endswith(BARE_MODULES):
        module = rest
        kind = "bias" if rest.endswith("bias") else "weight"
    if layer is None:
        modules = {module: gguf_name for gguf_name, module in TOP_MODULES.items()}
        found = modules.get(f"model.{module}")
        if found is None:
            return None
        return GgufPlace(f"{found}.{kind}", shape, offset=_offset(row, module))
    for gguf_name, pattern in (row.experts or (EXPERTS if row.stacked_experts else {})).items():
        expert = re.fullmatch(re.escape(pattern).replace(r"\{\}", r"(\d+)"), module)
        if expert is not None:
            assert spec.moe is not None
            whole = (spec.moe.num_experts, *shape)
            return GgufPlace(f"blk.{layer}.{gguf_name}.{kind}", whole, int(expert[1]))
    modules = {module: gguf_name for gguf_name, module in row.modules.items()}
    if module not in modules:
        return None
    num_heads = 0
    if row.interleaved_qk and module.endswith(("q_proj", "k_proj")):
        num_heads = spec.num_heads if module.endswith("q_proj") else spec.num_kv_heads
    if module.endswith(ONE_ROW_MODULES):
        shape = (math.prod(shape),)
    elif len(shape) == 3 and shape[1] == 1:  # a convolution of each channel
        shape = (shape[0], shape[2])
    elif not shape:
        shape = (1,)
    stored = f"blk.{layer}.{modules[module]}.{kind}"
    return GgufPlace(stored, shape, num_heads=num_heads, offset=_offset(row, module))


def _offset(row: GgufArchitecture, module: str) -> float:
    return row.norm_offset if module.endswith("norm") else 0.0


def _num_layers(places: Mapping[str, GgufPlace], num_layers: int) -> int:
    """The layers with those that predict several tokens at once, which are carried."""
    layers = [place.layer for place in places.values() if place.layer is not None]
    return max([num_layers, *(layer + 1 for layer in layers)])


def _check(reference: str, export: GgufExport, spec: ModelSpec) -> None:
    """Raises InputError when the file would be read as another model."""
    tensors = {
        name: TensorInfo(name, "F32", shape, ggml_type="F32")
        for name, shape in export.shapes.items()
    }

    def read_vector(info: TensorInfo) -> npt.NDArray[np.float32]:
        return export.vectors[info.name].numpy()

    values = {"general.architecture": export.architecture} | {
        key: _as_read(value) for key, value in export.metadata.items()
    }
    metadata = GgufMetadata(Path("GGUF"), values, tensors, read_vector)
    try:
        config = gguf_config(metadata, gguf_architecture(metadata))
        found = model_spec(config)
    except InputError as error:
        raise InputError(
            f"{reference} cannot be described by a GGUF file: {error}",
            todo="Use another --format",
        ) from error
    differences = list(_differences("", found, spec))
    if differences:
        raise InputError(
            f"{reference} cannot be described by a GGUF file: its architecture"
            f" {export.architecture} does not hold {', '.join(differences[:5])}",
            "A model of the family's usual settings was expected",
            "Use another --format",
        )


def _check_llama_cpp(reference: str, export: GgufExport, spec: ModelSpec) -> None:
    """Raises InputError for models of a family that llama.cpp cannot load, or computes otherwise.

    Tried with its sources of 2026; the reader of this project has no such limits.
    """
    name = export.architecture
    pattern = _NOT_LOADED.get(name)
    unknown = [tensor for tensor in export.shapes if pattern and re.fullmatch(pattern, tensor)]
    problem = f"the tensor {unknown[0]}" if unknown else ""
    windows = {layer.sliding_window for layer in spec.layers if layer.sliding_window}
    if name == "exaone4" and windows and (len(spec.layers), max(windows)) != _EXAONE4_WINDOWS:
        problem = f"windows of {max(windows)} tokens in {len(spec.layers)} layers"
    elif name == "olmoe" and spec.num_kv_heads != spec.num_heads:
        problem = f"{spec.num_kv_heads} KV heads of {spec.num_heads} heads"
    elif name == "phi3" and spec.num_heads * spec.head_dim != spec.hidden_size:
        problem = f"{spec.num_heads} heads of {spec.head_dim} in {spec.hidden_size} features"
    if problem:
        raise InputError(
            f"{reference}: llama.cpp's {name} does not support {problem}",
            "A model that llama.cpp runs was expected",
            "Use another --format",
        )


def _as_read(value: Any) -> Any:
    """A value as the reader finds it: numbers are stored in float32."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _differences(path: str, found: Any, expected: Any) -> list[str]:
    """The names of the fields in which two specs differ."""
    if isinstance(expected, float) and isinstance(found, (int, float)):
        return [] if math.isclose(found, expected, rel_tol=1e-5, abs_tol=1e-12) else [path]
    if isinstance(expected, RopeSpec) and isinstance(found, RopeSpec):
        expected, found = dataclasses.astuple(expected), dataclasses.astuple(found)
    if dataclasses.is_dataclass(expected) and type(found) is type(expected):
        differences = []
        for field in dataclasses.fields(expected):
            if field.name in _NAMES or field.name == "expert_stack":
                continue
            pair = getattr(found, field.name), getattr(expected, field.name)
            differences += _differences(field.name, *pair)
        return list(dict.fromkeys(differences))
    if isinstance(expected, (tuple, list)) and isinstance(found, (tuple, list)):
        if len(found) != len(expected):
            return [path]
        pairs = list(zip(found, expected, strict=True))
        return list(dict.fromkeys(name for pair in pairs for name in _differences(path, *pair)))
    if isinstance(expected, dict) and isinstance(found, dict):
        if found.keys() != expected.keys():
            return [path]
        pairs = [(found[key], expected[key]) for key in expected]
        return list(dict.fromkeys(name for pair in pairs for name in _differences(path, *pair)))
    return [] if found == expected else [path]
