"""Pulls and pushes checkpoints, and compares them with their manifest at both ends.

A push uploads the manifest last, so that readers never take an incomplete checkpoint for a complete
one. Only the files that the manifest names, and the signature, are copied.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmkit.checkpoint.hub import (
    HUB_SCHEME,
    SIGNATURE,
    download_from_hub,
    is_allowed_file,
    is_hub_url,
    is_url,
)
from llmkit.checkpoint.manifest import (
    MANIFEST,
    check_manifest,
    make_manifest,
    manifest_digest,
    manifest_mismatch,
    verify_manifest,
)
from llmkit.checkpoint.model_files import CONFIG, find_model, parse_json, require_config
from llmkit.checkpoint.output_directory import (
    check_output,
    output_lock,
    partial_path,
    sibling,
    sync_directory,
    write_errors,
    write_synced,
)
from llmkit.checkpoint.registry.open_store import open_store, open_writable_store
from llmkit.checkpoint.registry.store_interface import (
    AdvanceProgress,
    ReadableStore,
    hash_partial_file,
    store_errors,
)
from llmkit.checkpoint.tensor_reader import DIGEST_BYTES, sha256_file
from llmkit.common.errors import InputError
from llmkit.common.progress import Progress

MAX_MANIFEST_BYTES = 256 * 2**20  # a manifest has about 250 bytes for each tensor
MAX_SIGNATURE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class RemoteManifest:
    """The manifest of a checkpoint in a store, and the sizes of all files there."""

    text: bytes  # the manifest as it is stored
    manifest: dict[str, Any]  # the same, parsed
    sizes: Mapping[str, int]  # in bytes, of every file of the folder

    @property
    def files(self) -> dict[str, int]:
        """The size of each file to copy, without the manifest. The signature is copied, too."""
        files = {name: int(entry["bytes"]) for name, entry in self.manifest["files"].items()}
        return files | {name: size for name, size in self.sizes.items() if name == SIGNATURE}


@dataclass(frozen=True)
class TransferResult:
    """The result of a push or a pull."""

    source: str
    target: str
    files: int  # including the manifest
    bytes: int
    manifest_sha256: str
    signed: bool  # a signature is among the files
    left_out: list[str] = field(default_factory=list)  # files that the manifest does not name


def pull(
    reference: str, out: Path, progress: Progress, check: Callable[[Path], None] | None = None
) -> TransferResult:
    """Copy a checkpoint into the new folder `out`, all or nothing. An interrupted run is continued.

    check: called with the complete partial folder; when it raises, the folder is removed.
    Raises InputError when `reference` is no checkpoint, is incomplete or differs from its manifest,
    OutputError when `out` exists, ShortageError when a store cannot be reached or the disk is too
    small.
    """
    with _open_source(reference) as source:
        remote = read_remote_manifest(source)
        with output_lock(out):
            receive(source, remote, out, progress, check)
    return _result(reference, str(out), remote)


def push(folder: Path, target: str, progress: Progress, force: bool = False) -> TransferResult:
    """Copy a checkpoint to a URL or into a new folder. `folder` is not changed.

    A checkpoint without a manifest gets one at the target.
    force: replace another checkpoint at that URL.
    Raises as `pull` does, and InputError when `folder` differs from its manifest.
    """
    problems = verify_manifest(folder) if (folder / MANIFEST).exists() else []
    if problems:
        raise manifest_mismatch(problems[0])
    if not is_url(target):
        return pull(str(folder), Path(target).expanduser(), progress)
    local = read_remote_manifest(FolderStore(folder))
    files = dict(local.manifest["files"])
    if SIGNATURE in local.sizes:
        files[SIGNATURE] = {
            "bytes": local.sizes[SIGNATURE],
            "sha256": sha256_file(folder / SIGNATURE),
        }
    with open_writable_store(target) as store, store_errors(target):
        reference = store.publish(folder, files, local.text, force, progress)
    return _result(str(folder), reference, local)


def read_remote_manifest(source: ReadableStore) -> RemoteManifest:
    """The manifest of a checkpoint. Checks that every file it names exists and is allowed.

    Raises InputError, naming the file, when one is not.
    """
    with store_errors(source.reference):
        sizes = source.sizes()
        if MANIFEST not in sizes:
            names = ", ".join(sorted(sizes)[:5]) or "nothing"
            raise InputError(
                f"{source.reference} has no {MANIFEST}; it holds {names}",
                "A checkpoint that `llmkit push` has completed was expected",
            )
        where = f"{source.reference}/{MANIFEST}"
        _check_size(where, sizes[MANIFEST], MAX_MANIFEST_BYTES)
        text = source.read_small_file(MANIFEST, sizes[MANIFEST])
    manifest = check_manifest(parse_json(text, where), where)
    if "sha256" in manifest:
        digest = manifest_digest(manifest)
        if manifest["sha256"] != digest:
            raise manifest_mismatch(
                f"{where} says that its SHA-256 is {manifest['sha256']}, and it is {digest}"
            )
    if CONFIG not in manifest["files"]:
        raise InputError(
            f"{where} names no {CONFIG}", "The manifest of a whole checkpoint was expected"
        )
    for name, entry in manifest["files"].items():
        if not is_allowed_file(name) or name in (MANIFEST, SIGNATURE):
            raise InputError(
                f"{where} names the file {name}",
                "Safetensors, JSON and tokenizer files only, no code and no pickle",
            )
        size = sizes.get(name)
        if size != entry["bytes"]:
            problem = "is absent" if size is None else f"has {size} bytes"
            raise manifest_mismatch(
                f"{source.reference}/{name} {problem}, {MANIFEST} says {entry['bytes']} bytes"
            )
    if SIGNATURE in sizes:
        _check_size(f"{source.reference}/{SIGNATURE}", sizes[SIGNATURE], MAX_SIGNATURE_BYTES)
    return RemoteManifest(text, manifest, sizes)


def receive(
    source: ReadableStore,
    remote: RemoteManifest,
    out: Path,
    progress: Progress,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Download a checkpoint into `out`, whose lock the caller holds. See `pull`."""
    check_output(out, None, sum(remote.files.values()))
    partial = partial_path(out)
    with write_errors(partial):
        manifest_path = partial / MANIFEST
        if not manifest_path.is_file() or manifest_path.read_bytes() != remote.text:
            if partial.exists():  # left by the download of another checkpoint
                shutil.rmtree(partial)
            sibling(out, ".partial.journal").unlink(missing_ok=True)
            partial.mkdir(parents=True)
            write_synced(manifest_path, remote.text)
    progress.start("fetch", sum(remote.files.values()), "bytes")
    for name, size in remote.files.items():
        path = partial / name
        with store_errors(source.reference), write_errors(path):
            digest = source.download(name, size, path, progress.advance)
        # The manifest has no entry for the signature.
        expected = remote.manifest["files"].get(name, {"sha256": digest})["sha256"]
        if path.stat().st_size != size or digest != expected:
            path.unlink()
            raise manifest_mismatch(
                f"{source.reference}/{name} has SHA-256 {digest}, {MANIFEST} says {expected}"
            )
    progress.finish()
    if check is not None:
        try:
            check(partial)
        except InputError:
            shutil.rmtree(partial)
            raise
    with write_errors(partial):
        for path in partial.iterdir():
            if path.name not in {MANIFEST, *remote.files}:
                path.unlink()  # a signature that was removed at the source since an earlier attempt
                continue
            with path.open("rb") as file:
                os.fsync(file.fileno())
        sync_directory(partial)
        partial.rename(out)
        sync_directory(out.parent)


