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
    LOG_MULTIPLIER,
    ONE_ROW_MODULES,
    VARIANTS,
    GgufArchitecture,
    gguf_architecture,
    gguf_config,
)
from llmkit.checkpoint.gguf_metadata import GgufMetadata
from llmkit.checkpoint.gguf_moves import GgufMove
from llmkit.checkpoint.hf_config import RopeSpec, complete_config
from llmkit.checkpoint.safetensors_header import TensorInfo
from llmkit.common.errors import InputError
from llmkit.model.checkpoint_tensors import carried_tensors, checkpoint_tensors
from llmkit.model.families import SUPPORTED, model_spec
from llmkit.model.gguf_keys import gguf_keys
from llmkit.model.spec import GatedDeltaNetSpec, Mamba2Spec, ModelSpec
from llmkit.model.wrappers import architecture_of, text_model

# Families whose files have another family's architecture: theirs is the same decoder.
SAME_DECODER = {
    "mistral": "llama",
    "internlm3": "llama",
    "iquestcoder": "llama",
    "solar_open": "glm4_moe",
    "glm4_moe_lite": "deepseek_v3",
}
_GRANITE = ARCHITECTURES["granite"]
_GRANITE_MLP = {"ffn_down": "shared_mlp.output_linear"}
# Granite 4.0's models without Mamba 2 layers have files of the architectures without them.
_WITHOUT_STATES = {
    "granitemoehybrid": [
        (
            "granite",
            dataclasses.replace(
                _GRANITE,
                modules={**_GRANITE.modules, **_GRANITE_MLP},
                joined={"shared_mlp.input_linear": ("ffn_gate", "ffn_up")},
                moves=VARIANTS["granitehybrid"]["embedding_scale", None].moves,
            ),
        ),
        ("granitemoe", VARIANTS["granitemoe"]["expert_shared_feed_forward_length", None]),
    ]
}
# What two specs of one model may differ in: names of a checkpoint, and how it stores experts.
_NAMES = (
    "architecture",
    "tensor_prefix",
    "lm_head_name",
    "module_names",
    "fused_gate_up",
    "carried",
    "mtp",
)


# The modules of an MTP head that is beside the layers, by their names in one that is a layer.
_MTP_MODULES = {
    "fc": "eh_proj",
    "pre_fc_norm_embedding": "enorm",
    "pre_fc_norm_hidden": "hnorm",
    "norm": "shared_head.norm",
}


# What llama.cpp cannot load, by GGUF's architecture: tensors that its families have not.
_NO_OUTPUT_BIAS = r"blk\.\d+\.attn_output\.bias"
_NO_SSM_BIAS = r"blk\.\d+\.ssm_(in|out)\.bias"
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
            "qwen35",
            "qwen35moe",
            "qwen3next",
            "mellum",
            "hy_v3",
            "laguna",
        ),
        _NO_OUTPUT_BIAS,
    ),
    **dict.fromkeys(("mamba2", "nemotron_h", "nemotron_h_moe", "granitehybrid"), _NO_SSM_BIAS),
    **dict.fromkeys(("ernie4_5", "ernie4_5-moe"), r"blk\.\d+\.ffn_\w+\.bias"),
    **dict.fromkeys(("lfm2", "lfm2moe"), r"blk\.\d+\.shortconv\.\w+\.bias"),
}
# Whose attention has as many features as the model.
_SQUARE_OUTPUTS = ("phi3", "chatglm", "stablelm", "nemotron")
# Whose LM head is never the embedding.
_OWN_OUTPUT = ("mellum", "apertus")
# The only EXAONE 4 whose windows llama.cpp applies: the layers and the window of the 32B model.
_EXAONE4_WINDOWS = (64, 4096)


