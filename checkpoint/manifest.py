"""llmkit.json: what wrote a checkpoint, from what, and the SHA-256 of every file and tensor in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llmkit.checkpoint.errors import InputError
from llmkit.checkpoint.files import listing, load_json
from llmkit.checkpoint.hub import SIGNATURE, is_wanted
from llmkit.checkpoint.reading import DIGEST_BYTES, FileDigest, read_into, sha256_file
from llmkit.checkpoint.safetensors_header import read_header
from llmkit.checkpoint.version import version

MANIFEST = "llmkit.json"
FORMAT_VERSION = 1
_FIELDS: dict[str, dict[str, type]] = {"files": {"bytes": int, "sha256": str}, "tensors": {"file": str, "sha256": str}}


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
    return check_manifest(load_json(path), path) if path.exists() else None


def check_manifest(manifest: dict[str, Any], path: object) -> dict[str, Any]:
    """The manifest that was read from `path`. Raises InputError when it is malformed."""
    if (found := manifest.get("format_version")) != FORMAT_VERSION:
        raise InputError(f"{path} has format_version {found}", f"This llmkit reads version {FORMAT_VERSION}")
    for key, fields in _FIELDS.items():
        entries = manifest.get(key)
        if not isinstance(entries, dict) or not all(_has(entry, fields) for entry in entries.values()):
            raise InputError(f"{path}: {key} is malformed", f"Entries with {' and '.join(fields)} were expected")
    for file in manifest["files"]:
        if not is_plain_name(file):
            raise InputError(f"{path} names the file {file!r}", "Files in the same folder were expected")
    return manifest


def describe(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint that came without one: what of it a store may hold, as it is now.

    Raises InputError when there are no weights or a header is bad.
    """
    files, tensors = dict[str, dict[str, Any]](), dict[str, dict[str, Any]]()
    for path in sorted(folder.iterdir()):
        if not path.is_file() or not is_wanted(path.name) or path.name == SIGNATURE:
            continue
        whole, digests = _digests(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": whole}
        for name, info in (read_header(path) if digests else {}).items():
            tensors[name] = {
                "file": path.name, "dtype": info.dtype, "shape": list(info.shape), "sha256": digests[name]
            }  # fmt: skip
    if not tensors:
        raise InputError(f"{folder} has no weights in safetensors files; it holds {listing(folder)}")
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
    """Compare what is cheap to compare: the sizes of weight files, the digests of all others.

    Raises InputError naming the file with both sizes or digests.
    """
    for file, entry in manifest["files"].items():
        path = folder / file
        digest = None if file.endswith(".safetensors") or not path.is_file() else sha256_file(path)
        if problem := _check_file(path, entry, digest):
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
    sharded = manifest.get("layout") is not None
    problems: list[str] = []
    wanted = dict(manifest["tensors"])
    for file, entry in manifest["files"].items():
        whole, tensors = None, dict[str, str]()
        try:
            if (path / file).is_file():
                whole, tensors = _digests(path / file)
        except InputError as error:
            problems.append(str(error))
        for name, found in tensors.items():
            told = wanted.pop(tensor_key(name, file, sharded), None)
            if told is None:
                problems.append(f"{file}: tensor {name} is not in {MANIFEST}")
            elif found != told["sha256"]:
                problems.append(f"{file}: tensor {name} has SHA-256 {found}, the manifest says {told['sha256']}")
        if problem := _check_file(path / file, entry, whole):
            problems.append(problem)
    return problems + [f"{key} is in {MANIFEST} but in no file" for key in wanted]


def _digests(path: Path) -> tuple[str, dict[str, str]]:
    """The SHA-256 of a file and, where it has some, of its tensors, in one pass.

    Raises InputError as `read_header` does.
    """
    if path.suffix != ".safetensors":
        return sha256_file(path), {}
    whole, tensors = FileDigest(path), {}
    with ThreadPoolExecutor(1) as pool:
        for info in read_header(path).values():
            digest = hashlib.sha256()
            for start in range(info.start, info.end, DIGEST_BYTES):
                data = memoryview(bytearray(min(DIGEST_BYTES, info.end - start)))
                read_into(path, start, data)
                whole.catch_up(start)  # the header
                hashed = pool.submit(whole.add, start, data)
                digest.update(data)
                hashed.result()
            tensors[info.name] = digest.hexdigest()
    return whole.hexdigest(path.stat().st_size), tensors


def _check_file(path: Path, entry: Mapping[str, Any], digest: str | None) -> str | None:
    """What differs from a file's entry; its contents are not looked at when `digest` is None."""
    if not path.is_file():
        return f"{path} is in {MANIFEST} but absent"
    if digest not in (None, entry["sha256"]):
        return f"{path} has SHA-256 {digest}, {MANIFEST} says {entry['sha256']}"
    if (size := path.stat().st_size) != entry["bytes"]:
        return f"{path} has {size} bytes, {MANIFEST} says {entry['bytes']}"
    return None


def _has(entry: Any, fields: Mapping[str, type]) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(name), kind) for name, kind in fields.items())
