"""The manifest llmkit.json: tool, source, and the SHA-256 of every file and tensor."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

from llmkit.checkpoint.hub import SIGNATURE, is_allowed_file
from llmkit.checkpoint.model_files import list_names, load_json
from llmkit.checkpoint.output_directory import replace_file
from llmkit.checkpoint.safetensors_header import read_header
from llmkit.checkpoint.tensor_reader import DIGEST_BYTES, FileDigest, read_into, sha256_file
from llmkit.common.errors import InputError
from llmkit.common.formatting import count_text
from llmkit.common.version import version

MANIFEST = "llmkit.json"
FORMAT_VERSION = 1
# Files that shape prompts or hold defaults. Users edit them, also where the checkpoint had none.
_TEXT_FILES = ("chat_template.jinja", "chat_template.json", "generation_config.json")
# All files whose edits keep a checkpoint usable. Every other file is as it was written, or refused.
_EDITABLE_PATTERNS = (*_TEXT_FILES, "README*", "LICENSE*", "NOTICE*", "USE_POLICY*")
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


@dataclass(frozen=True)
class Difference:
    """One way in which a folder differs from its manifest."""

    file: str
    text: str  # a sentence with both sizes or digests

    @property
    def is_edit(self) -> bool:
        """Whether the checkpoint stays usable: `accept_edits` can take the file as it is."""
        return _is_editable(self.file)


def check_files(folder: Path, manifest: Mapping[str, Any], warn: bool = True) -> None:
    """A fast check when a model is opened: sizes of weight files, digests of all others.

    warn: log a warning about text files that were edited, once in a process.
    Raises InputError naming any other file with both sizes or digests.
    """
    for file, entry in manifest["files"].items():
        problem = None if _is_editable(file) else _quick_check(folder / file, entry)
        if problem:
            raise manifest_mismatch(problem)
    warning = edit_warning(folder, manifest) if warn else None
    if warning:
        _warn_once(warning)


def edit_warning(folder: Path, manifest: Mapping[str, Any]) -> str | None:
    """A line about text files that were edited since llmkit wrote the folder; None if none were."""
    edited = [
        file
        for file, entry in manifest["files"].items()
        if _is_editable(file) and _quick_check(folder / file, entry)
    ]
    edited += [difference.file for difference in _added_text_files(folder, manifest)]
    if not edited:
        return None
    return (
        f"{folder} was edited after llmkit wrote it ({', '.join(sorted(edited))}); it is used as"
        f" it is, and `llmkit verify {folder} --update` accepts the edit"
    )


@cache
def _warn_once(text: str) -> None:
    # Without a handler, Python writes warnings to stderr as they are.
    logging.getLogger("llmkit").warning("llmkit: warning: %s.", text)


def _is_editable(file: str) -> bool:
    return any(fnmatch(file, pattern) for pattern in _EDITABLE_PATTERNS)


def _quick_check(path: Path, entry: Mapping[str, Any]) -> str | None:
    """As `_compare_file`, with the size of a weight file only."""
    is_weights = path.name.endswith(".safetensors")
    digest = None if is_weights or not path.is_file() else sha256_file(path)
    return _compare_file(path, entry, digest)


def _added_text_files(folder: Path, manifest: Mapping[str, Any]) -> Iterator[Difference]:
    for file in _TEXT_FILES:
        if file not in manifest["files"] and (folder / file).is_file():
            yield Difference(file, f"{folder / file} is not in {MANIFEST}")


def manifest_mismatch(problem: str) -> InputError:
    """The error for a file that differs from the manifest."""
    return InputError(
        problem, "The file changed after llmkit wrote it", "Write or copy the checkpoint again"
    )


def differences_error(folder: Path, differences: Sequence[Difference]) -> InputError:
    """The error for a folder that does not verify. It names the worst difference."""
    binding = [difference for difference in differences if not difference.is_edit]
    first = (binding or list(differences))[0]
    return InputError(
        f"{folder} does not verify ({len(differences)} wrong, the first: {first.text})",
        f"Files as {MANIFEST} records them",
        "Write or copy the checkpoint again"
        if binding
        else f"`llmkit verify {folder} --update` accepts such edits",
    )


def accept_edits(folder: Path, differences: Sequence[Difference]) -> list[str]:
    """Record edited text files in the manifest as they are now, and return their names.

    differences: all of the folder, by `find_differences`.
    Raises InputError when another file differs, too; the manifest is then unchanged.
    """
    if any(not difference.is_edit for difference in differences):
        raise differences_error(folder, differences)
    manifest = load_manifest(folder)
    if manifest is None or not differences:
        return []
    edited = sorted({difference.file for difference in differences})
    files = dict(manifest["files"])
    for file in edited:
        path = folder / file
        if path.is_file():
            files[file] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        else:
            del files[file]
    manifest["files"] = files
    if "sha256" in manifest:
        manifest["sha256"] = manifest_digest(manifest)
    replace_file(folder / MANIFEST, manifest_text(manifest))
    return edited


def manifest_text(manifest: Mapping[str, Any]) -> bytes:
    """The content of llmkit.json."""
    return (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode()


def lines_by_file(differences: Sequence[Difference]) -> list[str]:
    """One line for each file: its first difference, and the number of its others."""
    texts: dict[str, list[str]] = {}
    for difference in differences:
        texts.setdefault(difference.file, []).append(difference.text)
    lines = []
    for file, (first, *others) in texts.items():
        more = f"; {count_text(len(others), 'more problems')} of {file}" if others else ""
        lines.append(first + more)
    return lines


def verify_manifest(path: Path) -> list[str]:
    """The differences between the folder `path` and its manifest, as `find_differences` does."""
    return [difference.text for difference in find_differences(path)]


def find_differences(path: Path) -> list[Difference]:
    """Compare every file and tensor in the folder `path` with its manifest.

    Raises InputError when there is no manifest or it is malformed.
    """
    manifest = load_manifest(path)
    if manifest is None:
        raise InputError(f"{path} has no {MANIFEST}", "A checkpoint that llmkit wrote was expected")
    sharded = manifest.get("layout") is not None
    differences: list[Difference] = []
    missing = dict(manifest["tensors"])
    for file, entry in manifest["files"].items():
        file_digest = None
        tensor_digests: dict[str, str] = {}
        texts: list[str] = []
        try:
            if (path / file).is_file():
                file_digest, tensor_digests = _compute_digests(path / file)
        except InputError as error:
            texts.append(str(error))
        for name, digest in tensor_digests.items():
            expected = missing.pop(tensor_key(name, file, sharded), None)
            if expected is None:
                texts.append(f"{file}: tensor {name} is not in {MANIFEST}")
            elif digest != expected["sha256"]:
                texts.append(
                    f"{file}: tensor {name} has SHA-256 {digest},"
                    f" the manifest says {expected['sha256']}"
                )
        problem = _compare_file(path / file, entry, file_digest)
        if problem:
            texts.append(problem)
        differences += [Difference(file, text) for text in texts]
    differences += _added_text_files(path, manifest)
    differences += [
        Difference(entry["file"], f"{key} is in {MANIFEST} but in no file")
        for key, entry in missing.items()
    ]
    return differences


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