@dataclass(frozen=True)
class GgufPlace:
    """Where a checkpoint tensor goes.

    names, shapes: of the tensors in the file, one unless `move` splits the checkpoint tensor; none
    when its value is in the metadata.
    expert: its index in a tensor of all experts; None: it is the whole tensor.
    move: in which order the values are stored; None: as in the checkpoint.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    expert: int | None = None
    move: GgufMove | None = None

    @property
    def name(self) -> str:
        """The first tensor in the file."""
        return self.names[0]

    @property
    def layer(self) -> int | None:
        """The layer that the tensor belongs to."""
        match = re.match(r"blk\.(\d+)\.", self.name) if self.names else None
        return None if match is None else int(match[1])

    @property
    def moves_rows_only(self) -> bool:
        """Whether the rows of the file are those of the checkpoint, in any order."""
        return self.move is None or self.move.kind == "rows"

    def arrange(self, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The values [out, ...] of each tensor of the file."""
        return (values,) if self.move is None else self.move.store(values)

    def restore(self, *parts: torch.Tensor) -> torch.Tensor:
        """The reverse of `arrange`."""
        return parts[0] if self.move is None else self.move.load(*parts)


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
        shapes = {
            name: shape
            for place in self.places.values()
            for name, shape in zip(place.names, place.shapes, strict=True)
        }
        return shapes | {name: tuple(vector.shape) for name, vector in self.vectors.items()}

    @property
    def has_two_rope_bases(self) -> bool:
        """Whether layers with sliding windows have another base than the others."""
        base = self.metadata.get(f"{self.architecture}.rope.freq_base")
        return self.metadata.get(f"{self.architecture}.rope.freq_base_swa", base) != base


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
    completed = complete_config(config, model_type)
    places = _places(checkpoint, spec, row, vars(completed))
    keys = gguf_keys(row, spec, completed)
    metadata = {f"{name}.{key}": value for key, value in keys.values.items()}
    metadata |= _layer_numbers(checkpoint, spec, row)
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
    wanted = SAME_DECODER.get(model_type, model_type)
    rows = [*ARCHITECTURES.items()]
    rows += [(name, row) for name, variants in VARIANTS.items() for row in variants.values()]
    found = [(name, row) for name, row in rows if row.model_type == wanted and row.is_written]
    # One family may have files of two architectures, with experts and without.
    if model_type in _WITHOUT_STATES and not spec.num_recurrent_layers:
        found = _WITHOUT_STATES[model_type]
    found.sort(key=lambda pair: pair[1].has_experts != (spec.moe is not None))
    if found:
        return found[0]
    known = {row.model_type for _, row in rows}
    raise InputError(
        f"{reference} is a {spec.architecture} ({model_type}), which is not written as GGUF",
        f"One of {', '.join(sorted(known | SAME_DECODER.keys()))} was expected",
        "Use another --format",
    )


def _places(
    checkpoint: Checkpoint, spec: ModelSpec, row: GgufArchitecture, config: Mapping[str, Any]
) -> dict[str, GgufPlace]:
    """Where each tensor of the checkpoint goes. config: the fields of config.json."""
    shapes = {name: packed.shape for name, (_, packed) in checkpoint_tensors(spec, None).items()}
    shapes |= {name: info.shape for name, info in carried_tensors(checkpoint, spec).items()}
    places = {}
    unknown = []
    for name, shape in shapes.items():
        place = _place(name, shape, spec, row, config)
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


def _layer_numbers(
    checkpoint: Checkpoint, spec: ModelSpec, row: GgufArchitecture
) -> dict[str, list[float]]:
    """The values of the tensors that are in the metadata, by key."""
    values = {}
    for key, (module, _) in row.layer_numbers.items():
        names = [
            f"{spec.tensor_prefix}.layers.{index}.{module}" for index in range(len(spec.layers))
        ]
        values[key] = [float(checkpoint.read(name)) for name in names]
    return values


