"""`llmkit deploy triton`: a model repository for Triton's Python backend."""

from __future__ import annotations

import json
from pathlib import Path

from llmkit.checkpoint.output_directory import write_errors
from llmkit.common.errors import OutputError
from llmkit.runtime.server.kserve.kserve_tensors import CONFIG_TYPES, INPUTS, OUTPUTS
from llmkit.runtime.server.serve_options import ServeOptions

MODEL_FILE = '''\
"""Written by `llmkit deploy triton`: Triton's Python backend needs llmkit in its Python."""

from llmkit.deploy.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def write_repository(folder: Path, name: str, options: ServeOptions) -> list[Path]:
    """Write `folder/name` for a server with these options; return the files.

    Raises OutputError when it exists, ShortageError when it cannot be written.
    """
    directory = folder / name
    if directory.exists():
        raise OutputError(f"{directory} exists already", todo="Remove it, or name another folder")
    config_file = directory / "config.pbtxt"
    model_file = directory / "1" / "model.py"
    with write_errors(directory):
        model_file.parent.mkdir(parents=True)
        config_file.write_text(configuration(name, options), encoding="utf-8")
        model_file.write_text(MODEL_FILE, encoding="utf-8")
    return [config_file, model_file]


def configuration(name: str, options: ServeOptions) -> str:
    """A model's config.pbtxt. One instance takes all requests, because the server batches them."""
    tensors = ""
    for kind, table in (("input", INPUTS), ("output", OUTPUTS)):
        for tensor, data_type in table.items():
            tensors += f"{kind} {{\n  name: {json.dumps(tensor)}\n"
            tensors += f"  data_type: {CONFIG_TYPES[data_type]}\n  dims: [ -1 ]\n"
            if kind == "input" and tensor != "text_input":
                tensors += "  optional: true\n"
            tensors += "}\n"
    # Once for the options' JSON, once for the string in the configuration.
    options_string = json.dumps(json.dumps(options.to_dict()))
    return (
        f"name: {json.dumps(name)}\n"
        'backend: "python"\n'
        "max_batch_size: 0\n"
        "model_transaction_policy { decoupled: true }\n"
        f"{tensors}"
        "instance_group [ { count: 1 kind: KIND_MODEL } ]\n"
        f'parameters {{\n  key: "options"\n  value {{ string_value: {options_string} }}\n}}\n'
    )
