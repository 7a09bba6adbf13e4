"""`llmkit deploy triton`: a model repository for Triton's Python backend."""

from __future__ import annotations

import json
from pathlib import Path

from llmkit.checkpoint.errors import OutputError
from llmkit.checkpoint.output import writing
from llmkit.runtime.server.kserve.tensors import CONFIG_TYPES, INPUTS, OUTPUTS
from llmkit.runtime.server.options import ServeOptions

MODEL = '''"""Written by `llmkit deploy triton`: Triton's Python backend needs llmkit in its Python."""

from llmkit.deploy.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def write_repository(folder: Path, name: str, options: ServeOptions) -> list[Path]:
    """Write `folder/name` for a server with these options; the files.

    Raises OutputError where it exists, ShortageError where it cannot be written.
    """
    home = folder / name
    if home.exists():
        raise OutputError(f"{home} exists already", todo="Remove it, or name another folder")
    written = [home / "config.pbtxt", home / "1" / "model.py"]
    with writing(home):
        (home / "1").mkdir(parents=True)
        written[0].write_text(configuration(name, options), encoding="utf-8")
        written[1].write_text(MODEL, encoding="utf-8")
    return written


def configuration(name: str, options: ServeOptions) -> str:
    """A model's config.pbtxt. One instance takes all requests: the server batches, on the GPUs that it is told."""
    tensors = "".join(
        f"{kind} {{\n  name: {json.dumps(one)}\n  data_type: {CONFIG_TYPES[type_]}\n  dims: [ -1 ]\n{optional}}}\n"
        for kind, table in (("input", INPUTS), ("output", OUTPUTS))
        for one, type_ in table.items()
        for optional in ("  optional: true\n" if kind == "input" and one != "text_input" else "",)
    )
    said = json.dumps(json.dumps(options.as_document()))
    return (
        f"name: {json.dumps(name)}\n"
        'backend: "python"\n'
        "max_batch_size: 0\n"
        "model_transaction_policy { decoupled: true }\n"
        f"{tensors}"
        "instance_group [ { count: 1 kind: KIND_MODEL } ]\n"
        f'parameters {{\n  key: "options"\n  value {{ string_value: {said} }}\n}}\n'
    )
