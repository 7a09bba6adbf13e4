"""Finds the checkpoints on this machine: in folders, in the hub's cache, among local copies.

It reads configs and headers only and needs no torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.checkpoint.model_files import (
    CONFIG,
    INDEX,
    PICKLE_SUFFIXES,
    load_json,
    read_quantization_entry,
)
from llmkit.checkpoint.safetensors_header import read_header
from llmkit.common.errors import InputError

SEARCH_DEPTH = 3  # folders below the one that is searched
GGUF_SUFFIX = ".gguf"
MANIFEST = "llmkit.json"
PARTIAL_SUFFIX = ".partial"  # of an output that is being written or was interrupted
_HUB_FOLDER_PREFIX = "models--"
_MAX_PROBLEM_FILES = 3


@dataclass(frozen=True)
class LocalCheckpoint:
    """A checkpoint on disk and what its small files say of it."""

    name: str  # as a command takes it: a path or a hub id
    path: Path
    architecture: str | None  # None: its config does not say, or it is a .gguf file
    quantization: str | None  # the method and bits, "gptq 4-bit"; None: none, or not known
    weight_bytes: int
    problem: str | None  # why it is not complete; None: it is

    def as_dict(self) -> dict[str, Any]:
        """The JSON document. The keys are an interface: programs read them."""
        return {
            "name": self.name,
            "path": str(self.path),
            "architecture": self.architecture,
            "quantization": self.quantization,
            "weight_bytes": self.weight_bytes,
            "complete": self.problem is None,
            "problem": self.problem,
        }


def find_checkpoints(folder: Path, depth: int = SEARCH_DEPTH) -> Iterator[Path]:
    """The checkpoints in a folder: directories with a config.json and .gguf files, sorted.

    The folder may be one itself. Hidden folders and those that cannot be read are left out, and so
    is what lies inside a checkpoint.
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    if any(entry.name == CONFIG for entry in entries) and _has_weights(entries):
        yield folder
        return
    for entry in entries:
        path = folder / entry.name
        if entry.name.endswith(GGUF_SUFFIX) and entry.is_file():
            yield path
        elif depth > 0 and not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False):
            yield from find_checkpoints(path, depth - 1)
        # A link may lead to a checkpoint, but the search does not follow it any further.
        elif depth > 0 and not entry.name.startswith(".") and entry.is_dir():
            yield from find_checkpoints(path, 0)


def hub_cache() -> Path:
    """The folder in which huggingface_hub keeps downloads."""
    # The same variables as in huggingface_hub, which is slow to import.
    explicit = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if explicit:
        return Path(explicit).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{cache}/huggingface"
    return Path(home).expanduser() / "hub"


def find_hub_checkpoints(cache: Path) -> Iterator[tuple[str, Path]]:
    """The hub ids in a cache of huggingface_hub, each with the folder of its snapshot.

    The snapshot is that of the branch `main`, else the last one that was downloaded.
    """
    for folder in sorted(cache.glob(f"{_HUB_FOLDER_PREFIX}*")):
        hub_id = folder.name.removeprefix(_HUB_FOLDER_PREFIX).replace("--", "/")
        try:
            snapshots = sorted(
                (folder / "snapshots").iterdir(), key=lambda path: path.stat().st_mtime
            )
            main = folder / "refs" / "main"
            current = main.read_text().strip() if main.is_file() else ""
        except OSError:
            continue
        snapshot = next((path for path in snapshots if path.name == current), None)
        if snapshot is None and snapshots:
            snapshot = snapshots[-1]
        if snapshot is not None and (snapshot / CONFIG).is_file():
            yield hub_id, snapshot


def describe_checkpoint(name: str, path: Path) -> LocalCheckpoint:
    """What the small files of a checkpoint say of it. A broken one is described, not raised."""
    if path.is_file():
        return _describe_gguf(name, path)
    try:
        config = load_json(path / CONFIG)
        problem = _problem(path)
    except InputError as error:
        return LocalCheckpoint(name, path, None, None, _weight_bytes(path), error.what)
    return LocalCheckpoint(
        name, path, _architecture(config), _quantization(path, config), _weight_bytes(path), problem
    )


def _describe_gguf(name: str, path: Path) -> LocalCheckpoint:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        return LocalCheckpoint(name, path, None, None, 0, f"it cannot be read ({error.strerror})")
    # Its header is not parsed: the parser needs numpy, and a vocabulary in it takes long.
    problem = None if magic == b"GGUF" else "it is not a GGUF file"
    return LocalCheckpoint(name, path, None, "gguf", size, problem)


def _has_weights(entries: list[os.DirEntry[str]]) -> bool:
    """Whether a folder with a config.json holds a model, and not for example an adapter's config.

    An index counts: its shards may not be downloaded yet.
    """
    suffixes = (".safetensors", *PICKLE_SUFFIXES)
    return any(entry.name.endswith(suffixes) or entry.name == INDEX for entry in entries)


def _architecture(config: dict[str, Any]) -> str | None:
    names = config.get("architectures")
    if isinstance(names, list) and names and isinstance(names[0], str):
        return names[0]
    model_type = config.get("model_type")
    return model_type if isinstance(model_type, str) else None


def _quantization(path: Path, config: dict[str, Any]) -> str | None:
    entry = read_quantization_entry(path, config)
    if not isinstance(entry, dict):
        return None
    method = str(entry.get("quant_method") or "unknown")
    bits = entry.get("bits") or entry.get("w_bit")
    groups = entry.get("config_groups")
    if bits is None and isinstance(groups, dict):
        weights = [group.get("weights") for group in groups.values() if isinstance(group, dict)]
        found = {w.get("num_bits") for w in weights if isinstance(w, dict) and w.get("num_bits")}
        bits = "/".join(str(number) for number in sorted(found, key=str)) or None
    return f"{method} {bits}-bit" if bits else method


def _weight_bytes(path: Path) -> int:
    total = 0
    for file in path.glob("*.safetensors"):
        try:
            total += file.stat().st_size
        except OSError:  # a link of the hub's cache to a file that is gone
            continue
    return total


def _problem(path: Path) -> str | None:
    """Why a directory is not a complete checkpoint."""
    if path.name.endswith(PARTIAL_SUFFIX):
        return "an interrupted output of llmkit"
    expected = _expected_files(path)
    if not expected:
        pickles = any(file.suffix in PICKLE_SUFFIXES for file in path.iterdir())
        return "its weights are pickle files, which are never loaded" if pickles else "no weights"
    missing = [name for name in expected if not (path / name).is_file()]
    if missing:
        shown = ", ".join(missing[:_MAX_PROBLEM_FILES])
        return f"{len(missing)} of {len(expected)} weight files are missing ({shown})"
    for name in expected:
        read_header(path / name)  # raises InputError for a file that is cut short
    return None


def _expected_files(path: Path) -> list[str]:
    """The weight files that the directory must have, by its manifest, its index or its content."""
    if (path / MANIFEST).is_file():
        files = load_json(path / MANIFEST).get("files")
        if isinstance(files, dict):
            return sorted(name for name in files if name.endswith(".safetensors"))
    if not (path / "model.safetensors").is_file() and (path / INDEX).is_file():
        weight_map = load_json(path / INDEX).get("weight_map")
        if isinstance(weight_map, dict):
            return sorted({str(name) for name in weight_map.values()})
    return sorted(file.name for file in path.glob("*.safetensors"))