def _place(
    name: str,
    shape: tuple[int, ...],
    spec: ModelSpec,
    row: GgufArchitecture,
    config: Mapping[str, Any],
) -> GgufPlace | None:
    """Where a tensor goes; None when the family's files have no such tensor."""
    prefix = re.escape(spec.tensor_prefix)
    if name == f"{spec.lm_head_name}.weight":
        return GgufPlace(("output.weight",), (shape,))
    match = re.fullmatch(rf"{prefix}\.(?:layers\.(\d+)\.)?(.+)", _unified_name(name, spec))
    if match is None:
        return None
    layer, rest = match.groups()
    module, _, kind = rest.rpartition(".")
    if rest.endswith(BARE_MODULES):
        module = rest
        kind = "bias" if rest.endswith("bias") else "weight"
    if layer is None:
        modules = {
            module.partition(".")[2]: gguf_name for gguf_name, module in row.all_top_modules.items()
        }
        found = modules.get(module)
        if found is None:
            return None
        return GgufPlace((f"{found}.{kind}",), (shape,), move=row.move(module, kind, config))
    for gguf_name, pattern in (row.experts or {}).items():
        expert = re.fullmatch(re.escape(pattern).replace(r"\{\}", r"(\d+)"), module)
        if expert is not None:
            assert spec.moe is not None
            whole = (spec.moe.num_experts, *shape)
            return GgufPlace((f"blk.{layer}.{gguf_name}.{kind}",), (whole,), int(expert[1]))
    if rest in [module for module, _ in row.layer_numbers.values()]:
        return GgufPlace((), ())
    scales = {module: gguf_name for gguf_name, module in row.scales.items()}
    if rest in scales:
        return GgufPlace((f"blk.{layer}.{scales[rest]}.scale",), (shape,))
    modules = {module: gguf_name for gguf_name, module in row.modules.items()}
    parts = row.joined.get(module) or ((modules[module],) if module in modules else ())
    if not parts:
        return None
    move = row.move(module, kind, config)
    if module.endswith(ONE_ROW_MODULES):
        shape = (math.prod(shape),)
    elif len(shape) == 3 and shape[1] == 1:  # a convolution of each channel
        shape = (shape[0], shape[2])
    elif not shape:
        shape = (1,)
    shapes: tuple[tuple[int, ...], ...] = (shape,)
    if move is not None:
        stored = move.store(torch.empty(shape, device="meta"))
        shapes = tuple(tuple(part.shape) for part in stored)
    names = tuple(
        f"blk.{layer}.{part}" if part in row.bare_tensors else f"blk.{layer}.{part}.{kind}"
        for part in parts
    )
    return GgufPlace(names, shapes, move=move)


def _unified_name(name: str, spec: ModelSpec) -> str:
    """The name of a tensor of an MTP head as if the head was a layer after the last one."""
    match = re.fullmatch(r"(?:model\.)?mtp\.(?:layers\.0\.)?(.+)\.(weight|bias)", name)
    if match is None:
        return name
    module = match[1] if "layers." in name else _MTP_MODULES.get(match[1], match[1])
    return f"{spec.tensor_prefix}.layers.{len(spec.layers)}.{module}.{match[2]}"


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
    differences = list(_differences("", _used_sizes(found), _used_sizes(spec)))
    if differences:
        raise InputError(
            f"{reference} cannot be described by a GGUF file: its architecture"
            f" {export.architecture} does not hold {', '.join(differences[:5])}",
            "A model of the family's usual settings was expected",
            "Use another --format",
        )


def _used_sizes(spec: ModelSpec) -> ModelSpec:
    """The spec without the sizes of MLPs, recurrent layers and attention that no layer has."""
    if spec.layers[0].num_heads is not None:  # then all layers have numbers of heads of their own
        spec = dataclasses.replace(spec, num_heads=spec.layers[0].num_heads)
    if not any(layer.is_recurrent for layer in spec.layers):
        spec = dataclasses.replace(spec, recurrent=None)
    has_mlp = any(layer.has_mlp and not layer.is_moe for layer in spec.layers)
    if has_mlp or (spec.moe is not None and spec.moe.parallel_mlp):
        return spec
    return dataclasses.replace(spec, intermediate_size=0)


