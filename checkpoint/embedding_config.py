"""How a model pools a text into one embedding, from the files that sentence-transformers writes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.checkpoint.model_files import ModelFiles, load_json
from llmkit.common.errors import InputError

# The pooling of each mode of sentence-transformers.
POOLINGS = {"lasttoken": "last", "mean": "mean", "mean_tokens": "mean"}
# The modules that llmkit supports. Normalize needs no code: embeddings are always normalized.
_SUPPORTED_MODULES = ("Transformer", "Pooling", "Normalize")


@dataclass(frozen=True)
class PoolingConfig:
    """What a checkpoint says about its embeddings."""

    pooling: str = "last"  # "last", "mean", or the name of a pooling that llmkit does not support
    size: int = 0  # the length of an embedding vector
    # The lengths to which an embedding may be truncated (Matryoshka, arXiv 2205.13147).
    sizes: tuple[int, ...] = ()
    any_size: bool = False  # an embedding may be truncated to any length


def read_pooling_config(files: ModelFiles) -> PoolingConfig:
    """The facts of a checkpoint. The default pooling is the last token.

    Raises InputError for files that are not JSON.
    """
    config = files.config
    dimensions = config.get("matryoshka_dimensions")
    sizes: tuple[int, ...] = ()
    if isinstance(dimensions, list):
        sizes = tuple(size for size in dimensions if isinstance(size, int))
    return PoolingConfig(
        pooling=_pooling(files.path) if files.path.is_dir() else "last",
        size=int(config.get("hidden_size") or files.text_config.get("hidden_size") or 0),
        sizes=sizes,
        any_size=config.get("is_matryoshka") is True and not dimensions,
    )


def _pooling(folder: Path) -> str:
    if not (folder / "modules.json").is_file():
        file = folder / "1_Pooling/config.json"
        return _pooling_mode(load_json(file)) if file.is_file() else "last"
    try:
        modules = json.loads((folder / "modules.json").read_bytes())
        folders = {
            str(module["type"]).rpartition(".")[2]: Path(module["path"]).name for module in modules
        }
    except (OSError, ValueError, RecursionError, TypeError, KeyError) as error:
        raise InputError(
            f"{folder / 'modules.json'} is not what sentence-transformers writes ({error})"
        ) from error
    unsupported = [module for module in folders if module not in _SUPPORTED_MODULES]
    if unsupported:
        return unsupported[0]
    if "Pooling" not in folders:
        return "unknown"
    file = folder / folders["Pooling"] / "config.json"
    return _pooling_mode(load_json(file)) if file.is_file() else "unknown"


def _pooling_mode(config: dict[str, Any]) -> str:
    """The mode of a pooling config, in its new form (one name) or its old one (a flag per mode)."""
    prefix = "pooling_mode_"
    if config.get("pooling_mode"):
        modes = [config["pooling_mode"]]
    else:
        flags = [key for key in config if key.startswith(prefix) and config[key]]
        modes = [key.removeprefix(prefix) for key in flags]
    return " and ".join(POOLINGS.get(str(mode), str(mode)) for mode in modes) or "last"
