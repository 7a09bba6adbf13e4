"""What the output checkpoint holds: its tensors, its config.json and its other files."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.dtypes import DTYPE_NAMES, DTYPES
from llmkit.checkpoint.model_files import QUANTIZATION_FILES, without_quantization
from llmkit.checkpoint.quantized_formats import format_of
from llmkit.checkpoint.quantized_weight import QuantizationConfig
from llmkit.checkpoint.safetensors_header import TensorInfo
from llmkit.model.checkpoint_tensors import carried_tensors, checkpoint_tensors, scheme_of
from llmkit.model.families import checkpoint_spec
from llmkit.model.parameter_table import parameters
from llmkit.model.spec import ModelSpec
from llmkit.model.wrappers import module_names

LICENSE_FILES = ("LICENSE", "NOTICE", "USE_POLICY")
HALF_DTYPES = ("BF16", "F16")


def unquantized_dtype(source: Checkpoint, cast: torch.dtype | None) -> str:
    """The dtype of the unquantized tensors, as in a safetensors header.

    It is `cast` when given, else the source's most common 16-bit dtype, else bfloat16.
    """
    if cast is not None:
        return DTYPE_NAMES[cast]
    sizes = Counter({"BF16": 0})
    for info in source.tensors.values():
        if info.dtype in HALF_DTYPES:
            sizes[info.dtype] += info.nbytes
    return sizes.most_common(1)[0][0]


def planned_tensors(
    source: Checkpoint,
    spec: ModelSpec,
    quantization: QuantizationConfig | None,
    cast: torch.dtype | None,
) -> list[TensorInfo]:
    """Every tensor of the output. Without `cast`, 16-bit tensors keep their dtype.

    Parameters that models keep in float32, such as the biases that choose experts, always keep the
    dtype of the source: close scores of two experts would change places.
    """
    other_dtype = unquantized_dtype(source, cast)
    planned = []
    for name, (parameter, packed) in checkpoint_tensors(spec, quantization).items():
        if packed.is_quantized:  # the format fixes the dtype
            dtype = packed.dtype
        else:
            source_dtype = source.tensors[name].dtype
            is_half = cast is None and source_dtype in HALF_DTYPES
            keeps_dtype = is_half or parameter.is_float32
            dtype = source_dtype if keeps_dtype else other_dtype
        planned.append(TensorInfo(name, dtype, packed.shape))
    carried = carried_tensors(with_stored_dtypes(source, cast), spec).values()
    return planned + [TensorInfo(info.name, info.dtype, info.shape) for info in carried]


def with_stored_dtypes(source: Checkpoint, cast: torch.dtype | None) -> Checkpoint:
    """A source whose carried tensors have the dtypes in which they are stored.

    A GGUF file is read as float32 whatever it stores, so its tensors are rounded like the others.
    """
    if source.file_format != "gguf":
        return source
    return source.with_dtype(unquantized_dtype(source, cast))


def carried_modules(source: Checkpoint, spec: ModelSpec) -> tuple[str, ...]:
    """The prefixes of carried modules for a `quantization_config`, with and without "model.".

    transformers and vLLM name these modules differently. Only parts that the source has are named.
    """
    found = {
        prefix.removeprefix("model.")
        for name in carried_tensors(source, spec)
        for prefix in spec.carried
        if name.startswith(prefix)
    }
    return tuple(prefix for prefix in spec.carried if prefix.removeprefix("model.") in found)


def output_config(
    source: Checkpoint, quantization: QuantizationConfig | None, dtype: str
) -> dict[str, Any]:
    """The output's config.json: the source's, with the new dtype and quantization."""
    config = without_quantization(source.config)
    dtype_name = str(DTYPES[dtype]).removeprefix("torch.")
    dtype_keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    config |= dict.fromkeys(dtype_keys, dtype_name)
    text_config = config.get("text_config")
    if isinstance(text_config, dict):
        nested_keys = [key for key in ("dtype", "torch_dtype") if key in text_config]
        config["text_config"] = text_config | dict.fromkeys(nested_keys, dtype_name)
    if quantization is None:
        return config
    quantization = _with_module_names(source, quantization)
    quantization_config = format_of(quantization).config_dict(quantization)
    if "dynamic" in quantization_config:
        # transformers does not read "dynamic": it needs the names of the quantized modules.
        spec = checkpoint_spec(source)
        modules = [
            module
            for parameter in parameters(spec)
            for name in parameter.source_names
            if scheme_of(parameter, name, quantization)
            for module in module_names(spec, name.removesuffix(".weight"))
        ]
        quantization_config["modules_in_block_to_quantize"] = [modules]
    config["quantization_config"] = quantization_config
    return config


def output_files(
    source: Checkpoint, quantization: QuantizationConfig | None, is_gguf: bool = False
) -> dict[str, bytes]:
    """The output's other files: the source's tokenizer and licenses, and those of the format.

    is_gguf: the output is a GGUF file, which holds the tokenizer itself.
    """
    files = source.side_files()
    if is_gguf:
        return {name: data for name, data in files.items() if name.startswith(LICENSE_FILES)}
    files = {name: data for name, data in files.items() if name not in QUANTIZATION_FILES}
    if quantization is not None:
        quantization = _with_module_names(source, quantization)
        files |= format_of(quantization).extra_files(quantization)
    return files


def _with_module_names(source: Checkpoint, quantization: QuantizationConfig) -> QuantizationConfig:
    """The config as its format writes it: Model-Optimizer names each module of a mixed model."""
    if quantization.format != "modelopt" or not quantization.overrides:
        return quantization
    spec = checkpoint_spec(source)
    overrides = [
        (module, scheme)
        for parameter in parameters(spec)
        for name in parameter.source_names
        if (scheme := scheme_of(parameter, name, quantization)) is not None
        for module in module_names(spec, name.removesuffix(".weight"))
    ]
    return replace(quantization, scheme=None, overrides=tuple(overrides))
