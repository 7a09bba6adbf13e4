"""Uploads a checkpoint to the Hugging Face hub in one commit: every revision is complete."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.checkpoint.hub import HUB_SCHEME
from llmkit.checkpoint.manifest import MANIFEST
from llmkit.checkpoint.registry.store_interface import Published, damaged_upload
from llmkit.common.errors import OutputError
from llmkit.common.progress import Progress

if TYPE_CHECKING:
    from huggingface_hub import HfApi


class HubStore:
    """A model repository on the hub. A new one is made private. See `WritableStore`."""

    def __init__(self, repository: str) -> None:
        self._repository = repository
        self._reference = HUB_SCHEME + repository

    def publish(
        self,
        folder: Path,
        files: Mapping[str, Mapping[str, Any]],
        manifest: bytes,
        force: bool,
        progress: Progress,
    ) -> Published:
        """See `WritableStore.publish`.

        The upload is checked with the SHA-256 that the hub reports for large files, and with the
        git hash that it reports for small ones.
        """
        # Only needed for an upload, and slow to import.
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

        api = HfApi()
        api.create_repo(self._repository, private=True, exist_ok=True)
        expected = {
            **files,
            MANIFEST: {"sha256": hashlib.sha256(manifest).hexdigest(), "bytes": len(manifest)},
        }
        existing = set(api.list_repo_files(self._repository))
        stale: set[str] = set()
        if MANIFEST in existing:
            old_manifest = Path(api.hf_hub_download(self._repository, MANIFEST)).read_bytes()
            if old_manifest != manifest and not force:
                raise OutputError(
                    f"{self._reference} holds another checkpoint",
                    todo="Push elsewhere or pass --force",
                )
            stale = existing & (set(json.loads(old_manifest)["files"]) - files.keys())
            if old_manifest == manifest and not self._damaged(api, folder, manifest, expected):
                return Published(self._reference, already_there=True)
        operations: list[Any] = [CommitOperationAdd(name, str(folder / name)) for name in files]
        operations += [
            CommitOperationAdd(MANIFEST, manifest),
            *(CommitOperationDelete(name) for name in stale),
        ]
        # The hub's client shows its own progress bars for bytes.
        progress.start("send", len(files) + 1, "files")
        commit = api.create_commit(
            self._repository, operations, commit_message="Checkpoint from llmkit"
        )
        damaged = self._damaged(api, folder, manifest, expected, commit.oid)
        if damaged:
            raise damaged_upload(self._reference, damaged[0])
        progress.advance(len(expected))
        return Published(self._reference)

    def _damaged(
        self,
        api: HfApi,
        folder: Path,
        manifest: bytes,
        expected: Mapping[str, Mapping[str, Any]],
        revision: str | None = None,
    ) -> list[str]:
        """The files that the hub lacks or whose content differs from the local one."""
        from huggingface_hub.hf_api import RepoFile  # see `publish`

        uploaded = {
            entry.path: entry
            for entry in api.get_paths_info(self._repository, list(expected), revision=revision)
            if isinstance(entry, RepoFile)
        }
        damaged = []
        for name, entry in expected.items():
            info = uploaded.get(name)
            if info is None or info.size != entry["bytes"]:
                damaged.append(name)
                continue
            if info.lfs:
                is_equal = info.lfs.sha256 == entry["sha256"]
            else:
                data = manifest if name == MANIFEST else (folder / name).read_bytes()
                is_equal = info.blob_id == _git_hash(data)
            if not is_equal:
                damaged.append(name)
        return damaged


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