class FolderStore:
    """A checkpoint in a local folder. A missing manifest is computed. See `ReadableStore`."""

    def __init__(self, folder: Path) -> None:
        self.reference = str(folder)
        self._folder = folder
        if (folder / MANIFEST).exists():
            self._manifest = (folder / MANIFEST).read_bytes()
        else:
            self._manifest = _to_json(make_manifest(folder))

    def sizes(self) -> dict[str, int]:
        """See `ReadableStore.sizes`."""
        sizes = {
            path.name: path.stat().st_size for path in self._folder.iterdir() if path.is_file()
        }
        return sizes | {MANIFEST: len(self._manifest)}

    def read_small_file(self, name: str, size: int) -> bytes:
        """See `ReadableStore.read_small_file`."""
        return self._manifest if name == MANIFEST else (self._folder / name).read_bytes()

    def download(self, name: str, size: int, path: Path, advance: AdvanceProgress) -> str:
        """See `ReadableStore.download`."""
        digest, length = hash_partial_file(path, size)
        advance(length)
        with (self._folder / name).open("rb") as source, path.open("ab") as file:
            source.seek(length)
            while data := source.read(DIGEST_BYTES):
                digest.update(data)
                file.write(data)
                advance(len(data))
        return str(digest.hexdigest())


def _open_source(reference: str) -> AbstractContextManager[ReadableStore]:
    if is_hub_url(reference):
        folder = require_config(download_from_hub(reference.removeprefix(HUB_SCHEME)))
    elif is_url(reference):
        return open_store(reference)
    else:
        folder = find_model(reference)
    if folder.is_file():
        raise InputError(
            f"{reference} is a file",
            "A checkpoint's folder was expected",
            "llmkit quantize --method bf16 makes one",
        )
    return nullcontext(FolderStore(folder))


def _result(source: str, target: str, remote: RemoteManifest) -> TransferResult:
    files = {**remote.files, MANIFEST: len(remote.text)}
    return TransferResult(
        source=source,
        target=target,
        files=len(files),
        bytes=sum(files.values()),
        manifest_sha256=hashlib.sha256(remote.text).hexdigest(),
        signed=SIGNATURE in files,
        left_out=sorted(remote.sizes.keys() - files.keys()),
    )


def _to_json(manifest: dict[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode()


def _check_size(where: str, size: int, max_size: int) -> None:
    if size > max_size:
        raise InputError(f"{where} has {size} bytes", f"At most {max_size} were expected")
