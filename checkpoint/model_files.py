"""Finds a model on disk or on the Hugging Face hub, and reads the files beside its weights.

This module needs no torch, so that a process that only tokenizes starts fast.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from llmkit.checkpoint.hub import download_from_hub, is_hub_id
from llmkit.common.errors import InputError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_QUANTIZATION_KEYS = ("quantization_config", "compression_config")
# What describes quantized weights beside config.json.
GPTQ_FILE = "quantize_config.json"
MODELOPT_FILE = "hf_quant_config.json"
QUANTIZATION_FILES = (GPTQ_FILE, MODELOPT_FILE)
# The files beside the weights that an output copies from its source.
SIDE_FILE_PATTERNS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tekken.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "*.tiktoken",
    *QUANTIZATION_FILES,
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


@dataclass
class ModelFiles:
    """A model without its weights: its path, configs and tokenizer files."""

    reference: str  # as the user wrote it
    path: Path  # the directory, or the .gguf file
    file_format: Literal["safetensors", "gguf"]
    config: dict[str, Any]  # config.json; for GGUF it is made from the metadata
    generation_config: dict[str, Any]
    load_side_files: Callable[[], dict[str, bytes]] = field(repr=False)

    @property
    def text_config(self) -> dict[str, Any]:
        """The config of a multimodal model's text model; {} for other models."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else {}

    def side_files(self) -> dict[str, bytes]:
        """The files that an output copies: tokenizer, chat template, generation config, licence.

        config.json is not among them.
        """
        return self.load_side_files()


def quantization_entry(config: Mapping[str, Any]) -> Any:
    """What a config.json says about quantized weights; None: nothing.

    Some tools write it in the text model's config of a multimodal model. Old versions of
    compressed-tensors called it `compression_config`.
    """
    for part in (config, config.get("text_config")):
        for key in _QUANTIZATION_KEYS:
            if isinstance(part, Mapping) and part.get(key) is not None:
                return part[key]
    return None


def read_quantization_entry(path: Path, config: Mapping[str, Any]) -> Any:
    """What a model directory says about quantized weights; None: nothing.

    Old versions of AutoGPTQ and Model-Optimizer wrote only a file of their own.
    """
    entry = quantization_entry(config)
    for method, name in (("gptq", GPTQ_FILE), ("modelopt", MODELOPT_FILE)):
        if entry is None and (path / name).is_file():
            entry = {"quant_method": method, **load_json(path / name)}
    return entry


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without what `quantization_entry` finds: that of a dense checkpoint."""
    kept = {key: value for key, value in config.items() if key not in _QUANTIZATION_KEYS}
    if isinstance(kept.get("text_config"), dict):
        kept["text_config"] = without_quantization(kept["text_config"])
    return kept


def find_model(reference: str | Path) -> Path:
    """The directory with a config.json, or the .gguf file, of a path or a hub id.

    A hub id is downloaded. URLs are not accepted here (see `resolve_model`).
    Raises InputError when there is no such model.
    """
    text = str(reference)
    path = Path(text).expanduser()
    if not text:  # for example an unset shell variable
        raise InputError(
            "the model's name is empty", "A directory, a hub id or a .gguf file was expected"
        )
    if path.is_file():
        return _check_model_file(text, path)
    if not path.is_dir():
        if isinstance(reference, Path) or not is_hub_id(text):
            raise InputError(
                f"{text} does not exist", "A directory, a hub id or a .gguf file was expected"
            )
        path = download_from_hub(text)
    return require_config(path)


def require_config(path: Path) -> Path:
    """The directory `path` itself. Raises InputError when it has no config.json."""
    if not (path / CONFIG).is_file():
        ggufs = sorted(path.glob("*.gguf"))
        raise InputError(
            f"{path} has no {CONFIG}; it holds {list_names(path)}",
            "A Hugging Face model directory was expected",
            f"Give the file itself, {ggufs[0]}" if ggufs else "",
        )
    return path


def _check_model_file(reference: str, path: Path) -> Path:
    if path.suffix == ".gguf":
        return path
    if path.suffix in PICKLE_SUFFIXES:
        raise pickle_error(path)
    todo = f"Give its directory, {path.parent}" if path.suffix == ".safetensors" else ""
    raise InputError(
        f"{reference} is a file", "A directory, a hub id or a .gguf file was expected", todo
    )


def read_generation_config(path: Path) -> dict[str, Any]:
    """The generation_config.json of a directory; {} when there is none."""
    file = path / "generation_config.json"
    return load_json(file) if file.is_file() else {}


def read_side_files(path: Path) -> dict[str, bytes]:
    """The files of a directory that match SIDE_FILE_PATTERNS, by name."""
    return {
        file.name: file.read_bytes()
        for file in sorted(path.iterdir())
        if file.is_file() and any(fnmatch(file.name, pattern) for pattern in SIDE_FILE_PATTERNS)
    }


def load_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises InputError when it holds none."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    return parse_json(data, path)


def parse_json(data: bytes, where: object) -> dict[str, Any]:
    """The JSON object in `data`.

    `where` names its origin in the InputError raised for other data.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{where} holds a JSON {type(value).__name__}", "An object was expected")
    return value


def list_names(path: Path) -> str:
    """The first names in a directory, for an error message."""
    names = sorted(file.name for file in path.iterdir())
    if not names:
        return "nothing"
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def pickle_error(path: Path) -> InputError:
    """The error for pickled weights."""
    return InputError(
        f"{path} is a pickle file, which can run code when loaded, and is never loaded",
        "Weights in safetensors files were expected",
        "Convert them where you trust them: "
        "AutoModelForCausalLM.from_pretrained(MODEL).save_pretrained(DIRECTORY)",
    )
