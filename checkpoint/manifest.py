"""llmkit.json: what wrote a checkpoint, from what, and the SHA-256 of every file and tensor in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmkit.checkpoint.errors import InputError
from llmkit.checkpoint.files import load_json
from llmkit.checkpoint.reading import sha256_file, sha256_range
from llmkit.checkpoint.safetensors_header import read_header

MANIFEST = "llmkit.json"
FORMAT_VERSION = 1

# What an entry has. A rank's file is told by its header: its other bytes are tensors', which have their own digests.
_FORMS: dict[str, tuple[dict[str, type], ...]] = {
    "files": ({"bytes": int, "sha256": str}, {"bytes": int, "header_sha256": str}),
    "tensors": ({"file": str, "sha256": str},),
}


def tensor_key(name: str, file: str, sharded: bool) -> str:
    """A tensor's key in the manifest; in sharded layouts several files hold a tensor of the same name."""
    return f"{file}::{name}" if sharded else name


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of what a manifest says, its own `sha256` left out."""
    said = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def load_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest in `folder`, or None when there is none. Raises InputError when it is malformed."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    manifest = load_json(path)
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(f"{path} has format_version {version}", f"This llmkit reads version {FORMAT_VERSION}")
    for key, forms in _FORMS.items():
        entries = manifest.get(key)
        if not isinstance(entries, dict) or not all(
            any(_has(entry, fields) for fields in forms) for entry in entries.values()
        ):
            raise InputError(f"{path}: {key} is malformed", f"Entries with {' and '.join(forms[0])} were expected")
    for file in manifest["files"]:
        if not is_plain_name(file):
            raise InputError(f"{path} names the file {file!r}", "Files in the same folder were expected")
    return manifest


def is_plain_name(name: object) -> bool:
    """Whether `name` is the name of a file in the same folder: no separators, no `..`."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set("/\\\0") & set(name)


def check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Compare what is cheap to compare: the sizes of weight files, the digests of all others.

    Raises InputError naming the file with both sizes or digests.
    """
    for file, entry in manifest["files"].items():
        problem = _check_file(folder / file, entry, digest=not file.endswith(".safetensors"))
        if problem:
            raise mismatch(problem)


def mismatch(problem: str) -> InputError:
    """The error for something that differs from the manifest."""
    return InputError(problem, "The file changed after llmkit wrote it", "Write or copy the checkpoint again")


def verify_manifest(path: Path) -> list[str]:
    """Compare every file and every tensor in the folder `path` with its manifest; the problems found.

    Raises InputError when there is no manifest or it is malformed.
    """
    manifest = load_manifest(path)
    if manifest is None:
        raise InputError(f"{path} has no {MANIFEST}", "A checkpoint that llmkit wrote was expected")
    problems = [found for file, entry in manifest["files"].items() if (found := _check_file(path / file, entry))]
    sharded = manifest.get("layout") is not None
    seen: set[str] = set()
    for file in manifest["files"]:
        if not file.endswith(".safetensors") or not (path / file).is_file():
            continue
        try:
            infos = read_header(path / file)
        except InputError as error:
            problems.append(str(error))
            continue
        for info in infos.values():
            key = tensor_key(info.name, file, sharded)
            seen.add(key)
            entry = manifest["tensors"].get(key)
            if entry is None:
                problems.append(f"{file}: tensor {info.name} is not in {MANIFEST}")
                continue
            digest = sha256_range(path / file, info.start, info.end - info.start)
            if digest != entry["sha256"]:
                problems.append(f"{file}: tensor {info.name} has SHA-256 {digest}, the manifest says {entry['sha256']}")
    problems += [f"{key} is in {MANIFEST} but in no file" for key in manifest["tensors"] if key not in seen]
    return problems


def header_sha256(path: Path) -> str:
    """The SHA-256 of a safetensors file up to its first tensor. Raises InputError as `read_header` does."""
    first = min((info.start for info in read_header(path).values()), default=path.stat().st_size)
    return sha256_range(path, 0, first)


def check_header(path: Path, entry: Mapping[str, Any]) -> str | None:
    """What is wrong with the header of a rank's file, by its entry among the manifest's files."""
    try:
        found = header_sha256(path)
    except InputError as error:
        return str(error)
    if found != entry["header_sha256"]:
        return f"{path} has a header of SHA-256 {found}, {MANIFEST} says {entry['header_sha256']}"
    return None


def _check_file(path: Path, entry: Mapping[str, Any], digest: bool = True) -> str | None:
    if not path.is_file():
        return f"{path} is in {MANIFEST} but absent"
    if digest and "sha256" not in entry:
        if problem := check_header(path, entry):
            return problem
    elif digest and (found := sha256_file(path)) != entry["sha256"]:
        return f"{path} has SHA-256 {found}, {MANIFEST} says {entry['sha256']}"
    if (size := path.stat().st_size) != entry["bytes"]:
        return f"{path} has {size} bytes, {MANIFEST} says {entry['bytes']}"
    return None


def _has(entry: Any, fields: Mapping[str, type]) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(name), kind) for name, kind in fields.items())
