"""A model without its weights: where it lies, its configs and tokenizer files. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from llmkit.checkpoint.errors import InputError
from llmkit.checkpoint.hub import fetch, looks_like_hub_id, looks_remote

CONFIG = "config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
CARRIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json",
    "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model",
    "spiece.model", "*.tiktoken", "quantize_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip


@dataclass
class ModelFiles:
    """What there is beside the weights."""

    reference: str  # as the user gave it
    path: Path  # the directory, or the .gguf file
    kind: Literal["safetensors", "gguf"]
    config: dict[str, Any]  # HF config.json; made from the metadata for GGUF
    generation_config: dict[str, Any]
    _side_files: Callable[[], dict[str, bytes]] = field(repr=False)

    def side_files(self) -> dict[str, bytes]:
        """What an output carries along: tokenizer, chat template, generation config, licence. Not config.json."""
        return self._side_files()


def open_files(reference: str | Path) -> ModelFiles:
    """A model directory, a hub id (organization/name) or a .gguf file, its weights unread and unchecked.

    Raises InputError when there is nothing there or its JSON files are malformed.
    """
    path = locate(reference)
    if path.is_file():
        from llmkit.checkpoint.gguf import open_gguf  # the gguf package is needed by few

        model = open_gguf(path)
        return ModelFiles(str(reference), path, "gguf", model.config, model.generation_config, model.side_files)
    return ModelFiles(
        str(reference), path, "safetensors", load_json(path / CONFIG), generation_config(path), lambda: side_files(path)
    )


def locate(reference: str | Path) -> Path:
    """The directory with a config.json or the .gguf file that `reference` names; fetches a hub id or a URL.

    Raises InputError when there is no such thing, ShortageError when a store cannot be reached.
    """
    text = str(reference)
    path = Path(text).expanduser()
    if not text:  # a shell's variable that is not set
        raise InputError("the model's name is empty", "A directory, a hub id or a .gguf file was expected")
    if path.is_file():
        return _model_file(text, path)
    if not path.is_dir():
        if isinstance(reference, str) and looks_remote(text):
            from llmkit.checkpoint.remote import cached  # what it is made of is needed by few

            path = cached(text)
        elif isinstance(reference, Path) or not looks_like_hub_id(text):
            raise InputError(f"{text} does not exist", "A directory, a hub id or a .gguf file was expected")
        else:
            path = fetch(text)
    if not (path / CONFIG).is_file():
        ggufs = sorted(path.glob("*.gguf"))
        raise InputError(
            f"{path} has no {CONFIG}; it holds {listing(path)}",
            "A Hugging Face model directory was expected",
            f"Give the file itself, {ggufs[0]}" if ggufs else "",
        )
    return path


def _model_file(reference: str, path: Path) -> Path:
    if path.suffix == ".gguf":
        return path
    if path.suffix in PICKLES:
        raise pickled(path)
    todo = f"Give its directory, {path.parent}" if path.suffix == ".safetensors" else ""
    raise InputError(f"{reference} is a file", "A directory, a hub id or a .gguf file was expected", todo)


def generation_config(path: Path) -> dict[str, Any]:
    """The generation_config.json of a directory; {} when there is none."""
    file = path / "generation_config.json"
    return load_json(file) if file.is_file() else {}


def side_files(path: Path) -> dict[str, bytes]:
    """The files of a directory that an output carries along, by name."""
    return {
        file.name: file.read_bytes()
        for file in sorted(path.iterdir())
        if file.is_file() and any(fnmatch(file.name, pattern) for pattern in CARRIED)
    }


def load_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises InputError when it is not one."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    return parse_json(data, path)


def parse_json(data: bytes, where: object) -> dict[str, Any]:
    """The JSON object in `data`, the contents of `where`. Raises InputError when it is not one."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{where} holds a JSON {type(value).__name__}", "An object was expected")
    return value


def listing(path: Path) -> str:
    """The first names in a directory, for a message."""
    names = sorted(file.name for file in path.iterdir())
    if not names:
        return "nothing"
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def pickled(path: Path) -> InputError:
    """The error for weights that are pickled."""
    return InputError(
        f"{path} is a pickle file, which can run code when loaded, and is never loaded",
        "Weights in safetensors files were expected",
        "Convert them where you trust them: AutoModelForCausalLM.from_pretrained(MODEL).save_pretrained(DIRECTORY)",
    )
