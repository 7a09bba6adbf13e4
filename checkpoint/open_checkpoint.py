"""Opens a model with its weights as a `Checkpoint`, from a directory, hub id, .gguf file or URL."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.manifest import check_files, is_plain_name, load_manifest
from llmkit.checkpoint.model_files import (
    CONFIG,
    INDEX,
    MODELOPT_FILE,
    PICKLE_SUFFIXES,
    list_names,
    load_json,
    pickle_error,
    quantization_entry,
    read_generation_config,
    read_quantization_entry,
    read_side_files,
)
from llmkit.checkpoint.modelopt_format import check_same_config, with_group_size
from llmkit.checkpoint.open_model_files import resolve_model
from llmkit.checkpoint.quantized_formats import parse_quantization
from llmkit.checkpoint.quantized_weight import QuantizationConfig
from llmkit.checkpoint.safetensors_header import TensorInfo, read_header
from llmkit.checkpoint.tensor_reader import SafetensorsRows
from llmkit.common.errors import InputError

SINGLE_FILE = "model.safetensors"


def open_checkpoint(
    reference: str | Path, warn_of_edits: bool = True, dequantize_gguf: bool = False
) -> Checkpoint:
    """Open a model: a directory, a hub id (organization/name), a .gguf file or a URL.

    All headers are checked; no tensor is read.
    warn_of_edits: log a warning about a chat template or another text file that was edited since
    llmkit wrote the checkpoint. A server's API process warns, so that its engines need not.
    dequantize_gguf: dequantize the MXFP4 experts of a .gguf file too, which otherwise stay as they
    are.

    Raises InputError when there is no such model, when files are missing, malformed, cut short or
    changed since llmkit wrote them, and when the weights are pickled.
    """
    path = resolve_model(reference)
    text = str(reference)
    if path.is_dir():
        return _open_directory(text, path, warn_of_edits)
    from llmkit.checkpoint.gguf import open_gguf  # keeps the gguf package off the start path

    model = open_gguf(path, dequantize_gguf)
    return Checkpoint(
        text,
        path,
        "gguf",
        model.config,
        model.generation_config,
        model.side_files,
        model.tensors,
        _quantization(path, model.config, model.tensors),
        None,
        model.files,
        model,
    )


def _open_directory(reference: str, path: Path, warn_of_edits: bool) -> Checkpoint:
    config = load_json(path / CONFIG)
    manifest = load_manifest(path)
    if manifest is not None:
        check_files(path, manifest, warn_of_edits)
    if manifest is not None and manifest.get("layout") is not None:
        files = tuple(sorted(name for name in manifest["files"] if name.endswith(".safetensors")))
        tensors: dict[str, TensorInfo] = {}
    else:
        files, tensors = _find_tensors(path)
    names = [*tensors, *_source_tensors((manifest or {}).get("layout"))]
    return Checkpoint(
        reference,
        path,
        "safetensors",
        config,
        read_generation_config(path),
        lambda: read_side_files(path),
        tensors,
        _quantization(path, config, names),
        manifest,
        files,
        SafetensorsRows(path),
    )


def _source_tensors(layout: object) -> list[str]:
    """The source tensors that a layout names. What is malformed is refused where it is read."""
    tensors = layout.get("tensors") if isinstance(layout, dict) else None
    entries = tensors.values() if isinstance(tensors, dict) else ()
    return [str(entry.get("source")) for entry in entries if isinstance(entry, dict)]


def _quantization(
    path: Path, config: Mapping[str, Any], tensors: Collection[str]
) -> QuantizationConfig | None:
    entry = read_quantization_entry(path, config)
    if entry is None:
        return None
    modelopt_file = path / MODELOPT_FILE
    if not modelopt_file.is_file() or quantization_entry(config) is None:
        return parse_quantization(entry, tensors)
    method = entry.get("quant_method") if isinstance(entry, dict) else None
    if not str(method).startswith("modelopt"):
        raise InputError(
            f"{modelopt_file} is of Model-Optimizer, and {CONFIG} has the quant_method {method}",
            "modelopt in both was expected",
            "Remove the one that does not belong to the weights",
        )
    of_file = {"quant_method": "modelopt", **load_json(modelopt_file)}
    quantization = parse_quantization(with_group_size(entry, of_file), tensors)
    check_same_config(parse_quantization(of_file, tensors), quantization, tensors)
    return quantization


def _find_tensors(path: Path) -> tuple[tuple[str, ...], dict[str, TensorInfo]]:
    """The weight files of a directory and all tensors in them."""
    file_by_tensor: dict[str, str] = {}
    if (path / SINGLE_FILE).is_file():  # transformers, too, prefers this file to an index
        files = [SINGLE_FILE]
    elif (path / INDEX).is_file():
        file_by_tensor = _read_weight_map(path)
        files = sorted(set(file_by_tensor.values()))
    else:
        files = sorted(file.name for file in path.glob("*.safetensors"))
    if not files:
        pickles = sorted(file for file in path.iterdir() if file.suffix in PICKLE_SUFFIXES)
        if pickles:
            raise pickle_error(pickles[0])
        raise InputError(
            f"{path} has no weights; it holds {list_names(path)}",
            "Files named *.safetensors were expected",
        )
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read_header(path / file).items():
            if name in tensors:
                raise InputError(
                    f"{path}: tensor {name} is in both {tensors[name].file} and {file}",
                    "Each tensor was expected once",
                )
            tensors[name] = info
    wrong = [
        name
        for name, file in file_by_tensor.items()
        if name not in tensors or tensors[name].file != file
    ]
    if wrong:
        raise InputError(
            f"{path / INDEX} places {len(wrong)} tensors in files that lack them"
            f" ({', '.join(wrong[:5])})",
            "An index that agrees with its files was expected",
        )
    return tuple(files), tensors


def _read_weight_map(path: Path) -> dict[str, str]:
    """The `weight_map` of the index: the file of each tensor.

    Raises InputError when it is wrong.
    """
    weight_map = load_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(
            f"{path / INDEX} has no weight_map", "An object of tensor names and files was expected"
        )
    for name, file in weight_map.items():
        if not is_plain_name(file) or not file.endswith(".safetensors"):
            raise InputError(
                f"{path / INDEX} places {name} in {str(file)!r}",
                "A .safetensors file of the same folder was expected",
            )
    missing = sorted(file for file in set(weight_map.values()) if not (path / file).is_file())
    if missing:
        raise InputError(
            f"{path} lacks {len(missing)} of the files that {INDEX} names"
            f" ({', '.join(missing[:5])})",
            todo="Download them again",
        )
    return weight_map
