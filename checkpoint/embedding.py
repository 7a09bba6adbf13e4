"""How a model makes one vector of a text: what sentence-transformers has written beside it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.checkpoint.errors import InputError
from llmkit.checkpoint.files import ModelFiles, load_json

POOLINGS = {"lasttoken": "last", "mean": "mean", "mean_tokens": "mean"}  # by sentence-transformers' words
_NO_CHANGE = ("Transformer", "Pooling", "Normalize")  # vectors are normalized anyway


@dataclass(frozen=True)
class EmbeddingFacts:
    """What a checkpoint says of its embeddings."""

    pooling: str = "last"  # "last", "mean", or the name of what it wants and llmkit does not do
    size: int = 0  # of a vector
    sizes: tuple[int, ...] = ()  # that vectors may be cut to
    any_size: bool = False  # they may be cut to any (arXiv 2205.13147)


def embedding_facts(files: ModelFiles) -> EmbeddingFacts:
    """Those of a checkpoint; the last token where it says nothing. Raises InputError for files that are no JSON."""
    config = files.config
    sizes = config.get("matryoshka_dimensions")
    return EmbeddingFacts(
        pooling=_pooling(files.path) if files.path.is_dir() else "last",
        size=int(config.get("hidden_size") or 0),
        sizes=tuple(size for size in sizes if isinstance(size, int)) if isinstance(sizes, list) else (),
        any_size=config.get("is_matryoshka") is True and not sizes,
    )


def _pooling(folder: Path) -> str:
    if not (folder / "modules.json").is_file():
        return _mode(load_json(file)) if (file := folder / "1_Pooling/config.json").is_file() else "last"
    try:
        modules = json.loads((folder / "modules.json").read_bytes())
        kinds = {str(one["type"]).rpartition(".")[2]: Path(one["path"]).name for one in modules}
    except (OSError, ValueError, RecursionError, TypeError, KeyError) as error:
        raise InputError(f"{folder / 'modules.json'} is not what sentence-transformers writes ({error})") from error
    if others := [kind for kind in kinds if kind not in _NO_CHANGE]:
        return others[0]
    file = folder / kinds.get("Pooling", "") / "config.json"
    return _mode(load_json(file)) if "Pooling" in kinds and file.is_file() else "unknown"


def _mode(config: dict[str, Any]) -> str:
    named = config.get("pooling_mode")
    prefix = "pooling_mode_"
    modes = [named] if named else [key.removeprefix(prefix) for key in config if key.startswith(prefix) and config[key]]
    words = [POOLINGS.get(str(mode), str(mode)) for mode in modes]
    return " and ".join(words) or "last"
