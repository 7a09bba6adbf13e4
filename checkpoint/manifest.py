"""The manifest llmkit.json: tool, source, and the SHA-256 of every file and tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llmkit.checkpoint.hub import SIGNATURE, is_allowed_file
from llmkit.checkpoint.model_files import list_names, load_json
from llmkit.checkpoint.safetensors_header import read_header
from llmkit.checkpoint.tensor_reader import DIGEST_BYTES, FileDigest, read_into, sha256_file
from llmkit.common.errors import InputError
from llmkit.common.version import version

MANIFEST = "llmkit.json"
FORMAT_VERSION = 1
_REQUIRED_FIELDS: dict[str, dict[str, type]] = {
    "files": {"bytes": int, "sha256": str},
    "tensors": {"file": str, "sha256": str},
}


def tensor_key(name: str, file: str, sharded: bool) -> str:
    """A tensor's key in the manifest. In a sharded layout several files hold the same name."""
    return f"{file}::{name}" if sharded else name


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """The SHA-256 of a manifest's content, without its own field `sha256`."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest in `folder`; None when there is none. Raises InputError when it is malformed."""
    path = folder / MANIFEST
    return check_manifest(load_json(path), path) if path.exists() else None


def check_manifest(manifest: dict[str, Any], path: object) -> dict[str, Any]:
    """The manifest that was read from `path`. Raises InputError when it is malformed."""
    format_version = manifest.get("format_version")
    if format_version != FORMAT_VERSION:
        raise InputError(
            f"{path} has format_version {format_version}",
            f"This llmkit reads version {FORMAT_VERSION}",
        )
    for key, fields in _REQUIRED_FIELDS.items():
        entries = manifest.get(key)
        if not isinstance(entries, dict) or not all(
            _has_fields(entry, fields) for entry in entries.values()
        ):
            raise InputError(
                f"{path}: {key} is malformed", f"Entries with {' and '.join(fields)} were expected"
            )
    for file in manifest["files"]:
        if not is_plain_name(file):
            raise InputError(
                f"{path} names the file {file!r}", "Files in the same folder were expected"
            )
    return manifest


def make_manifest(folder: Path) -> dict[str, Any]:
    """A manifest for a checkpoint that has none, with the digests of its files as they are now.

    Files that a store may not hold are left out (see `is_allowed_file`).
    Raises InputError when there are no weights or a header is bad.
    """
    files: dict[str, dict[str, Any]] = {}
    tensors: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.iterdir()):
        if not path.is_file() or not is_allowed_file(path.name) or path.name == SIGNATURE:
            continue
        file_digest, tensor_digests = _compute_digests(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": file_digest}
        if not tensor_digests:
            continue
        for name, info in read_header(path).items():
            tensors[name] = {
                "file": path.name,
                "dtype": info.dtype,
                "shape": list(info.shape),
                "sha256": tensor_digests[name],
            }
    if not tensors:
        raise InputError(
            f"{folder} has no weights in safetensors files; it holds {list_names(folder)}"
        )
    return {
        "format_version": FORMAT_VERSION,
        "tool": {"name": "llmkit", "version": version()},
        "files": files,
        "tensors": tensors,
    }


def is_plain_name(name: object) -> bool:
    """Whether `name` is the name of a file in the same folder: no separators, no `..`."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set("/\\\0") & set(name)


def check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """A fast check when a model is opened: sizes of weight files, digests of all others.

    Raises InputError naming the file with both sizes or digests.
    """
    for file, entry in manifest["files"].items():
        path = folder / file
        digest = None if file.endswith(".safetensors") or not path.is_file() else sha256_file(path)
        problem = _compare_file(path, entry, digest)
        if problem:
            raise manifest_mismatch(problem)


def manifest_mismatch(problem: str) -> InputError:
    """The error for a file that differs from the manifest."""
    return InputError(
        problem, "The file changed after llmkit wrote it", "Write or copy the checkpoint again"
    )


def verify_manifest(path: Path) -> list[str]:
    """Compare every file and tensor in the folder `path` with its manifest. Returns all problems.

    Raises InputError when there is no manifest or it is malformed.
    """
    manifest = load_manifest(path)
    if manifest is None:
        raise InputError(f"{path} has no {MANIFEST}", "A checkpoint that llmkit wrote was expected")
    sharded = manifest.get("layout") is not None
    problems: list[str] = []
    missing = dict(manifest["tensors"])
    for file, entry in manifest["files"].items():
        file_digest = None
        tensor_digests: dict[str, str] = {}
        try:
            if (path / file).is_file():
                file_digest, tensor_digests = _compute_digests(path / file)
        except InputError as error:
            problems.append(str(error))
        for name, digest in tensor_digests.items():
            expected = missing.pop(tensor_key(name, file, sharded), None)
            if expected is None:
                problems.append(f"{file}: tensor {name} is not in {MANIFEST}")
            elif digest != expected["sha256"]:
                problems.append(
                    f"{file}: tensor {name} has SHA-256 {digest},"
                    f" the manifest says {expected['sha256']}"
                )
        problem = _compare_file(path / file, entry, file_digest)
        if problem:
            problems.append(problem)
    return problems + [f"{key} is in {MANIFEST} but in no file" for key in missing]


def _compute_digests(path: Path) -> tuple[str, dict[str, str]]:
    """The SHA-256 of a file and, for safetensors, of each of its tensors, in one pass.

    Raises InputError as `read_header` does.
    """
    if path.suffix != ".safetensors":
        return sha256_file(path), {}
    file_digest = FileDigest(path)
    tensor_digests = {}
    with ThreadPoolExecutor(1) as pool:
        for info in read_header(path).values():
            tensor_digest = hashlib.sha256()
            for start in range(info.start, info.end, DIGEST_BYTES):
                data = memoryview(bytearray(min(DIGEST_BYTES, info.end - start)))
                read_into(path, start, data)
                file_digest.catch_up(start)  # before the first tensor: the header
                file_hashed = pool.submit(file_digest.add, start, data)
                tensor_digest.update(data)
                file_hashed.result()
            tensor_digests[info.name] = tensor_digest.hexdigest()
    return file_digest.hexdigest(path.stat().st_size), tensor_digests


def _compare_file(path: Path, entry: Mapping[str, Any], digest: str | None) -> str | None:
    """How a file differs from its manifest entry; None when it does not.

    digest: the file's SHA-256; None: the content is not compared.
    """
    if not path.is_file():
        return f"{path} is in {MANIFEST} but absent"
    if digest not in (None, entry["sha256"]):
        return f"{path} has SHA-256 {digest}, {MANIFEST} says {entry['sha256']}"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"{path} has {size} bytes, {MANIFEST} says {entry['bytes']}"
    return None


def _has_fields(entry: Any, fields: Mapping[str, type]) -> bool:
    return isinstance(entry, dict) and all(
        isinstance(entry.get(name), type_) for name, type_ in fields.items()
    )