def _check_llama_cpp(reference: str, export: GgufExport, spec: ModelSpec) -> None:
    """Raises InputError for models of a family that llama.cpp cannot load, or computes otherwise.

    Tried with its sources of 2026; the reader of this project has no such limits.
    """
    name = export.architecture
    pattern = _NOT_LOADED.get(name)
    unknown = [tensor for tensor in export.shapes if pattern and re.fullmatch(pattern, tensor)]
    problem = f"the tensor {unknown[0]}" if unknown else ""
    windows = {layer.sliding_window for layer in spec.layers if layer.sliding_window}
    recurrent = spec.recurrent
    if name == "exaone4" and windows and (len(spec.layers), max(windows)) != _EXAONE4_WINDOWS:
        problem = f"windows of {max(windows)} tokens in {len(spec.layers)} layers"
    elif name == "olmoe" and spec.num_kv_heads != spec.num_heads:
        problem = f"{spec.num_kv_heads} KV heads of {spec.num_heads} heads"
    elif isinstance(recurrent, GatedDeltaNetSpec) and recurrent.head_k_dim != recurrent.head_v_dim:
        problem = (
            f"value heads of {recurrent.head_v_dim} beside key heads of {recurrent.head_k_dim}"
        )
    elif name == "mellum" and export.has_two_rope_bases:
        problem = "another RoPE base of layers with windows"
    elif name in _OWN_OUTPUT and "output.weight" not in export.shapes:
        problem = "a tied LM head"
    elif (
        name == "granitehybrid"
        and isinstance(recurrent, Mamba2Spec)
        and recurrent.intermediate_size != 2 * spec.hidden_size
    ):
        problem = f"Mamba 2 layers of {recurrent.intermediate_size} features in {spec.hidden_size}"
    elif name == "mamba2" and "blk.0.ssm_conv1d.bias" not in export.shapes:
        problem = "convolutions without biases"
    elif name == "laguna":
        problem = problem or _laguna_problem(spec)
    elif spec.mla is not None:
        problem = problem or _latent_rope_problem(export, spec)
    elif name in _SQUARE_OUTPUTS and spec.num_heads * spec.head_dim != spec.hidden_size:
        problem = f"{spec.num_heads} heads of {spec.head_dim} in {spec.hidden_size} features"
    if problem:
        raise InputError(
            f"{reference}: llama.cpp's {name} does not support {problem}",
            "A model that llama.cpp runs was expected",
            "Use another --format",
        )


def _laguna_problem(spec: ModelSpec) -> str:
    """What llama.cpp computes otherwise than a Laguna model; "": nothing."""
    full = spec.ropes.get("full_attention")
    sliding = spec.ropes.get("sliding_attention")
    if full is None:
        return ""
    # It rotates as many dimensions in layers without a window as in layer 0.
    is_same_size = sliding is None or len(sliding.inv_freq) == len(full.inv_freq)
    if spec.layers[0].sliding_window is not None and not is_same_size:
        return "a window in layer 0 and RoPE of other dimensions in layers without one"
    return ""


def _latent_rope_problem(export: GgufExport, spec: ModelSpec) -> str:
    """What llama.cpp computes otherwise of latent attention with YaRN; "": nothing.

    Its softmax has the square of what multiplies queries and keys, which is 1 in real models.
    """
    rope = next(iter(spec.ropes.values()), None)
    name = export.architecture
    if rope is None or export.metadata.get(f"{name}.rope.scaling.type") != "yarn":
        return ""
    if not math.isclose(rope.attention_scaling, 1.0, rel_tol=1e-5):
        return f"the attention_factor {rope.attention_scaling:g} of YaRN in latent attention"
    multiplier = export.metadata.get(f"{name}.{LOG_MULTIPLIER}", 0.0)
    # llama.cpp takes mscale to be mscale_all_dim in deepseek2, and 1 in other architectures.
    if multiplier and (name == "deepseek2" or math.isclose(multiplier, 0.1, rel_tol=1e-5)):
        return ""
    return f"YaRN with mscale_all_dim {10 * multiplier:g} in latent attention"


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
