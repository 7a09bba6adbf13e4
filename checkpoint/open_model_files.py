"""Opens a model by any reference (directory, hub id, .gguf file or URL), without its weights.

This module needs no torch. `open_checkpoint` opens a model with its weights.
"""

from __future__ import annotations

from pathlib import Path

from llmkit.checkpoint.hub import is_url
from llmkit.checkpoint.model_files import (
    CONFIG,
    ModelFiles,
    find_model,
    load_json,
    read_generation_config,
    read_side_files,
    require_config,
)


def resolve_model(reference: str | Path) -> Path:
    """The local directory with a config.json, or the .gguf file, that `reference` names.

    A hub id and a URL (s3://, gs://, models:/, runs:/, hf://) are downloaded first.
    Raises InputError when there is no such model, ShortageError when a store cannot be reached.
    """
    if isinstance(reference, str) and is_url(reference):
        path = Path(reference).expanduser()
        if not path.is_file() and not path.is_dir():
            # The object stores' clients are heavy: they are imported only for a URL.
            from llmkit.checkpoint.registry.local_copies import local_copy

            return require_config(local_copy(reference))
    return find_model(reference)


def open_model_files(reference: str | Path) -> ModelFiles:
    """The configs and tokenizer files of a model; its weights are neither read nor checked.

    Raises InputError when there is no such model or its JSON files are malformed.
    """
    path = resolve_model(reference)
    if path.is_file():
        from llmkit.checkpoint.gguf import open_gguf  # keeps the gguf package off the start path

        model = open_gguf(path)
        return ModelFiles(
            str(reference), path, "gguf", model.config, model.generation_config, model.side_files
        )
    return ModelFiles(
        str(reference),
        path,
        "safetensors",
        load_json(path / CONFIG),
        read_generation_config(path),
        lambda: read_side_files(path),
    )
