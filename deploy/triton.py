"""`llmkit deploy triton`: a model repository for Triton's Python backend."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmkit.checkpoint.output_directory import write_errors
from llmkit.common.errors import OutputError
from llmkit.deploy.triton_tensors import (
    DETOKENIZER_INPUTS,
    DETOKENIZER_OUTPUTS,
    ENSEMBLE_INPUTS,
    ENSEMBLE_OUTPUTS,
    GENERATOR_INPUTS,
    GENERATOR_OUTPUTS,
    OPTIONAL_INPUTS,
    TOKENIZER_INPUTS,
    TOKENIZER_OUTPUTS,
)
from llmkit.runtime.server.kserve.kserve_tensors import CONFIG_TYPES, INPUTS, OUTPUTS
from llmkit.runtime.server.serve_options import ServeOptions

MODEL_FILE = '''\
"""Written by `llmkit deploy triton`: Triton's Python backend needs llmkit in its Python."""

from llmkit.deploy.{module} import {name}

__all__ = ["TritonPythonModel"]
'''
_TYPES = CONFIG_TYPES | {"INT64": "TYPE_INT64"}
# One value for each request, of any other tensor an unknown number.
_SHAPES = {"text_range": 2}


@dataclass(frozen=True)
class TritonModel:
    """A model of the repository. Its inputs and outputs are data types by name."""

    name: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    # The module of llmkit.deploy and its class.
    implementation: tuple[str, str]
    is_decoupled: bool = False
    # The server batches requests itself, whatever Triton's device is.
    instance_kind: Literal["KIND_MODEL", "KIND_CPU"] = "KIND_CPU"


def write_repository(
    folder: Path, name: str, options: ServeOptions, ensemble: bool = False
) -> list[Path]:
    """Write the models for a server with these options to `folder`; return the files.

    ensemble: three models and the ensemble `name`, in place of one model.
    Raises OutputError when one of them exists, ShortageError when it cannot be written.
    """
    models = ensemble_models(name) if ensemble else [text_model(name)]
    names = [model.name for model in models] + ([name] if ensemble else [])
    for directory in (folder / one for one in names):
        if directory.exists():
            raise OutputError(
                f"{directory} exists already", todo="Remove it, or name another folder"
            )
    files: dict[Path, str] = {}
    for model in models:
        module, class_name = model.implementation
        imported = class_name
        if class_name != "TritonPythonModel":  # the name that Triton looks for
            imported = f"{class_name} as TritonPythonModel"
        files[folder / model.name / "config.pbtxt"] = configuration(model, options)
        files[folder / model.name / "1" / "model.py"] = MODEL_FILE.format(
            module=module, name=imported
        )
    if ensemble:
        files[folder / name / "config.pbtxt"] = ensemble_configuration(name)
    try:
        with write_errors(folder / name):
            for path, text in files.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
            if ensemble:  # it has no file, but Triton wants a version
                (folder / name / "1").mkdir()
    except BaseException:
        for one in names:
            shutil.rmtree(folder / one, ignore_errors=True)
        raise
    return list(files)


def text_model(name: str) -> TritonModel:
    """The model that answers text with text."""
    return TritonModel(
        name,
        INPUTS,
        OUTPUTS,
        ("triton_model", "TritonPythonModel"),
        is_decoupled=True,
        instance_kind="KIND_MODEL",
    )


def ensemble_models(name: str) -> list[TritonModel]:
    """The tokenizer, the model from ids to ids, and the detokenizer."""
    module = "triton_ensemble_models"
    return [
        TritonModel(
            f"{name}_tokenizer", TOKENIZER_INPUTS, TOKENIZER_OUTPUTS, (module, "TokenizerModel")
        ),
        TritonModel(
            f"{name}_model",
            GENERATOR_INPUTS,
            GENERATOR_OUTPUTS,
            (module, "GeneratorModel"),
            is_decoupled=True,
            instance_kind="KIND_MODEL",
        ),
        TritonModel(
            f"{name}_detokenizer",
            DETOKENIZER_INPUTS,
            DETOKENIZER_OUTPUTS,
            (module, "DetokenizerModel"),
        ),
    ]


def configuration(model: TritonModel, options: ServeOptions) -> str:
    """A model's config.pbtxt.

    There is one instance. The server batches requests by itself, and Triton keeps the order of
    responses only for models with one instance.
    """
    decoupled = "model_transaction_policy { decoupled: true }\n" if model.is_decoupled else ""
    # Once for the options' JSON, once for the string in the configuration.
    options_string = json.dumps(json.dumps(options.to_dict()))
    return (
        f"name: {json.dumps(model.name)}\n"
        'backend: "python"\n'
        "max_batch_size: 0\n"
        f"{decoupled}"
        f"{_tensors(model.inputs, model.outputs)}"
        f"instance_group [ {{ count: 1 kind: {model.instance_kind} }} ]\n"
        f'parameters {{\n  key: "options"\n  value {{ string_value: {options_string} }}\n}}\n'
    )


def ensemble_configuration(name: str) -> str:
    """The config.pbtxt of the ensemble: each model's outputs are the next one's inputs."""
    steps = "".join(
        f"  step {{\n    model_name: {json.dumps(model.name)}\n    model_version: -1\n"
        f"{_map('input_map', model.inputs)}{_map('output_map', model.outputs)}  }}\n"
        for model in ensemble_models(name)
    )
    return (
        f"name: {json.dumps(name)}\n"
        'platform: "ensemble"\n'
        "max_batch_size: 0\n"
        "model_transaction_policy { decoupled: true }\n"
        f"{_tensors(ENSEMBLE_INPUTS, ENSEMBLE_OUTPUTS)}"
        f"ensemble_scheduling {{\n{steps}}}\n"
    )


def _map(field: str, tensors: Iterable[str]) -> str:
    """A step's tensors; they have the same names in the model and in the ensemble."""
    return "".join(
        f"    {field} {{ key: {json.dumps(tensor)} value: {json.dumps(tensor)} }}\n"
        for tensor in tensors
    )


def _tensors(inputs: Mapping[str, str], outputs: Mapping[str, str]) -> str:
    text = ""
    for kind, table in (("input", inputs), ("output", outputs)):
        for tensor, data_type in table.items():
            text += f"{kind} {{\n  name: {json.dumps(tensor)}\n"
            text += f"  data_type: {_TYPES[data_type]}\n  dims: [ {_SHAPES.get(tensor, -1)} ]\n"
            if kind == "input" and tensor in OPTIONAL_INPUTS:
                text += "  optional: true\n"
            text += "}\n"
    return text
