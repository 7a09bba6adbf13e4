"""Pulls and pushes checkpoints, and compares them with their manifest at both ends.

A push uploads the manifest last, so that readers never take an incomplete checkpoint for a complete
one. Only the files that the manifest names, and the signature, are copied.
"""

from __future__ import annotations

import hashlib
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
    differences_error,
    find_differences,
    load_manifest,
    make_manifest,
    manifest_digest,
    manifest_mismatch,
    manifest_text,
)
from llmkit.checkpoint.model_files import CONFIG, find_model, parse_json, require_config
from llmkit.checkpoint.output_directory import (
    check_not_in_source,
    check_output,
    check_space,
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
from llmkit.common.errors import InputError, OutputError
from llmkit.common.progress import Progress

MAX_MANIFEST_BYTES = 256 * 2**20  # a manifest has about 250 bytes for each tensor
# The name of a checkpoint while a push puts another one in its place.
REPLACED_SUFFIX = ".replaced"
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
    already_there: bool = False  # nothing was sent: the target was complete


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
    """Copy a checkpoint to a URL or into a folder. `folder` is not changed.

    A checkpoint without a manifest gets one at the target. A checkpoint that is already there is
    compared, and not copied again.
    force: replace another checkpoint at the target.
    Raises as `pull` does, OutputError when the target holds something else, and InputError when
    `folder` differs from its manifest.
    """
    differences = find_differences(folder) if (folder / MANIFEST).exists() else []
    if differences:
        raise differences_error(folder, differences)
    if not is_url(target):
        return _push_to_folder(folder, Path(target).expanduser().resolve(), progress, force)
    local = read_remote_manifest(FolderStore(folder))
    files = dict(local.manifest["files"])
    if SIGNATURE in local.sizes:
        files[SIGNATURE] = {
            "bytes": local.sizes[SIGNATURE],
            "sha256": sha256_file(folder / SIGNATURE),
        }
    with open_writable_store(target) as store, store_errors(target):
        published = store.publish(folder, files, local.text, force, progress)
    return _result(str(folder), published.reference, local, published.already_there)


def _push_to_folder(folder: Path, out: Path, progress: Progress, force: bool) -> TransferResult:
    """See `push`."""
    source = FolderStore(folder)
    remote = read_remote_manifest(source)
    with output_lock(out):
        _finish_replacement(out)
        old_files = _checkpoint_files(out)
        is_same = old_files is not None and source.has_manifest_of(out)
        if is_same and _is_complete(folder, remote, out, progress):
            return _result(str(folder), str(out), remote, already_there=True)
        check_not_in_source(out, folder)
        is_taken = out.is_file() or (out.is_dir() and any(out.iterdir()))
        if not is_taken:
            receive(source, remote, out, progress)
        elif old_files is None:
            raise OutputError(
                f"The output {out} exists and is no checkpoint",
                "An absent or empty folder, or with --force a checkpoint, was expected",
                "Remove it or choose another output",
            )
        elif force or is_same:
            check_space(out, sum(remote.files.values()))
            _fetch(source, remote, out, progress)
            _replace(out)
        else:
            raise OutputError(
                f"{out} holds another checkpoint", todo="Choose another place or pass --force"
            )
    return _result(str(folder), str(out), remote)


def _replace(out: Path) -> None:
    """Put the complete partial folder in the place of the checkpoint `out`.

    After a kill in the middle, `_finish_replacement` puts things right.
    """
    old = sibling(out, REPLACED_SUFFIX)
    with write_errors(out):
        out.rename(old)
        partial_path(out).rename(out)
        sync_directory(out.parent)
        _remove_replaced(old, out)


def _finish_replacement(out: Path) -> None:
    """Restore or remove the checkpoint that an interrupted push was replacing."""
    old = sibling(out, REPLACED_SUFFIX)
    if not old.is_dir():
        return
    with write_errors(out):
        if out.exists():
            _remove_replaced(old, out)
        else:
            old.rename(out)


def _remove_replaced(old: Path, out: Path) -> None:
    """Remove the replaced checkpoint `old`; its folder's other files move to `out`."""
    names = _checkpoint_files(old) or set()
    for path in old.iterdir():
        if path.name not in names and not (out / path.name).exists():
            path.rename(out / path.name)
    # The files that tell what belongs to the checkpoint go last: this may be interrupted, too.
    for name in names - {MANIFEST, CONFIG}:
        (old / name).unlink(missing_ok=True)
    shutil.rmtree(old)


def _checkpoint_files(folder: Path) -> set[str] | None:
    """The names of the files of the checkpoint in a folder; None when it holds no checkpoint.

    Other files of the folder are not among them.
    """
    if (folder / MANIFEST).is_file():
        try:
            manifest = load_manifest(folder)
        except InputError:
            manifest = None
        if manifest is not None:
            return {*manifest["files"], MANIFEST, SIGNATURE}
    elif not (folder / CONFIG).is_file():
        return None
    return {path.name for path in folder.iterdir() if is_allowed_file(path.name)}


def _is_complete(folder: Path, remote: RemoteManifest, out: Path, progress: Progress) -> bool:
    """Whether `out`, which has the manifest of `folder`, has the same files, too."""
    if (out / SIGNATURE).is_file() != (SIGNATURE in remote.files):
        return False
    progress.start("compare", sum(remote.files.values()), "bytes")
    for name, size in remote.files.items():
        path = out / name
        if not path.is_file() or path.stat().st_size != size:
            return False
        # The manifest has no entry for the signature.
        entry = remote.manifest["files"].get(name)
        expected = sha256_file(folder / name) if entry is None else entry["sha256"]
        if sha256_file(path) != expected:
            return False
        progress.advance(size, name)
    progress.finish()
    return True


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
    _fetch(source, remote, out, progress, check)
    with write_errors(out):
        partial_path(out).rename(out)
        sync_directory(out.parent)


def _fetch(
    source: ReadableStore,
    remote: RemoteManifest,
    out: Path,
    progress: Progress,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Download a checkpoint into the partial folder of `out`, complete and synced to disk."""
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


class FolderStore:
    """A checkpoint in a local folder. A missing manifest is computed. See `ReadableStore`."""

    def __init__(self, folder: Path) -> None:
        self.reference = str(folder)
        self._folder = folder
        if (folder / MANIFEST).exists():
            self._manifest = (folder / MANIFEST).read_bytes()
        else:
            self._manifest = manifest_text(make_manifest(folder))

    def has_manifest_of(self, folder: Path) -> bool:
        """Whether another folder has the same manifest."""
        path = folder / MANIFEST
        return path.is_file() and path.read_bytes() == self._manifest

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


def _result(
    source: str, target: str, remote: RemoteManifest, already_there: bool = False
) -> TransferResult:
    files = {**remote.files, MANIFEST: len(remote.text)}
    return TransferResult(
        source=source,
        target=target,
        files=len(files),
        bytes=sum(files.values()),
        manifest_sha256=hashlib.sha256(remote.text).hexdigest(),
        signed=SIGNATURE in files,
        left_out=sorted(remote.sizes.keys() - files.keys()),
        already_there=already_there,
    )


def _check_size(where: str, size: int, max_size: int) -> None:
    if size > max_size:
        raise InputError(f"{where} has {size} bytes", f"At most {max_size} were expected")
